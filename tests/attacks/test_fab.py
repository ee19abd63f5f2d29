"""FAB-T: closed forms on linear models, its projection, and the laws that every result obeys."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from toys import DUAL, NORMS, ORDER, SHAPES, WIDE, batch, curved, linear, predicted, sizes

import advfeat as af
from advfeat.attacks._fab import FAB, FABState, fab
from advfeat.attacks.base import prepare_batch
from advfeat.attacks.minimum_norm import to_hyperplane
from advfeat.attacks.pool import worst_case
from advfeat.model import attackable

# --- The smallest move to a hyperplane within a box, from textbook arguments ---


def smallest(w, x, gap, norm):
    """Norm of the smallest move from x within [0, 1] that adds the gap to w . x; inf for none."""
    room = np.where(w > 0, 1 - x, x)
    if np.abs(w) @ room < gap:
        return np.inf
    if norm == "l1":  # a fractional knapsack
        cost = 0.0
        for i in np.argsort(-np.abs(w)):
            length = min(room[i], gap / abs(w[i])) if w[i] else 0.0
            cost, gap = cost + length, gap - abs(w[i]) * length
        return cost
    # KKT: the move is t w, or t sign(w), clipped to the box; by bisection on t.
    way = w if norm == "l2" else np.sign(w)
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        reached = w @ np.clip(middle * way, -x, 1 - x) >= gap
        low, high = (low, middle) if reached else (middle, high)
    return np.linalg.norm(np.clip(high * way, -x, 1 - x), ORDER[norm])


def boxed_distance(model, x, y, norm):
    """Distance of each row from the nearest wrong answer of a linear model within [0, 1]."""
    weight = model[1].weight.detach().double().numpy()
    bias = model[1].bias.detach().double().numpy()
    found = []
    for row, label in zip(x.flatten(1).double().numpy(), y.tolist(), strict=True):
        logits = weight @ row + bias
        found.append(
            min(
                smallest(weight[k] - weight[label], row, logits[label] - logits[k], norm)
                for k in range(len(bias))
                if k != label
            )
        )
    return np.array(found)


# --- The projection ---


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_projection_is_the_smallest_move(norm, dtype):
    generator = torch.Generator().manual_seed(2)
    points = torch.rand(40, 2, 9, generator=generator, dtype=dtype)
    points[:, 0, :3], points[:, 1, 5:] = 0.0, 1.0
    weight = torch.randn(40, 9, generator=generator, dtype=dtype)
    weight[:, 4] = 0.0
    gap = 3 * torch.randn(40, 2, generator=generator, dtype=dtype)
    moves = to_hyperplane(points, weight, gap, norm)
    assert ((points + moves).clamp(0, 1) - points - moves).abs().max() < 1e-6
    infeasible = 0
    for row, k in itertools.product(range(40), range(2)):
        w, x = weight[row].double().numpy(), points[row, k].double().numpy()
        delta, need = moves[row, k].double().numpy(), float(gap[row, k])
        expected = smallest(np.sign(need) * w, x, abs(need), norm)
        if np.isinf(expected):
            infeasible += 1
            corner = np.where(np.sign(need) * w > 0, 1.0, 0.0)
            np.testing.assert_allclose(delta, np.where(w == 0, 0.0, corner - x), atol=1e-6)
        else:
            assert w @ delta == pytest.approx(need, abs=2e-6)
            assert np.linalg.norm(delta, ORDER[norm]) == pytest.approx(expected, abs=1e-5)
    assert 5 < infeasible < 60


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_projection_is_exact_where_the_box_stops_entries_one_by_one(norm):
    # Pulls and rooms over many orders of magnitude: the hardest case for Newton's steps.
    k = torch.arange(24, dtype=torch.float64)
    weight, points = (0.5**k)[None], 1 - (0.3 ** k.flip(0))[None, None]
    reachable = float((weight * (1 - points[0])).sum())
    for share in (1e-6, 1e-3, 0.1, 0.5, 0.9, 0.999, 1 - 1e-9):
        gap = torch.tensor([[share * reachable]], dtype=torch.float64)
        gained = (to_hyperplane(points, weight, gap, norm)[0] * weight).sum()
        assert float(gained) == pytest.approx(share * reachable, rel=1e-7)


@pytest.mark.parametrize("norm", NORMS)
def test_the_projection_is_accurate_at_image_size_in_float32(norm):
    generator = torch.Generator().manual_seed(3)
    points = torch.rand(4, 1, 3072, generator=generator)
    weight = torch.randn(4, 3072, generator=generator)
    weight /= weight.abs().amax(1, keepdim=True)
    gap = torch.tensor([[0.01], [1.0], [-30.0], [200.0]])
    moves = to_hyperplane(points, weight, gap, norm)
    gained = (moves[:, 0].double() * weight.double()).sum(1)
    torch.testing.assert_close(gained, gap[:, 0].double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_the_projection_survives_what_is_not_finite(norm):
    points, weight = torch.full((3, 1, 4), 0.5), torch.tensor([1.0, -0.5, 0.0, 1e-38])
    gap = torch.tensor([[torch.inf], [-torch.inf], [torch.nan]])
    moves = to_hyperplane(points, weight.expand(3, 4), gap, norm)
    assert torch.isfinite(moves).all()
    torch.testing.assert_close(moves[0, 0, :3], torch.tensor([0.5, -0.5, 0.0]))
    torch.testing.assert_close(moves[1, 0, :3], torch.tensor([-0.5, 0.5, 0.0]))
    assert (moves[2] == 0).all()


# --- Closed forms ---


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_finds_the_closed_form_on_a_linear_model(norm, classes, shape):
    model, x = linear(classes), batch(shape=shape, dtype=torch.float32)
    y = predicted(model, x)
    x_adv = fab(model, x, y, norm=norm, steps=30, bounds=WIDE)
    assert (predicted(model, x_adv) != y).all()
    with torch.no_grad():
        logits = model(x)
    margin = logits.gather(1, y[:, None]) - logits
    normal = model[1].weight.detach()
    slope = (normal[None] - normal[y][:, None]).norm(DUAL[norm], dim=2)
    ratio = (margin / slope).nan_to_num(torch.inf).scatter(1, y[:, None], torch.inf)
    expected = ratio.amin(1).double().numpy()
    found = sizes(x_adv, x, norm)
    assert (found >= expected * (1 - 1e-4)).all()
    assert (found <= expected * 1.01).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.slow
def test_it_finds_the_closest_where_the_box_is_in_the_way(norm, classes):
    model, x = linear(classes), batch(30, dtype=torch.float32)
    x = x.where(x < 0.7, 1.0).where(x > 0.3, 0.0)
    y = predicted(model, x)
    x_adv = fab(model, x, y, norm=norm)
    expected = boxed_distance(model, x, y, norm)
    possible = np.isfinite(expected)
    assert possible.sum() > 10
    assert ((predicted(model, x_adv) != y).numpy() == possible).all()
    found = sizes(x_adv, x, norm)[possible]
    assert (found >= expected[possible] * (1 - 1e-4)).all()
    assert (found <= expected[possible] * 1.01).all()
    assert ((x_adv >= 0) & (x_adv <= 1)).all()


def by_hand(model, x, y, targets, steps):
    """Algorithm 1 of Croce and Hein (2020) for l2 towards one class, without a box, written out."""
    current, best = x.clone(), x.clone()
    closest = torch.full((len(x),), torch.inf, dtype=x.dtype)
    for _ in range(steps):
        leaf = current.clone().requires_grad_()
        logits = model(leaf)
        lead = (logits.gather(1, targets[:, None]) - logits.gather(1, y[:, None])).squeeze(1)
        (normal,) = torch.autograd.grad(lead.sum(), leaf)
        squared = normal.square().sum(1)
        lead = lead.detach()
        ahead = lead + (normal * (x - current)).sum(1)
        at_current = -(lead / squared)[:, None] * normal
        at_clean = -(ahead / squared)[:, None] * normal
        one, two = at_current.norm(dim=1), at_clean.norm(dim=1)
        alpha = (one / (one + two)).clamp_max(0.1)[:, None]
        current = (1 - alpha) * (current + 1.05 * at_current) + alpha * (x + 1.05 * at_clean)
        hit = predicted(model, current) != y
        better = hit & ((current - x).norm(dim=1) < closest)
        best[better], closest[better] = current[better], (current - x).norm(dim=1)[better]
        current[hit] = 0.1 * x[hit] + 0.9 * current[hit]
    return best


def test_l2_steps_equal_those_by_hand():
    model, x = curved(), batch()
    y = predicted(model, x)
    with torch.no_grad():
        targets = model(x).scatter(1, y[:, None], -torch.inf).argmax(1)
    expected = by_hand(model, x, y, targets, 15)
    assert (predicted(model, expected) != y).all()
    found = fab(model, x, y, norm="l2", steps=15, targets=1, bounds=WIDE)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


# --- What is kept ---


@pytest.mark.parametrize("norm", NORMS)
def test_kept_points_fool_the_model_within_the_box_at_the_distance_told(norm):
    model, x = curved(dtype=torch.float32), batch(40, dtype=torch.float32)
    x[0], x[1] = 0.0, 1.0
    y = predicted(model, x)
    with attackable(model) as net:
        attack = FAB(norm=norm, steps=20)
        state = attack.run(net, attack.init(net, prepare_batch(net, x, y, None, (0.0, 1.0))))
    kept = attack.result(state)
    assert ((kept >= 0) & (kept <= 1)).all()
    assert state.success.all()
    assert torch.equal(predicted(model, kept) != y, state.success)
    np.testing.assert_allclose(sizes(kept, x, norm), state.distance.numpy(), rtol=1e-5)
    assert torch.equal(state.value, -state.distance)


@pytest.mark.parametrize("norm", NORMS)
def test_an_input_that_is_wrong_already_is_its_own_result(norm):
    model, x = curved(), batch()
    y = (predicted(model, x) + 1) % 4
    assert torch.equal(fab(model, x, y, norm=norm, steps=3), x)
    with attackable(model) as net:
        attack = FAB(norm=norm, steps=3)
        state = attack.init(net, prepare_batch(net, x, y, None, (0.0, 1.0)))
    assert (state.distance == 0).all()
    assert state.success.all()
    assert attack.finished(state).all()


@pytest.mark.parametrize("norm", NORMS)
def test_a_failed_attack_returns_a_perturbed_input(norm):
    # Class 0 leads by more than the box can take away.
    model, x = linear(3), batch(dtype=torch.float32)
    model[1].bias.data = torch.tensor([100.0, 0.0, 0.0])
    y = torch.zeros(8, dtype=torch.int64)
    for eps in (None, 0.1):
        x_adv = FAB(norm=norm, eps=eps, steps=3)(model, x, y)
        assert (predicted(model, x_adv) == 0).all()
        assert (sizes(x_adv, x, norm) > 0).all()
        assert eps is None or (sizes(x_adv, x, norm) <= eps + 1e-6).all()


def test_without_a_gradient_nothing_moves():
    model, x = linear(3), batch(dtype=torch.float32)
    model[1].weight.data.zero_()
    model[1].bias.data = torch.tensor([1.0, 0.0, 0.0])
    for norm in NORMS:
        assert torch.equal(fab(model, x, torch.zeros(8, dtype=torch.int64), norm=norm, steps=3), x)


def test_however_tiny_a_gradient_is_a_direction():
    model, x = linear(), batch(dtype=torch.float32)
    y = predicted(model, x)
    plain = fab(model, x, y, norm="l2", steps=10)
    for scale in (1e-18, 1e18):
        model[1].weight.data *= scale
        model[1].bias.data *= scale
        torch.testing.assert_close(fab(model, x, y, norm="l2", steps=10), plain)
        model[1].weight.data /= scale
        model[1].bias.data /= scale


def test_more_targets_are_never_worse_and_a_wrong_answer_of_any_class_counts():
    model, x = curved(6), batch(30)
    y = predicted(model, x)
    found = [
        sizes(fab(model, x, y, norm="l2", steps=15, targets=k), x, "l2") for k in (1, 2, 5, 50)
    ]
    for fewer, more in itertools.pairwise(found):
        assert (more <= fewer + 1e-12).all()
    assert (found[2] < found[0]).any()
    np.testing.assert_array_equal(found[2], found[3])


def test_the_targets_are_the_most_likely_other_classes():
    model, x = curved(5), batch()
    y = torch.arange(8) % 5
    with attackable(model) as net:
        state = FAB(norm="l2", targets=3).init(net, prepare_batch(net, x, y, None, (0.0, 1.0)))
        logits = net.logits(x)
    for row in range(8):
        order = [k for k in logits[row].argsort(descending=True).tolist() if k != y[row]]
        assert state.targets[row].tolist() == order[:3]


# --- What a result depends on, and what it does not ---


@pytest.mark.parametrize("norm", NORMS)
def test_a_sample_does_not_depend_on_its_batch(norm):
    model, x, y = curved(), batch(), torch.arange(8) % 4
    whole = fab(model, x, y, norm=norm, steps=6)
    assert torch.equal(fab(model, x, y, norm=norm, steps=6), whole)
    for size in (1, 3):
        rows = zip(x.split(size), y.split(size), strict=True)
        parts = torch.cat([fab(model, a, b, norm=norm, steps=6) for a, b in rows])
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-9)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    shuffled = fab(model, x[order], y[order], norm=norm, steps=6)
    torch.testing.assert_close(shuffled, whole[order], rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", NORMS)
def test_samples_at_different_stages_go_on_as_if_alone(norm):
    model, x = curved(), batch(9)
    y = predicted(model, x)
    attack = FAB(norm=norm, steps=5, targets=2)
    with attackable(model) as net:
        start = attack.init(net, prepare_batch(net, x, y, None, (0.0, 1.0)))
        alone = attack.run(net, start)
        parts = [FABState(*(field[k : k + 3] for field in start)) for k in (0, 3, 6)]
        for ahead, part in zip((0, 4, 7), list(parts), strict=True):
            for _ in range(ahead):
                part = attack.step(net, part)
            parts[ahead // 3] = part
        mixed = FABState(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
        assert mixed.step.tolist() == [0] * 3 + [4] * 3 + [7] * 3
        done = {}
        for _ in range(attack.max_evaluations):
            mixed = attack.step(net, mixed)
            for row in attack.finished(mixed).nonzero().squeeze(1).tolist():
                done.setdefault(row, attack.result(mixed)[row])
    together = torch.stack([done[row] for row in range(9)])
    torch.testing.assert_close(together, attack.result(alone), rtol=0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("limited", [False, True])
def test_the_pool_does_not_matter(norm, limited):
    model, x = curved(), batch(20)
    y = predicted(model, x)
    eps = float(np.median(sizes(fab(model, x, y, norm=norm, steps=6), x, norm)))
    attack = FAB(norm=norm, steps=6, eps=eps if limited else None).stop_at_success()
    outcomes = []
    with attackable(model) as net:
        for pool in (3, 50):
            rows = prepare_batch(net, x, y, None, (0.0, 1.0))
            verdicts = list(worst_case([attack], net, [rows], pool))
            ids = torch.cat([v.ids for v in verdicts]).argsort()
            adversarial = torch.cat([v.adversarial for v in verdicts])[ids]
            success = torch.cat([v.success for v in verdicts])[ids]
            outcomes.append((adversarial, success))
    for first, second in zip(*outcomes, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-9)
    assert success.sum() == (10 if limited else 20)
    if limited:
        assert (sizes(adversarial, x, norm) <= eps + 1e-6).all()


@pytest.mark.parametrize("norm", NORMS)
def test_robust_accuracy_counts_the_samples_further_than_eps(norm):
    model, x = curved(), batch(20)
    y = predicted(model, x)
    distance = np.sort(sizes(fab(model, x, y, norm=norm, steps=6), x, norm))
    rows = torch.utils.data.TensorDataset(x, y)
    attack = FAB(eps=float(distance[6:8].mean()), norm=norm, steps=6)
    assert af.robust_accuracy(model, rows, attack=attack, batch_size=6).count == 13


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes_take_fewer_steps(classes):
    model, x = curved(classes), batch()
    attack = FAB(norm="l2", steps=4)
    assert attack.max_evaluations == 36
    with attackable(model) as net:
        state = attack.init(net, prepare_batch(net, x, predicted(model, x), None, (0.0, 1.0)))
        state = attack.run(net, state)
    assert (state.step == 4 * (classes - 1)).all()
    assert attack.finished(state).all()


def test_the_global_random_state_is_untouched():
    model, x = curved(), batch()
    state = torch.get_rng_state()
    fab(model, x, torch.arange(8) % 4, norm="l2", steps=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_other_bounds_hold_and_scale():
    # The same problem in other units.
    model, x = curved(), batch()
    y = predicted(model, x)
    wide = nn.Sequential(Shifted(), model)
    for norm in NORMS:
        plain = fab(model, x, y, norm=norm, steps=10)
        scaled = fab(wide, 4 * x - 2, y, norm=norm, steps=10, bounds=(-2.0, 2.0))
        torch.testing.assert_close((scaled + 2) / 4, plain, rtol=0, atol=1e-7)


class Shifted(nn.Module):
    def forward(self, x):
        return (x + 2) / 4


def test_the_dtype_is_that_of_the_inputs():
    for model_dtype, dtype in itertools.product([torch.float32, torch.float64], repeat=2):
        model, x = curved(dtype=model_dtype), batch(dtype=dtype)
        x_adv = fab(model, x, torch.arange(8) % 4, norm="l2", steps=2)
        assert x_adv.dtype == dtype


def test_in_bfloat16_what_is_kept_fools_the_model_in_float32(monkeypatch):
    monkeypatch.setattr("advfeat.model.formats.supports_bfloat16", lambda device: True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    x = torch.rand(20, 3, 8, 8)
    y = predicted(model, x)
    x_adv = fab(model, x, y, norm="l2", steps=20, precision="bfloat16")
    assert (predicted(model, x_adv) != y).all()
    plain = fab(model, x, y, norm="l2", steps=20)
    assert sizes(x_adv, x, "l2").mean() < 1.05 * sizes(plain, x, "l2").mean()


def test_images_in_channels_last_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    x = torch.rand(5, 3, 8, 8)
    y = predicted(model, x)
    for norm in NORMS:
        x_adv = fab(model, x, y, norm=norm, steps=10)
        assert (predicted(model, x_adv) != y).all()
        again = fab(model, x.contiguous(memory_format=torch.channels_last), y, norm=norm, steps=10)
        torch.testing.assert_close(again, x_adv)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"norm": "l3"}, "norm"),
        ({"norm": "linf", "eps": 8.0}, "eps"),
        ({"norm": "l2", "eps": -1.0}, "eps"),
        ({"norm": "l2", "steps": 0}, "steps"),
        ({"norm": "l2", "targets": 0}, "targets"),
        ({"norm": "l2", "bounds": (1.0, 0.0)}, "bounds"),
    ],
)
def test_bad_settings_are_refused(options, argument):
    with pytest.raises((ValueError, TypeError), match=f"^{argument}="):
        FAB(**options)


def test_each_norms_attack_is_the_best_in_its_own_norm():
    model, x = curved(), batch(20)
    y = predicted(model, x)
    found = {norm: fab(model, x, y, norm=norm, steps=30) for norm in NORMS}
    for norm in NORMS:
        own = sizes(found[norm], x, norm).mean()
        assert all(own <= sizes(other, x, norm).mean() + 1e-9 for other in found.values())
