"""Planted masks: the default verdict is at the model's own value, or `robust_accuracy` warns."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from toys import Changed

from advfeat.attacks import APGD, SmoothedPGD, Square
from advfeat.metrics import diagnose, robust_accuracy

BALL = {"eps": 0.1, "norm": "linf", "seed": 0}


class Front(nn.Module):
    """A model behind a layer that changes its input."""

    def __init__(self, model, change):
        super().__init__()
        self.model, self.change = model, change

    def forward(self, x):
        return self.model(self.change(x))


class NoBackward(torch.autograd.Function):
    """The identity, with a backward pass of zeros."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros_like(gradient)


class Misleading(torch.autograd.Function):
    """The identity, with a backward pass that has nothing to do with it."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        places = torch.arange(gradient.numel(), dtype=gradient.dtype)
        return torch.sin(13 * places).view_as(gradient) * gradient.abs().mean()


def one_open_pixel(x):
    """Rounded but for the first pixel, which has the only gradient."""
    is_first = torch.zeros_like(x)
    is_first[..., 0, 0] = 1
    return torch.where(is_first.bool(), x, torch.round(8 * x) / 8)


def side_way(x):
    """The input without a gradient, and a millionth of the mean with one."""
    return x.detach() + 1e-6 * x.flatten(1).mean(1).view(-1, 1, 1, 1)


def high_frequency(x):
    return x + 0.004 * torch.sin(1500 * x)


def winners(x):
    """The largest half of the pixels, and zeros (k-winners-take-all)."""
    return x * (x >= x.flatten(1).median(1).values.view(-1, 1, 1, 1))


# Functions of the logits or the inputs that leave every decision as it is.
EQUIVALENT = {
    "huge logits": lambda m: Changed(m, lambda z: 1e4 * z),
    "tiny logits": lambda m: Changed(m, lambda z: 1e-5 * z),
    "distilled": lambda m: Changed(m, lambda z: 40 * z),
    "common offset": lambda m: Changed(m, lambda z: z + 1e3),
    "detached": lambda m: Front(m, torch.detach),
    "saturated outputs": lambda m: Changed(m, lambda z: torch.tanh(3 * (z - z.amax(1)[:, None]))),
    "no backward": lambda m: Front(m, NoBackward.apply),
    "misleading backward": lambda m: Front(m, Misleading.apply),
    "side way": lambda m: Front(m, side_way),
    "high frequency": lambda m: Front(m, high_frequency),
}


@pytest.fixture(scope="module")
def rows(digits):
    return TensorDataset(*(tensor[:20] for tensor in digits[1].tensors))


@pytest.fixture(scope="module")
def exact(standard, rows):
    return robust_accuracy(standard, rows, **BALL)


def evaluate(model, rows, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return robust_accuracy(model, rows, **(BALL | options))


@pytest.mark.slow
@pytest.mark.parametrize("name", EQUIVALENT)
def test_a_mask_that_changes_no_decision_changes_no_verdict_or_is_reported(
    standard, rows, exact, name
):
    found = evaluate(EQUIVALENT[name](standard).eval(), rows)
    assert found.standard == exact.standard
    assert float(found) <= float(exact) + 0.03 or found.warnings


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("rounded", lambda x: torch.round(8 * x) / 8),
        ("thresholds", lambda x: (x > 0.4).float()),
        ("uint8", lambda x: (16 * x).to(torch.uint8).float() / 16),
        ("one open pixel", one_open_pixel),
    ],
)
def test_behind_layers_without_a_gradient_straight_through_is_as_good_as_long_random_search(
    standard, rows, name, change
):
    model = Front(standard, change)
    found = evaluate(model, rows)
    search = evaluate(model, rows, eps=None, norm=None,
                      attack=Square(eps=0.1, norm="linf", queries=500))  # fmt: skip
    gradient = evaluate(model, rows, eps=None, norm=None, attack=APGD(eps=0.1, norm="linf"))
    assert float(found) <= float(search) + 0.03
    assert float(found) < float(gradient)
    assert found.warnings


@pytest.mark.slow
def test_winners_take_all_is_no_hiding_place(standard, rows):
    model = Front(standard, winners)
    found = evaluate(model, rows)
    search = evaluate(model, rows, eps=None, norm=None,
                      attack=Square(eps=0.1, norm="linf", queries=500))  # fmt: skip
    assert float(found) <= float(search) + 0.03


class DeadUnits(nn.Module):
    """Two classes; class 1 is reached through a ReLU that is off at every input of the data."""

    def forward(self, x):
        lead = torch.relu(x.sum(1) - 33.0) - 0.5
        return torch.stack([-lead, lead], 1)


def dead_units():
    torch.manual_seed(0)
    x = 0.5 + 0.01 * torch.randn(30, 64)
    x = x - x.mean(1, keepdim=True) + 0.5
    x[0, :2] = torch.tensor([0.2, 0.8])
    return DeadUnits(), TensorDataset(x, torch.zeros(30, dtype=torch.int64))


@pytest.mark.slow
def test_dead_units_are_passed_and_reported_by_the_default_and_by_diagnose():
    # The sum is 32 and has to grow by 1.5; within l2 0.25 it can grow by 2.
    model, data = dead_units()
    with pytest.warns(UserWarning, match="masked"):
        found = robust_accuracy(model, data, eps=0.25, norm="l2", seed=0)
    assert float(found) <= 0.05
    assert isinstance(found.attacks[int(found.broken_by.mode().values)], SmoothedPGD)
    with pytest.warns(UserWarning, match="smoothed_gradients_win"):
        diagnosis = diagnose(model, data, eps=0.25, norm="l2", seed=0, queries=50)
    assert diagnosis["smoothed_gradients_win"].value > 0.9


@pytest.mark.slow
def test_saturated_cross_entropy_still_has_a_direction_or_is_reported(standard, rows):
    found = evaluate(EQUIVALENT["huge logits"](standard), rows, steps=5)
    assert float(found) <= float(evaluate(standard, rows, steps=5)) + 0.03 or found.warnings


def test_a_result_of_zero_is_not_said_to_be_too_high():
    head = nn.Linear(64, 2)
    head.weight.data = torch.stack([torch.ones(64), -torch.ones(64)])
    head.bias.data = torch.tensor([-59.0, 0.0])  # the margin is 5; a random start moves it by 1
    model = Front(nn.Sequential(nn.Flatten(), head), lambda x: torch.round(8 * x) / 8)
    x, y = torch.full((8, 1, 8, 8), 0.5), torch.zeros(8, dtype=torch.int64)
    with pytest.warns(UserWarning, match="robust accuracy 0.0000: 8 of 8 samples"):
        assert float(robust_accuracy(model, [(x, y)], **BALL)) == 0
