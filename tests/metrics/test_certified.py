"""Randomized smoothing: radii in closed form, soundness against attacks, settings."""

import math
from statistics import NormalDist

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import advfeat as af
from advfeat.checks import ResultWarning
from advfeat.metrics import _certified, certified_accuracy, robustness_curve
from advfeat.metrics._certified import lower_bound

SIGMA = 0.5


def half_plane():
    """A linear model of two classes, inputs, and their signed l2 distances to the boundary."""
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    inputs = torch.rand(6, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0], [0.5, 1.0]]))
        model.bias.copy_(torch.tensor([0.3, 0.0]))
    normal = model.weight[0] - model.weight[1]
    with torch.no_grad():
        distance = (inputs @ normal + 0.3) / normal.norm()
    return model, inputs, distance


def test_radii_of_a_linear_model_are_the_distances_to_its_boundary():
    model, inputs, distance = half_plane()
    labels = (distance < 0).long()
    found = certified_accuracy(
        model, (inputs, labels), sigma=SIGMA, n=1_000_000, batch_size=100_000, seed=1
    )
    assert torch.equal(found.prediction, labels)
    # The smoothed classifier is the linear one, and its exact radius the distance (Cohen et al.).
    far = distance.abs() > 0.3
    assert int(far.sum()) >= 4
    ratio = found.radius / distance.abs()
    assert bool((ratio < 1).all())
    assert bool((ratio[far] > 0.99).all())


@pytest.mark.parametrize(("count", "total"), [(1, 3), (50, 100), (100, 100), (980, 1000)])
@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_the_bound_is_the_probability_at_which_so_many_votes_are_as_rare_as_alpha(
    count, total, alpha
):
    p = lower_bound(count, total, alpha)
    tail = sum(math.comb(total, k) * p**k * (1 - p) ** (total - k) for k in range(count, total + 1))
    assert tail == pytest.approx(alpha, rel=1e-6)
    assert lower_bound(0, total, alpha) == 0.0


def test_the_largest_radius_is_that_of_votes_that_all_agree():
    model = nn.Sequential(nn.Linear(3, 2), nn.Flatten())
    nn.init.zeros_(model[0].weight)
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([1.0, 0.0]))
    found = certified_accuracy(model, (torch.rand(2, 3), torch.tensor([0, 1])), sigma=2.0, n=500)
    largest = 2.0 * NormalDist().inv_cdf(0.001 ** (1 / 500))
    assert found.radius.tolist() == pytest.approx([largest] * 2, rel=1e-6)
    assert found.correct.tolist() == [True, False]
    assert found.distance.tolist() == pytest.approx([largest, 0.0])


@pytest.mark.slow
def test_confidence_is_kept():
    """At most alpha of the samples are certified beyond their true radius."""
    model, inputs, distance = half_plane()
    p = 0.6
    at = inputs[:1] + (SIGMA * NormalDist().inv_cdf(p) - distance[0]) * _unit(model)
    count = 400
    found = certified_accuracy(
        model,
        (at.expand(count, 2).contiguous(), torch.zeros(count, dtype=torch.int64)),
        sigma=SIGMA, n0=50, n=200, alpha=0.1, batch_size=250, seed=0,
    )  # fmt: skip
    radius = SIGMA * NormalDist().inv_cdf(p)
    # Votes are whole numbers, so the error is below alpha; three deviations of the count are 18.
    too_far = int((found.radius > radius).sum())
    assert 0 < too_far <= 0.1 * count + 18


def _unit(model):
    normal = (model.weight[0] - model.weight[1]).detach()
    return normal / normal.norm()


def test_a_sample_that_no_class_wins_is_abstained_and_counts_as_wrong():
    model, inputs, distance = half_plane()
    at = inputs - distance[:, None] * _unit(model)  # on the boundary
    with pytest.warns(ResultWarning, match="no class"):
        found = certified_accuracy(
            model, (at, torch.zeros(6, dtype=torch.int64)), sigma=SIGMA, n=400
        )
    assert found.abstained >= 5
    gone = found.prediction == -1
    assert int(gone.sum()) == found.abstained
    assert not bool(found.correct[gone].any())
    assert not bool(found.radius[gone].any())


