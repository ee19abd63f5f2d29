"""Gradient alignment and layer robustness: linear models, whose gradients are known."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from advfeat import analysis

WIDE = (-100.0, 100.0)


def made(count=60, features=6, classes=3):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(count, features, generator=generator)
    return TensorDataset(x, torch.arange(count) % classes)


def curved(scale=1.0):
    torch.manual_seed(0)
    last = nn.Linear(16, 3)
    last.weight.data *= scale
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), last)


def test_cosines_of_a_linear_model_by_hand():
    data = made()
    x, y = data.tensors
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    found = analysis.alignment({"mine": model}, data, eps=0.1, seed=0)
    logits = model(x).detach()
    logits[torch.arange(60), y] = -torch.inf
    other = logits.argmax(1)
    gradient = model.weight[y] - model.weight[other]
    means = torch.stack([x[y == label].mean(0) for label in range(3)])
    cosine = torch.nn.functional.cosine_similarity
    expected = {
        "image": cosine(gradient, x - x.mean(0)),
        "class means": cosine(gradient, means[y] - means[other]),
        "local": torch.ones(60),
    }
    for name, values in expected.items():
        torch.testing.assert_close(found.cosines["mine"][name], values.detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.gradients["mine"], gradient.detach())


def test_theorem_3_is_seen_by_the_measurement():
    truth = analysis.Gaussian([1.0, 1.0, 1.0], [4.0, 1.0, 0.25])
    x, y = truth.sample(4000, seed=0).tensors
    models = {}
    for name, learner in (("standard", truth), ("robust", truth.robust(2.0))):
        models[name] = nn.Linear(3, 2, bias=False)
        models[name].weight.data = torch.stack([-learner.classifier, learner.classifier]).float()
    data = TensorDataset(x.float(), y)
    found = analysis.alignment(models, data, eps=0.1, bounds=WIDE, seed=0)
    for name, learner in (("standard", truth), ("robust", truth.robust(2.0))):
        exact = torch.cosine_similarity(learner.classifier, truth.mean, dim=0)
        assert found.mean(name, "class means") == pytest.approx(float(exact), abs=0.02)
        assert exact >= learner.worst_cosine
    assert found.mean("robust", "class means") > found.mean("standard", "class means") + 0.1


def test_sure_answers_have_gradients_too():
    found = analysis.alignment({"sure": curved(scale=1e6)}, made(), eps=0.01, seed=0)
    assert bool((found.gradients["sure"].flatten(1).norm(dim=1) > 0).all())
    assert found.mean("sure", "local") > 0.9


def test_local_similarity_falls_with_the_radius_and_not_with_the_batch():
    model, data = curved(), made()
    near, far, pieces = (
        analysis.alignment({"m": model}, data, eps=eps, batch_size=size, bounds=WIDE, seed=1)
        for eps, size in ((0.01, 60), (20.0, 60), (20.0, 7))
    )
    assert near.mean("m", "local") > 0.99
    assert far.mean("m", "local") < 0.9
    torch.testing.assert_close(
        far.cosines["m"]["local"], pieces.cosines["m"]["local"], atol=1e-5, rtol=0
    )
    other = analysis.alignment({"m": model}, data, eps=20.0, bounds=WIDE, seed=2)
    assert not torch.allclose(far.cosines["m"]["local"], other.cosines["m"]["local"], atol=1e-3)


def test_the_plot_shows_inputs_and_each_models_gradients():
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.rand(5, 1, 4, 4, generator=generator), torch.arange(5) % 2)
    models = {
        name: nn.Sequential(nn.Flatten(), nn.Linear(16, 2)) for name in ("standard", "robust")
    }
    figure = analysis.alignment(models, data, eps=0.1, seed=0).pictures(count=4)
    assert len(figure.axes) == 12
    assert [figure.axes[i].get_ylabel() for i in (0, 4, 8)] == ["input", "standard", "robust"]


@pytest.mark.parametrize(
    ("models", "error"),
    [(nn.Linear(6, 3), TypeError), ({}, TypeError), ({"mine": "model"}, TypeError)],
)
def test_models_come_by_name(models, error):
    with pytest.raises(error, match="model"):
        analysis.alignment(models, made(), eps=0.1)


# --- Layer robustness ---


def test_the_ratio_of_a_linear_layer_is_its_spectral_norm():
    data, eps = made(), 0.3
    x, _ = data.tensors
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    found = analysis.layer_robustness(
        model, data, layers=["0", None, "1"], eps=eps, norm="l2", bounds=WIDE, seed=0, steps=60
    )
    first = model[0].weight.detach()
    for name, matrix in (
        ("0", first), ("penultimate", first), ("1", model[1].weight.detach() @ first)
    ):  # fmt: skip
        farthest = eps * float(torch.linalg.matrix_norm(matrix, 2))
        spread = float(torch.pdist(x @ matrix.T).mean())
        assert found.ratios[name] == pytest.approx(farthest / spread, rel=0.01)
        assert found.ratios[name] <= farthest / spread * (1 + 1e-4)


def test_layer_robustness_does_not_depend_on_the_batch():
    whole, pieces = (
        analysis.layer_robustness(
            curved(), made(), layers=["1"], eps=0.1, norm="linf", batch_size=size, seed=0, steps=5
        ).ratios["1"]
        for size in (60, 7)
    )
    assert whole == pytest.approx(pieces, rel=1e-4)


def test_unknown_layers_are_refused():
    with pytest.raises(ValueError, match="layer"):
        analysis.layer_robustness(curved(), made(), layers=["9"], eps=0.1, norm="l2")
    with pytest.raises(ValueError, match="layers"):
        analysis.layer_robustness(curved(), made(), layers=[], eps=0.1, norm="l2")


def test_one_sample_prints_without_a_standard_error():
    data = TensorDataset(torch.rand(1, 6), torch.zeros(1, dtype=torch.int64))
    found = analysis.alignment({"mine": nn.Linear(6, 3)}, data, eps=0.1, seed=0)
    assert "nan" not in str(found)
