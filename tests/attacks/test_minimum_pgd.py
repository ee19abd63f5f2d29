"""MinimumPGD: closed forms on linear models, masked gradients, and the laws of every result."""

import numpy as np
import pytest
import torch
from test_fmn import boxed_distance, distances
from torch import nn
from toys import NORMS, SHAPES, WIDE, batch, curved, linear, predicted, sizes

from advfeat.attacks import FAB, FMN, MinimumPGD, minimum_pgd
from advfeat.attacks._minimum_pgd import MinimumPGDOnMaskedGradients
from advfeat.attacks.base import prepare_batch
from advfeat.attacks.pool import attack_batch
from advfeat.attacks.samples import concat_samples, select_samples
from advfeat.model import attackable


def run(model, attack, x, y, start=None):
    with attackable(model) as net:
        rows = prepare_batch(net, x, y, None, attack.bounds, attack.targeted)
        return attack.run(net, attack.init(net, rows._replace(start=start)))


# --- Closed forms ---


@pytest.mark.parametrize("noise", [0.0, 6.0])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("classes", [2, 3])
def test_it_finds_the_closed_form_on_a_linear_model(norm, classes, noise):
    model, x = linear(classes), batch(shape=SHAPES[classes - 2], dtype=torch.float32)
    y = predicted(model, x)
    x_adv = minimum_pgd(model, x, y, norm=norm, bounds=WIDE, noise=noise, seed=0)
    assert (predicted(model, x_adv) != y).all()
    expected, found = distances(model, x, y, norm).min(1), sizes(x_adv, x, norm)
    assert (found >= expected * (1 - 1e-4)).all()
    assert (found <= expected * 1.01).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.slow
def test_it_finds_the_closest_where_the_bounds_are_in_the_way(norm, classes):
    model, x = linear(classes), batch(30, dtype=torch.float32)
    x = x.where(x < 0.7, 1.0).where(x > 0.3, 0.0)
    y = predicted(model, x)
    x_adv = minimum_pgd(model, x, y, norm=norm, seed=0)
    weight = model[1].weight.detach().double().numpy()
    logits = model(x).detach().double().numpy()
    expected = np.array(
        [
            min(
                boxed_distance(weight[k] - weight[label], row, own[label] - own[k], norm)
                for k in range(classes)
                if k != label
            )
            for row, own, label in zip(x.double().numpy(), logits, y.tolist(), strict=True)
        ]
    )
    possible = np.isfinite(expected)
    assert possible.sum() > 10
    assert ((predicted(model, x_adv) != y).numpy() == possible).all()
    found = sizes(x_adv, x, norm)[possible]
    assert (found >= expected[possible] * (1 - 1e-4)).all()
    assert (found <= expected[possible] * 1.01).all()
    assert ((x_adv >= 0) & (x_adv <= 1)).all()


class Dead(nn.Module):
    """A linear model behind ReLUs that are dead at the clean input: its gradient is zero there."""

    def __init__(self, size=0.2, features=16):
        super().__init__()
        self.size, self.features = size, features

    def forward(self, x):
        # Class 1 needs the mean to rise above 0.5 + size.
        rise = torch.relu((x - 0.5).mean(1) - self.size / 2)
        return torch.stack([torch.full_like(rise, self.size / 2), rise], 1)


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_noise_leads_past_dead_units(norm):
    x = torch.full((8, 16), 0.5)
    y = torch.zeros(8, dtype=torch.int64)
    plain = run(Dead(), MinimumPGD(norm=norm, noise=0.0), x, y)
    assert plain.distance.isinf().all()
    found = run(Dead(), MinimumPGD(norm=norm, seed=0, restarts=3), x, y)
    # The closest point raises all entries by 0.2, or one sum by 3.2.
    exact = {"linf": 0.2, "l2": 0.2 * 4, "l1": 0.2 * 16}[norm]
    assert found.success.float().mean() > 0.7
    assert (found.distance >= exact * (1 - 1e-4)).all()
    assert found.distance[found.success].max() < exact * 1.05


# --- What is kept ---


@pytest.mark.parametrize("norm", NORMS)
def test_kept_points_fool_the_model_within_the_bounds_at_their_distance(norm):
    model, x = curved(dtype=torch.float32), batch(40, dtype=torch.float32)
    x[0], x[1] = 0.0, 1.0
    y = predicted(model, x)
    attack = MinimumPGD(norm=norm, steps=30, restarts=2, seed=0)
    state = run(model, attack, x, y)
    kept = attack.result(state)
    assert ((kept >= 0) & (kept <= 1)).all()
    assert state.success.float().mean() > 0.9
    for size in (40, 7, 1):
        said = torch.cat([predicted(model, rows) for rows in kept.split(size)])
        assert torch.equal(said != y, state.success)
    found = torch.from_numpy(sizes(kept, x, norm)).float()
    torch.testing.assert_close(found[state.success], state.distance[state.success])
    assert torch.equal(state.value, -state.distance)