def test_no_copy_that_chose_the_class_is_counted_for_it(monkeypatch):
    drawn, count = [], _certified._Votes._count

    def counted(self, net, batch, place, first, number):
        drawn.extend(range(first, first + number))
        return count(self, net, batch, place, first, number)

    monkeypatch.setattr(_certified._Votes, "_count", counted)
    model, inputs, distance = half_plane()
    settings = {"sigma": SIGMA, "alpha": 0.6}
    certified_accuracy(model, (inputs[:1], (distance < 0).long()[:1]), n0=3, n=4, **settings)
    assert drawn == list(range(7))
    certified_accuracy(model, (inputs[:1], (distance < 0).long()[:1]), n0=1, n=1, **settings)


def test_noise_goes_by_the_sample_not_by_the_batch():
    model, inputs, distance = half_plane()
    labels = (distance < 0).long()
    data = TensorDataset(inputs, labels)
    settings = {"sigma": SIGMA, "n": 300}
    whole = certified_accuracy(model, data, **settings)
    small = certified_accuracy(model, data, batch_size=7, **settings)
    loader = DataLoader(data, batch_size=4, shuffle=True)
    shuffled = certified_accuracy(model, loader, **settings)
    order = shuffled.index.argsort()
    assert torch.equal(whole.radius, small.radius)
    assert torch.equal(whole.radius, shuffled.radius[order])
    other = certified_accuracy(model, data, seed=5, **settings)
    assert not torch.equal(whole.radius, other.radius)
    before = torch.get_rng_state()
    certified_accuracy(model, data, **settings)
    assert torch.equal(torch.get_rng_state(), before)


def test_nan_among_the_logits_is_no_vote():
    class Sometimes(nn.Module):
        def forward(self, x):
            return torch.where(x[:, :1] > 0.5, torch.nan, torch.tensor([[1.0, 0.0]]))

    found = certified_accuracy(
        Sometimes(), (torch.full((1, 2), 0.0), torch.zeros(1, dtype=torch.int64)), sigma=0.5, n=4000
    )
    exact = 0.5 * NormalDist().inv_cdf(NormalDist(0, 0.5).cdf(0.5))
    assert 0.9 * exact < float(found.radius) < exact


def test_arguments_that_go_with_the_samples():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.plane = half_plane()[0]

        def forward(self, x, gate=None):
            return self.plane(x) * gate[:, None]

    model, inputs, distance = half_plane()
    labels, gate = (distance < 0).long(), torch.tensor([1.0, -1.0] * 3)
    data = [{"x": inputs, "labels": labels, "gate": gate}]
    found = certified_accuracy(Gated(), data, sigma=SIGMA, n=300)
    plain = certified_accuracy(model, (inputs, labels), sigma=SIGMA, n=300)
    assert torch.equal(found.radius, plain.radius)
    assert torch.equal(found.correct, plain.correct & (gate > 0))


def test_accuracy_over_the_radius():
    model, inputs, _ = half_plane()
    labels = torch.zeros(6, dtype=torch.int64)
    found = certified_accuracy(model, (inputs, labels), sigma=SIGMA, n=300)
    radii, values = found.curve()
    assert radii[0] == 0
    for radius, value in zip(radii.tolist(), values.tolist(), strict=True):
        assert float(found.at(radius)) == pytest.approx(value)
    assert float(found.at(0.0)) == float(found.correct.double().mean())
    assert float(found.at(100.0)) == 0.0
    assert found.table([0.1])[0]["certified_accuracy"] == float(found.at(0.1))
    assert len(repr(found)) < 200
    again = type(found).from_dict(found.to_dict())
    assert torch.equal(again.radius, found.radius)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sigma": 0.0}, "sigma"),
        ({"sigma": -1.0}, "sigma"),
        ({"n0": 0}, "n0"),
        ({"n": 9}, "fewer than 10"),
        ({"alpha": 1.5}, "alpha"),
        ({"alpha": 0.0}, "alpha"),
    ],
)
def test_bad_settings_are_named(wrong, message):
    model, inputs, _ = half_plane()
    with pytest.raises(ValueError, match=message):
        certified_accuracy(
            model, (inputs, torch.zeros(6, dtype=torch.int64)), **({"sigma": 0.5} | wrong)
        )


