"""Which gradients predict how an output changes: closed forms, and the models that mislead."""

import pytest
import torch
from torch import nn

from advfeat.attacks.base import prepare_batch
from advfeat.attacks.misleading import (
    SquareOnMisleadingGradients,
    check_gradients,
    check_size,
    reached_size,
)
from advfeat.attacks.pool import attack_batch
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
