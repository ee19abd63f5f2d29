"""APGD beside its papers: the published schedule, and the same iterates as other implementations.

Croce and Hein (2020), "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks", for l2 and linf; Croce and Hein (2021), "Mind the box", for l1.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import ORDER, WIDE, adv_lib

from advfeat import threat
from advfeat.attacks import APGD
from advfeat.attacks.base import prepare_batch
from advfeat.model import attackable

NORMS = ("l1", "l2", "linf")
# Powers of two: torchattacks keeps eps in float32.
EPS = {"l1": 4.0, "l2": 0.5, "linf": 0.0625}
CHECKPOINTS = [22, 41, 57, 70, 80, 87, 93, 99]  # of 100 steps: 0.22, 0.41, ...
WINDOWS = [22, 19, 16, 13, 10, 7, 6, 6]


def curved(seed=0):
    """A network whose gradient turns a lot within the balls of these tests."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 5)).double()
    for parameter in net.parameters():
        parameter.data *= 4
    return net


def points(count=12, shape=(3, 4, 4)):
    """Samples in the middle of [0, 1]: the bounds stop nothing within the balls of l2, linf."""
    generator = torch.Generator().manual_seed(1)
    return 0.5 + 0.1 * (torch.rand(count, *shape, generator=generator, dtype=torch.float64) - 0.5)


def run(attack, model, x, y, start=None, steps=None):
    """States before each evaluation and after the last; from ``start`` instead of a random one."""
    with attackable(model, purpose=None) as net:
        state = attack.init(net, prepare_batch(net, x, y, None, attack.bounds))
        if start is not None:
            state = state._replace(current=start, previous=start)
        states = [state]
        for _ in range(attack.max_evaluations if steps is None else steps):
            states.append(attack.step(net, states[-1]))
    return states


# --- The schedule, on a recorded objective ---


class Recorded(nn.Module):
    """A model whose margin at the k-th evaluation is the k-th column, wherever that is.

    Its gradient has another random direction at each evaluation.
    """

    def __init__(self, values):
        super().__init__()
        self.values, self.calls = values, 0
        self.directions = torch.randn(1000, 4, generator=torch.Generator().manual_seed(2)).double()

    def forward(self, x):
        value = self.values[:, min(self.calls, self.values.shape[1] - 1)]
        self.calls += 1
        along = x.flatten(1) @ self.directions[self.calls]
        return torch.stack([torch.zeros_like(value), value + along - along.detach()], 1)


def step_sizes(values, norm="linf", steps=100):
    """Step sizes, over eps, that init and then each evaluation sets, ``(N, steps + 1)``."""
    attack = APGD(eps=1.0, norm=norm, steps=steps, loss="margin", bounds=WIDE, seed=0)
    x = torch.zeros(len(values), 4, dtype=torch.float64)
    y = torch.zeros(len(values), dtype=torch.int64)
    states = run(attack, Recorded(values), x, y, steps=steps)
    return torch.stack([state.step_size for state in states], 1)


def halvings(sizes):
    """Evaluations, counted from 0, after which the step size of each sample is halved."""
    found = []
    for row in sizes:
        ratio = row[1:] / row[:-1]
        assert set(ratio.tolist()) <= {0.5, 1.0}
        found.append((ratio == 0.5).nonzero().flatten().tolist())
    return found


def staircase(rises_of):
    """Objective that rises in the first of each window's steps, so many, and falls a bit after."""
    values = [0.0]
    for rises, window in zip(rises_of, WINDOWS, strict=True):
        values += [values[-1] + k + 1 for k in range(rises)]
        values += [values[-1] - 0.01 * (k + 1) for k in range(window - rises)]
    return values


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_checkpoints_are_the_published_ones(norm):
    # An objective that never rises halves the step at every checkpoint, and nowhere else.
    sizes = step_sizes(torch.zeros(2, 101, dtype=torch.float64), norm)
    assert halvings(sizes) == [CHECKPOINTS] * 2
    assert (sizes[:, 0] == 2).all()


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (1, []),
        (10, [2, 3, 4, 5, 6, 7, 8, 9]),
        (40, [8, 15, 21, 26, 30, 33, 35, 37, 39]),
        (50, [11, 21, 30, 38, 45]),
        (200, [44, 82, 114, 140, 160, 174, 186, 198]),
    ],
)
def test_checkpoints_of_other_numbers_of_steps(steps, expected):
    sizes = step_sizes(torch.zeros(1, steps + 1, dtype=torch.float64), steps=steps)
    assert halvings(sizes) == [expected]


