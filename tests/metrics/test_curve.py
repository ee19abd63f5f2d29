"""The curve of robust accuracy against eps from one minimum-norm run."""

import functools
import math

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from advfeat import threat
from advfeat.attacks import FAB, FMN, MinimumPGD, SmoothedPGD
from advfeat.attacks.base import prepare_batch
from advfeat.attacks.misleading import SquareBeyondGradients
from advfeat.metrics import RobustnessCurve, _curve, robust_accuracy, robustness_curve
from advfeat.model import attackable

DUAL = {"l1": math.inf, "l2": 2, "linf": 1}
WIDE = (-50.0, 50.0)


def line(count=30, classes=2):
    torch.manual_seed(0)
    model = nn.Linear(5, classes).double()
    x = torch.rand(count, 5, dtype=torch.float64)
    return model, TensorDataset(x, torch.randint(classes, (count,)))


@pytest.mark.parametrize("norm", DUAL)
@pytest.mark.parametrize("attack", [FMN, FAB, MinimumPGD])
def test_distances_of_a_linear_model_are_the_closed_form(norm, attack):
    model, rows = line()
    x, y = rows.tensors
    with torch.no_grad():
        logits = model(x)
        margin = (logits.gather(1, y[:, None]) - logits.gather(1, 1 - y[:, None])).squeeze(1)
        steepness = (model.weight[0] - model.weight[1]).norm(DUAL[norm])
    expected = (margin / steepness).clamp_min(0.0).float()
    options = {"norm": norm, "bounds": WIDE}
    curve = robustness_curve(model, rows, norm=norm, attack=attack(**options))
    right = margin > 0
    assert torch.equal(curve.distance == 0, ~right)
    torch.testing.assert_close(curve.distance[right], expected[right], rtol=0.01, atol=1e-5)
    assert 0 < right.sum() < len(x)


@pytest.fixture(scope="module")
def samples(digits):
    return TensorDataset(*(tensor[:60] for tensor in digits[1].tensors))


@pytest.fixture(scope="module")
def curves(robust, samples):
    """The default curve of the robust model, by norm."""
    return functools.cache(lambda norm: robustness_curve(robust, samples, norm=norm))


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["l2", "l1", "linf"])
def test_the_curve_agrees_with_robust_accuracy_at_each_eps(robust, samples, curves, norm):
    curve = curves(norm)
    scale = {"linf": 1.0, "l2": 5.0, "l1": 25.0}[norm]
    for eps in (0.06 * scale, 0.12 * scale) if norm == "linf" else (0.12 * scale,):
        fast = robust_accuracy(robust, samples, eps=eps, norm=norm, seed=0)
        # One sample of 60.
        assert abs(curve.at(eps) - fast) <= 0.017
        assert torch.equal(curve.at(0.0).correct, fast.standard.correct)


@pytest.mark.slow
def test_it_falls_to_zero_and_is_read_off(curves):
    curve = curves("linf")
    values = [row["robust_accuracy"] for row in curve.table([0.0, 0.05, 0.1, 0.2, 1.0])]
    assert values == sorted(values, reverse=True)
    assert values[0] > 0.8
    assert values[-1] == 0.0
    below = (curve.distance <= curve.median).float().mean()
    assert 0.5 <= below <= 0.55
    assert curve.at(curve.median).total == 60
    assert str(curve).startswith(f"60 samples, {int((curve.distance == 0).sum())} wrong")


def test_the_plot_steps_down_where_samples_are():
    curve = RobustnessCurve(torch.tensor([0.0, 0.2, 0.5, math.inf]), torch.arange(4), "l2")
    axes = curve.plot()
    (line_,) = axes.lines
    assert line_.get_drawstyle() == "steps-post"
    assert line_.get_xdata()[:-1].tolist() == pytest.approx([0.0, 0.2, 0.5])
    assert line_.get_ydata().tolist() == [75.0, 50.0, 25.0, 25.0]
    assert axes.get_xlabel().startswith("l2")
    assert str(curve).startswith("4 samples, 1 wrong without an attack, median distance 0.2 in l2")


