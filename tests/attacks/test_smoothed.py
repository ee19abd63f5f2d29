"""PGD on smoothed gradients: closed forms, masked models, and what a sample depends on."""

import pytest
import torch
from torch import nn

from advfeat import losses, threat
from advfeat.attacks import AutoAttack, SmoothedPGD, Square, smoothed_pgd
from advfeat.attacks.base import prepare_batch
from advfeat.attacks.misleading import SquareBeyondGradients
from advfeat.attacks.pool import attack_batch, worst_case
from advfeat.model import attackable

NORMS = ("l1", "l2", "linf")
EPS = {"l1": 1.0, "l2": 0.3, "linf": 0.05}
DUAL = {"l1": "linf", "l2": "l2", "linf": "l1"}


def linear(features=20, classes=2, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(features, classes))


def cnn(seed=0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)]
    return nn.Sequential(*layers)


class DeadUnit(nn.Module):
    """Class 1 beyond ``sum(x) = 2.4``, by a ReLU that is off (and nearly flat) below 2.3."""

    def __init__(self, slope=0.0):
        super().__init__()
        self.slope = slope

    def forward(self, x):
        total = x.flatten(1).sum(1)
        lead = torch.relu(total - 2.3) - 0.1 + self.slope * (total - 2)
        return torch.stack([-lead, lead], 1)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_it_reaches_the_optimum_of_a_linear_model(norm):
    model = linear()
    x, y = 0.5 + 0.01 * torch.rand(6, 20), torch.arange(6) % 2
    x_adv = smoothed_pgd(model, x, y, eps=EPS[norm], norm=norm, bounds=(-9, 9), seed=0)
    weight = model[1].weight.detach()
    gain = losses.margin(model(x_adv), y) - losses.margin(model(x), y)
    best = EPS[norm] * threat.size((weight[1] - weight[0])[None], DUAL[norm])
    torch.testing.assert_close(gain.detach(), best.expand(6), rtol=0.01, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_results_lie_in_ball_and_bounds(norm):
    x, y = torch.rand(5, 3, 6, 6), torch.arange(5)
    x_adv = smoothed_pgd(cnn(), x, y, eps=EPS[norm], norm=norm, steps=15, seed=1)
    assert threat.size(x_adv - x, norm).max() <= EPS[norm] + 1e-6
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_it_finds_the_way_past_a_dead_unit(norm):
    # All inputs are 4 x 0.5, so the sum has to grow by 0.4; the gradient is zero at the start.
    eps = {"l1": 0.5, "l2": 0.25, "linf": 0.15}[norm]
    x, y = torch.full((8, 4), 0.5), torch.zeros(8, dtype=torch.int64)
    model = DeadUnit()
    x_adv = smoothed_pgd(model, x, y, eps=eps, norm=norm, seed=0)
    assert (model(x_adv).argmax(1) == 1).float().mean() >= 0.75
    plain = smoothed_pgd(model, x, y, eps=eps, norm=norm, scales=(0.0,), seed=0)
    assert (model(plain).argmax(1) == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_a_sample_does_not_depend_on_its_batch_or_pool(norm):
    x, y, ids = torch.rand(7, 3, 6, 6), torch.arange(7), torch.arange(40, 47)
    model = cnn()
    attack = SmoothedPGD(eps=EPS[norm], norm=norm, steps=8, scales=(6.0, 3.0), seed=3)
    whole = attack(model, x, y, index=ids)
    parts = [attack(model, x[i : i + 1], y[i : i + 1], index=ids[i : i + 1]) for i in range(7)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-5)
    with attackable(model) as net:
        batch = prepare_batch(net, x, y, ids, (0.0, 1.0))
        verdicts = list(worst_case([attack], net, [batch], pool_size=3))
    found = torch.cat([v.adversarial for v in verdicts])
    order = torch.cat([v.ids for v in verdicts]).argsort()
    torch.testing.assert_close(found[order], whole, rtol=0, atol=1e-5)


def test_only_masked_samples_get_further_runs():
    y = torch.zeros(8, dtype=torch.int64)
    settings = {"norm": "l2", "steps": 20, "scales": (6.0, 6.0, 3.0), "seed": 0}

    def gradients(model, x, **changed):
        attack = SmoothedPGD(**settings, **changed)
        with attackable(model) as net:
            batch = prepare_batch(net, x, y, None, (0.0, 1.0))
            return attack_batch(attack, net, batch).step

    x = torch.full((8, 4), 0.5)
    sound = linear(4)
    sound[1].bias.data[0] += 9  # never fooled
    assert (gradients(sound, x, eps=0.25, masking_ratio=1.2) == 20).all()
    assert (gradients(sound, x, eps=0.25) == 60).all()
    # Too far away to be fooled, but the ReLU is reached: the gradient at the input said nothing.
    assert (gradients(DeadUnit(), x, eps=0.18, masking_ratio=1.2) == 60).float().mean() >= 0.75
    # With a gradient that tells little, 64% of the margin are closed within 0.18, 43% in 0.17.
    slow = DeadUnit(slope=0.01)
    assert (gradients(slow, x, eps=0.18, masking_ratio=1.2) == 60).all()
    assert (gradients(slow, x, eps=0.17, masking_ratio=1.2) == 20).all()
    assert (gradients(slow, x, eps=0.17) == 60).all()


def test_entries_of_the_gradient_that_are_not_finite_count_as_zero():
    model, plain = nn.Sequential(Roots(), linear(4)), linear(4)
    x, y = torch.full((3, 4), 0.5), torch.tensor([0, 1, 0])
    x[:, 0] = 0.0
    settings = {"eps": 0.3, "norm": "l2", "scales": (0.0,), "seed": 0}
    moved = (smoothed_pgd(model, x, y, **settings) - x)[:, 1:]
    expected = (smoothed_pgd(plain, x, y, **settings) - x)[:, 1:]
    assert torch.equal(moved.sign(), expected.sign())


class Roots(nn.Module):
    """The identity, with an infinite slope at zero."""

    def forward(self, x):
        return x.sqrt().square()


class Quantised(nn.Module):
    def forward(self, x):
        return torch.round(16 * x) / 16


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_it_passes_rounding_by_straight_through_gradients(norm):
    # On the grid of 1/16 the optimum of a linear model is that of the rounded ball.
    head = linear()
    model, y = nn.Sequential(Quantised(), head), torch.arange(6) % 2
    x = torch.full((6, 20), 0.5)
    eps = {"l1": 1.25, "l2": 0.28, "linf": 0.0625}[norm]
    auto = smoothed_pgd(model, x, y, eps=eps, norm=norm, seed=0)
    never = smoothed_pgd(model, x, y, eps=eps, norm=norm, straight_through="never", seed=0)
    gain = losses.margin(model(auto), y) - losses.margin(model(x), y)
    weight = head[1].weight.detach()
    best = eps * threat.size((weight[1] - weight[0])[None], DUAL[norm])
    assert (gain >= 0.9 * best).all() if norm == "linf" else (gain >= 0.5 * best).all()
    assert (gain >= losses.margin(model(never), y) - losses.margin(model(x), y)).all()


@pytest.mark.parametrize("norm", NORMS)
def test_versions_contain_each_other(norm):
    def stages(version):
        return AutoAttack(eps=EPS[norm], norm=norm, version=version).attacks

    assert set(stages("fast")) | set(stages("standard")) < set(stages("strong"))
    assert not any(isinstance(attack, SmoothedPGD) for attack in stages("standard"))
    assert any(isinstance(attack, Square) for attack in stages("standard"))
    last = stages("fast")[-1]
    assert isinstance(last, SquareBeyondGradients if norm == "linf" else SmoothedPGD)
    assert any(isinstance(attack, SmoothedPGD) for attack in stages("fast"))


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"steps": 0}, ValueError, "steps"),
        ({"scales": ()}, ValueError, "scales"),
        ({"scales": (-1.0,)}, ValueError, "scales"),
        ({"masking_ratio": -1.0}, ValueError, "masking_ratio"),
        ({"straight_through": "yes"}, ValueError, "straight_through"),
        ({"norm": "l3"}, ValueError, "norm"),
        ({"seed": "0"}, TypeError, "seed"),
    ],
)
def test_bad_settings_raise(change, error, name):
    with pytest.raises(error, match=name):
        SmoothedPGD(**({"eps": 0.1, "norm": "l2"} | change))
