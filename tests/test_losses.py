"""Objectives of attacks, against their formulas written out row by row."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from advfeat import losses

FAST = settings(max_examples=40, deadline=None, derandomize=True)
ALL = [
    losses.cross_entropy,
    losses.margin,
    losses.dlr,
    losses.margin_to_target,
    losses.dlr_to_target,
]


def cross_entropy(row, label):
    return math.log(sum(math.exp(z - row[label]) for z in row))


def margin(row, label):
    return max(z for k, z in enumerate(row) if k != label) - row[label]


def dlr(row, label):
    first, _, third = sorted(row, reverse=True)[:3]
    return margin(row, label) / (first - third)


def dlr_to_target(row, target):
    first, _, third, fourth = sorted(row, reverse=True)[:4]
    return -margin(row, target) / (first - (third + fourth) / 2)


BY_HAND = {
    losses.cross_entropy: cross_entropy,
    losses.margin: margin,
    losses.dlr: dlr,
    losses.margin_to_target: lambda row, target: -margin(row, target),
    losses.dlr_to_target: dlr_to_target,
}


def some_logits(count=8, classes=6, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(count, classes, generator=generator, dtype=dtype)
    return logits, torch.randint(classes, (count,), generator=generator)


@pytest.mark.parametrize("loss", ALL)
@FAST
@given(count=st.sampled_from([1, 3, 8]), classes=st.integers(4, 12), seed=st.integers(0, 2**31))
def test_values_are_those_of_the_formula(loss, count, classes, seed):
    logits, labels = some_logits(count, classes, seed, torch.float64)
    expected = [
        BY_HAND[loss](row, label)
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True)
    ]
    np.testing.assert_allclose(loss(logits, labels).numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("loss", ALL)
def test_gradients_are_those_of_finite_differences(loss):
    logits, labels = some_logits(dtype=torch.float64)
    leaf = logits.clone().requires_grad_()
    loss(leaf, labels).sum().backward()
    for k in range(logits.shape[1]):
        nudge = torch.zeros_like(logits)
        nudge[:, k] = 1e-6
        slope = (loss(logits + nudge, labels) - loss(logits - nudge, labels)) / 2e-6
        torch.testing.assert_close(leaf.grad[:, k], slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("loss", [losses.cross_entropy, losses.margin, losses.dlr])
def test_untargeted_losses_grow_as_the_labels_logit_falls(loss):
    # Where the model is right; DLR is flat once the label is third.
    logits, _ = some_logits()
    labels = logits.argmax(1)
    lower = logits.scatter_add(1, labels[:, None], torch.full((8, 1), -0.1))
    assert (loss(lower, labels) > loss(logits, labels)).all()


@pytest.mark.parametrize("name", losses.LOSS_NAMES)
def test_targeted_losses_grow_as_the_targets_logit_rises(name):
    logits, targets = some_logits()
    higher = logits.scatter_add(1, targets[:, None], torch.full((8, 1), 0.01))
    climb = losses.objective(name, targets, targeted=True)
    assert (climb(higher) > climb(logits)).all()


@pytest.mark.parametrize("loss", [losses.margin, losses.dlr])
def test_the_margin_is_positive_exactly_where_the_model_is_wrong(loss):
    logits, labels = some_logits(200)
    assert torch.equal(loss(logits, labels) > 0, logits.argmax(1) != labels)


@pytest.mark.parametrize("loss", [losses.margin_to_target, losses.dlr_to_target])
def test_the_targeted_margin_is_positive_exactly_where_the_model_says_the_target(loss):
    logits, targets = some_logits(200)
    assert torch.equal(loss(logits, targets) > 0, logits.argmax(1) == targets)


@pytest.mark.parametrize("loss", [losses.dlr, losses.dlr_to_target])
@pytest.mark.parametrize(("shift", "scale"), [(7.0, 1.0), (-3.0, 100.0), (0.0, 1e-3)])
def test_dlr_does_not_see_a_shift_or_a_scale(loss, shift, scale):
    logits, labels = some_logits(dtype=torch.float64)
    torch.testing.assert_close(loss(shift + scale * logits, labels), loss(logits, labels))


def test_dlr_of_two_classes_is_the_margin():
    logits, labels = some_logits(classes=2)
    assert torch.equal(losses.dlr(logits, labels), losses.margin(logits, labels))


@pytest.mark.parametrize("classes", [2, 3])
def test_targeted_dlr_below_four_classes_is_the_margin(classes):
    logits, targets = some_logits(classes=classes)
    expected = losses.margin_to_target(logits, targets)
    assert torch.equal(losses.dlr_to_target(logits, targets), expected)


def test_dlr_of_equal_logits_is_zero_and_its_gradient_finite():
    logits = torch.zeros(2, 5, requires_grad=True)
    value = losses.dlr(logits, torch.tensor([0, 3]))
    value.sum().backward()
    assert torch.equal(value, torch.zeros(2))
    assert torch.isfinite(logits.grad).all()


def test_the_label_is_masked_with_minus_infinity():
    # Masked with any number, such as 0 or -1e4, the label's own place would be the largest other.
    logits = torch.tensor([[-1e6, -3e6, -2e6]])
    assert losses.margin(logits, torch.tensor([0])).item() == -1e6


def test_classes_that_the_model_masks_do_no_harm():
    logits = torch.tensor([[2.0, float("-inf"), 1.0, 0.0]], requires_grad=True)
    label = torch.tensor([0])
    value = losses.margin(logits, label) + losses.cross_entropy(logits, label)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(logits.grad).all()


def test_the_scale_of_dlr_is_that_of_the_classes_that_are_not_masked():
    # Divided by infinity, the ratio and its gradient would be zero.
    logits = torch.tensor([[2.0, 1.0, float("-inf"), float("-inf")]], requires_grad=True)
    label, target = torch.tensor([0]), torch.tensor([1])
    for value in (losses.dlr(logits, label), losses.towards("dlr", logits, label, target)):
        assert value.item() == -1.0
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert gradient.tolist() == [[-1.0, 1.0, 0.0, 0.0]]


@pytest.mark.parametrize("loss", ALL)
def test_a_sample_has_the_same_value_alone_and_in_a_batch(loss):
    logits, labels = some_logits(9)
    together = loss(logits, labels)
    assert together.shape == (9,)
    for row in range(9):
        one = slice(row, row + 1)
        assert torch.equal(loss(logits[one], labels[one]), together[one])


@pytest.mark.parametrize("loss", ALL)
def test_a_sample_has_no_gradient_by_its_batch_mates(loss):
    logits, labels = some_logits()
    logits.requires_grad_()
    loss(logits, labels)[3].backward()
    others = torch.arange(8) != 3
    assert not logits.grad[others].any()
    assert logits.grad[3].any()


@pytest.mark.parametrize("loss", ALL)
def test_losses_leave_the_logits_alone(loss):
    logits, labels = some_logits()
    before = logits.clone()
    loss(logits, labels)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("name", "targeted", "expected"),
    [
        ("cross_entropy", False, losses.cross_entropy),
        ("margin", False, losses.margin),
        ("dlr", False, losses.dlr),
        ("cross_entropy", True, lambda z, t: -losses.cross_entropy(z, t)),
        ("margin", True, lambda z, t: -losses.margin(z, t)),
        ("dlr", True, losses.dlr_to_target),
    ],
)
def test_an_attack_climbs_the_loss_or_its_targeted_twin(name, targeted, expected):
    logits, labels = some_logits()
    assert torch.equal(losses.objective(name, labels, targeted)(logits), expected(logits, labels))


@pytest.mark.parametrize("targeted", [False, True])
def test_a_callable_is_climbed_and_with_targets_descended(targeted):
    logits, labels = some_logits()
    climb = losses.objective(lambda z, y: z[:, 0] * y, labels, targeted)
    sign = -1 if targeted else 1
    assert torch.equal(climb(logits), sign * logits[:, 0] * labels)


def test_towards_one_class_is_the_difference_of_two_logits():
    logits = torch.tensor([[3.0, 1.0, 2.0, -1.0, 0.5]])
    label, target = torch.tensor([0]), torch.tensor([2])
    margin = losses.towards("margin", logits, label, target)
    assert margin.tolist() == [-1.0]
    # Over z_(1) - (z_(3) + z_(4)) / 2 = 3 - (1 + 0.5) / 2.
    torch.testing.assert_close(losses.towards("dlr", logits, label, target), margin / 2.25)
    likelihood = logits.log_softmax(1)[:, 2]
    torch.testing.assert_close(losses.towards("cross_entropy", logits, label, target), likelihood)
    # With three classes there is no fourth logit.
    few = losses.towards("dlr", logits[:, :3], label, target)
    assert few.tolist() == [-1.0]


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e6])
def test_a_certain_sample_does_not_change_the_gradient_of_one_that_is_far_off(scale):
    logits = scale * torch.tensor([[3.0, 0.0, -1.0], [2.0, -1.0, 0.0]])
    logits.requires_grad_()
    labels = torch.tensor([0, 1])  # certain; wrong by 3
    value = losses.objective("cross_entropy", labels, False)(logits)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    (expected,) = torch.autograd.grad(losses.cross_entropy(logits, labels).sum(), logits)
    torch.testing.assert_close(gradient[1], expected[1])
    assert gradient[0, 0] < 0
