"""Objectives of attacks, one value per sample: ``(logits (N, C), labels (N,)) -> (N,)``.

Each grows as the model is more wrong about ``labels``; a targeted attack climbs their negatives
(for DLR, its targeted form). Nothing is averaged over the batch, so no sample weighs on another.
The terms that TRADES and MART train on are here too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from advfeat import threat

Objective: TypeAlias = Callable[[Tensor, Tensor], Tensor]
LossName: TypeAlias = Literal["cross_entropy", "margin", "dlr"]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in nats.

    Examples
    --------
    >>> import torch
    >>> cross_entropy(torch.zeros(1, 10), torch.tensor([3]))
    tensor([2.3026])
    """
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest other logit minus the label's: positive where the model is wrong.

    Examples
    --------
    >>> import torch
    >>> margin(torch.tensor([[1.0, 4.0, 2.0]]), torch.tensor([0]))
    tensor([3.])
    """
    own = logits.gather(1, labels[:, None]).squeeze(1)
    return _largest_other(logits, labels) - own


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio (Croce and Hein 2020): the margin over z_(1) - z_(3).

    Invariant to shifting and scaling the logits. With two classes the ratio has no third logit and
    the plain margin is used.

    Examples
    --------
    >>> import torch
    >>> dlr(torch.tensor([[1.0, 4.0, 2.0]]), torch.tensor([1]))
    tensor([-0.6667])
    """
    if logits.shape[1] < 3:
        return margin(logits, labels)
    top = logits.topk(3, dim=1).values
    return margin(logits, labels) / _usable(top[:, 0] - top[:, 2])


def margin_to_target(logits: Tensor, targets: Tensor) -> Tensor:
    """Target's logit minus the largest other: positive where the model says the target."""
    return -margin(logits, targets)


def dlr_to_target(logits: Tensor, targets: Tensor) -> Tensor:
    """Margin to the target over z_(1) - (z_(3) + z_(4)) / 2; the plain margin below 4 classes."""
    if logits.shape[1] < 4:
        return margin_to_target(logits, targets)
    return margin_to_target(logits, targets) / _targeted_scale(logits)


def _likelihood_of_target(logits: Tensor, targets: Tensor) -> Tensor:
    return -cross_entropy(logits, targets)


# Where the label leads by more than this, rounding takes over in the gradient of the softmax.
_SATURATED = -8.0
_NEARLY_SATURATED = 4e-4  # the cross-entropy is smaller there


