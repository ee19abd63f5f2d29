"""Whether a model's gradient says how its output changes; Square Attack where it does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

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
# Of a search from where gradients ended: queries, its first window, and by which fraction the
# margin has to rise for another search. Whenever that one's queries have doubled, a sample leaves
# whose margin is still below this multiple of the rise since then.
_PROBE, _PROBE_WINDOW, _LEAST_GAIN = 100, 0.1, 0.03
_CHECKS, _FARTHEST = (400, 800, 1600, 3200), 3.0


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


class SquareBeyondGradientsState(NamedTuple):
    """State of a `SquareBeyondGradients`: that of `Square`, and the best of the search before."""

    inputs: Tensor  # (N, ...) clean
    labels: Tensor  # (N,) int64
    eps: Tensor  # (N,)
    keys: Tensor  # (N,) int64, random keys
    step: Tensor  # (N,) int64, queries spent in both searches
    current: Tensor  # (N, ...), the best iterate of this search
    value: Tensor  # (N,) margin there
    success: Tensor  # (N,) bool, whether it fools the model
    box: Tensor  # (N, 2, ...) bounds of each sample, or (N, 0) where they are the attack's
    x_reached: Tensor  # (N, ...), where the attack before or the first search ended
    reached: Tensor  # (N,) margin there
    earlier: Tensor  # (N,) margin at the last check of the second search


@dataclass(frozen=True, kw_only=True)
class SquareBeyondGradients(Square):
    """Square Attack, run only on samples where random search gets further than gradients did.

    A stage of ensembles, which starts at the result of the attack before it. Sound gradients have
    led to a local optimum, which a hundred small random changes do not improve: such a sample is
    finished then. Other samples start again, as in `Square`, and are finished early where they stay
    behind the attack before, or where the margin rises too slowly.

    Examples
    --------
    >>> SquareBeyondGradients(eps=0.1, norm="linf", queries=2000).max_evaluations
    2100
    """

    starts_at_result: ClassVar[bool] = True

    @property
    def max_evaluations(self) -> int:
        """Queries of both searches."""
        return _PROBE + self.queries

    def init(self, net: Network, batch: Batch) -> Any:
        """Start where the attack before ended; without one, with the second search."""
        state = super().init(net, batch)
        without = batch.start is None
        return SquareBeyondGradientsState(
            **state._replace(step=state.step + _PROBE * without)._asdict(),
            x_reached=state.current,
            reached=torch.full_like(state.value, -torch.inf),
            earlier=state.value,
        )

    def step(self, net: Network, state: Any) -> Any:
        """Spend one query of every sample that is not finished."""
        state = super().step(net, state)
        state = self._remember(state, state.step == 1)
        probed = (state.step == _PROBE) & ~state.success
        better = state.value - state.reached > _LEAST_GAIN * state.reached.abs()
        checked = self._is_checked(state)
        over = (probed & ~better) | (checked & self._is_hopeless(state))
        state = state._replace(step=torch.where(over, self.max_evaluations, state.step))
        again = probed & better
        if not threat.known_none(again):
            state = self._remember(state, again)
            start = self._own_start(state)
            state = state._replace(
                current=torch.where(threat.per_sample(again, start), start, state.current),
                value=state.value.masked_fill(again, -torch.inf),
            )
        worse = self.finished(state) & ~state.success & (state.value < state.reached)
        kept = threat.per_sample(worse, state.current)
        return state._replace(
            current=torch.where(kept, state.x_reached, state.current),
            value=torch.where(worse, state.reached, state.value),
            earlier=torch.where(checked, state.value, state.earlier),
        )

    def run(self, net: Network, state: Any) -> Any:
        """Take steps until every sample is finished, as far as that costs no wait."""
        for _ in range(self.max_evaluations):
            if threat.known_none(~self.finished(state)):
                break
            state = self.step(net, state)
        return state

    @staticmethod
    def _is_checked(state: SquareBeyondGradientsState) -> Tensor:
        return torch.stack([state.step - _PROBE == check for check in _CHECKS]).any(0)

    def _is_hopeless(self, state: SquareBeyondGradientsState) -> Tensor:
        """Samples to leave if this is a check of the second search, bool ``(N,)``."""
        first = state.step == _PROBE + _CHECKS[0]
        slow = -state.value > _FARTHEST * (state.value - state.earlier)
        behind = slow | (state.value < state.reached)
        return ~first & behind & ~state.success

    @staticmethod
    def _remember(state: SquareBeyondGradientsState, chosen: Tensor) -> SquareBeyondGradientsState:
        """Keep the iterates of these samples as the best of the search before."""
        kept = threat.per_sample(chosen, state.current)
        return state._replace(
            x_reached=torch.where(kept, state.current, state.x_reached),
            reached=torch.where(chosen, state.value, state.reached),
        )

    def _is_start(self, state: Any) -> Tensor:
        """The start of either search."""
        start: Tensor = (state.step == 0) | (state.step == _PROBE)
        return start

    def _areas(self, spent: Tensor, whole: int, stages: Tensor) -> Tensor:
        """Smaller ones at first: the first search is around its start."""
        probing = spent < _PROBE
        areas = super()._areas(torch.where(probing, spent, spent - _PROBE), whole, stages)
        return torch.where(probing, _PROBE_WINDOW / self.p_init, 1.0) * areas


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