# --- Never above what attacks leave of the smoothed classifier ---


class Smoothed(nn.Module):
    """Mean probabilities of a model under noise that is always the same, with a gradient."""

    def __init__(self, model, shape, copies=64):
        super().__init__()
        self.model = model
        noise = torch.randn(copies, *shape, generator=torch.Generator().manual_seed(3))
        self.register_buffer("noise", SIGMA * noise)

    def forward(self, x):
        noisy = (x[:, None] + self.noise).flatten(0, 1)
        probabilities = F.softmax(self.model(noisy), 1).unflatten(0, (len(x), -1))
        return probabilities.mean(1).clamp_min(1e-9).log()


def votes(model, inputs, copies=8000):
    generator = torch.Generator().manual_seed(9)
    counted = []
    with torch.no_grad():
        for x in inputs:
            noise = torch.randn(copies, *x.shape, generator=generator)
            counted.append(torch.bincount(model(x + SIGMA * noise).argmax(1), minlength=3))
    return torch.stack(counted)


def perceptron(activation):
    return nn.Sequential(nn.Linear(8, 24), activation, nn.Linear(24, 3))


MODELS = {
    "linear": lambda: nn.Linear(8, 3),
    "relu": lambda: perceptron(nn.ReLU()),
    "tanh": lambda: perceptron(nn.Tanh()),
    "batchnorm": lambda: nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Linear(16, 3)
    ),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)
    ),
}


@pytest.mark.parametrize(
    "name", [n if n == "relu" else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]
)
def test_certified_accuracy_is_never_above_accuracy_under_attack(name):
    torch.manual_seed(0)
    centres = torch.tensor([[1.0] * 4 + [0.0] * 4, [0.0] * 4 + [1.0] * 4, [0.5] * 8])
    labels = torch.arange(240) % 3
    inputs = centres[labels] + 0.2 * torch.randn(240, 8)
    model = MODELS[name]().train()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs + SIGMA * torch.randn_like(inputs)), labels).backward()
        optimizer.step()
    model.eval()
    few, own = inputs[:15], labels[:15]
    found = certified_accuracy(model, (few, own), sigma=SIGMA, n=10_000, batch_size=5000)
    assert float(found.at(0.0)) > 0.6
    checked = 0
    for radius in (0.2, 0.5, 0.8):
        adversarial = af.pgd(
            Smoothed(model, (8,)), few, own, eps=radius, norm="l2", steps=20,
            bounds=(-9.0, 9.0),
        )  # fmt: skip
        counted = votes(model, adversarial)
        right = counted.gather(1, own[:, None])[:, 0]
        others = counted.scatter(1, own[:, None], 0).amax(1)
        # Clearly wrong: by five deviations of the votes.
        wrong = others - right > 5 * (others + right).sqrt()
        certified = found.distance > radius
        checked += int(wrong.sum())
        assert not bool((wrong & certified).any())
        assert float(found.at(radius)) <= float((~wrong).double().mean())
    assert checked  # attacks find something beyond the certificates


@pytest.mark.slow
def test_it_is_drawn_beside_the_curve_of_attacks():
    pytest.importorskip("matplotlib")
    model, inputs, distance = half_plane()
    labels = (distance < 0).long()
    found = certified_accuracy(model, (inputs, labels), sigma=SIGMA, n=300)
    curve = robustness_curve(model, (inputs, labels), norm="l2", bounds=(-4.0, 4.0))
    axes = found.plot(empirical=curve)
    assert axes.get_legend_handles_labels()[1] == ["certified", "under attack"]
    # The smoothed classifier is the model itself here: no certificate beyond the attack.
    assert bool((found.distance <= curve.distance + 1e-4).all())
