"""FMN: closed forms on linear models, and the laws that every result obeys."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from toys import (
    DUAL,
    NORMS,
    ORDER,
    SHAPES,
    WIDE,
    batch,
    curved,
    linear,
    masked,
    predicted,
    sizes,
)

import advfeat as af
from advfeat import threat
from advfeat.attacks import fab
from advfeat.attacks._fmn import FMN, FMNState, fmn
from advfeat.attacks.base import prepare_batch
from advfeat.attacks.minimum_norm import likely_others, linearised_distances, nearest_class
from advfeat.attacks.pool import worst_case
from advfeat.model import attackable


def run(model, attack, x, y):
    with attackable(model) as net:
        rows = prepare_batch(net, x, y, None, attack.bounds, attack.targeted)
        return attack.run(net, attack.init(net, rows))


# --- Closed forms ---


def distances(model, x, y, norm):
    """Distance of each row from the boundary to each class of a linear model, without a box."""
    with torch.no_grad():
        logits = model(x)
    normal = model[1].weight.detach()
    margin = logits.gather(1, y[:, None]) - logits
    slope = (normal[None] - normal[y][:, None]).norm(DUAL[norm], dim=2)
    found = (margin / slope).scatter(1, y[:, None], torch.inf)
    return found.double().numpy()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_finds_the_closed_form_on_a_linear_model(norm, classes, shape):
    model, x = linear(classes), batch(shape=shape, dtype=torch.float32)
    y = predicted(model, x)
    x_adv = fmn(model, x, y, norm=norm, bounds=WIDE, step_size=1.0)
    assert (predicted(model, x_adv) != y).all()
    expected, found = distances(model, x, y, norm).min(1), sizes(x_adv, x, norm)
    assert (found >= expected * (1 - 1e-4)).all()
    assert (found <= expected * 1.01).all()


@pytest.mark.parametrize("norm", NORMS)
def test_targeted_it_finds_the_closed_form_too(norm):
    # The nearest point of class k: where all planes to it but one are far, that plane's.
    model, x = linear(3), batch(dtype=torch.float32)
    y = predicted(model, x)
    targets = (y + 1) % 3
    x_adv = fmn(model, x, targets, norm=norm, targeted=True, bounds=WIDE, step_size=1.0)
    assert (predicted(model, x_adv) == targets).all()
    found = sizes(x_adv, x, norm)
    plane = distances(model, x, y, norm)[np.arange(8), targets.numpy()]
    assert (found >= plane * (1 - 1e-4)).all()
    assert (found <= plane * 1.01).mean() > 0.5


def boxed_distance(w, x, gap, norm):
    """Norm of the smallest move from x within [0, 1] that adds the gap to w . x; inf for none."""
    room = np.where(w > 0, 1 - x, x)
    if np.abs(w) @ room < gap:
        return np.inf
    if norm == "l1":  # a fractional knapsack
        cost = 0.0
        for i in np.argsort(-np.abs(w)):
            length = min(room[i], gap / abs(w[i]))
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


@pytest.mark.parametrize("accelerator", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_the_class_aimed_at_is_the_nearest_of_all(monkeypatch, norm, accelerator):
    # On the CPU classes that are too far even without the bounds are not measured within them.
    model, x = curved(classes=8, dtype=torch.float32), batch(60, dtype=torch.float32)
    x = x.where(x < 0.8, 1.0).where(x > 0.2, 0.0)
    y = predicted(model, x)
    with attackable(model) as net:
        samples = prepare_batch(net, x, y, None, (0.0, 1.0))
        classes = likely_others(net.logits(x), y, 7)
        distances, _ = linearised_distances(net, samples, classes, norm, (0.0, 1.0))
        expected = classes.gather(1, distances.argmin(1, keepdim=True)).squeeze(1)
        if accelerator:
            monkeypatch.setattr(threat, "known_none", lambda mask: False)
        found = nearest_class(net, samples, classes, norm, (0.0, 1.0))
    assert torch.equal(found, expected)
    assert (expected != classes[:, 0]).sum() > 2  # not simply the likeliest


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.slow
def test_it_finds_the_closest_where_the_box_is_in_the_way(norm, classes):
    model, x = linear(classes), batch(30, dtype=torch.float32)
    x = x.where(x < 0.7, 1.0).where(x > 0.3, 0.0)
    y = predicted(model, x)
    x_adv = fmn(model, x, y, norm=norm)
    weight = model[1].weight.detach().double().numpy()
    with torch.no_grad():
        logits = model(x).double().numpy()
    rows, labels = x.double().numpy(), y.tolist()
    expected = np.array(
        [
            min(
                boxed_distance(weight[k] - weight[label], row, own[label] - own[k], norm)
                for k in range(classes)
                if k != label
            )
            for row, own, label in zip(rows, logits, labels, strict=True)
        ]
    )
    possible = np.isfinite(expected)
    assert possible.sum() > 10
    assert ((predicted(model, x_adv) != y).numpy() == possible).all()
    found = sizes(x_adv, x, norm)[possible]
    assert (found >= expected[possible] * (1 - 1e-4)).all()
    assert (found <= expected[possible] * 1.01).all()
    assert ((x_adv >= 0) & (x_adv <= 1)).all()


# --- What is kept ---


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("targeted", [False, True])
def test_kept_points_fool_the_model_within_the_box_at_the_distance_told(norm, targeted):
    model, x = curved(dtype=torch.float32), batch(40, dtype=torch.float32)
    x[0], x[1] = 0.0, 1.0
    y = predicted(model, x)
    labels = (y + 1) % 4 if targeted else y
    attack = FMN(norm=norm, targeted=targeted, steps=60)
    state = run(model, attack, x, labels)
    kept = attack.result(state)
    assert ((kept >= 0) & (kept <= 1)).all()
    assert state.success.float().mean() > 0.7
    # In other batches too, where the logits are rounded differently.
    for size in (40, 7, 1):
        said = torch.cat([predicted(model, rows) for rows in kept.split(size)])
        assert torch.equal((said == labels) == targeted, state.success)
    assert torch.equal(state.success, state.distance.isfinite())
    found = torch.from_numpy(sizes(kept, x, norm)).float()
    torch.testing.assert_close(found[state.success], state.distance[state.success])
    assert torch.equal(state.value, -state.distance)


@pytest.mark.parametrize("steps", [100, 300])
def test_what_ends_on_the_boundary_is_on_the_far_side_of_rounding(steps):
    # Weights and inputs so large that single logits are far more uncertain than the search is.
    model, x = linear(3), batch(50, dtype=torch.float32)
    model[1].bias.data += 1000
    y = predicted(model, x)
    kept = fmn(model, x, y, norm="l2", steps=steps)
    assert (predicted(model, kept) != y).all()
    for size in (1, 7):
        assert (torch.cat([predicted(model, rows) for rows in kept.split(size)]) != y).all()
    assert (predicted(model.double(), kept.double()) != y).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("targeted", [False, True])
def test_an_input_that_fools_the_model_already_is_its_own_result(norm, targeted):
    model, x = curved(), batch()
    y = predicted(model, x)
    labels = y if targeted else (y + 1) % 4
    assert torch.equal(fmn(model, x, labels, norm=norm, targeted=targeted, steps=3), x)
    attack = FMN(norm=norm, targeted=targeted, steps=3)
    with attackable(model) as net:
        state = attack.init(net, prepare_batch(net, x, labels, None, (0.0, 1.0)))
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
        x_adv = FMN(norm=norm, eps=eps, steps=1)(model, x, y)
        assert (predicted(model, x_adv) == 0).all()
        assert (sizes(x_adv, x, norm) > 0).all()
        assert eps is None or (sizes(x_adv, x, norm) <= eps + 1e-6).all()


def test_without_a_gradient_nothing_moves():
    model, x = linear(3), batch(dtype=torch.float32)
    model[1].weight.data.zero_()
    model[1].bias.data = torch.tensor([1.0, 0.0, 0.0])
    for norm in NORMS:
        assert torch.equal(fmn(model, x, torch.zeros(8, dtype=torch.int64), norm=norm, steps=3), x)


def test_however_tiny_a_gradient_is_a_direction():
    model, x = linear(), batch(dtype=torch.float32)
    y = predicted(model, x)
    plain = fmn(model, x, y, norm="l2", steps=10)
    for scale in (2.0**-60, 2.0**60):
        for parameter in model.parameters():
            parameter.data *= scale
        torch.testing.assert_close(fmn(model, x, y, norm="l2", steps=10), plain)
        for parameter in model.parameters():
            parameter.data /= scale


def test_each_norms_attack_is_the_best_in_its_own_norm():
    model, x = curved(), batch(20)
    y = predicted(model, x)
    found = {norm: fmn(model, x, y, norm=norm) for norm in NORMS}
    for norm in NORMS:
        own = sizes(found[norm], x, norm).mean()
        assert all(own <= sizes(other, x, norm).mean() + 1e-9 for other in found.values())


# --- The step ---


def by_hand(model, x, y, steps):
    """Algorithm 1 of Pintor et al. (2021) for linf without an active box, written out."""
    delta, eps, best, closest = torch.zeros_like(x), torch.zeros(len(x)).double(), x.clone(), None
    closest = torch.full((len(x),), torch.inf, dtype=x.dtype)
    for k in range(steps + 1):
        leaf = (x + delta).requires_grad_()
        logits = model(leaf)
        own = logits.gather(1, y[:, None]).squeeze(1)
        others = logits.scatter(1, y[:, None], -torch.inf).amax(1)
        (grad,) = torch.autograd.grad((others - own).sum(), leaf)
        hit = (others > own).detach()
        size = delta.abs().amax(1)
        better = hit & (size < closest)
        best[better], closest[better] = (x + delta)[better], size[better]
        cosine = (1 + np.cos(np.pi * k / steps)) / 2
        gamma, alpha = 0.001 + 0.049 * cosine, 0.01 + 0.99 * cosine
        first = size + (others - own).detach().abs() / grad.abs().sum(1)
        grown = torch.where(closest.isinf(), first, eps * (1 + gamma))
        eps = torch.where(hit, torch.minimum(eps * (1 - gamma), closest), grown)
        delta = delta + alpha * grad / grad.norm(dim=1, keepdim=True)
        delta = delta.clamp(-eps[:, None], eps[:, None])
    return best


def test_linf_steps_equal_those_by_hand():
    # With two classes there is nothing to choose.
    model, x = curved(2), batch()
    y = predicted(model, x)
    expected = by_hand(model, x, y, 30)
    found = fmn(model, x, y, norm="linf", steps=30, bounds=WIDE, step_size=1.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


# --- What a result depends on, and what it does not ---


@pytest.mark.parametrize("norm", NORMS)
def test_a_sample_does_not_depend_on_its_batch(norm):
    model, x, y = curved(), batch(), torch.arange(8) % 4
    whole = fmn(model, x, y, norm=norm, steps=12)
    assert torch.equal(fmn(model, x, y, norm=norm, steps=12), whole)
    for size in (1, 3):
        rows = zip(x.split(size), y.split(size), strict=True)
        parts = torch.cat([fmn(model, a, b, norm=norm, steps=12) for a, b in rows])
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-9)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    shuffled = fmn(model, x[order], y[order], norm=norm, steps=12)
    torch.testing.assert_close(shuffled, whole[order], rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", NORMS)
def test_samples_at_different_stages_go_on_as_if_alone(norm):
    model, x = curved(), batch(9)
    y = predicted(model, x)
    attack = FMN(norm=norm, steps=12)
    alone = attack.result(run(model, attack, x, y))
    with attackable(model) as net:
        start = attack.init(net, prepare_batch(net, x, y, None, (0.0, 1.0)))
        parts = []
        for first, ahead in ((0, 0), (3, 4), (6, 9)):
            part = FMNState(*(field[first : first + 3] for field in start))
            for _ in range(ahead):
                part = attack.step(net, part)
            parts.append(part)
        mixed = FMNState(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
        assert mixed.step.tolist() == [0] * 3 + [4] * 3 + [9] * 3
        done = {}
        for _ in range(attack.max_evaluations):
            mixed = attack.step(net, mixed)
            for row in attack.finished(mixed).nonzero().squeeze(1).tolist():
                done.setdefault(row, attack.result(mixed)[row])
    together = torch.stack([done[row] for row in range(9)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("limited", [False, True])
def test_the_pool_does_not_matter(norm, limited):
    model, x = curved(), batch(20)
    y = predicted(model, x)
    distance = run(model, FMN(norm=norm, steps=20), x, y).distance
    eps = float(distance.sort().values[9:11].mean())
    attack = FMN(norm=norm, steps=20, eps=eps if limited else None).stop_at_success()
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
    assert torch.equal(success, distance < (eps if limited else torch.inf))
    if limited:
        assert (sizes(adversarial, x, norm) <= eps + 1e-6).all()


@pytest.mark.parametrize("norm", NORMS)
def test_robust_accuracy_counts_the_samples_further_than_eps(norm):
    model, x = curved(), batch(20)
    y = predicted(model, x)
    distance = run(model, FMN(norm=norm, steps=20), x, y).distance.sort().values
    rows = torch.utils.data.TensorDataset(x, y)
    attack = FMN(eps=float(distance[6:8].mean()), norm=norm, steps=20)
    assert af.robust_accuracy(model, rows, attack=attack, batch_size=6).count == 13


def test_the_global_random_state_is_untouched():
    model, x = curved(), batch()
    state = torch.get_rng_state()
    fmn(model, x, torch.arange(8) % 4, norm="l2", steps=2)
    assert torch.equal(torch.get_rng_state(), state)


class Shifted(nn.Module):
    def forward(self, x):
        return (x + 2) / 4


def test_other_bounds_hold_and_scale():
    # The same problem in other units.
    model, x = curved(), batch()
    y = predicted(model, x)
    wide = nn.Sequential(Shifted(), model)
    for norm in NORMS:
        plain = fmn(model, x, y, norm=norm, steps=20)
        scaled = fmn(wide, 4 * x - 2, y, norm=norm, steps=20, bounds=(-2.0, 2.0))
        torch.testing.assert_close((scaled + 2) / 4, plain, rtol=0, atol=1e-7)


def test_the_dtype_is_that_of_the_inputs():
    for model_dtype, dtype in itertools.product([torch.float32, torch.float64], repeat=2):
        model, x = curved(dtype=model_dtype), batch(dtype=dtype)
        attack = FMN(norm="l2", steps=2)
        y = predicted(curved(), batch())
        assert attack(model, x, y).dtype == dtype
        state = run(model, attack, x, y)
        floats = (state.current, state.radius, state.x_best, state.distance, state.value)
        assert {field.dtype for field in floats} == {dtype}


def test_in_bfloat16_what_is_kept_fools_the_model_in_float32(monkeypatch):
    monkeypatch.setattr("advfeat.model.formats.supports_bfloat16", lambda device: True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    x = torch.rand(20, 3, 8, 8)
    y = predicted(model, x)
    x_adv = fmn(model, x, y, norm="l2", precision="bfloat16")
    assert (predicted(model, x_adv) != y).all()
    plain = fmn(model, x, y, norm="l2")
    assert sizes(x_adv, x, "l2").mean() < 1.05 * sizes(plain, x, "l2").mean()


def test_images_in_channels_last_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    x = torch.rand(5, 3, 8, 8)
    y = predicted(model, x)
    for norm in NORMS:
        x_adv = fmn(model, x, y, norm=norm, steps=30)
        assert (predicted(model, x_adv) != y).all()
        again = fmn(model, x.contiguous(memory_format=torch.channels_last), y, norm=norm, steps=30)
        torch.testing.assert_close(again, x_adv)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"norm": "l3"}, "norm"),
        ({"norm": "linf", "eps": 8.0}, "eps"),
        ({"norm": "l2", "eps": -1.0}, "eps"),
        ({"norm": "l2", "steps": 0}, "steps"),
        ({"norm": "l2", "step_size": 0.0}, "step_size"),
        ({"norm": "l2", "bounds": (1.0, 0.0)}, "bounds"),
    ],
)
def test_bad_settings_are_refused(options, argument):
    with pytest.raises((ValueError, TypeError), match=f"^{argument}="):
        FMN(**options)


@pytest.mark.parametrize("attack", [fmn, fab])
def test_a_class_that_the_model_rules_out_changes_nothing(attack):
    model, x = curved(3), batch()
    y = predicted(model, x)
    expected = attack(model, x, y, norm="l2", steps=20)
    found = attack(masked(model), x, y, norm="l2", steps=20)
    assert (predicted(model, found) != y).all()
    assert (sizes(found, x, "l2") <= 1.02 * sizes(expected, x, "l2")).all()
