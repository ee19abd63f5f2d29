"""Whether a model's gradient says how its output changes; Square Attack where it does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from advfeat import losses, seeding, threat
from advfeat.attacks._square import Square, SquareState
from advfeat.attacks.base import per_sample_eps
from advfeat.attacks.samples import Batch
from advfeat.model import Network
from advfeat.threat import FeatureBounds, Norm

_DIRECTIONS = 8
# Of what the gradient predicts and what happens along random directions: the least correlation, and
# the most that one may be larger than the other. Measured in docs/benchmarks.md.
_LEAST_CORRELATION, _LARGEST_RATIO = 0.3, 4.0
# The radius of the check as a fraction of that of the ball.
_FRACTION = 0.25
# Changes between two calls at one point above this fraction of those along the directions are a
# random model's; changes below so many units of rounding say nothing.
_NOISE, _ROUNDINGS = 0.25, 16


@dataclass(frozen=True, kw_only=True)
class SquareOnMisleadingGradients(Square):
    """Square Attack, run only on samples whose gradient is zero or predicts no change.

    Every other sample is finished at once, after one gradient and ten forward passes. A stage of
    ensembles, whose other attacks follow gradients.

    Examples
    --------
    >>> SquareOnMisleadingGradients(eps=0.1, norm="linf", queries=100).queries
    100
    """

    def init(self, net: Network, batch: Batch) -> SquareState:
        """Start the samples without a good gradient; the others have spent their queries."""
        state = super().init(net, batch)
        size = check_size(per_sample_eps(self.eps, batch.inputs), self.norm, batch.inputs)
        bounds = threat.bounds_of(batch.box, self.bounds)
        found = check_gradients(net, batch.inputs, batch.labels, size, bounds, self.targeted)
        misled = found.misled
        return state._replace(
            step=torch.where(misled, state.step, self.max_evaluations),
            current=torch.where(
                threat.per_sample(misled, state.current), state.current, batch.inputs
            ),
            value=torch.where(misled, state.value, found.margin.to(state.value.dtype)),
        )


def check_size(eps: Tensor, norm: Norm, inputs: Tensor) -> Tensor:
    """How far `check_gradients` moves each feature in a ball, ``(N,)``."""
    width = inputs[0].numel()
    unit = {"linf": 1.0, "l2": width**-0.5, "l1": width**-0.5 / 4}[norm]
    size: Tensor = _FRACTION * unit * eps
    return size


def reached_size(inputs: Tensor, reached: Tensor) -> Tensor:
    """How far `check_gradients` moves each feature, by where an attack ended, ``(N,)``."""
    size: Tensor = (reached - inputs).flatten(1).square().mean(1).sqrt()
    return _FRACTION * size


class GradientCheck(NamedTuple):
    """What `check_gradients` finds."""

    misled: Tensor  # (N,) bool, whether the gradient is zero or predicts no change
    margin: Tensor  # (N,) the margin, which an attack raises
    gradient: Tensor  # (N, d) float64, the margin's; zero where it is not finite


def check_gradients(
    net: Network,
    inputs: Tensor,
    labels: Tensor,
    size: Tensor,
    bounds: FeatureBounds,
    targeted: bool = False,
) -> GradientCheck:
    """Find the samples whose gradient is zero or does not predict how the margin changes.

    The margin's gradient predicts how it changes when every feature moves by ``size`` up or down,
    at random. Without masking, predictions and changes correlate by more than 0.9. What is below
    the resolution of the model's own type, or lost in a random model's noise, is not counted as
    misleading.
    """
    objective = losses.objective("margin", labels, targeted)
    gradient = net.logits_gradient(inputs, objective).gradient.flatten(1).double()
    gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
    logits = net.logits(inputs)
    margin = objective(logits)
    keys = seeding.keys(0, torch.arange(_DIRECTIONS, device=inputs.device))
    signs = seeding.uniform(keys, 0, gradient.shape[1])
    predicted, changes = [], []
    for sign in torch.where(signs < 0.5, -1.0, 1.0).to(inputs.dtype):
        move = threat.per_sample(size, inputs) * sign.view(inputs.shape[1:])
        points = threat.clip(inputs + move, bounds)
        predicted.append((gradient * (points - inputs).flatten(1)).sum(1))
        changes.append((objective(net.logits(points)) - margin).double())
    expected, change = torch.stack(predicted, 1), torch.stack(changes, 1)
    wanted, seen = expected.norm(dim=1), change.norm(dim=1)
    agrees = (expected * change).sum(1) >= _LEAST_CORRELATION * wanted * seen
    agrees &= (wanted <= _LARGEST_RATIO * seen) & (seen <= _LARGEST_RATIO * wanted)
    again = (objective(net.logits(inputs)) - margin).abs().double()
    largest = logits.detach().nan_to_num(0.0, 0.0, 0.0).abs().amax(1).double()
    resolution = _ROUNDINGS * max(torch.finfo(logits.dtype).eps, net.rounding) * largest
    unclear = (again > _NOISE * seen / _DIRECTIONS**0.5) | (wanted.maximum(seen) <= resolution)
    misled = (gradient == 0).all(1) | ~(agrees | unclear)
    return GradientCheck(misled, margin, gradient)
