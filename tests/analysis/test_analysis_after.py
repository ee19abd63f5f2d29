"""What came after the paper: closed forms and published directions."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import advfeat as af
from advfeat import analysis

WIDE = (-100.0, 100.0)


def linear(weight, bias=None):
    """A model of given weights."""
    model = nn.Linear(weight.shape[1], len(weight))
    with torch.no_grad():
        model.weight.copy_(weight)
        model.bias.copy_(torch.zeros(len(weight)) if bias is None else bias)
    return model


def least_squares(data):
    """A linear classifier, trained in closed form."""
    found = analysis.linear_probe(nn.Identity(), data, data, layer=lambda x: x)
    return linear(found.weight.float(), found.bias.float())


def halves(count=90, seed=0):
    """Either half of the inputs tells the class by itself."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    shown = nn.functional.one_hot(labels, 3).float()
    return TensorDataset(
        torch.cat([shown, shown], 1) + 0.1 * torch.randn(count, 6, generator=generator), labels
    )


FIRST, SECOND = torch.eye(6)[:3], torch.eye(6)[3:]


# --- linear_probe ---


def test_a_probe_is_the_least_squares_solution():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 4, generator=generator), torch.arange(50) % 3
    found = analysis.linear_probe(
        nn.Identity(), TensorDataset(x, y), TensorDataset(x, y), layer=lambda x: x, ridge=0.0
    )
    ones = torch.cat([x, torch.ones(50, 1)], 1).double()
    exact = torch.linalg.lstsq(ones, nn.functional.one_hot(y, 3).double()).solution.T
    torch.testing.assert_close(found.weight, exact[:, :4], atol=1e-8, rtol=0)
    torch.testing.assert_close(found.bias, exact[:, 4], atol=1e-8, rtol=0)
    assert found.accuracy.count == int(((ones @ exact.T).argmax(1) == y).sum())


def test_a_probe_of_noise_is_not_above_chance():
    generator = torch.Generator().manual_seed(0)
    wrong = 0
    for _ in range(200):
        train, test = (
            TensorDataset(torch.randn(n, 5, generator=generator), torch.arange(n) % 2)
            for n in (40, 100)
        )
        found = analysis.linear_probe(nn.Identity(), train, test, layer=lambda x: x)
        wrong += found.above_chance
    assert wrong <= 16


def test_a_probe_takes_the_layer_and_leaves_the_encoder_alone():
    data = halves()
    encoder = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    found = analysis.linear_probe(encoder, data, data, batch_size=7)
    assert found.weight.shape == (3, 5)
    assert encoder.training
    assert all(torch.equal(v, before[n]) for n, v in encoder.state_dict().items())
    whole = analysis.linear_probe(encoder, data, data, layer="2")
    torch.testing.assert_close(found.weight, whole.weight, atol=1e-5, rtol=1e-4)
    assert "chance 33.3%" in str(found)


# --- robustified test data, targeted transfer ---


def test_robustified_data_hold_what_the_source_reads_and_no_more():
    data = halves()
    source = nn.Sequential(linear(FIRST), nn.Identity(), nn.Linear(3, 3))
    given = {"layer": "0", "steps": 60, "step_size": 0.1, "momentum": 0.6, "bounds": WIDE}
    found = analysis.robustified_accuracy(
        {"first half": source, "all": nn.Sequential(nn.Identity(), nn.Linear(6, 3))},
        {"reads the first": linear(FIRST), "reads the second": linear(SECOND)},
        data, seed=0, progress=False, **given,
    )  # fmt: skip
    clean = found.values["original"]
    assert float(clean["reads the first"]) == float(clean["reads the second"]) == 1.0
    # Everything comes back from an invertible layer; of a layer of one half, that half.
    assert all(float(each) == 1.0 for each in found.values["all"].values())
    half = found.values["first half"]
    assert float(half["reads the first"]) == 1.0
    assert half["reads the second"].interval[0] < 1 / 3  # another image's, at chance
    assert "first half" in str(found)
    assert len(found.plot().patches) >= 6


def test_targets_are_reached_by_models_that_read_what_the_source_does():
    found = analysis.targeted_transfer(
        {"first": linear(FIRST)},
        {"alike": linear(2 * FIRST), "other": linear(SECOND)},
        halves(), eps=3.0, norm="l2", steps=10, bounds=WIDE, seed=0, progress=False,
    )  # fmt: skip
    assert float(found.values["first"]["alike"]) == 1.0
    assert float(found.values["first"]["other"]) == 0.0
    assert found.values["first"]["alike"].total == 90


# --- D_R under strong attack, purified ---


