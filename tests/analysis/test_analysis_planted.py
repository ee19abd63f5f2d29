"""The science where the truth is known: a coarse robust and a faint non-robust feature."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from advfeat import analysis, study

EPS = 0.2


def network():
    return nn.Sequential(
        nn.BatchNorm1d(64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )  # fmt: skip


@pytest.mark.parametrize("name", ["robust", "nonrobust"])
def test_usefulness_is_the_closed_form(name):
    world = analysis.planted(20_000, seed=0)
    rho, gamma = world.usefulness(EPS)[name]
    blocks = torch.zeros(10, 64)
    blocks[:, :32] = world.patterns * (name == "robust")
    blocks[:, 32:] = world.patterns * (name == "nonrobust")
    found = analysis.linear_usefulness(blocks, world.data, eps=EPS, norm="l2", seed=0, resamples=20)
    assert float(found.rho.diagonal().mean()) == pytest.approx(rho, abs=0.01)
    assert float(found.gamma.diagonal().mean()) == pytest.approx(gamma, abs=0.03)
    assert (gamma > 0) == (name == "robust")
    features = getattr(world, name)(world.data.tensors[0])
    torch.testing.assert_close(features, (world.data.tensors[0] - 0.5) @ blocks.T)


def test_a_sample_depends_on_its_index_alone():
    few, many = analysis.planted(50, seed=3), analysis.planted(80, seed=3)
    for one, other in zip(few.data.tensors, many.data.tensors, strict=True):
        assert torch.equal(one, other[:50])
    assert not torch.equal(few.data.tensors[0], analysis.planted(50, seed=4).data.tensors[0])
    assert few.data.tensors[0].min() >= 0
    assert few.data.tensors[0].max() <= 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"classes": 1}, "classes=1"),
        ({"size": 5}, "size=5"),
        ({"agreement": (0.5, 1.5)}, "agreement"),
        ({"sizes": (-1.0, 0.1)}, "sizes"),
        ({"count": 3}, "count=3"),
    ],
)
def test_bad_arguments_are_refused(change, named):
    with pytest.raises(ValueError, match=named):
        analysis.planted(**change)


@pytest.fixture(scope="module")
def found():
    train, test = (
        analysis.planted(count, seed=seed).data for count, seed in ((1500, 0), (1000, 1))
    )
    targeted, inverted = {"steps": 15}, {"steps": 40, "step_size": 0.05, "momentum": 0.6}
    recipe = study.Recipe(
        standard={"epochs": 12, "lr": 0.05, "batch_size": 64, "schedule": "one_cycle"},
        robust={"eps": 0.3, "steps": 5},
        sets={
            "D_R": inverted, "D_R control": {}, "D_NR": inverted, "D_rand": targeted,
            "D_det": targeted, "D_det control": {}, "D_det noise control": {},
        },
        measured={"steps": 8},
    )  # fmt: skip
    stages = [f"measure {name}" for name in ("standard", "robust", *recipe.sets)]
    return study.run(
        network, train, test, eps=EPS, norm="l2", at=[0.02, EPS], recipe=recipe, seed=0,
        stages=stages,
    )  # fmt: skip


@pytest.mark.slow
def test_the_claims_that_are_true_here_are_confirmed(found):
    verdicts = {claim.text.split(":")[0]: claim.verdict for claim in found.claims}
    assert verdicts["adversarial training makes a model robust"] == "confirmed"
    assert verdicts["D_rand"] == "confirmed"
    assert verdicts["D_det"] == "confirmed"
    assert verdicts["a robust model has few non-robust features to construct with"] == "confirmed"
    measured = {name: each.standard for name, each in found.measured.items()}
    assert measured["D_rand"] > 0.85
    assert measured["D_det"] > 0.4
    assert measured["D_det control"] < 0.2
    assert found.measured["D_det control"].shifted > 0.6
    # Noise of the same size carries no target: labels alone teach y + 1.
    assert measured["D_det noise control"] < 0.15


@pytest.mark.slow
def test_perturbations_carry_the_faint_feature_and_leave_the_coarse_one(found):
    """Equations 8 and 9, to the sign: E[f y] on the datasets, for features that are known."""
    world = analysis.planted(1500, seed=0)

    def mean_correlation(name, data):
        inputs, labels = data
        features = getattr(world, name)(inputs)
        found = analysis.linear_usefulness(
            torch.eye(10), TensorDataset(features, labels), eps=0.0, norm="l2", seed=0, resamples=1
        )
        return float((found.rho * found.sign).diagonal().mean())

    def both(made):
        return [mean_correlation(n, (made.images, made.labels)) for n in ("robust", "nonrobust")]

    coarse, faint = both(found.dataset("D_det"))
    assert coarse < -0.05
    assert faint > 0.5
    coarse, faint = both(found.dataset("D_rand"))
    assert abs(coarse) < 0.15
    assert faint > 0.5
    of_d_nr = both(found.dataset("D_NR"))
    coarse, faint = both(found.dataset("D_R"))
    assert of_d_nr[1] > faint + 0.05  # D_NR holds more of the faint feature than D_R,
    assert of_d_nr[0] < coarse - 0.05  # and less of the coarse one
    assert coarse > 0.5  # and the faint one leaks: directions shrink, none vanishes
