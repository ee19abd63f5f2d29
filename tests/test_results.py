"""Every result: a short repr, HTML, JSON and back, and plots that return axes."""

import importlib
import json
import math
import pkgutil

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import advfeat as af
from advfeat import analysis, metrics, results, statistics
from advfeat.attacks import PGD
from advfeat.datasets import inspect as inspect_dataset
from advfeat.results import Result, from_plain, to_plain
from advfeat.training import History

MODEL = nn.Linear(6, 3)
with torch.random.fork_rng():
    torch.manual_seed(0)
    MODEL.reset_parameters()
    INPUTS = torch.rand(12, 6)
DATA = TensorDataset(INPUTS, MODEL(INPUTS).argmax(1))
IMAGES = TensorDataset(torch.rand(8, 1, 8, 8), torch.arange(8) % 3)
BALL = {"eps": 0.05, "norm": "linf"}


def image_model():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


def accuracy(count=3):
    return metrics.Accuracy.of(torch.arange(4) < count)


def some_results():
    """One of every kind, quickly made."""
    robust = af.robust_accuracy(MODEL, DATA, **BALL, seed=0)
    yield robust
    yield accuracy()
    yield metrics.robustness_curve(MODEL, DATA, norm="l2")
    yield metrics.corruption_accuracy(MODEL, DATA, severities=[1, 5])
    yield metrics.certified_accuracy(MODEL, DATA, sigma=0.05, n=50)
    models = {"a": MODEL, "b": MODEL}
    yield metrics.transfer_matrix(models, models, DATA, PGD(**BALL))
    finding = metrics.Diagnosis.__annotations__ and metrics._diagnose.Finding
    one = finding("zero_gradients", 0.5, 0.01, "what", "do this")
    yield one
    certified = (torch.tensor([0, -1]), torch.tensor([0.5, 0.0]), torch.tensor([True, False]))
    yield metrics.CertifiedAccuracy(*certified, torch.arange(2), 0.25, 100, 1000, 0.001)
    yield metrics.Diagnosis({"zero_gradients": one})
    yield History([{"epoch": 1, "loss": 0.5, "accuracy": 0.25, "lr": 1e-5}], 1)
    det = af.construct_det_dataset(MODEL, DATA, eps=0.1, steps=2)
    yield inspect_dataset(det)
    usefulness = analysis.linear_usefulness(
        MODEL.weight, TensorDataset(INPUTS, torch.arange(12) % 3), **BALL
    )
    yield usefulness
    yield analysis.Leakage(accuracy(), accuracy(4), 1 / 3, 2, usefulness)
    yield analysis.spectrum({"m": image_model()}, IMAGES, eps=0.3, norm="l2")
    yield analysis.filtered_accuracy({"m": image_model()}, IMAGES, cutoffs=[0.2, 0.4])
    yield analysis.fourier_sensitivity(image_model(), IMAGES, size=1.0, seed=0)
    yield analysis.Mislabelled(accuracy(), accuracy(4), det, 1 / 3)
    yield analysis.Tradeoff((0.0, 0.5), (robust, robust), (1.0, 2.0))
    seconds = {"standard": 1.0, "adversarial": 2.0, "from_robust_dataset": 1.0, "construction": 3.0}
    yield analysis.RobustDatasetCost(robust, robust, robust, seconds)
    yield analysis.alignment({"m": MODEL}, DATA, eps=0.1, seed=0)
    yield analysis.LayerRobustness({"first": 0.5, "second": math.inf}, 0.5, "l2")
    point = analysis._transfer.TransferPoint("net", *[accuracy()] * 5)
    yield point
    yield analysis.Transfer((point, point))
    truth = analysis.Gaussian([1.0, 0.5], [[4.0, 1.0], [1.0, 2.0]])
    yield truth
    yield analysis.gaussian([1.0, 0.5], [[4.0, 1.0], [1.0, 2.0]])
    yield analysis.planted(20, classes=3, seed=0)
    yield analysis.AccuracyMatrix({"a": {"b": accuracy()}}, "accuracy on test data")
    yield analysis.AttackGap({"a": accuracy(4)}, {"a": accuracy()})
    yield analysis.Poisoning(accuracy(), accuracy(4), accuracy(1), 1 / 3)
    yield analysis.linear_probe(nn.Identity(), DATA, DATA, layer=lambda x: x)
    yield analysis.gradient_measures({"m": MODEL}, DATA, eps=0.1, seed=0)
    yield analysis.superposition(MODEL)
    yield statistics.paired_difference(torch.ones(9).bool(), torch.arange(9) < 4)


