"""What minimum-norm attacks have in common: each sample's closest input that fools the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from advfeat import checks, losses, threat
from advfeat.attacks.base import Attack
from advfeat.attacks.restricted import check_not_restricted
from advfeat.attacks.samples import Batch
from advfeat.attacks.settings import canonical, scale_of_features
from advfeat.model import Evaluation, Network
from advfeat.threat import FeatureBounds, Norm

# Another batch shape, memory format or device moves logits by some units of rounding, and these
# attacks end on the boundary, where that decides. What all logits have in common is added last, and
# rounded a few times only.
_ROUNDINGS, _OFFSET_ROUNDINGS = 64, 8
# The length of the first and of the last step as a fraction of the radius.
RELATIVE_STEP: dict[Norm, tuple[float, float]] = {
    "l1": (0.4, 0.1),
    "l2": (1.0, 0.02),
    "linf": (0.5, 0.02),
}
DUAL: dict[Norm, Norm] = {"l1": "linf", "l2": "l2", "linf": "l1"}
# Two points on one sphere differ in distance by rounding alone: the later is not closer for that.
_CLOSER = 1 - 1e-6


def rounding(logits: Tensor) -> Tensor:
    """By how much one logit has to lead another for the lead to be sure, ``(N,)``."""
    # A class that the model rules out by a logit of minus infinity is not rounded.
    finite = logits.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    offset = finite.mean(1, keepdim=True)
    spread = finite.sub_(offset).abs_().amax(1)
    eps = torch.finfo(logits.dtype).eps  # powers of two, which round nothing
    common = offset.squeeze(1).abs()
    return spread.mul_(_ROUNDINGS * eps).add_(common, alpha=_OFFSET_ROUNDINGS * eps)


def step_direction(gradient: Tensor, norm: Norm) -> Tensor:
    """Direction of a step whose length is relative to the radius.

    In l1 a step along the steepest entry alone is slow; the projection makes it sparse.
    """
    return threat.steepest(gradient, "linf" if norm == "linf" else "l2")


def lead_of(targets: Tensor, labels: Tensor, targeted: bool = False) -> Callable[[Tensor], Tensor]:
    """Objective: the targets' logits less the labels', or less the largest other one."""
    if targeted:
        return lambda logits: losses.margin_to_target(logits, targets)
    pairs = torch.stack([targets, labels], 1)

    def lead(logits: Tensor) -> Tensor:
        target, label = logits.gather(1, pairs).unbind(1)
        return target - label

    return lead


def evaluated(
    net: Network, points: Tensor, objective: Callable[[Tensor], Tensor], exact: bool = True
) -> tuple[Evaluation, Tensor]:
    """Gradient of an objective of the logits, whose value is positive where that is sure.

    Also the `rounding` of the logits. With ``exact`` the gradient alone is of low precision where
    that was asked for: where the boundary is, and what is beyond it, takes float32 logits to say.
    """
    found = net.logits_gradient(points, objective)
    logits, value = found.output, found.value
    if exact and net.low_precision:
        logits = net.logits(points)
        value = objective(logits)
    uncertain = rounding(logits)
    return Evaluation(found.gradient, value.sub(uncertain, alpha=2), logits), uncertain


def likely_others(logits: Tensor, labels: Tensor, count: int) -> Tensor:
    """The classes of largest logit but the label, at most all of them, ``(N, count)``."""
    others = logits.scatter(1, labels[:, None], -torch.inf)
    order = others.argsort(dim=1, descending=True, stable=True)
    return order[:, : min(count, logits.shape[1] - 1)]


def linearised_distances(
    net: Network,
    batch: Batch,
    classes: Tensor,
    norm: Norm,
    bounds: FeatureBounds,
    targeted: bool = False,
) -> tuple[Tensor, Tensor]:
    """How far each class is by its gradient at the clean input, and what its logit lacks there.

    Both ``(N, T)`` for ``classes``; a class that the linear model does not reach within the bounds
    is infinitely far.
    """
    distances, gaps = [], []
    for target in classes.unbind(1):
        found, _ = evaluated(net, batch.inputs, lead_of(target, batch.labels, targeted))
        gaps.append(-found.value.to(batch.inputs.dtype))
        distances.append(_distance(batch.inputs, found.gradient, gaps[-1], norm, bounds))
    return torch.stack(distances, 1), torch.stack(gaps, 1)


def nearest_class(
    net: Network, batch: Batch, classes: Tensor, norm: Norm, bounds: FeatureBounds
) -> Tensor:
    """The class that is nearest by `linearised_distances`, ``(N,)``; of equals the first."""
    nearest = classes[:, 0]
    if classes.shape[1] == 1:
        return nearest
    least = torch.full_like(batch.inputs.flatten(1)[:, 0], torch.inf)
    for target in classes.unbind(1):
        found, _ = evaluated(net, batch.inputs, lead_of(target, batch.labels))
        weight, gap = found.gradient, -found.value.to(batch.inputs.dtype)
        # The bounds make no way shorter: what is farther even without them is left out.
        possible = gap / threat.size(weight, DUAL[norm]) < least * (1 + 1e-4)
        if threat.known_none(possible):
            continue
        if threat.known_none(~possible) or possible.device.type != "cpu":
            distance = _distance(batch.inputs, weight, gap, norm, bounds)
        else:
            chosen = possible.nonzero().squeeze(1)
            own = threat.bounds_of(None if batch.box is None else batch.box[chosen], bounds)
            some = _distance(batch.inputs[chosen], weight[chosen], gap[chosen], norm, own)
            distance = torch.full_like(least, torch.inf).index_copy_(0, chosen, some)
        nearer = distance < least
        nearest = torch.where(nearer, target, nearest)
        least = torch.where(nearer, distance, least)
    return nearest


def _distance(
    inputs: Tensor, gradient: Tensor, gap: Tensor, norm: Norm, bounds: FeatureBounds
) -> Tensor:
    """How far the inputs are from hyperplanes, ``(N,)``; infinite where the bounds keep them off.

    A gain of 1e-4 less than the gap is rounding.
    """
    weight = gradient.flatten(1)
    points = inputs.flatten(1)[:, None]
    moves = to_hyperplane(points, weight, gap[:, None], norm, flat_bounds(bounds))[:, 0]
    unreached = (weight * moves).sum(1) < (1 - 1e-4) * gap
    return threat.size(moves, norm).masked_fill(unreached, torch.inf)


@dataclass(frozen=True, kw_only=True)
class MinimumNorm(Attack):
    """An attack that looks for the smallest perturbation instead of the worst one in a ball.

    Without ``eps`` every sample takes all its steps, and ``success`` says whether anything that
    fools the model was found; with it, a sample is successful and finished once that lies within
    ``eps``.

    Its state has, beside what every attack's has: ``x_best``, the closest input found that fools
    the model (the last iterate where there is none); ``distance`` of that input from the clean one,
    infinite without one; ``value``, its negative; and ``step``, the sample's own step count.
    """

    eps: float | Tensor | None = None
    norm: Norm
    steps: int = 100
    bounds: FeatureBounds = (0.0, 1.0)
    mask: Tensor | None = None
    scale: Tensor | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        canonical(self, needs_eps=False)
        if self.scale is not None:
            scale_of_features(self.scale)
            if isinstance(self.eps, Tensor):
                checks.fail("eps, scale", "tensors", "one of them gives the radius by feature")
        checks.count("steps", self.steps, low=1)

    def finished(self, state: Any) -> Tensor:
        """Samples whose steps are spent, that were wrong at once, or fooled within ``eps``."""
        done: Tensor = (state.step >= self.evaluations(state)) | (state.distance == 0)
        return done if self.eps is None else done | state.success

    def result(self, state: Any) -> Tensor:
        """The closest input that fools the model; what is not within ``eps`` is moved there."""
        kept: Tensor = state.x_best
        if self.eps is None:
            return kept
        bounds = threat.bounds_of(state.box, self.bounds)
        inside = threat.project(kept, state.inputs, self.eps, self.norm, bounds)
        close = threat.per_sample(self._close_enough(state.distance), kept)
        return torch.where(close, kept, inside)

    @property
    def is_fixed_length(self) -> bool:
        """Without a ball every sample takes all its steps."""
        return self.eps is None

    def _nothing_kept(self, batch: Batch) -> dict[str, Any]:
        """Fields of a state before anything was found."""
        check_not_restricted(self, batch)
        inputs = batch.inputs
        if isinstance(self.eps, Tensor):
            shape = tuple(inputs.shape[1:])
            cause = (
                f"expected a number, or radii by feature that broadcast against one sample, {shape}"
            )
            checks.fail("eps.shape", tuple(self.eps.shape), cause)
        distance = inputs.new_full((inputs.shape[0],), torch.inf)
        return {
            "x_best": inputs,
            "distance": distance,
            "value": -distance,
            "success": torch.zeros_like(distance, dtype=torch.bool),
            "box": batch.state_box,
        }

    def _fools(self, logits: Tensor, labels: Tensor, uncertain: Tensor | None = None) -> Tensor:
        """Whether the attack surely has what it wants, bool ``(N,)``."""
        uncertain = rounding(logits) if uncertain is None else uncertain
        return losses.objective("margin", labels, self.targeted)(logits) > uncertain

    def _keep(
        self, state: Any, points: Tensor, hits: Tensor, distance: Tensor | None = None
    ) -> Any:
        """Keep the points of samples that they fool, where nothing closer was kept before."""
        if distance is None:
            distance = threat.size(points - state.inputs, self.norm)
        closer = hits & (distance < _CLOSER * state.distance)
        # Until then the latest point: a failed attack returns a perturbed input.
        kept = closer | (state.distance == torch.inf)
        distance = torch.where(closer, distance, state.distance)
        return state._replace(
            x_best=threat.choose(kept, points, state.x_best),
            distance=distance,
            value=-distance,
            success=self._close_enough(distance),
        )

    def _keep_start(self, net: Network, state: Any, start: Tensor | None) -> Any:
        """Keep the points that an earlier attack found, where they fool the model."""
        if start is None:
            return state
        hits = self._fools(net.logits(start), state.labels)
        # A start that does not is no point of this attack.
        start = torch.where(threat.per_sample(hits, start), start, state.inputs)
        return self._keep(state, start, hits)

    def _close_enough(self, distance: Tensor) -> Tensor:
        return distance < torch.inf if self.eps is None else distance <= self.eps


def flat_bounds(bounds: FeatureBounds) -> FeatureBounds:
    """Bounds that broadcast against ``(N, K, d)``, as `to_hyperplane` takes them."""
    low, high = bounds
    if isinstance(low, Tensor) and isinstance(high, Tensor):
        return low.flatten(1)[:, None], high.flatten(1)[:, None]
    return bounds


def to_hyperplane(
    points: Tensor, weight: Tensor, gap: Tensor, norm: Norm, bounds: FeatureBounds = (0.0, 1.0)
) -> Tensor:
    """Smallest moves within the bounds that add ``gap`` to the product with ``weight``.

    Parameters
    ----------
    points
        Shape ``(N, K, d)``, K points to a sample, within the bounds.
    weight
        The hyperplanes' normals, ``(N, d)``, of any size; where they are zero, or not finite,
        nothing moves.
    gap
        Shape ``(N, K)``: what the product with ``weight`` has to grow by. Where the bounds leaves
        not so much, the move goes as far as the bounds allows.
    norm, bounds
        In which norm the move is smallest, and the bounds ``(low, high)``, numbers or tensors that
        broadcast.

    Returns
    -------
    Tensor
        Shape ``(N, K, d)``.

    Examples
    --------
    >>> points, weight = torch.tensor([[[0.5, 0.9]]]), torch.tensor([[0.5, 1.0]])
    >>> to_hyperplane(points, weight, torch.tensor([[0.2]]), "l1")
    tensor([[[0.2000, 0.1000]]])
    """
    low, high = bounds
    peak = weight.abs().amax(1, keepdim=True)
    usable = torch.isfinite(peak) & (peak > 0)
    peak = torch.where(usable, peak, 1.0)
    weight = torch.where(usable, weight / peak, 0.0)
    gap = (gap / peak).nan_to_num()[..., None]
    sense = weight.sign()[:, None] * gap.sign()
    # Products, for torch.where is many times slower on the CPU.
    limit = sense.clamp_min(0.0) * (high - points) - sense.clamp_max(0.0) * (points - low)
    limit = limit.clamp_min(0.0)
    pull = weight.abs()[:, None]
    need, most = gap.abs(), (pull * limit).sum(-1, keepdim=True)
    feasible = torch.minimum(need, most)
    if norm == "l1":
        lengths = _fill_in_turn(pull, limit, feasible)
    else:
        lengths = _fill_together(pull, pull if norm == "l2" else pull.sign(), limit, feasible)
    return sense * torch.where(need < most, lengths, limit)


def _fill_in_turn(pull: Tensor, limit: Tensor, need: Tensor) -> Tensor:
    """The lengths of a fractional knapsack: entries of larger pull first, each up to its limit."""
    pull, order = pull.sort(dim=-1, descending=True, stable=True)
    order = order.expand_as(limit)
    limit = limit.gather(-1, order)
    gain = pull * limit
    left = need - (gain.cumsum(-1) - gain)
    lengths = torch.where(left > 0, torch.minimum(left / pull, limit), 0.0)
    return torch.empty_like(limit).scatter_(-1, order, lengths)


def _fill_together(
    pull: Tensor, speed: Tensor, limit: Tensor, need: Tensor, rounds: int = 16
) -> Tensor:
    """The lengths min(t speed, limit) at the time t when they gain what is needed.

    What they gain grows in t, concavely and piecewise linearly: Newton's steps from 0 do not
    overshoot, and are exact once they stop the entries that the bounds stops.
    """
    gain, rate = pull * limit, pull * speed
    largest = torch.finfo(need.dtype).max
    time = torch.zeros_like(need)
    for _ in range(rounds):
        # As numbers 0 and 1, to multiply with.
        stopped = (time * speed).ge_(limit)
        left = need - (stopped * gain).sum(-1, keepdim=True)
        slope = ((1 - stopped) * rate).sum(-1, keepdim=True)
        later = torch.where(slope > 0, left / slope, time).clamp_max(largest)
        later = torch.maximum(time, later)
        # Reading the result back is free on the CPU; elsewhere it would wait for the device.
        if later.device.type == "cpu" and torch.equal(later, time):
            break
        time = later
    return torch.minimum(time * speed, limit)