def test_a_step_is_halved_where_fewer_than_three_quarters_rise():
    rises = range(23)
    values = [staircase([k, *WINDOWS[1:]]) for k in rises]
    found = halvings(step_sizes(torch.tensor(values, dtype=torch.float64)))
    assert found == [[22] if k <= 16 else [] for k in rises]  # 0.75 * 22 = 16.5


def test_every_window_counts_its_own_rises():
    windows = range(1, 8)
    for short, expected in ((0, True), (1, False)):
        # One rise more than three quarters of each window, or not.
        values = []
        for j in windows:
            rises = list(WINDOWS)
            rises[j] = int(0.75 * WINDOWS[j]) + short
            values.append(staircase(rises))
        found = halvings(step_sizes(torch.tensor(values, dtype=torch.float64)))
        assert found == [[CHECKPOINTS[j]] if expected else [] for j in windows]


def test_a_step_is_halved_where_the_best_did_not_rise_at_the_same_step_size():
    # From the second window on, a fall from which 18 of 19 steps rise, but not to the best value.
    values = list(range(23))
    for window in WINDOWS[1:]:
        values.append(values[-1] - 1000)
        values += [values[-1] + k + 1 for k in range(window - 1)]
    found = halvings(step_sizes(torch.tensor([values], dtype=torch.float64)))
    # Halved at one checkpoint, it is left alone at the next.
    assert found == [[41, 70, 87, 99]]


def test_after_halving_it_starts_from_the_best_iterate():
    values = torch.zeros(1, 101, dtype=torch.float64)
    values[0, 7] = 5.0  # the best is the eighth evaluation
    model, x = Recorded(values), torch.zeros(1, 4, dtype=torch.float64)
    attack = APGD(eps=1.0, norm="linf", loss="margin", bounds=WIDE, seed=0)
    states = run(attack, model, x, torch.zeros(1, dtype=torch.int64), steps=23)
    best = states[7].current
    assert torch.equal(states[23].previous, best)
    assert not torch.equal(states[22].current, best)


def test_no_step_is_halved_in_l1_but_divided_by_one_and_a_half_down_to_a_tenth():
    # The gradient is constant and dense: the perturbation gets no sparser.
    values = torch.zeros(1, 103, dtype=torch.float64)
    x = torch.zeros(1, 4, dtype=torch.float64)
    attack = APGD(eps=1.0, norm="l1", loss="margin", bounds=WIDE, seed=0)
    states = run(attack, Recorded(values), x, torch.zeros(1, dtype=torch.int64))
    sizes = [float(state.step_size) for state in states[:-1]]
    # A phase of 30, 30 and 40 steps begins at its radius: 3, 2 and 1.
    for first, last, radius in ((0, 30, 3.0), (31, 61, 2.0), (62, 102, 1.0)):
        expected = [max(radius / 1.5**k, radius / 10) for k in range(last - first)]
        np.testing.assert_allclose(sizes[first], radius)
        np.testing.assert_allclose(sizes[first + 1 : last + 1], expected)


def test_the_l1_phases_lie_in_balls_of_three_two_and_one_radius():
    model, x = curved(), points()
    y = model(x).argmax(1)
    attack = APGD(eps=0.25, norm="l1", loss="margin", seed=0)
    assert attack.max_evaluations == 103  # 30, 30 and 40 steps, and their starts
    states = run(attack, model, x, y)
    sizes = torch.stack([(s.current - x).flatten(1).norm(1, dim=1) for s in states[:-1]], 1)
    for part, radius in ((sizes[:, :31], 3), (sizes[:, 31:62], 2), (sizes[:, 62:], 1)):
        assert part.max() <= 0.25 * radius + 1e-9
        np.testing.assert_allclose(part[:, 5:].amax(1), 0.25 * radius, atol=1e-9)
    # A phase begins at the best of the one before, projected.
    for at, radius in ((31, 2), (62, 1)):
        start = project(states[at].x_max, x, 0.25 * radius, "l1")
        torch.testing.assert_close(states[at].current, start, rtol=0, atol=1e-9)


def test_the_first_l1_step_moves_a_fifth_of_the_entries():
    model, x = Gradient(torch.arange(1.0, 51.0).double()), torch.zeros(3, 50, dtype=torch.float64)
    attack = APGD(eps=1.0, norm="l1", loss="margin", bounds=WIDE, seed=0)
    states = run(attack, model, x, torch.zeros(3, dtype=torch.int64), start=x, steps=1)
    moved = states[1].current
    expected = torch.cat([torch.zeros(40), torch.full((10,), 3.0 / 10)]).double()
    torch.testing.assert_close(moved, expected.expand(3, -1))


