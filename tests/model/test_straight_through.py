"""Straight-through gradients: values stay, and each operation has the slope of its neighbour."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from advfeat.model import attackable
from advfeat.model.straight_through import StraightThroughMode

GRID = torch.linspace(0, 1, 9)
IDENTITY = {
    "round": lambda x: torch.round(16 * x) / 16,
    "round in place": lambda x: (16 * x).round_() / 16,
    "floor": lambda x: (16 * x).floor() / 16,
    "integer": lambda x: (16 * x).int().float() / 16,
    "uint8": lambda x: (255 * x).to(torch.uint8) / 255,
    "bits": lambda x: (((255 * x).to(torch.uint8) >> 4) << 4).float() / 255,
    "floor division": lambda x: (255 * x) // 16 * 16 / 255,
    "div": lambda x: torch.div(8 * x, 1, rounding_mode="floor") / 8,
    "remainder": lambda x: x - x % (1 / 8),
    "bucketize": lambda x: torch.bucketize(x, GRID) / 8,
    "sign": lambda x: torch.sign(x - 0.5),
    "heaviside": lambda x: torch.heaviside(x - 0.5, torch.tensor(0.0)),
    "greater": lambda x: (x > 0.5).float(),
    "ge": lambda x: 1.0 * x.ge(0.5),
    "where": lambda x: torch.where(x > 0.5, 1.0, 0.0),
    "detach": lambda x: x.detach(),
}


@pytest.mark.parametrize("name", IDENTITY)
def test_values_stay_and_the_slope_is_one(name):
    operation = IDENTITY[name]
    torch.manual_seed(0)
    x = (0.05 + 0.9 * torch.rand(3, 5)).requires_grad_()
    with StraightThroughMode():
        output = operation(x)
    torch.testing.assert_close(output.detach(), operation(x.detach()).float())
    slope = torch.autograd.grad(output.sum(), x)[0]
    torch.testing.assert_close(slope, torch.ones_like(x), rtol=1e-3, atol=0)


def test_less_has_the_opposite_slope():
    x = torch.rand(4, requires_grad=True)
    with StraightThroughMode():
        output = (x < 0.5).float()
    assert torch.autograd.grad(output.sum(), x)[0].tolist() == [-1.0] * 4


@pytest.mark.parametrize("as_table", [False, True])
def test_an_index_has_the_slope_of_the_softmax(as_table):
    torch.manual_seed(0)
    x, table = torch.rand(3, 5, requires_grad=True), torch.rand(5)
    with StraightThroughMode():
        index = x.argmax(1)
        output = table[index] if as_table else F.one_hot(index, 5).float() @ table
    assert torch.equal(output.detach(), table[x.argmax(1)])
    expected = torch.autograd.grad((x.softmax(1) @ table).sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(output.sum(), x)[0], expected)


def test_differentiable_operations_are_left_alone():
    torch.manual_seed(0)
    x = torch.randn(3, 5, requires_grad=True)

    def smooth(x):
        return (torch.relu(x) * x.clamp(-1, 1) + F.max_pool1d(x[None], 2).sum()).to(torch.float64)

    expected = torch.autograd.grad(smooth(x).sum(), x)[0]
    with StraightThroughMode():
        output = smooth(x)
    assert torch.equal(torch.autograd.grad(output.sum(), x)[0], expected)


def test_a_mask_that_keeps_the_largest_passes_its_own_gradient_too():
    x = torch.tensor([[0.2, 0.9, 0.7]], requires_grad=True)
    with StraightThroughMode():
        output = x * (x > 0.5)
    # Of the product: the mask where it is 1, plus x times the slope of the mask.
    torch.testing.assert_close(
        torch.autograd.grad(output.sum(), x)[0], torch.tensor([[0.2, 1.9, 1.7]])
    )


def test_a_detached_tensor_goes_to_numpy():
    x = torch.rand(4, requires_grad=True)
    with StraightThroughMode():
        assert (x.detach().numpy() == np.asarray(x.detach())).all()


def test_a_model_that_fails_in_the_mode_is_called_without_it():
    class Picky(torch.nn.Linear):
        def forward(self, x):
            if hasattr(x > 0.5, "_advfeat_soft"):
                raise RuntimeError("an operation that the mode does not know")
            return super().forward(x)

    x = torch.rand(4, 3)
    with attackable(Picky(3, 2)) as net:
        found = net.logits_gradient(x, lambda z: z[:, 0], straight_through=True)
        assert torch.equal(found.gradient, net.logits_gradient(x, lambda z: z[:, 0]).gradient)
        assert found.gradient.abs().sum() > 0