@pytest.mark.slow
def test_samples_keep_their_places_whatever_the_batches(standard, digits):
    rows = TensorDataset(*(tensor[:12] for tensor in digits[1].tensors))
    attack = FMN(norm="l2", steps=20)
    expected = robustness_curve(standard, rows, norm="l2", attack=attack)
    for size in (1, 8):
        found = robustness_curve(standard, rows, norm="l2", attack=attack, batch_size=size)
        torch.testing.assert_close(found.distance, expected.distance, rtol=1e-3, atol=1e-4)
    assert expected.distance.unique().numel() > 8


@pytest.mark.parametrize(
    ("attack", "cause"),
    [
        (FMN(norm="linf"), "norm='l2'"),
        (FAB(norm="l2", eps=0.1), "without eps"),
    ],
)
def test_an_attack_that_gives_no_curve_is_refused(attack, cause):
    model, rows = line()
    with pytest.raises(ValueError, match=cause):
        robustness_curve(model, rows, norm="l2", attack=attack)


@pytest.mark.parametrize("eps", [-0.1, float("nan")])
def test_a_bad_radius_is_refused(eps):
    curve = RobustnessCurve(torch.tensor([0.0, 0.2]), torch.arange(2), "l2")
    with pytest.raises(ValueError, match="eps"):
        curve.at(eps)


