"""Auto-PGD and the ensembles: closed forms and invariants."""

import pytest
import torch
from torch import nn

import advfeat as af
from advfeat import losses, threat
from advfeat.attacks import APGD, AutoAttack, Batch, apgd
from advfeat.attacks.base import prepare_batch
from advfeat.attacks.pool import worst_case
from advfeat.model import attackable

NORMS = ("l1", "l2", "linf")
EPS = {"l1": 1.0, "l2": 0.3, "linf": 0.05}
DUAL = {"l1": "linf", "l2": "l2", "linf": "l1"}


def linear(features: int, classes: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(features, classes))


def cnn(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("norm", NORMS)
def test_it_reaches_the_optimum_of_a_linear_model(norm):
    model = linear(20, 2)
    x, y = 0.5 + 0.01 * torch.rand(6, 20), torch.arange(6) % 2
    x_adv = apgd(model, x, y, eps=EPS[norm], norm=norm, loss="margin", bounds=(-9, 9), seed=0)
    weight = model[1].weight.detach()
    gain = losses.margin(model(x_adv), y) - losses.margin(model(x), y)
    best = EPS[norm] * threat.size((weight[1] - weight[0])[None], DUAL[norm])
    torch.testing.assert_close(gain.detach(), best.expand(6), rtol=0.01, atol=0)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("targets", [0, 3])
def test_results_lie_in_ball_and_box(norm, targets):
    x, y = torch.rand(5, 3, 6, 6), torch.arange(5)
    x_adv = apgd(
        cnn(), x, y, eps=EPS[norm], norm=norm, steps=15, loss="dlr", targets=targets, seed=1
    )
    assert threat.size(x_adv - x, norm).max() <= EPS[norm] + 1e-6
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("classes", [2, 3])
def test_models_of_few_classes_work(norm, classes):
    model, x = linear(12, classes), torch.rand(7, 12)
    y = model(x).argmax(1)
    x_adv = apgd(model, x, y, eps=9.0, norm=norm, steps=20, targets=9, loss="dlr", seed=0,
                 bounds=(-99, 99))  # fmt: skip
    assert (model(x_adv).argmax(1) != y).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.slow
def test_the_pool_and_the_order_do_not_change_a_verdict(norm):
    model, x = cnn().double(), torch.rand(23, 3, 6, 6, dtype=torch.float64)
    y = model(x).argmax(1)
    eps = EPS[norm] / 8  # small enough that some rows resist
    attack = APGD(eps=eps, norm=norm, steps=12, loss="dlr", targets=2, seed=3).stop_at_success()

    def verdicts(order: torch.Tensor, pool: int) -> list[bool]:
        with attackable(model) as net:
            batch = prepare_batch(net, x[order], y[order], order, (0.0, 1.0))
            found = list(worst_case([attack], net, [batch], pool))
        ids = torch.cat([v.ids for v in found])
        assert sorted(ids.tolist()) == list(range(23))
        return torch.cat([v.success for v in found])[ids.argsort()].tolist()

    expected = verdicts(torch.arange(23), 23)
    assert verdicts(torch.randperm(23), 4) == expected
    assert 0 < sum(expected) < 23


def test_worst_case_is_a_success_of_any_attack():
    model, x = cnn(), torch.rand(20, 3, 6, 6)
    y = model(x).argmax(1)
    small, large = (
        APGD(eps=e, norm="linf", steps=10, seed=0).stop_at_success() for e in (0.01, 0.05)
    )
    with attackable(model) as net:
        batch = prepare_batch(net, x, y, None, (0.0, 1.0))
        batch = Batch(*batch[:3])
        found = list(worst_case([small, large], net, [batch], 6))
        alone = list(worst_case([large], net, [batch], 20))
    ids = torch.cat([v.ids for v in found])
    assert sorted(ids.tolist()) == list(range(20))
    by = torch.cat([v.attack for v in found])[ids.argsort()]
    fooled = torch.cat([v.ids[v.success] for v in alone])
    assert set(fooled.tolist()) <= set((by >= 0).nonzero().squeeze(1).tolist())
    for verdict in found:
        wrong = model(verdict.adversarial).argmax(1) != verdict.labels
        assert torch.equal(wrong, verdict.success)


def test_a_seed_makes_the_ensemble_reproducible_and_leaves_the_global_state():
    model, x = cnn(), torch.rand(4, 3, 6, 6)
    y = model(x).argmax(1)
    attack = AutoAttack(eps=0.02, norm="linf", version="fast", seed=5)
    before = torch.get_rng_state()
    first, second = attack(model, x, y), attack(model, x, y)
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())
    assert threat.size(first - x, "linf").max() <= 0.02 + 1e-6


def test_autoattack_has_the_published_order_and_budgets():
    attacks = AutoAttack(eps=0.1, norm="l2").attacks
    assert [type(a).__name__ for a in attacks] == ["APGD", "APGD", "FAB", "Square"]
    assert (attacks[0].steps, attacks[1].targets, attacks[3].queries) == (100, 9, 5000)


def test_it_is_at_least_as_strong_as_pgd_of_the_same_steps():
    model, x = cnn(), torch.rand(32, 3, 6, 6)
    y = model(x).argmax(1)
    ours = apgd(model, x, y, eps=0.02, norm="linf", steps=40, loss="margin", seed=0)
    plain = af.pgd(model, x, y, eps=0.02, norm="linf", steps=40, loss="margin")
    wrong = [(model(found).argmax(1) != y).sum() for found in (ours, plain)]
    assert wrong[0] >= wrong[1]