def _climbable_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy, with its gradient to full precision where the label is nearly certain.

    The gradient is (1 - p) times that of the other logits' logsumexp less the label's logit; in
    the softmax 1 - p rounds to zero, and a gradient attack would lose its direction, or stop.
    """
    value = cross_entropy(logits, labels)
    if threat.known_none(value.detach() < _NEARLY_SATURATED):
        return value
    own = logits.gather(1, labels[:, None]).squeeze(1)
    gap = logits.scatter(1, labels[:, None], float("-inf")).logsumexp(1) - own
    # Of other samples too: an infinite factor would make their gradient 0 * inf.
    size = gap.detach().clamp_max(_SATURATED).exp().clamp_min(1e-30)
    exact = value.detach() + size * (gap - gap.detach())
    return torch.where((gap < _SATURATED) & gap.isfinite(), exact, value)


_UNTARGETED: dict[str, Objective] = {
    "cross_entropy": _climbable_cross_entropy,
    "margin": margin,
    "dlr": dlr,
}
_TARGETED: dict[str, Objective] = {
    "cross_entropy": _likelihood_of_target,
    "margin": margin_to_target,
    "dlr": dlr_to_target,
}
LOSS_NAMES = tuple(_UNTARGETED)


def objective(
    loss: LossName | Objective, labels: Tensor, targeted: bool
) -> Callable[[Tensor], Tensor]:
    """What an attack climbs, as a function of the logits alone.

    A callable is a loss that grows as the model is more wrong about the labels, such as the
    cross-entropy: a targeted attack climbs its negative.
    """
    if callable(loss):
        own, sign = loss, -1 if targeted else 1
        return lambda logits: _signed(own(logits, labels), sign)
    objective = (_TARGETED if targeted else _UNTARGETED)[loss]
    return lambda logits: objective(logits, labels)


def _signed(value: Tensor, sign: int) -> Tensor:
    # What is no tensor raises an error later.
    return -value if sign < 0 and isinstance(value, Tensor) else value


def towards(loss: LossName | Objective, logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """What an attack from a label towards one wrong class climbs.

    For ``"dlr"`` and ``"margin"`` the difference of the two logits, for DLR over
    z_(1) - (z_(3) + z_(4)) / 2 (Croce and Hein 2020); for cross-entropy the target's likelihood,
    and for a callable its negative at the target.
    """
    if callable(loss):
        return _signed(loss(logits, targets), -1)
    if loss == "cross_entropy":
        return _likelihood_of_target(logits, targets)
    pair = logits.gather(1, torch.stack([targets, labels], 1))
    difference = pair[:, 0] - pair[:, 1]
    if loss == "margin" or logits.shape[1] < 4:
        return difference
    return difference / _targeted_scale(logits)


def divergence(clean: Tensor, attacked: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the softmax of attacked logits from that of clean ones.

    What TRADES (Zhang et al. 2019) adds to the cross-entropy, and what its attack climbs.

    Examples
    --------
    >>> import torch
    >>> divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0986]]))
    tensor([0.1438])
    """
    p, q = clean.log_softmax(1), attacked.log_softmax(1)
    return (p.exp() * (p - q)).sum(1)


def boosted_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy plus ``-log(1 - p)`` of the likeliest wrong class: MART's first term.

    Wang et al. (2020), equation 8; ``1 - p`` is at least 1e-4, as in the authors' code.

    Examples
    --------
    >>> import torch
    >>> boosted_cross_entropy(torch.zeros(1, 2), torch.tensor([1]))
    tensor([1.3863])
    """
    wrong = _largest_other(logits.softmax(1), labels)
    return cross_entropy(logits, labels) - (1 - wrong).clamp_min(1e-4).log()


def doubted_divergence(clean: Tensor, attacked: Tensor, labels: Tensor) -> Tensor:
    """`divergence` times how little the model trusts the label on clean inputs: MART's second term.

    Wang et al. (2020), equation 10.

    Examples
    --------
    >>> import torch
    >>> logits = torch.tensor([[0.0, 1.0986]])
    >>> doubted_divergence(torch.zeros(1, 2), logits, torch.tensor([1]))
    tensor([0.0719])
    """
    trust = clean.softmax(1).gather(1, labels[:, None]).squeeze(1)
    return divergence(clean, attacked) * (1 - trust)


def _targeted_scale(logits: Tensor) -> Tensor:
    top = logits.topk(4, dim=1).values
    return _usable(top[:, 0] - (top[:, 2] + top[:, 3]) / 2)


def _usable(scale: Tensor) -> Tensor:
    """What can be divided by: 1 where a class is ruled out by minus infinity, as with too few."""
    return scale.clamp_min(1e-12).masked_fill(scale == torch.inf, 1.0)


def _largest_other(logits: Tensor, labels: Tensor) -> Tensor:
    others = logits.scatter(1, labels[:, None], float("-inf"))
    return others.amax(1)


def is_success(logits: Tensor, labels: Tensor, targeted: bool) -> Tensor:
    """Whether the attack has what it wants, bool ``(N,)``; NaN among logits is no class at all."""
    largest, where = logits.max(1)  # of NaN among others NaN
    if targeted:  # NaN alone is not equal to itself
        return (where == labels) & (largest == largest)
    return (where != labels) | (largest != largest)