def searched(monkeypatch, norm, far, masked):
    """Distances that the search by smoothed gradients found, the true ones, and its attacks.

    It begins at points that are `far` times as far as the closest of a linear model.
    """
    model = nn.Linear(4, 2).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.5, 0.25, 2.0], [0.0, 0.0, 0.0, 0.0]]))
        model.bias.copy_(torch.tensor([0.0, 1.0]))
    x = 1.0 + torch.rand(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = model.weight[0].detach()
    direction = {
        "l1": -(weight == weight.max()).double(), "l2": -weight / weight.norm(),
        "linf": -torch.ones(4, dtype=torch.float64),
    }[norm]  # fmt: skip
    exact = (x @ weight - 1.0) / -(weight @ direction)
    attacks, run = [], _curve._Search._attacked
    monkeypatch.setattr(
        _curve._Search,
        "_attacked",
        lambda self, attack, samples, near: (
            attacks.append((attack, near)) or run(self, attack, samples, near)
        ),
    )
    with attackable(model) as net:
        batch = prepare_batch(net, x, torch.zeros(3, dtype=torch.int64), None, WIDE)
        polish = MinimumPGD(norm=norm, bounds=WIDE, steps=60, step_size=0.1, noise=0.0)
        search = _curve._Search(net, norm, WIDE, polish, 0)
        closest = x + far * exact[:, None] * direction
        found = search.run(batch, closest, far * exact, torch.full((3,), masked))
        assert (threat.size(found[0] - x, norm) <= found[1] * (1 + 1e-9)).all()
    return found[1], exact, attacks


@pytest.mark.parametrize(
    "norm",
    [
        "l1",
        pytest.param("l2", marks=pytest.mark.slow),
        pytest.param("linf", marks=pytest.mark.slow),
    ],
)
def test_the_search_ends_at_the_closest_point(norm, monkeypatch):
    found, exact, attacks = searched(monkeypatch, norm, 1.5, False)
    torch.testing.assert_close(found, exact, rtol=0.01, atol=0.0)
    assert (found >= exact * (1 - 1e-6)).all()
    # Each run in a ball is in a smaller one than the closest point so far.
    for attack, near in attacks:
        if not isinstance(attack, MinimumPGD):
            assert (attack.eps < near).all()
    kinds = {
        "l1": [MinimumPGD, MinimumPGD, SmoothedPGD],
        "l2": [SmoothedPGD, SmoothedPGD, MinimumPGD],
        "linf": [SmoothedPGD, SquareBeyondGradients, MinimumPGD],
    }
    assert [type(attack) for attack, _ in attacks[:3]] == kinds[norm]


@pytest.mark.parametrize(
    ("masked", "rounds"),
    [(False, _curve._PATIENCE), pytest.param(True, _curve._ROUNDS, marks=pytest.mark.slow)],
)
def test_a_sample_that_gains_nothing_leaves_the_search_unless_masked(masked, rounds, monkeypatch):
    found, exact, attacks = searched(monkeypatch, "l2", 1.0 - 1e-6, masked)
    assert torch.equal(found, exact * (1.0 - 1e-6))
    assert len(attacks) == rounds


class Saturating(nn.Module):
    """Class 1 looks near and never wins; class 2 is farther, and does."""

    def forward(self, x):
        near, far = 0.9 * torch.tanh(3 * x.sum(1)), 2 * (x[:, 0] - x[:, 1])
        return torch.stack([torch.ones_like(near), near, far], 1)


@pytest.mark.slow
@pytest.mark.parametrize("norm", DUAL)
def test_a_sample_that_the_first_attack_finds_nothing_for_is_given_to_another(norm):
    # Not at (0.2, 0.2), where the outputs (1, 0.5, 0) look like those of a sigmoid.
    x = torch.tensor([[0.2, 0.25], [0.2, 0.25]])
    rows = TensorDataset(x, torch.zeros(2, dtype=torch.int64))
    alone = robustness_curve(Saturating(), rows, norm=norm, attack=FMN(norm=norm))
    assert alone.distance.isinf().all()
    found = robustness_curve(Saturating(), rows, norm=norm)
    # x0 - x1 has to reach 1/2, and x1 can give 0.25 of it.
    nearest = {"l1": 0.55, "l2": (0.3**2 + 0.25**2) ** 0.5, "linf": 0.3}[norm]
    torch.testing.assert_close(found.distance, torch.full((2,), nearest), rtol=0.01, atol=0.0)


class Offset(nn.Module):
    """Logits that have a large number in common."""

    def __init__(self, model, offset):
        super().__init__()
        self.model, self.offset = model, offset

    def forward(self, x):
        return self.model(x) + self.offset


@pytest.mark.slow
def test_an_offset_of_all_logits_is_warned_of():
    torch.manual_seed(0)
    model, x, norm = nn.Linear(20, 10), torch.rand(50, 20), "l2"
    rows = TensorDataset(x, model(x).argmax(1))
    plain = robustness_curve(model, rows, norm=norm, attack=FMN(norm=norm))
    shifted = Offset(model, 1e5)
    kept = TensorDataset(x, shifted(x).argmax(1))
    with pytest.warns(UserWarning, match="offset"):
        curve = robustness_curve(shifted, kept, norm=norm)
    for fraction in (0.25, 0.5, 0.75):
        eps = float(plain.distance.quantile(fraction))
        assert abs(curve.at(eps) - plain.at(eps)) <= 0.2


def test_usual_logits_are_not_warned_of(standard, digits, recwarn):
    rows = TensorDataset(*(tensor[:20] for tensor in digits[1].tensors))
    robustness_curve(standard, rows, norm="l2", attack=FMN(norm="l2", steps=20))
    assert not recwarn.list


class FixedBatch(nn.Module):
    """A model that takes batches of eight alone, like some exported ones."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        assert len(x) == 8
        return self.model(x)


def test_the_batch_size_never_changes():
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    x = torch.rand(16, 5)
    rows = TensorDataset(x, model(x).argmax(1) ^ (torch.arange(16) < 3))
    options = {"norm": "l2", "batch_size": 8, "attack": FMN(norm="l2", steps=20)}
    curve = robustness_curve(FixedBatch(model), rows, **options)
    expected = robustness_curve(model, rows, **options)
    torch.testing.assert_close(curve.distance, expected.distance)
    assert 0 < (curve.distance > 0).sum() < 16


@pytest.mark.slow
def test_the_seed_decides(robust, digits):
    rows = TensorDataset(*(tensor[:8] for tensor in digits[1].tensors))
    attack = MinimumPGD(norm="l2", steps=10)
    first, again, other = (
        robustness_curve(robust, rows, norm="l2", attack=attack, seed=seed).distance
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
