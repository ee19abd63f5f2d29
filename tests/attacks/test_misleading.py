"""Which gradients predict how an output changes: closed forms, and the models that mislead."""

import pytest
import torch
from torch import nn

from advfeat.attacks import PGD
from advfeat.attacks.base import prepare_batch
from advfeat.attacks.misleading import (
    SquareBeyondGradients,
    SquareOnMisleadingGradients,
    check_gradients,
    check_size,
    reached_size,
)
from advfeat.attacks.pool import attack_batch
from advfeat.losses import objective
from advfeat.metrics import robust_accuracy
from advfeat.model import attackable


class Scaled(torch.autograd.Function):
    """The identity, with a backward pass of a given factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.factor * gradient, None


class Linear(nn.Module):
    def __init__(self, factor=1.0, change=lambda x: x, scale=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(20, 3))
        self.factor, self.change, self.scale = factor, change, scale

    def forward(self, x):
        return self.scale * (Scaled.apply(self.change(x), self.factor) @ self.weight)


def misled(model, size=0.02, inputs=None):
    torch.manual_seed(1)
    x = torch.rand(6, 20) if inputs is None else inputs
    y = model(x).argmax(1)
    with attackable(model) as net:
        sizes = torch.full((len(x),), size)
        return check_gradients(net, x, y, sizes, (0.0, 1.0)).misled


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_a_linear_model_is_predicted_whatever_its_scale(scale):
    assert not misled(Linear(scale=scale)).any()


@pytest.mark.parametrize(
    ("factor", "expected"), [(1.0, False), (2.0, False), (10.0, True), (0.1, True), (-1.0, True)]
)
def test_a_gradient_is_misleading_where_it_is_off_by_a_large_factor(factor, expected):
    assert (misled(Linear(factor)) == expected).all()


def test_zero_gradients_are_misleading():
    assert misled(Linear(change=torch.detach)).all()
    assert misled(Linear(change=lambda x: torch.round(16 * x) / 16)).all()


def test_changes_below_the_resolution_of_float32_say_nothing():
    assert not misled(Linear(), size=1e-12).any()


def test_noise_of_a_random_model_says_nothing():
    torch.manual_seed(2)
    assert not misled(Linear(change=lambda x: x + 0.5 * torch.randn_like(x))).all()


def test_a_sample_does_not_depend_on_its_batch():
    model = Linear(change=lambda x: torch.where(x.mean(1, keepdim=True) > 0.5, x, x.round()))
    torch.manual_seed(3)
    x = torch.rand(8, 20)
    whole = misled(model, inputs=x)
    assert whole.any()
    assert not whole.all()
    assert torch.equal(whole, torch.cat([misled(model, inputs=x[i : i + 1]) for i in range(8)]))


def test_points_of_the_check_are_inside_the_ball():
    x = torch.rand(4, 3, 5, 5)
    eps = torch.full((4,), 0.8)
    assert torch.allclose(check_size(eps, "linf", x), torch.full((4,), 0.2))
    assert torch.allclose(check_size(eps, "l2", x) * 75**0.5, torch.full((4,), 0.2))
    assert (check_size(eps, "l1", x) * 75 <= 0.8 * 75**0.5 / 16 + 1e-6).all()
    assert torch.allclose(reached_size(x, x + 0.4), torch.full((4,), 0.1))


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_square_runs_only_on_samples_with_misleading_gradients(norm):
    eps = {"l1": 2.0, "l2": 0.5, "linf": 0.1}[norm]
    attack = SquareOnMisleadingGradients(eps=eps, norm=norm, queries=30, seed=0)
    x = torch.rand(5, 20)

    def moved(model):
        with attackable(model) as net:
            batch = prepare_batch(net, x, model(x).argmax(1), None, (0.0, 1.0))
            state = attack_batch(attack, net, batch)
        return (attack.result(state) != x).any(1), state.value

    still, value = moved(Linear())
    assert not still.any()
    top = Linear()(x).topk(2).values
    assert torch.allclose(value, top[:, 1] - top[:, 0], atol=1e-5)
    assert moved(Linear(-1.0))[0].all()


class Trap(nn.Module):
    """A margin that rises with the distance from 0.5, where its gradient is zero."""

    def forward(self, x):
        rise = (x - 0.5).abs().flatten(1).mean(1) - 0.05
        return torch.stack([torch.zeros_like(rise), rise], 1)


def beyond(model, x, y, start, eps, queries=2000):
    counted = []
    hook = model.register_forward_hook(lambda module, inputs, output: counted.append(len(output)))
    attack = SquareBeyondGradients(eps=eps, norm="linf", queries=queries, seed=0)
    with attackable(model) as net:
        batch = prepare_batch(net, x, y, None, (0.0, 1.0))._replace(start=start)
        state = attack_batch(attack, net, batch)
    hook.remove()
    return attack.result(state), state, sum(counted)


def test_a_search_from_an_optimum_of_gradients_ends_after_a_hundred_queries():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2, bias=False))
    model[1].weight.data = torch.stack([torch.full((16,), 1.0), torch.full((16,), -1.0)])
    x, y = torch.full((3, 1, 4, 4), 0.5), torch.zeros(3, dtype=torch.int64)
    result, state, count = beyond(model, x, y, x - 0.1, eps=0.1)
    assert torch.equal(result, x - 0.1)
    assert torch.allclose(state.value, torch.tensor(-12.8))
    assert not state.success.any()
    assert count < 3 * 110


def test_a_search_goes_on_where_the_attack_before_it_was_no_optimum():
    model, x = Trap(), torch.full((4, 1, 4, 4), 0.5)
    result, state, _ = beyond(model, x, torch.zeros(4, dtype=torch.int64), x + 0.01, eps=0.1)
    assert state.success.all()
    assert (model(result).argmax(1) == 1).all()
    assert ((result - x).abs() <= 0.1 + 1e-6).all()


def test_a_search_that_fails_returns_the_better_of_both_ends():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))
    x = torch.rand(16, 1, 8, 8)
    y = model(x).argmax(1)
    start = (x + 0.002 * torch.randn_like(x).sign()).clamp(0, 1)
    result, state, count = beyond(model, x, y, start, eps=0.004, queries=500)
    left = ~state.success

    def margin(points):
        return objective("margin", y, False)(model(points))

    assert left.any()
    assert count < 16 * 600
    assert torch.allclose(margin(result), state.value, atol=1e-5)
    assert (margin(result) >= margin(start) - 1e-6)[left].all()


def test_without_an_attack_before_it_square_runs_from_its_own_start():
    model, x = Trap(), torch.full((2, 1, 4, 4), 0.5)
    _, state, count = beyond(model, x, torch.zeros(2, dtype=torch.int64), None, eps=0.1)
    assert state.success.all()
    assert count < 20


def test_an_ensemble_hands_the_result_of_one_attack_to_the_next_that_asks_for_it():
    model, x = Trap(), torch.full((4, 1, 4, 4), 0.5)
    y = torch.zeros(4, dtype=torch.int64)
    seen = []

    class Seen(SquareBeyondGradients):
        def init(self, net, batch):
            seen.append(batch.start)
            return super().init(net, batch)

    ball = {"eps": 0.04, "norm": "linf"}
    first = PGD(**ball, steps=2, step_size=0.01, random_start=True, seed=0)
    mask = torch.ones(1, 4, 4)
    for settings in ({}, {"mask": mask}):
        attacks = (first, Seen(**ball, queries=3, seed=0, **settings))
        found = robust_accuracy(model, [(x, y)], attack=attacks, progress=False)
        assert float(found) == 1
        start = seen.pop() + (0 if not settings else x)
        assert torch.allclose(start, first(model, x, y), atol=1e-6)