def test_of_a_linear_model_the_strong_attack_leaves_what_the_margin_says():
    """And PGD more: of three classes the cross-entropy pulls between the other two."""
    data = halves()
    x, y = data.tensors
    model = linear(FIRST)
    logits = model(x).detach()
    rest = logits.scatter(1, y[:, None], -torch.inf).amax(1)
    margin = (logits.gather(1, y[:, None]).squeeze(1) - rest) / math.sqrt(2)
    exact = float((margin > 0.7).float().mean())
    found = analysis.attack_gap({"mine": model}, data, eps=0.7, norm="l2", bounds=WIDE, seed=0)
    assert float(found.strong["mine"]) == pytest.approx(exact, abs=0.02)
    assert found.gap("mine").sign == 1


class Saturated(nn.Module):
    """A linear model whose logits are so large that the cross-entropy has no gradient."""

    def forward(self, x):
        return 1e4 * (x @ FIRST.T)


@pytest.mark.filterwarnings("ignore")
def test_masked_gradients_are_a_gap():
    data = halves(60)
    found = analysis.attack_gap(
        {"masked": Saturated()}, data, eps=1.5, norm="l2", steps=5, bounds=WIDE, seed=0
    )
    assert float(found.strong["masked"]) < 0.1
    assert float(found.strong["masked"]) <= float(found.weak["masked"])
    assert "AutoAttack" in str(found)


def test_purified_images_keep_what_is_read_and_average_the_rest():
    data = halves(30)
    source = nn.Sequential(linear(FIRST), nn.Linear(3, 3))
    d_r = af.construct_robust_dataset(
        source, data, layer="0", starts=4, steps=60, step_size=0.1, momentum=0.6, bounds=WIDE,
        seed=0, progress=False,
    )  # fmt: skip
    pure = analysis.purify(d_r)
    assert len(pure) == 30
    for row in (0, 17):
        own = d_r.images[d_r.field("index") == row]
        torch.testing.assert_close(pure.images[row], own.mean(0))
    assert torch.equal(pure.labels, data.tensors[1])
    goal = data.tensors[0][:, :3]
    assert float((pure.images[:, :3] - goal).norm(dim=1).max()) < 0.1
    spread = [part.images[:, 3:].var(0).mean() for part in (d_r, pure)]
    assert float(spread[1]) < 0.5 * float(spread[0])
    single = af.construct_robust_dataset(
        source, data, layer="0", steps=1, bounds=WIDE, seed=0, progress=False
    )
    with pytest.raises(ValueError, match="one start"):
        analysis.purify(single)


# --- perturbations on noise, poison ---


def test_perturbations_on_noise_carry_the_direction_of_a_linear_source():
    """Of two classes the perturbation is eps (w_1 - w_0) / ||w_1 - w_0||, whatever the image."""
    weight = torch.tensor([[1.0, 2.0, 0.0, -1.0], [0.0, -1.0, 1.0, 0.5]])
    made = analysis.noise_perturbations(
        linear(weight), 400, (4,), classes=2, eps=0.5, norm="l2", steps=5, bounds=(-3.0, 3.0),
        seed=0, progress=False,
    )  # fmt: skip
    again = analysis.noise_perturbations(
        linear(weight), 401, (4,), classes=2, eps=1e-6, norm="l2", steps=1, bounds=(-3.0, 3.0),
        seed=0, progress=False,
    )  # fmt: skip
    direction = (weight[1] - weight[0]) / (weight[1] - weight[0]).norm()
    inside = made.images.abs().amax(1) < 2.4  # away from the bounds, which would clip
    delta = (made.images - again.images[:400])[inside]
    sign = (2.0 * made.labels - 1)[inside, None]
    torch.testing.assert_close(delta, 0.5 * sign * direction, atol=1e-3, rtol=0)
    assert made.labels.bincount().tolist() == [200, 200]


def test_a_poison_makes_models_predict_the_class_before():
    world = analysis.planted(600, seed=0)
    train, test = world.data, analysis.planted(400, seed=1).data
    d_det = af.construct_det_dataset(
        least_squares(train), train, eps=0.3, norm="l2", steps=10, progress=False
    )
    found = analysis.poisoning(d_det, train, test, learn=least_squares)
    assert found.damage.sign == 1
    assert found.before.interval[0] > found.chance
    assert "damage" in str(found)
    assert len(found.plot().patches) >= 3
    made = analysis.poison(d_det)
    assert torch.equal(made.images, d_det.images)
    assert torch.equal(made.labels, train.tensors[1])
    assert torch.equal(made.field("targets"), d_det.labels)


# --- gradients, superposition ---