@pytest.mark.parametrize("norm", NORMS)
def test_more_restarts_are_never_farther(norm):
    model, x = curved(dtype=torch.float32), batch(40, dtype=torch.float32)
    y = predicted(model, x)
    once, thrice = (
        run(model, MinimumPGD(norm=norm, steps=20, restarts=count, seed=0), x, y).distance
        for count in (1, 3)
    )
    assert (thrice <= once).all()
    assert (thrice < once).any()


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", [FMN, FAB, MinimumPGD])
def test_a_start_that_fools_the_model_is_kept_and_one_that_does_not_is_not(kind, norm):
    model, x = curved(dtype=torch.float32), batch(20, dtype=torch.float32)
    y = predicted(model, x)
    near = run(model, MinimumPGD(norm=norm, restarts=2, seed=0), x, y)
    state = run(model, kind(norm=norm, steps=2), x, y, near.x_best)
    assert (state.distance <= near.distance).all()
    nothing = run(model, kind(norm=norm, steps=2), x, y, x + 1e-4)
    alone = run(model, kind(norm=norm, steps=2), x, y)
    if kind is not MinimumPGD:
        torch.testing.assert_close(nothing.distance, alone.distance)
    assert (nothing.distance > 1e-3).all()


def test_an_input_that_fools_the_model_already_is_its_own_result():
    model, x = curved(), batch()
    y = predicted(model, x)
    assert torch.equal(minimum_pgd(model, x, (y + 1) % 4, norm="l2", steps=3, seed=0), x)


def test_without_any_gradient_it_returns_inputs_within_the_bounds():
    model, x = linear(3), batch(dtype=torch.float32)
    model[1].weight.data.zero_()
    model[1].bias.data = torch.tensor([1.0, 0.0, 0.0])
    y = torch.zeros(8, dtype=torch.int64)
    for norm in NORMS:
        assert torch.equal(minimum_pgd(model, x, y, norm=norm, steps=3, seed=0), x)


# --- What a result depends on, and what it does not ---


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_a_sample_does_not_depend_on_its_batch(norm):
    model, x, y = curved(), batch(), torch.arange(8) % 4
    attack = MinimumPGD(norm=norm, steps=9, restarts=2, seed=0)
    whole = attack(model, x, y)
    for size in (1, 3):
        rows = zip(x.split(size), y.split(size), torch.arange(8).split(size), strict=True)
        parts = torch.cat([attack(model, a, b, index=i) for a, b, i in rows])
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-9)


def test_samples_at_different_stages_go_on_as_if_alone():
    model, x = curved(), batch(9)
    y = predicted(model, x)
    attack = MinimumPGD(norm="l2", steps=9, restarts=2, seed=0)
    alone = attack.result(run(model, attack, x, y))
    with attackable(model) as net:
        start = attack.init(net, prepare_batch(net, x, y, None, (0.0, 1.0)))
        parts = []
        for first, ahead in ((0, 0), (3, 4), (6, 11)):
            part = select_samples(start, torch.arange(first, first + 3))
            for _ in range(ahead):
                part = attack.step(net, part)
            parts.append(part)
        mixed = concat_samples(concat_samples(*parts[:2]), parts[2])
        done = {}
        for _ in range(attack.max_evaluations):
            mixed = attack.step(net, mixed)
            for row in attack.finished(mixed).nonzero().squeeze(1).tolist():
                done.setdefault(row, attack.result(mixed)[row])
    together = torch.stack([done[row] for row in range(9)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)


def test_the_seed_decides_and_the_global_random_state_is_untouched():
    model, x = curved(), batch()
    y = predicted(model, x)
    state = torch.get_rng_state()
    first, again, other = (
        minimum_pgd(model, x, y, norm="l2", steps=9, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"norm": "l3"}, "norm"),
        ({"norm": "l2", "steps": 0}, "steps"),
        ({"norm": "l2", "restarts": 0}, "restarts"),
        ({"norm": "l2", "step_size": 0.0}, "step_size"),
        ({"norm": "l2", "noise": -1.0}, "noise"),
        ({"norm": "l2", "targets": 0}, "targets"),
    ],
)
def test_bad_settings_raise(options, argument):
    with pytest.raises((ValueError, TypeError), match=f"^{argument}="):
        MinimumPGD(**options)


def test_only_samples_nearer_than_predicted_take_further_restarts():
    class Bent(nn.Module):
        """Class 1 is reached at half of what the gradient at the inputs (4 x 0.5) predicts."""

        def forward(self, x):
            total = x.flatten(1).sum(1) - 2
            lead = total + 30 * torch.relu(total - 0.2) - 1
            return torch.stack([-lead, lead], 1)

    class Straight(Bent):
        def forward(self, x):
            lead = x.flatten(1).sum(1) - 3
            return torch.stack([-lead, lead], 1)

    x, y = torch.full((3, 4), 0.5), torch.zeros(3, dtype=torch.int64)

    def steps(model):
        # Too small a ball: nothing ends the search but its own rule.
        attack = MinimumPGDOnMaskedGradients(eps=0.01, norm="l1", steps=10, restarts=4, seed=0)
        with attackable(model) as net:
            batch = prepare_batch(net, x, y, None, (0.0, 1.0))
            return attack_batch(attack, net, batch).step.tolist()

    assert steps(Straight()) == [22, 22, 22]
    assert steps(Bent()) == [44, 44, 44]