class Gradient(nn.Module):
    """A linear model of two classes with this gradient of the margin."""

    def __init__(self, gradient):
        super().__init__()
        self.register_buffer("gradient", gradient)

    def forward(self, x):
        along = x.flatten(1) @ self.gradient
        return torch.stack([torch.zeros_like(along), along], 1)


# --- The same iterates as the papers' algorithms, written as they are printed ---


def project(z, x, eps, norm):
    """Nearest point of the ball within [0, 1]."""
    if norm == "linf":
        return torch.minimum(torch.maximum(z, x - eps), x + eps).clamp(0, 1)
    if norm == "l1":
        # test_threat.py holds it to be the nearest point. What counts the entries in use, as l1
        # does, would tell apart a zero from a rounding of it.
        return threat.project(z, x, eps, "l1")
    delta = (z - x).flatten(1)  # the bounds stop nothing in l2
    delta = delta * (eps / delta.norm(dim=1, keepdim=True)).clamp_max(1)
    return x + delta.view(x.shape)


def steepest(g, norm, density=None):
    flat = g.flatten(1)
    if norm == "linf":
        return g.sign()
    if norm == "l2":
        return (flat / flat.norm(dim=1, keepdim=True)).view(g.shape)
    rows = []
    for row, part in zip(flat, density, strict=True):
        count = max(1, int(part * len(row)))
        kept = row.abs() >= row.abs().sort(descending=True).values[count - 1]
        rows.append(kept * row.sign() / kept.sum())
    return torch.stack(rows).view(g.shape)


def evaluate(model, x, y):
    leaf = x.detach().requires_grad_()
    value = F.cross_entropy(model(leaf), y, reduction="none")
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def published(model, x, y, start, eps, norm):
    """Algorithm 1 of Croce and Hein (2020), 100 steps; yields x(0) to x(100) and the best x."""
    n = len(x)
    step = torch.full((n, 1, 1, 1), 2 * eps, dtype=x.dtype)
    previous = current = start
    values, gradients = [], []
    reduced, best_at_checkpoint = torch.ones(n, dtype=bool), None
    iterates = []
    for k in range(101):
        value, gradient = evaluate(model, current, y)
        iterates.append(current)
        values.append(value)
        gradients.append(gradient)
        best = torch.stack(values).argmax(0)
        best_value = torch.stack(values).amax(0)
        if k == 0:
            best_at_checkpoint = value
        if k in CHECKPOINTS:
            window = WINDOWS[CHECKPOINTS.index(k)]
            rises = sum((values[i + 1] > values[i]).long() for i in range(k - window, k))
            stalled = rises <= 0.75 * window
            stalled |= ~reduced & (best_at_checkpoint == best_value)
            reduced, best_at_checkpoint = stalled, best_value
            current, gradient = current.clone(), gradient.clone()
            for i in stalled.nonzero().flatten():
                step[i] /= 2
                current[i], gradient[i] = iterates[best[i]][i], gradients[best[i]][i]
        z = project(current + step * steepest(gradient, norm), x, eps, norm)
        alpha = 0.75 if k else 1.0
        z = current + alpha * (z - current) + (1 - alpha) * (current - previous)
        previous, current = current, project(z, x, eps, norm)
    return iterates, torch.stack([iterates[b][i] for i, b in enumerate(best)])


def published_l1(model, x, y, start, eps):
    """l1-APGD of Croce and Hein (2021) in three phases, from a start of 20% density."""
    n, d = len(x), x[0].numel()
    density, support = torch.full((n,), 0.2), torch.full((n,), float(d))
    iterates, current, best = [], start, start
    for radius, steps in ((3 * eps, 30), (2 * eps, 30), (eps, 40)):
        if iterates:
            current = project(best, x, radius, "l1")
            support = (current != x).flatten(1).sum(1).double()
            density = support / d / 1.5
        step = torch.full((n, 1, 1, 1), radius, dtype=x.dtype)
        best_value = torch.full((n,), -torch.inf, dtype=x.dtype)
        best, best_gradient = current.clone(), current.clone()
        for k in range(steps + 1):
            value, gradient = evaluate(model, current, y)
            iterates.append(current)
            better = value > best_value
            best[better], best_gradient[better] = current[better], gradient[better]
            best_value = torch.maximum(value, best_value)
            if k > 0:  # int(0.04 * 30) = int(0.04 * 40) = 1: after every step
                used = (best != x).flatten(1).sum(1).double()
                sparser = used / support < 0.95
                step = (step / 1.5).clamp_min(radius / 10)
                step[sparser] = radius
                current, gradient = current.clone(), gradient.clone()
                current[sparser], gradient[sparser] = best[sparser], best_gradient[sparser]
                support, density = used, used / d / 1.5
            moved = current + step * steepest(gradient, "l1", density)
            current = project(moved, x, radius, "l1")
    return iterates


