"""PGD and FGSM: closed forms on linear models, and the laws that every result obeys."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toys import FEATURES, NORMS, batch, curved, ends_and_stays, linear, predicted, sizes

import advfeat as af
from advfeat import seeding, threat
from advfeat.attacks import Batch
from advfeat.model import attackable

SHAPES = [(1, (12,)), (3, (3, 4)), (8, (3, 2, 2))]
EPS = {"l1": 3.0, "l2": 1.0, "linf": 0.3}


class Wavy(nn.Module):
    """Steps overshoot on it, so that the last iterate is not the best."""

    def __init__(self):
        super().__init__()
        self.inner = curved()

    def forward(self, x):
        return torch.sin(5 * self.inner(x))


def objective(model, x, y):
    with torch.no_grad():
        return F.cross_entropy(model(x), y, reduction="none")


# --- The optimum of v . delta over ball and box, from textbook arguments ---


def best_linf(v, x, eps):
    return np.clip(x + eps * np.sign(v), 0, 1) - x


def best_l2(v, x, eps):
    """KKT: delta = s v clipped to the box, with the s that spends the radius (water-filling)."""

    def at(s):
        return np.clip(s * v, -x, 1 - x)

    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.linalg.norm(at(middle)) <= eps else (low, middle)
    return at(low)


def best_l1(v, x, eps):
    """A fractional knapsack: the steepest entries first, each as far as the box lets it."""
    delta, left = np.zeros_like(v), eps
    for i in np.argsort(-np.abs(v)):
        room = 1 - x[i] if v[i] > 0 else x[i]
        delta[i] = np.sign(v[i]) * min(room, left)
        left -= abs(delta[i])
    return delta


BEST = {"l1": best_l1, "l2": best_l2, "linf": best_linf}
SHORTFALL = {"l1": 1e-2, "l2": 1e-5, "linf": 1e-5}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("box_active", [False, True])
@pytest.mark.parametrize(
    ("count", "shape"),
    [*(pytest.param(*each, marks=pytest.mark.slow) for each in SHAPES[:-1]), SHAPES[-1]],
)
def test_pgd_reaches_the_optimum_of_a_linear_model(norm, targeted, box_active, count, shape):
    model = linear()
    x = batch(count, shape, torch.float32)
    eps = EPS[norm] if box_active else 0.2
    x = x.where(x < 0.8, 1.0).where(x > 0.2, 0.0) if box_active else 0.4 + 0.2 * x
    y = torch.arange(count) % 2
    x_adv = af.pgd(model, x, y, eps=eps, norm=norm, targeted=targeted, steps=200)
    weight = model[1].weight.detach().double().numpy()
    for row in range(count):
        # With two classes the gradient's direction is the same everywhere.
        v = weight[1 - int(y[row])] - weight[int(y[row])]
        v = -v if targeted else v
        clean = x[row].flatten().double().numpy()
        optimum = v @ BEST[norm](v, clean, eps)
        gained = v @ (x_adv[row].flatten().double().numpy() - clean)
        assert gained >= optimum * (1 - SHORTFALL[norm])
        assert gained <= optimum + 1e-5


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["cross_entropy", "margin", "dlr"])
def test_every_loss_reaches_the_same_optimum_with_two_classes(norm, loss):
    model, x, y = linear(), 0.4 + 0.2 * batch(3, dtype=torch.float32), torch.tensor([0, 1, 1])
    x_adv = af.pgd(model, x, y, eps=0.2, norm=norm, steps=20, loss=loss)
    weight = model[1].weight.detach()
    v = (weight[1 - y] - weight[y]).double().numpy()
    gained = (v * (x_adv - x).double().numpy()).sum(1)
    dual = {"l1": np.inf, "l2": 2, "linf": 1}[norm]
    np.testing.assert_allclose(gained, 0.2 * np.linalg.norm(v, dual, axis=1), rtol=1e-5)


# --- Ball and box ---


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    norm=st.sampled_from(NORMS),
    eps=st.floats(0, 1),
    steps=st.integers(1, 4),
    step_size=st.none() | st.floats(1e-3, 10),
    random_start=st.booleans(),
    restarts=st.integers(1, 2),
    momentum=st.sampled_from([0.0, 0.9]),
    returns=st.sampled_from(["last", "best", "first"]),
    targeted=st.booleans(),
    seed=st.integers(-(2**70), 2**70),
)
def test_results_lie_in_ball_and_box(norm, eps, seed, **options):
    model, x = curved(dtype=torch.float32), batch(5, dtype=torch.float32)
    x[0], x[1] = 0.0, 1.0
    x_adv = af.pgd(model, x, torch.arange(5) % 4, eps=eps, norm=norm, seed=seed, **options)
    assert (sizes(x_adv, x, norm) <= eps + 1e-6).all()
    assert ((x_adv >= 0) & (x_adv <= 1)).all()


@pytest.mark.parametrize(("norm", "eps"), [("l1", 12.0), ("l2", 1.0), ("linf", 8 / 255)])
def test_results_lie_in_the_ball_at_image_size_too(norm, eps):
    # Float32 rounding grows with the number of entries.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    x = torch.rand(4, 3, 32, 32)
    x_adv = af.pgd(
        model, x, torch.arange(4), eps=eps, norm=norm, steps=3, random_start=True, seed=0
    )
    assert (sizes(x_adv, x, norm) <= eps + 1e-6).all()


def test_other_bounds_hold():
    model, x = curved(), 4 * batch() - 2
    x_adv = af.pgd(model, x, torch.arange(8) % 4, eps=3.0, norm="linf", bounds=(-2.0, 2.0))
    assert x_adv.min() == -2
    assert x_adv.max() == 2


def test_inputs_off_the_box_by_rounding_are_clipped():
    model, x = linear(), torch.full((2, FEATURES), 1.0 + 1e-6)
    x_adv = af.pgd(model, x, torch.tensor([0, 1]), eps=0.1, norm="l2")
    assert x_adv.max() <= 1


# --- What a result depends on, and what it does not ---


@pytest.mark.parametrize("norm", NORMS)
def test_a_sample_does_not_depend_on_its_batch(norm):
    model, x, y = curved(), batch(), torch.arange(8) % 4
    ids = torch.tensor([5, 0, 91, 7, 3, 2**40, 12, 4])
    attack = af.PGD(eps=EPS[norm], norm=norm, steps=3, restarts=2, seed=3)
    whole = attack(model, x, y, index=ids)
    for size in (1, 3):
        rows = zip(x.split(size), y.split(size), ids.split(size), strict=True)
        parts = torch.cat([attack(model, a, b, index=c) for a, b, c in rows])
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-9)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    shuffled = attack(model, x[order], y[order], index=ids[order])
    torch.testing.assert_close(shuffled, whole[order], rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", NORMS)
def test_random_starts_are_bitwise_equal_for_any_batch_size_and_rank(norm):
    # A constant model leaves the start in place.
    def model_of(shape):
        net = nn.Sequential(nn.Flatten(), nn.Linear(FEATURES, 2))
        net[1].weight.data.zero_()
        return net

    attack = af.PGD(eps=0.3, norm=norm, steps=1, random_start=True, seed=5)
    x, y = torch.full((4, FEATURES), 0.5), torch.zeros(4, dtype=torch.int64)
    flat = attack(model_of(x.shape), x, y)
    image = attack(model_of(x.shape), x.view(4, 3, 2, 2), y)
    single = attack(model_of(x.shape), x[2:3], y[2:3], index=torch.tensor([2]))
    assert torch.equal(image.flatten(1), flat)
    assert torch.equal(single, flat[2:3])


@pytest.mark.parametrize("norm", NORMS)
def test_the_same_seed_gives_the_same_result_and_another_seed_another(norm):
    model, x, y = curved(), batch(), torch.arange(8) % 4

    def attack(seed):
        return af.pgd(model, x, y, eps=0.3, norm=norm, steps=2, random_start=True, seed=seed)

    assert torch.equal(attack(3), attack(3))
    assert not torch.equal(attack(3), attack(4))


def test_a_generator_as_seed_advances():
    model, x, y = curved(), batch(), torch.arange(8) % 4

    def attack(generator):
        return af.pgd(model, x, y, eps=0.3, norm="l2", random_start=True, seed=generator)

    first, second = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    one = attack(first)
    assert torch.equal(attack(second), one)
    assert not torch.equal(attack(second), one)


def test_numpy_integers_are_seeds():
    model, x, y = curved(), batch(), torch.arange(8) % 4
    one, two = (
        af.pgd(model, x, y, eps=0.3, norm="l2", random_start=True, seed=seed)
        for seed in (7, np.int64(7))
    )
    assert torch.equal(one, two)


def test_without_a_seed_torch_manual_seed_governs():
    model, x, y = curved(), batch(), torch.arange(8) % 4

    def attack():
        return af.pgd(model, x, y, eps=0.3, norm="l2", random_start=True)

    torch.manual_seed(0)
    first, second = attack(), attack()
    torch.manual_seed(0)
    assert torch.equal(attack(), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("options", [{}, {"random_start": True, "seed": 3}])
def test_the_global_random_state_is_untouched(options):
    model, x = curved(), batch()
    state = torch.get_rng_state()
    af.pgd(model, x, torch.arange(8) % 4, eps=0.3, norm="l2", **options)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("norm", NORMS)
def test_one_eps_a_sample_equals_separate_calls(norm):
    model, x, y = curved(), batch(3), torch.tensor([0, 1, 2])
    eps = torch.tensor([0.0, 0.1, 0.4], dtype=torch.float64)
    together = af.PGD(eps=eps, norm=norm, steps=4, random_start=True, seed=1)(model, x, y)
    for row in range(3):
        attack = af.PGD(eps=float(eps[row]), norm=norm, steps=4, random_start=True, seed=1)
        alone = attack(model, x[row : row + 1], y[row : row + 1], index=torch.arange(row, row + 1))
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-9)


# --- Which iterate is returned ---


def iterates(model, x, y, steps, **options):
    """All iterates of a run, each as the last one of a shorter run."""
    return [af.pgd(model, x, y, steps=k, **options) for k in range(1, steps + 1)]


@pytest.mark.parametrize("norm", NORMS)
def test_best_is_the_iterate_of_largest_objective(norm):
    model, x, y = Wavy(), batch(40), torch.arange(40) % 4
    options = {"eps": EPS[norm] / 2, "norm": norm, "step_size": EPS[norm] / 3}
    runs = iterates(model, x, y, 6, **options)
    values = torch.stack([objective(model, i, y) for i in runs])
    best = af.pgd(model, x, y, steps=6, returns="best", **options)
    torch.testing.assert_close(objective(model, best, y), values.max(0).values)
    assert torch.equal(af.pgd(model, x, y, steps=6, returns="last", **options), runs[-1])
    # Neither the last iterate nor the clean input would pass this test.
    assert (values[-1] < values.max(0).values).any()
    assert (objective(model, x, y) > values.max(0).values).any()


@pytest.mark.parametrize("norm", NORMS)
def test_first_is_the_first_success_else_the_best(norm):
    model, x = curved(), batch(40)
    y = predicted(model, x)
    options = {"eps": EPS[norm] / 3, "norm": norm, "step_size": EPS[norm] / 9}
    runs = iterates(model, x, y, 6, **options)
    first = af.pgd(model, x, y, steps=6, returns="first", **options)
    best = af.pgd(model, x, y, steps=6, returns="best", **options)
    hits = torch.stack([predicted(model, i) != y for i in runs])
    for row in range(len(x)):
        at = next((k for k in range(6) if hits[k, row]), None)
        expected = best[row] if at is None else runs[at][row]
        torch.testing.assert_close(first[row], expected)
    assert hits.any(0).any()
    assert not hits.any(0).all()


@pytest.mark.parametrize("returns", ["last", "best", "first"])
@pytest.mark.parametrize("restarts", [1, 3])
@pytest.mark.parametrize("norm", NORMS)
def test_a_failed_attack_returns_a_perturbed_input(returns, restarts, norm):
    model, x = curved(), batch()
    y = predicted(model, x)
    options = {"eps": 1e-3, "norm": norm, "restarts": restarts, "returns": returns, "seed": 0}
    x_adv = af.pgd(model, x, y, **options)
    assert (predicted(model, x_adv) == y).all()
    assert (sizes(x_adv, x, norm) > 0).all()


@pytest.mark.parametrize("returns", ["last", "best"])
@pytest.mark.parametrize("norm", NORMS)
def test_more_restarts_are_never_worse(returns, norm):
    model, x = curved(), batch(20)
    y = predicted(model, x)
    options = {"eps": EPS[norm], "norm": norm, "steps": 3, "returns": returns, "seed": 2}
    one = af.pgd(model, x, y, random_start=True, restarts=1, **options)
    five = af.pgd(model, x, y, restarts=5, **options)
    gain = objective(model, five, y) - objective(model, one, y)
    assert gain.min() >= 0
    assert gain.max() > 0


def random_start_by_hand(x, draw, seed, eps):
    """Where linf restart number ``draw`` begins."""
    keys = seeding.keys(seed, torch.arange(len(x)))
    numbers = seeding.uniform(keys, draw, x[0].numel() + 1)
    return (x + threat.point_in_ball(numbers, eps, "linf").double()).clamp(0, 1)


def test_restarts_return_the_best_of_their_last_iterates():
    model, x, y = Wavy(), batch(40), torch.arange(40) % 4
    runs = []
    for draw in range(3):
        start = random_start_by_hand(x, draw, 2, 0.2)
        runs.append(by_hand(model, x, y, 0.2, 0.1, 4, 0.0, start))
    values = torch.stack([objective(model, i, y) for i in runs])
    expected = torch.stack(runs)[values.argmax(0), torch.arange(40)]
    options = {"eps": 0.2, "norm": "linf", "steps": 4, "step_size": 0.1}
    found = af.pgd(model, x, y, restarts=3, seed=2, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    assert values.argmax(0).unique().tolist() == [0, 1, 2]


def test_a_targeted_attack_climbs_towards_its_labels():
    model, x = curved(), batch()
    targets = (predicted(model, x) + 1) % 4
    x_adv = af.pgd(model, x, targets, eps=2.0, norm="l2", targeted=True, steps=40)
    assert (objective(model, x_adv, targets) < objective(model, x, targets)).all()
    assert (predicted(model, x_adv) == targets).float().mean() > 0.8


# --- The step ---


def by_hand(model, x, y, eps, step, steps, decay, start=None):
    """MI-FGSM (Dong et al. 2018, algorithm 1) with the sign step, written out."""
    current, velocity = x if start is None else start, torch.zeros_like(x)
    for _ in range(steps):
        leaf = current.clone().requires_grad_()
        F.cross_entropy(model(leaf), y, reduction="sum").backward()
        velocity = decay * velocity + leaf.grad / leaf.grad.abs().sum(1, keepdim=True)
        current = current + step * velocity.sign()
        current = torch.min(torch.max(current, x - eps), x + eps).clamp(0, 1)
    return current


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_linf_steps_equal_those_by_hand(momentum):
    model, x, y = curved(), batch(), torch.arange(8) % 4
    expected = by_hand(model, x, y, 0.2, 0.07, 6, momentum)
    options = {"eps": 0.2, "norm": "linf", "steps": 6, "step_size": 0.07}
    x_adv = af.pgd(model, x, y, momentum=momentum, **options)
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-12)


def test_momentum_changes_the_path():
    model, x, y = curved(), batch(), torch.arange(8) % 4
    options = {"eps": 1.0, "norm": "l2", "steps": 6, "step_size": 0.3}
    plain = af.pgd(model, x, y, **options)
    assert torch.equal(af.pgd(model, x, y, momentum=0.0, **options), plain)
    assert not torch.allclose(af.pgd(model, x, y, momentum=0.9, **options), plain)


def test_each_restart_begins_without_the_momentum_of_the_last():
    model, x, y = Wavy(), batch(40), torch.arange(40) % 4
    options = {"eps": 0.2, "norm": "linf", "steps": 1, "step_size": 0.05, "momentum": 0.9}
    both = af.pgd(model, x, y, restarts=2, seed=4, **options)
    first = af.pgd(model, x, y, random_start=True, seed=4, **options)
    second = (both != first).any(1)
    start = random_start_by_hand(x, 1, 4, 0.2)
    expected = by_hand(model, x, y, 0.2, 0.05, 1, 0.0, start)
    assert second.sum() > 5
    torch.testing.assert_close(both[second], expected[second], rtol=0, atol=1e-7)


@pytest.mark.parametrize("returns", ["last", "best", "first"])
def test_endless_patience_changes_nothing_and_little_ends_a_sample(returns):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    x, y = torch.rand(8, 6), torch.arange(8) % 3
    ball = {"eps": 0.1, "norm": "l2", "step_size": 0.05, "steps": 40, "returns": returns}
    whole = af.pgd(model, x, y, **ball)
    assert torch.equal(af.pgd(model, x, y, patience=41, **ball), whole)
    attack = af.PGD(patience=3, **ball)
    with attackable(model) as net:
        ends_and_stays(attack, net, attack.init(net, Batch(x, y, torch.arange(8))))
    with torch.no_grad():
        lost = F.cross_entropy(model(whole), y) - F.cross_entropy(model(attack(model, x, y)), y)
    assert lost < 0.01


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_fgsm_is_one_step_by_hand(norm):
    model, x, y = curved(), batch(), torch.arange(8) % 4
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(leaf), y, reduction="sum"), leaf)
    if norm == "linf":
        expected = (x + 0.1 * gradient.sign()).clamp(0, 1)
    else:
        x = 0.4 + 0.2 * x  # interior, so that the box does not change the l2 step
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(leaf), y, reduction="sum"), leaf)
        expected = x + 0.1 * gradient / gradient.norm(dim=1, keepdim=True)
    x_adv = af.fgsm(model, x, y, eps=0.1, norm=norm)
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-12)
    assert torch.equal(af.FGSM(eps=0.1, norm=norm)(model, x, y), x_adv)


@pytest.mark.parametrize(("steps", "size"), [(1, 0.4), (2, 0.4), (10, 0.1)])
def test_the_default_step_is_two_and_a_half_eps_over_steps_at_most_eps(steps, size):
    model, x, y = linear(), batch(2, dtype=torch.float32), torch.tensor([0, 1])
    options = {"eps": 0.4, "norm": "l2", "steps": steps}
    by_default = af.pgd(model, x, y, **options)
    torch.testing.assert_close(by_default, af.pgd(model, x, y, step_size=size, **options))


# --- Losses and numbers ---


def margin(logits, labels):
    own = F.one_hot(labels, logits.shape[1]).bool()
    return logits.masked_fill(own, -torch.inf).amax(1) - logits[own]


def test_a_callable_loss_is_climbed_as_it_is():
    model, x, y = curved(), batch(), torch.arange(8) % 4
    options = {"eps": 0.3, "norm": "l2", "steps": 4}
    named = af.pgd(model, x, y, loss="margin", **options)
    own = af.pgd(model, x, y, loss=margin, **options)
    torch.testing.assert_close(own, named)
    # With targets it descends, as in other libraries (A11).
    towards = af.pgd(model, x, y, loss=margin, targeted=True, **options)
    away = af.pgd(model, x, y, loss=lambda z, labels: -margin(z, labels), **options)
    torch.testing.assert_close(towards, away)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("norm", NORMS)
def test_a_tiny_gradient_is_still_a_direction(norm, momentum):
    model, x, y = curved(dtype=torch.float32), batch(dtype=torch.float32), torch.arange(8) % 4
    options = {"eps": 0.3, "norm": norm, "steps": 4, "momentum": momentum}

    def tiny(logits, labels):
        return 1e-30 * F.cross_entropy(logits, labels, reduction="none")

    x_adv = af.pgd(model, x, y, loss=tiny, **options)
    torch.testing.assert_close(x_adv, af.pgd(model, x, y, **options), rtol=0, atol=1e-4)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("random_start", [False, True])
def test_saturated_logits_keep_their_direction(norm, momentum, random_start):
    model = linear()
    model[1].weight.data *= 1e6  # in float32 the softmax's gradient is exactly zero
    x = batch(dtype=torch.float32)
    y = predicted(model, x)
    options = {"momentum": momentum, "random_start": random_start, "seed": 0, "eps": 0.3}
    x_adv = af.pgd(model, x, y, norm=norm, **options)
    assert torch.isfinite(x_adv).all()
    with torch.no_grad():
        assert (margin(model(x_adv), y) > margin(model(x), y)).all()


def test_a_zero_gradient_sample_does_not_stop_its_neighbours():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = curved()

        def forward(self, x):
            return self.net(x) * (x[:, :1] > 0.5)

    x = batch()
    x[:, 0] = torch.tensor([0.0, 1.0]).repeat(4).double()
    x_adv = af.pgd(Half(), x, torch.arange(8) % 4, eps=0.1, norm="l2")
    assert ((x_adv != x).any(1) == (x[:, 0] > 0.5)).all()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_gradient_of_nan_stops_no_later_step(momentum):
    class Hiccup(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.calls = curved(), 0

        def forward(self, x):
            self.calls += 1
            return self.net(x) * (torch.nan if self.calls == 2 else 1.0)

    x, y = batch(), torch.arange(8) % 4
    options = {"eps": 1.0, "norm": "l2", "step_size": 0.1, "momentum": momentum}
    x_adv = af.pgd(Hiccup(), x, y, steps=6, **options)
    before = af.pgd(curved(), x, y, steps=1, **options)
    assert torch.isfinite(x_adv).all()
    assert (sizes(x_adv, x, "l2") > 2 * sizes(before, x, "l2")).all()


def test_a_model_without_gradient_warns():
    class Detached(nn.Module):
        def forward(self, x):
            return x[:, :3].detach()

    with pytest.warns(UserWarning, match="no gradient"):
        af.pgd(Detached(), batch(), torch.zeros(8, dtype=torch.int64), eps=0.1, norm="l2")


# --- Tensors in and out ---


@pytest.mark.parametrize(
    ("given", "returned"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
)
def test_results_are_float32_or_float64(given, returned):
    model = curved(dtype=torch.float64 if given == torch.float64 else torch.float32)
    x = batch().to(given)
    x_adv = af.pgd(model, x, torch.arange(8) % 4, eps=0.3, norm="l2", random_start=True, seed=0)
    assert x_adv.dtype == returned
    assert (sizes(x_adv, x, "l2") <= 0.3 + 1e-6).all()


def test_float64_is_computed_in_float64():
    model, x, y = curved(), batch(), torch.arange(8) % 4
    x_adv = af.pgd(model, x, y, eps=0.3, norm="l2", steps=20, step_size=0.3)
    assert np.abs(sizes(x_adv, x, "l2").max() - 0.3) < 1e-14


@pytest.mark.parametrize("shape", [(12,), (3, 4), (3, 2, 2), (1, 3, 2, 2)])
@pytest.mark.parametrize("attack", [af.PGD, af.FGSM])
def test_results_have_the_shape_of_the_inputs_and_no_gradient(attack, shape):
    x = batch(3, shape).requires_grad_()
    x_adv = attack(eps=0.1, norm="l2")(curved(), x, torch.tensor([0, 1, 2]))
    assert x_adv.shape == x.shape
    assert not x_adv.requires_grad
    assert x.grad is None


@pytest.mark.parametrize("eps", [0.0, 0.3])
@pytest.mark.parametrize("norm", NORMS)
def test_the_users_tensors_are_not_modified_or_shared(norm, eps):
    x, y = batch(), torch.arange(8) % 4
    before = x.clone(), y.clone()
    x_adv = af.pgd(curved(), x, y, eps=eps, norm=norm, random_start=True, seed=0)
    x_adv.fill_(7.0)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_attacks_work_inside_no_grad_and_inference_mode(mode):
    model, x, y = curved(), batch(), torch.arange(8) % 4
    expected = af.pgd(model, x, y, eps=0.3, norm="l2")
    with mode():
        assert torch.equal(af.pgd(model, x, y, eps=0.3, norm="l2"), expected)
        inside = batch(), torch.arange(8) % 4
        assert torch.equal(af.pgd(model, *inside, eps=0.3, norm="l2"), expected)


def test_strided_and_expanded_inputs_work():
    model, y = curved(), torch.arange(8) % 4
    x = batch(1).expand(8, FEATURES)
    y_same = torch.zeros_like(y)
    x_adv = af.pgd(model, x, y_same, eps=0.3, norm="l2")
    torch.testing.assert_close(x_adv, x_adv[:1].expand(8, FEATURES))
    turned = batch().T.contiguous().T
    expected = af.pgd(model, batch(), y, eps=0.3, norm="l2")
    assert torch.equal(af.pgd(model, turned, y, eps=0.3, norm="l2"), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_may_be_any_integers(dtype):
    model, x, y = curved(), batch(), torch.arange(8) % 4
    expected = af.pgd(model, x, y, eps=0.3, norm="l2")
    assert torch.equal(af.pgd(model, x, y.to(dtype), eps=0.3, norm="l2"), expected)


@pytest.mark.parametrize("norm", NORMS)
def test_the_function_and_the_dataclass_agree(norm):
    model, x, y = curved(), batch(), torch.arange(8) % 4
    for momentum, returns, loss in itertools.product([0.0, 0.5], ["last", "best"], ["dlr"]):
        options = {"eps": 0.3, "norm": norm, "momentum": momentum, "returns": returns}
        options |= {"loss": loss, "restarts": 2, "seed": 1}
        expected = af.pgd(model, x, y, **options)
        assert torch.equal(af.PGD(**options)(model, x, y), expected)
