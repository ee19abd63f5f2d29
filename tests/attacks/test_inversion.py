"""Representation inversion: the activations of one input, reached from another."""

import pytest
import torch
from torch import nn
from toys import ends_and_stays

from advfeat.attacks import Batch, invert
from advfeat.attacks.inversion import Inversion
from advfeat.model import attackable


def images(count=4, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 4, 4, generator=generator, dtype=dtype)


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(96, 20), nn.Linear(20, 3)
    ).to(dtype)


def pixels(x):
    return x.flatten(1)


@pytest.mark.parametrize("step_size", [0.1, 0.02])
def test_at_the_pixels_themselves_it_reaches_the_source(step_size):
    x, start = images(), images(seed=1)
    away = (start - x).flatten(1).norm(dim=1).max()
    steps = int(away / step_size) + 2
    made = invert(nn.Identity(), x, start, layer=pixels, steps=steps, step_size=step_size)
    assert ((made - x).flatten(1).norm(dim=1) <= step_size + 1e-6).all()


def test_a_step_has_the_given_l2_length():
    x, start = 0.4 + 0.2 * images(), 0.4 + 0.2 * images(seed=1)  # away from the box
    made = invert(network(), x, start, steps=1, step_size=0.05)
    torch.testing.assert_close((made - start).flatten(1).norm(dim=1), torch.full((4,), 0.05))


def test_a_linear_layer_is_descended_as_by_hand():
    torch.manual_seed(0)
    matrix = torch.randn(48, 48, dtype=torch.float64) / 7 + torch.eye(48, dtype=torch.float64)
    x, start = images(dtype=torch.float64), images(seed=1, dtype=torch.float64)
    made = invert(
        nn.Identity(), x, start, layer=lambda z: z.flatten(1) @ matrix, steps=30, step_size=0.05
    )
    current = start.flatten(1)
    for _ in range(30):
        gradient = (current - x.flatten(1)) @ matrix @ matrix.T
        current = (current - 0.05 * gradient / gradient.norm(dim=1, keepdim=True)).clamp(0, 1)
    torch.testing.assert_close(made.flatten(1), current)


@pytest.mark.parametrize("layer", [None, "0", "1", "3"])
def test_the_distance_at_the_layer_falls(layer):
    model, x, start = network(), images(), images(seed=1)
    parts = {None: model[:4], "0": model[:1], "1": model[:2], "3": model[:4]}

    def distance(made):
        with torch.no_grad():
            return (parts[layer](made) - parts[layer](x)).flatten(1).norm(dim=1)

    made = invert(model, x, start, layer=layer, steps=60, step_size=0.1)
    assert (distance(made) < 0.3 * distance(start)).all()


def test_a_layer_by_name_module_and_callable_is_the_same():
    model, x, start = network(), images(), images(seed=1)
    by_name = invert(model, x, start, layer="3", steps=5)
    assert torch.equal(invert(model, x, start, layer=model[3], steps=5), by_name)
    by_call = invert(model, x, start, layer=lambda z: model[:4](z), steps=5)
    torch.testing.assert_close(by_call, by_name)


def test_the_default_layer_is_the_input_of_the_last_linear():
    model, x, start = network(), images(), images(seed=1)
    assert torch.equal(
        invert(model, x, start, steps=5), invert(model, x, start, layer="3", steps=5)
    )


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 0.5)])
def test_the_box_holds(bounds):
    low, high = bounds
    x, start = (low + (high - low) * images(seed=seed) for seed in (0, 1))
    made = invert(network(), x, start, steps=10, step_size=3.0, bounds=bounds)
    assert made.min() >= low
    assert made.max() <= high


def test_labels_do_not_matter():
    model, x = network(), images()
    attack = Inversion(steps=5)
    assert torch.equal(
        attack(model, x, torch.tensor([0, 1, 2, 0])), attack(model, x, torch.tensor([2, 2, 1, 1]))
    )


def test_a_start_at_the_source_stays_there():
    x = images()
    made = invert(network(), x, x, steps=5)
    assert torch.equal(made, x)


def test_a_sample_does_not_depend_on_its_batch():
    model, x, start = network(torch.float64), images().double(), images(seed=1).double()
    whole = invert(model, x, start, steps=20)
    rows = [invert(model, x[i : i + 1], start[i : i + 1], steps=20) for i in range(4)]
    torch.testing.assert_close(torch.cat(rows), whole, rtol=0, atol=1e-9)


def test_the_users_tensors_are_not_modified_or_shared():
    x, start = images().requires_grad_(), images(seed=1).requires_grad_()
    before = x.detach().clone(), start.detach().clone()
    made = invert(network(), x, start, steps=3)
    assert not made.requires_grad
    made.fill_(7.0)
    assert torch.equal(x, before[0])
    assert torch.equal(start, before[1])
    assert x.grad is None


@pytest.mark.parametrize("shape", [(2, 6), (2, 3, 2), (2, 1, 2, 3)])
def test_any_rank(shape):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    made = invert(model, torch.rand(shape), torch.rand(shape), steps=3)
    assert made.shape == shape


# --- Momentum ---


def test_without_momentum_nothing_changes():
    model, x, start = network(), images(), images(seed=1)
    plain = invert(model, x, start, steps=30)
    assert torch.equal(invert(model, x, start, steps=30, momentum=0.0), plain)
    assert not torch.equal(invert(model, x, start, steps=30, momentum=0.5), plain)


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_moves_add_up_as_a_heavy_balls(momentum):
    # At the pixels themselves every gradient points to the source: the way is a sum of moves.
    x, start = 0.5 + 0.1 * images(dtype=torch.float64), 0.2 * images(seed=1, dtype=torch.float64)
    moves = [sum(momentum**k for k in range(1 + step)) for step in range(6)]
    made = invert(nn.Identity(), x, start, layer=pixels, steps=6, step_size=0.01, momentum=momentum)
    way = (made - start).flatten(1).norm(dim=1)
    torch.testing.assert_close(way, torch.full_like(way, 0.01 * sum(moves)))


def test_momentum_comes_as_near_in_a_part_of_the_steps():
    model, x, start = network(), images(), images(seed=1)

    def distance(**options):
        made = invert(model, x, start, step_size=0.01, **options)
        return (model[:4](made) - model[:4](x)).norm(dim=1).mean()

    with torch.no_grad():
        assert distance(steps=40, momentum=0.9) < distance(steps=160)


# --- Patience ---


def test_patience_is_off_by_default_and_endless_patience_changes_nothing():
    model, x, start = network(), images(), images(seed=1)
    whole = invert(model, x, start, steps=30)
    assert torch.equal(invert(model, x, start, steps=30, patience=31), whole)
    assert not torch.equal(invert(model, x, start, steps=30, patience=1), whole)


def test_a_sample_stops_where_its_distance_no_longer_falls():
    # At the pixels themselves a step of 0.1 reaches the source and then jumps over it for ever.
    x = 0.4 + 0.2 * images()
    start = x + 0.01
    attack = Inversion(steps=200, step_size=0.1, patience=5)
    made = invert(nn.Identity(), x, start, layer=pixels, steps=200, patience=5)
    assert ((made - x).flatten(1).norm(dim=1) <= 0.1 + 1e-6).all()
    with attackable(nn.Identity(), layer=pixels) as net:
        state = attack.init(net, Batch(x, torch.zeros(4).long(), torch.arange(4), start))
        ends_and_stays(attack, net, state)