@pytest.mark.parametrize("norm", NORMS)
def test_iterates_are_those_of_the_printed_algorithm(norm):
    model, x = curved(), points()
    y, eps = model(x).argmax(1), EPS[norm]
    states = run(APGD(eps=eps, norm=norm, seed=0), model, x, y)
    found = [state.current for state in states[:-1]]
    if norm == "l1":
        expected = published_l1(model, x, y, found[0], eps)
    else:
        expected, best = published(model, x, y, found[0], eps, norm)
        torch.testing.assert_close(states[-1].x_max, best, rtol=0, atol=1e-6)
    assert len(expected) == len(found)
    for k, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6, msg=lambda m, k=k: f"{k}: {m}")
    final = torch.stack([s.step_size for s in states[:-1]])
    assert (final.amin(0) < final.amax(0) / 4).any()  # the schedule was at work


# --- The same as other libraries ---


def torchattacks_run(model, x, y, norm, loss):
    ta = pytest.importorskip("torchattacks")
    attack = ta.APGD(model, norm={"l2": "L2", "linf": "Linf"}[norm], eps=EPS[norm], steps=100,
                     loss={"cross_entropy": "ce", "dlr": "dlr"}[loss])  # fmt: skip
    torch.manual_seed(5)
    best, _, value, _ = attack.attack_single_run(x, y)
    torch.manual_seed(5)  # its start again
    noise = 2 * torch.rand(x.shape) - 1 if norm == "linf" else torch.randn(x.shape)
    sizes = noise.flatten(1).norm(ORDER[norm], dim=1).view(-1, 1, 1, 1)
    return best.detach(), value.detach(), (x + EPS[norm] * noise / sizes).clamp(0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["cross_entropy", "dlr"])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_from_the_same_start_it_finds_what_torchattacks_finds(norm, loss):
    model, x = curved(), points(20)
    y = model(x).argmax(1)
    best, value, start = torchattacks_run(model, x, y, norm, loss)
    attack = APGD(eps=EPS[norm], norm=norm, loss=loss, seed=0)
    last = run(attack, model, x, y, start)[-1]
    torch.testing.assert_close(last.value_max, value, rtol=1e-6, atol=0)
    if loss != "dlr":  # DLR has kinks, at which many points are as good
        torch.testing.assert_close(last.x_max, best, rtol=0, atol=1e-6)


def adv_lib_run(model, x, y, norm, loss):
    apgd = adv_lib("auto_pgd")
    eps = torch.full((len(x),), EPS[norm], dtype=x.dtype)
    loss = {"cross_entropy": "ce", "dlr": "dlr"}[loss]
    torch.manual_seed(5)
    if norm != "l1":
        best, _, value, _ = apgd._apgd(model, x, y, eps, ORDER[norm], loss_function=loss)
    else:
        start = None
        for radius, steps in ((3, 30), (2, 30), (1, 40)):
            if start is not None:
                start = start + apgd.l1_projection(x, start - x, radius * eps)
            start, _, value, best = apgd._apgd(
                model, x, y, radius * eps, 1, x_init=start, n_iter=steps, loss_function=loss
            )
        best = start
    torch.manual_seed(5)
    noise = 2 * torch.rand_like(x) - 1 if norm == "linf" else torch.randn_like(x)
    if norm == "l1":
        return best, value, x + noise + apgd.l1_projection(x, noise, 3 * eps)
    sizes = noise.flatten(1).norm(ORDER[norm], dim=1).view(-1, 1, 1, 1)
    return best, value, (x + EPS[norm] * noise / sizes).clamp(0, 1)


@pytest.mark.parametrize(
    ("norm", "loss"),
    [("l2", "cross_entropy"), ("l2", "dlr"), ("linf", "cross_entropy"), ("linf", "dlr"),
     ("l1", "cross_entropy")],
)  # fmt: skip
def test_it_climbs_as_high_as_adv_lib(norm, loss):
    model, x = curved(), points(20)
    y = model(x).argmax(1)
    _, value, start = adv_lib_run(model, x, y, norm, loss)
    attack = APGD(eps=EPS[norm], norm=norm, loss=loss, seed=0)
    last = run(attack, model, x, y, start)[-1]
    # Theirs halves the step more often, and in l1 a step moves up to one entry more.
    close = 1e-6 if norm != "l1" else 0.02
    near = (last.value_max - value).abs() <= close * value.abs()
    assert near.double().mean() >= 0.9
    torch.testing.assert_close(last.value_max.mean(), value.mean(), rtol=close, atol=0)