# In the order of `some_results`.
NAMES = [
    "RobustAccuracy",
    "Accuracy",
    "RobustnessCurve",
    "CorruptionAccuracy",
    "CertifiedAccuracy",
    "TransferMatrix",
    "Finding",
    "CertifiedAccuracy",
    "Diagnosis",
    "History",
    "Inspection",
    "Usefulness",
    "Leakage",
    "Spectrum",
    "FilteredAccuracy",
    "FourierSensitivity",
    "Mislabelled",
    "Tradeoff",
    "RobustDatasetCost",
    "Alignment",
    "LayerRobustness",
    "TransferPoint",
    "Transfer",
    "Gaussian",
    "GaussianStudy",
    "Planted",
    "AccuracyMatrix",
    "AttackGap",
    "Poisoning",
    "LinearProbe",
    "GradientMeasures",
    "Superposition",
    "Estimate",
]


@pytest.fixture(scope="module")
def made():
    found = list(some_results())
    assert [type(each).__name__ for each in found] == NAMES
    return found


@pytest.fixture(params=range(len(NAMES)), ids=NAMES)
def found(made, request):
    return made[request.param]


def all_kinds(kind=Result):
    for sub in kind.__subclasses__():
        if sub.__module__.startswith("advfeat"):
            yield sub
            yield from all_kinds(sub)


def test_no_kind_is_left_out():
    for module in pkgutil.walk_packages(af.__path__, "advfeat."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    elsewhere = {
        "Calibration", "Claim", "Comparison", "Evidence", "FeatureUsefulness", "Study", "Report",
        "ReportFields",
        "ClassAccuracy",
        "Example",
        "Verdict",
    }  # fmt: skip
    assert {kind.__name__ for kind in all_kinds()} - elsewhere == set(NAMES)


def test_repr_is_one_short_line(found):
    text = repr(found)
    assert "\n" not in text
    assert len(text) < 160
    assert "tensor(" not in text


def test_text_and_html(found):
    page = found._repr_html_()
    assert page.count("<table>") == page.count("</table>")
    for tag in ("<script", "<img", "http"):
        assert tag not in page
    assert str(found)


def test_json_there_and_back(found):
    plain = found.to_dict()
    text = json.dumps(plain, allow_nan=False)
    again = type(found).from_dict(json.loads(text))
    assert again.to_dict() == plain
    assert repr(again) == repr(found) or type(found) in (analysis.Planted,)
    if type(found) is not analysis.Mislabelled and type(found) is not analysis.Planted:
        assert str(again) == str(found)


@pytest.mark.slow
def test_plots_return_axes_and_take_them(found):
    if not hasattr(found, "plot"):
        pytest.skip("no plot")
    figure = pytest.importorskip("matplotlib.figure").Figure()
    first = found.plot()
    if isinstance(first, tuple):
        axes = tuple(figure.subplots(1, len(first), squeeze=False)[0])
        assert found.plot(ax=axes) == axes
    else:
        axes = figure.add_subplot()
        assert found.plot(ax=axes) is axes
    assert len(figure.axes) >= 1
    with pytest.raises(ValueError, match=r"^ax="):
        found.plot(ax="no axes")


def test_broken_counts_add_up(made):
    robust = made[0]
    counts = robust.broken_counts
    assert sum(counts.values()) == robust.total
    assert counts["still robust"] == robust.count
    wrong = robust.standard.total - robust.standard.count
    assert counts["wrong without an attack"] == wrong


@pytest.mark.parametrize(
    "value",
    [
        math.inf, -math.inf, 0.5, None, True, 3, "inf", (1, ("a", None)), {"a": {"b": (1,)}},
        {1: "one", 0.5: "half"}, {"type": "x"}, {"tensor": 1}, {"float": "inf"}, PGD(**BALL),
    ],
)  # fmt: skip
def test_plain_values_come_back(value):
    assert from_plain(json.loads(json.dumps(to_plain(value), allow_nan=False))) == value


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([1.0, math.inf, -math.inf]), torch.zeros(0, 3), torch.tensor(2),
        torch.tensor([True, False]), torch.arange(6).view(2, 3), torch.rand(2, dtype=torch.float64),
        torch.rand(3, 2),
    ],
)  # fmt: skip
def test_tensors_come_back_to_the_bit(tensor):
    again = from_plain(json.loads(json.dumps(to_plain(tensor), allow_nan=False)))
    assert again.dtype == tensor.dtype
    assert torch.equal(again, tensor)


def test_nan_comes_back():
    again = from_plain(json.loads(json.dumps(to_plain({"a": math.nan}), allow_nan=False)))
    assert math.isnan(again["a"])


def test_values_of_another_kind_raise_an_error():
    with pytest.raises(ValueError, match=r"RobustnessCurve.*'Accuracy'"):
        metrics.RobustnessCurve.from_dict(accuracy().to_dict())
    with pytest.raises(ValueError, match="'Unknown' is unknown"):
        results.from_plain({"type": "Unknown"})
