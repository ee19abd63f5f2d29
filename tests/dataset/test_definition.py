"""Equations 5, 8 and 9 on datasets whose features are known."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import advfeat as af
from advfeat import analysis
from advfeat.datasets import inspect

WORLD = analysis.planted(800, classes=4, size=8, seed=0)


def made(method, coarse, faint, inputs=None, **fields):
    """A dataset of the world's samples whose blocks are those of other classes."""
    x, y = WORLD.data.tensors
    block = WORLD.patterns.shape[1]
    labels = fields.pop("labels", y)
    generator = torch.Generator().manual_seed(1)
    parts = []
    for kind, (size, noise) in zip((coarse, faint), ((1.0, 0.1), (0.1, 0.02)), strict=True):
        shown = 0.0 if kind is None else size * WORLD.patterns[kind]
        parts.append(0.5 + shown + noise * torch.randn(len(x), block, generator=generator))
    stored = {
        "images": torch.cat(parts, 1).float().numpy(),
        "labels": labels.numpy(),
        "index": torch.arange(len(x)).numpy(),
        **{name: torch.as_tensor(value).numpy() for name, value in fields.items()},
    }
    return af.ConstructedDataset(stored, {"method": method})


FEATURES = {"robust": WORLD.robust, "nonrobust": WORLD.nonrobust}


def test_d_det_reverses_robust_features_and_keeps_the_others():
    y = WORLD.data.tensors[1]
    target = (y + 1) % 4
    found = inspect(made("D_det", y, target, labels=target), WORLD.data, features=FEATURES, seed=0)
    robust, faint = found.features["robust"], found.features["nonrobust"]
    assert robust.constructed_interval[1] < 0  # eq. 9
    assert faint.constructed_interval[0] > 0.9 * faint.original
    assert faint.original_interval[0] > 0.5
    assert found.notes == ()
    assert "usefulness of robust features" in str(found)
    # Where the perturbation moves the robust features too, a note says so.
    whole = inspect(made("D_det", target, target, labels=target), WORLD.data, features=FEATURES,
                    seed=0)  # fmt: skip
    assert any("eq. 9" in text and "lower eps" in text for text in whole.notes)


def test_d_rand_leaves_robust_features_without_use():
    y = WORLD.data.tensors[1]
    target = torch.randint(4, y.shape, generator=torch.Generator().manual_seed(2))
    found = inspect(made("D_rand", y, target, labels=target), WORLD.data, features=FEATURES, seed=0)
    low, high = found.features["robust"].constructed_interval
    assert low < 0.06
    assert high > -0.06  # eq. 8
    assert found.features["nonrobust"].kept > 0.9
    assert found.notes == ()
    nothing = inspect(made("D_rand", y, y, labels=target), WORLD.data, features=FEATURES, seed=0)
    assert any("raise eps or steps" in text for text in nothing.notes)


@pytest.mark.slow
def test_d_r_keeps_robust_features_and_no_others():
    y = WORLD.data.tensors[1]
    found = inspect(made("D_R", y, None), WORLD.data, features=FEATURES, seed=0)
    assert found.features["robust"].kept > 0.9
    assert abs(found.features["nonrobust"].kept) < 0.1
    assert found.notes == ()
    leaks = inspect(made("D_R", y, y), WORLD.data, features=FEATURES, seed=0)
    assert any("leaks" in text for text in leaks.notes)
    lost = inspect(made("D_R", None, None), WORLD.data, features=FEATURES, seed=0)
    assert any("check layer=" in text for text in lost.notes)


def test_how_much_of_the_original_came_back():
    x = torch.rand(6, 4)
    start = torch.tensor([1, 2, 3, 4, 5, 0])
    left = torch.tensor([0.0, 0.5, 1.0, 0.25, 0.0, 0.25])[:, None]
    fields = {
        "images": (x + left * (x[start] - x)).numpy(),
        "labels": (torch.arange(6) % 2).numpy(),
        "index": torch.arange(6).numpy(),
        "start_index": start.numpy(),
        "distance_before": torch.full((6,), 2.0).numpy(),
        "distance": torch.full((6,), 0.8).numpy(),
    }
    data = TensorDataset(x, torch.arange(6) % 2)
    found = inspect(af.ConstructedDataset(fields, {"method": "D_R"}), data)
    assert found.distance_left == pytest.approx(float(left.mean()), abs=1e-5)
    assert "40%" in found.notes[0]
    assert "fraction of the way" in str(found)


def test_a_start_that_equals_the_original_is_not_counted():
    """Duplicates, or one sample of its kind: there is no distance to divide by."""
    x = torch.tensor([[0.2], [0.2], [0.8]])
    fields = {
        "images": np.array([[0.3], [0.2], [0.5]], dtype=np.float32),
        "labels": np.array([0, 0, 1]),
        "index": np.array([0, 1, 2]),
        "start_index": np.array([1, 0, 0]),
    }
    data = TensorDataset(x, torch.tensor([0, 0, 1]))
    found = inspect(af.ConstructedDataset(fields, {"method": "D_R"}), data)
    assert found.distance_left == pytest.approx(0.5, abs=1e-6)
    same = {**fields, "start_index": fields["index"]}
    nothing = inspect(af.ConstructedDataset(same, {"method": "D_R"}), data)
    assert nothing.distance_left is None


def test_features_that_are_no_numbers_raise_an_error():
    y = WORLD.data.tensors[1]
    with pytest.raises(ValueError, match="NaN or infinite"):
        inspect(made("D_R", y, None), WORLD.data, features={"f": lambda x: x / 0}, seed=0)


def test_models_and_layers_give_features():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))
    data = af.construct_det_dataset(model, WORLD.data, eps=0.2, steps=3, progress=False)
    by_hand = {"standard": lambda x: model[1](model[0](x)), "first": model[0]}
    given = {"standard": model, "first": (model, "0")}
    found, expected = (
        inspect(data, WORLD.data, features=f, samples=400, seed=3).features
        for f in (given, {**by_hand, "first": lambda x: model[0](x)})
    )
    for name in given:
        assert found[name].original == pytest.approx(expected[name].original, abs=1e-5)
        assert found[name].constructed == pytest.approx(expected[name].constructed, abs=1e-5)


@pytest.mark.slow
def test_features_of_noise_are_not_useful():
    """Signs and values are from different samples: random features have no use."""
    generator = torch.Generator().manual_seed(0)
    y = WORLD.data.tensors[1]
    wrong = 0
    for seed in range(12):
        noise = TensorDataset(torch.rand(len(y), 16, generator=generator), y)
        made_of_it = made("D_R", None, None)
        found = inspect(
            made_of_it, noise, features={"f": lambda x: x}, samples=300, seed=seed
        ).features["f"]
        wrong += found.original_interval[0] > 0
    assert wrong <= 2


def test_bad_arguments_are_refused():
    dataset = made("D_R", None, None)
    with pytest.raises(ValueError, match="data="):
        inspect(dataset, features=FEATURES)
    with pytest.raises(TypeError, match="features"):
        inspect(dataset, WORLD.data, features=[WORLD.robust])
    with pytest.raises(TypeError, match="features"):
        inspect(dataset, WORLD.data, features={"f": 3})
    with pytest.raises(ValueError, match="samples=1"):
        inspect(dataset, WORLD.data, samples=1)