def test_etmanns_alignment_of_a_linear_score_is_the_distance_to_its_boundary():
    weight = torch.tensor([[3.0, -4.0], [-3.0, 4.0]])
    x = torch.tensor([[1.0, 0.2], [0.1, 2.0], [0.4, 0.3]])
    data = TensorDataset(x, torch.tensor([0, 1, 0]))
    found = analysis.gradient_measures({"mine": linear(weight)}, data, eps=0.1, bounds=WIDE, seed=0)
    torch.testing.assert_close(found.alignment["mine"], (x @ weight[0]).abs() / 5)
    torch.testing.assert_close(found.similarity["mine"], torch.ones(3))


def test_similarity_falls_where_the_gradient_turns():
    class Wave(nn.Module):
        def forward(self, x):
            score = torch.sin(20 * x).sum(1)
            return torch.stack([score, -score], 1)

    data = TensorDataset(torch.rand(30, 3), torch.arange(30) % 2)
    models = {"wave": Wave(), "linear": nn.Linear(3, 2)}
    near, far = (
        analysis.gradient_measures(models, data, eps=eps, bounds=WIDE, seed=0).similarity
        for eps in (1e-4, 1.0)
    )
    assert float(near["wave"].mean()) > 0.95
    assert float(far["wave"].mean()) < 0.5
    assert float(far["linear"].min()) > 0.999


def test_gradient_measures_pass_on_what_goes_with_the_samples():
    class Masked(nn.Module):
        def forward(self, x, mask=None):
            score = (x if mask is None else x * mask).sum(1)
            return torch.stack([score, -score], 1)

    x, mask = torch.rand(4, 3), torch.tensor([[1.0, 0.0, 0.0]]).expand(4, 3)
    data = [{"inputs": x, "labels": torch.zeros(4, dtype=torch.int64), "mask": mask}]
    found = analysis.gradient_measures({"a": Masked()}, data, eps=0.1, bounds=WIDE, seed=0)
    torch.testing.assert_close(found.alignment["a"], x[:, 0])


def test_superposition_of_known_arrangements():
    angles = 2 * math.pi * torch.arange(5) / 5
    pentagon = torch.stack([angles.cos(), angles.sin()], 1)
    found = analysis.superposition(pentagon)
    assert found.features_per_dimension == pytest.approx(2.5)
    torch.testing.assert_close(found.dimensionality, torch.full((5,), 0.4).double())
    two = torch.block_diag(torch.tensor([[1.0], [-1.0]]), torch.eye(2), torch.zeros(1, 1))
    found = analysis.superposition(7 * two)
    assert found.dimensionality.tolist() == pytest.approx([0.5, 0.5, 1, 1, 0])
    assert found.features_per_dimension == pytest.approx(4 / 3)
    assert "4 features in 3.0 of 4 dimensions" in str(found)
    layer = nn.Conv2d(3, 8, 3)
    flat = analysis.superposition(layer.weight.flatten(1))
    assert analysis.superposition(layer).features_per_dimension == flat.features_per_dimension


# --- bad input ---

MODEL, DATA = nn.Linear(6, 3), halves(6)


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: analysis.superposition(nn.ReLU()), TypeError, "no weight"),
        (lambda: analysis.superposition(torch.ones(3)), ValueError, "a direction for each"),
        (lambda: analysis.linear_probe(MODEL, DATA, DATA, ridge=-1.0), ValueError, "ridge"),
        (lambda: analysis.robustified_accuracy({}, {"a": MODEL}, DATA), TypeError, "models"),
        (
            lambda: analysis.noise_perturbations(
                MODEL, 0, (6,), classes=3, eps=0.1, norm="l2"
            ),
            ValueError,
            "count=0",
        ),
        (
            lambda: analysis.noise_perturbations(
                MODEL, 4, (6,), classes=1, eps=0.1, norm="l2"
            ),
            ValueError,
            "classes=1",
        ),
        (lambda: analysis.gradient_measures({"a": MODEL}, DATA, eps=-1), ValueError, "eps"),
        (
            lambda: analysis.attack_gap({"a": MODEL}, DATA, eps=0.1, norm="l7"),
            ValueError,
            "norm",
        ),
        (
            lambda: analysis.targeted_transfer({"a": MODEL}, {"a": 3}, DATA, eps=0.1, norm="l2"),
            TypeError,
            "model",
        ),
        (
            lambda: analysis.poisoning(
                af.construct_det_dataset(MODEL, DATA, eps=0.1, bounds=WIDE, steps=1), DATA, DATA,
                learn=3,
            ),
            TypeError,
            "learn",
        ),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call, error, named):
    with pytest.raises(error, match=named):
        call()
