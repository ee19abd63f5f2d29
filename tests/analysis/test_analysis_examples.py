"""Every question has an example of at most ten lines; the doctests of the package run it."""

import doctest
import inspect

import pytest

from advfeat import analysis, plots
from advfeat.results import Result

FUNCTIONS = [getattr(analysis, name) for name in analysis.__all__ if name.islower()]
PICTURES = [plots.bars, plots.curves, plots.differences, plots.robustness_curves, plots.samples]


@pytest.mark.parametrize("function", FUNCTIONS + PICTURES, ids=lambda f: f.__name__)
def test_an_example_of_at_most_ten_lines(function):
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(function))
    lines = sum(example.source.count("\n") for example in examples)
    assert 1 < lines <= 10


def test_the_names_are_these():
    results = {name for name in analysis.__all__ if not name.islower()}
    assert {function.__name__ for function in FUNCTIONS} == {
        "attack_gap", "gradient_measures", "linear_probe", "noise_perturbations", "poison",
        "poisoning", "purify", "robustified_accuracy", "superposition", "targeted_transfer",
        "alignment", "filtered_accuracy", "fit_gaussian", "fourier_sensitivity", "gaussian",
        "just_bugs", "layer_robustness", "leakage", "linear_usefulness", "mislabelled", "mistakes",
        "planted",
        "robust_dataset_cost", "spectrum", "tradeoff", "transfer", "usefulness",
    }  # fmt: skip
    for name in results:
        assert issubclass(getattr(analysis, name), Result), name
    for name in results - {"Gaussian", "LinearProbe", "Superposition"}:  # nothing to draw
        assert callable(getattr(analysis, name).plot), name
