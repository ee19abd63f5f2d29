"""Auto-PGD (Croce and Hein 2020; in l1, Croce and Hein 2021): PGD that sets its own step size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Self

from advfeat import checks, losses, seeding, threat
from advfeat.attacks.base import Attack, Batch, is_success, per_sample_eps
from advfeat.losses import LossName
from advfeat.model import Evaluation, Network, Precision
from advfeat.threat import Bounds, Norm

_MOMENTUM = 0.75  # weight of the gradient step against the last move
_RISES = 0.75  # share of steps that must have risen for the step size to stay
# In l1: first step's share of entries, what a checkpoint divides entries and step by, and the
# smallest step as a share of the radius.
_L1_DENSITY, _L1_SHRINK, _L1_SMALLEST = 0.2, 1.5, 0.1
# In l1 a run goes through larger balls first: radius and share of the steps.
_L1_PHASES = ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4))


class APGDState(NamedTuple):
    """Samples of a running APGD; a round is a restart, or the attack on one target class."""

    inputs: Tensor  # (N, ...) clean
    labels: Tensor  # (N,) int64
    eps: Tensor  # (N,)
    keys: Tensor  # (N,) int64, random keys
    targets: Tensor  # (N, rounds) int64, the class each round is about
    step: Tensor  # (N,) int64, evaluations in all rounds
    current: Tensor  # (N, ...)
    previous: Tensor  # (N, ...) the iterate before
    step_size: Tensor  # (N,)
    density: Tensor  # (N,) share of entries that an l1 step moves
    x_max: Tensor  # (N, ...) iterate of the largest objective in this phase
    gradient_max: Tensor  # (N, ...)
    value_max: Tensor  # (N,)
    last_value: Tensor  # (N,) objective at the previous iterate
    rises: Tensor  # (N,) int64, steps since the last checkpoint that raised the objective
    checkpoint_value: Tensor  # (N,) peak value at the last checkpoint
    reduced: Tensor  # (N,) bool, whether that checkpoint reduced the step size
    support: Tensor  # (N,) entries that the l1 perturbation used at the last checkpoint
    x_best: Tensor  # (N, ...) what is returned
    value: Tensor  # (N,) objective there
    success: Tensor  # (N,) bool


@dataclass(frozen=True, kw_only=True)
class APGD(Attack):
    """Auto-PGD as a value; see `apgd` for the meaning of each setting.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(4, 3)
    >>> attack = APGD(eps=0.1, norm="linf", steps=20, loss="dlr", seed=0)
    >>> attack(model, torch.rand(2, 4), torch.tensor([0, 2])).shape
    torch.Size([2, 4])
    """

    eps: float | Tensor
    norm: Norm
    steps: int = 100
    loss: LossName = "cross_entropy"
    targets: int = 0
    restarts: int = 1
    returns: Literal["best", "first"] = "best"
    bounds: Bounds = (0.0, 1.0)
    seed: int | torch.Generator | None = None

    targeted = False

    def __post_init__(self) -> None:
        """Refuse bad settings."""
        checks.norm(self.norm)
        checks.bounds(self.bounds)
        checks.eps(self.eps)
        checks.linf_in_bounds(self.eps, self.norm, self.bounds)
        checks.count("steps", self.steps, low=1)
        checks.loss(self.loss)
        checks.count("targets", self.targets, low=0)
        checks.count("restarts", self.restarts, low=1)
        checks.one_of("returns", self.returns, ("best", "first"))
        checks.seed(self.seed)

    def init(self, net: Network, batch: Batch) -> APGDState:
        """Choose each row's targets and put it at a random point of the ball."""
        inputs, labels = batch.inputs, batch.labels
        count = inputs.shape[0]
        eps = per_sample_eps(self.eps, inputs)
        lowest = inputs.new_full((count,), -torch.inf)
        state = APGDState(
            inputs=inputs,
            labels=labels,
            eps=eps,
            keys=seeding.keys(seeding.resolve(self.seed), batch.ids),
            targets=self._targets(net, batch),
            step=torch.zeros_like(labels),
            current=inputs,
            previous=inputs,
            step_size=eps,
            density=torch.full_like(eps, _L1_DENSITY),
            x_max=inputs,
            gradient_max=torch.zeros_like(inputs),
            value_max=lowest,
            last_value=lowest,
            rises=torch.zeros_like(labels),
            checkpoint_value=lowest,
            reduced=torch.ones_like(labels, dtype=torch.bool),
            support=torch.full_like(eps, inputs[0].numel()),
            x_best=inputs,
            value=lowest,
            success=torch.zeros_like(labels, dtype=torch.bool),
        )
        return self._start_phase(state, torch.ones_like(state.success))

    def step(self, net: Network, state: APGDState) -> APGDState:
        """Evaluate every row's iterate and move on; at the end of a phase, begin the next."""
        found = net.logits_gradient(state.current, self._objective(state))
        place = self._place(state)
        state = self._keep(state, found, place)
        state = self._update_max(state, found, place)
        gradient = found.gradient
        due = _among(place, self._checkpoints)
        if bool(due.any()):
            state, gradient = self._at_checkpoint(state, gradient, due)
        state = self._move(state, gradient, place)
        starting = self._place(state) == 0
        if bool(starting.any()):
            state = self._start_phase(state, starting)
        starting = _among(self._place(state), self._phase_starts[1:])
        if bool(starting.any()):
            state = self._start_phase(state, starting)
        return state

    def finished(self, state: APGDState) -> Tensor:
        """Samples whose rounds are spent, or that have the first success they were to return."""
        spent = state.step >= state.targets.shape[1] * self._round
        return spent | state.success if self.returns == "first" else spent

    def result(self, state: APGDState) -> Tensor:
        """A success if there was one, else the iterate of the largest objective."""
        return state.x_best

    def stop_at_success(self) -> Self:
        """The same attack, which returns the first success."""
        return replace(self, returns="first")

    @property
    def max_evaluations(self) -> int:
        """Evaluations of all rounds, for a model with more classes than targets."""
        return max(self.targets, 1) * self.restarts * self._round

    @property
    def _phases(self) -> tuple[tuple[float, int], ...]:
        """Multiple of the radius and steps of each phase of a round."""
        if self.norm != "l1":
            return ((1.0, self.steps),)
        counts = [max(1, round(share * self.steps)) for _, share in _L1_PHASES]
        return tuple((radius, n) for (radius, _), n in zip(_L1_PHASES, counts, strict=True))

    @property
    def _phase_starts(self) -> tuple[int, ...]:
        """Evaluations of a round before each of its phases; a phase evaluates its start too."""
        starts = [0]
        for _, steps in self._phases:
            starts.append(starts[-1] + steps + 1)
        return tuple(starts[:-1])

    @property
    def _round(self) -> int:
        return sum(steps + 1 for _, steps in self._phases)

    @property
    def _checkpoints(self) -> tuple[int, ...]:
        """Places in a round where the step size is looked at (Croce and Hein 2020, section 3.3)."""
        places = []
        for start, (_, steps) in zip(self._phase_starts, self._phases, strict=True):
            if self.norm == "l1":
                every = max(1, int(0.04 * steps))
                places += [start + place for place in range(every, steps + 1, every)]
                continue
            window, smallest = max(1, int(0.22 * steps)), max(1, int(0.06 * steps))
            decrease, place = max(1, int(0.03 * steps)), 0
            while place + window <= steps:
                place += window
                places.append(start + place)
                window = max(window - decrease, smallest)
        return tuple(places)

    def _targets(self, net: Network, batch: Batch) -> Tensor:
        """Classes of the rounds: the labels for restarts, else the likeliest wrong classes."""
        if not self.targets:
            return batch.labels[:, None].expand(-1, self.restarts)
        logits = net.logits(batch.inputs)
        others = logits.scatter(1, batch.labels[:, None], -torch.inf)
        likeliest = others.topk(min(self.targets, logits.shape[1] - 1), dim=1).indices
        return likeliest.repeat(1, self.restarts)

    def _objective(self, state: APGDState) -> Callable[[Tensor], Tensor]:
        if not self.targets:
            return losses.objective(self.loss, state.labels, targeted=False)
        turn = (state.step // self._round).clamp_max(state.targets.shape[1] - 1)
        target = state.targets.gather(1, turn[:, None]).squeeze(1)
        return lambda logits: losses.towards(self.loss, logits, state.labels, target)

    def _place(self, state: APGDState) -> Tensor:
        """Evaluations each row has had in its present round."""
        return state.step % self._round

    def _radius(self, state: APGDState) -> Tensor:
        place, radius = self._place(state), state.eps
        for start, (multiple, _) in zip(self._phase_starts, self._phases, strict=True):
            radius = torch.where(place >= start, multiple * state.eps, radius)
        return radius

    def _keep(self, state: APGDState, found: Evaluation, place: Tensor) -> APGDState:
        """Keep each row's iterate if it is a first success, or the best of the failures."""
        hits = is_success(found.output, state.labels, targeted=False)
        better = (hits & ~state.success) | ((hits == state.success) & ~(found.value <= state.value))
        # Only the last phase's ball is the one that was asked for.
        better &= place >= self._phase_starts[-1]
        return state._replace(
            x_best=_where(better, state.current, state.x_best),
            value=torch.where(better, found.value.to(state.value.dtype), state.value),
            success=state.success | (better & hits),
        )

    def _update_max(self, state: APGDState, found: Evaluation, place: Tensor) -> APGDState:
        """Account for the objective at the current iterate."""
        value = found.value.to(state.value.dtype)
        first = _among(place, self._phase_starts)
        higher = first | ~(value <= state.value_max)
        return state._replace(
            x_max=_where(higher, state.current, state.x_max),
            gradient_max=_where(higher, found.gradient.to(state.current.dtype), state.gradient_max),
            value_max=torch.where(higher, value, state.value_max),
            rises=torch.where(first, 0, state.rises + (value > state.last_value)),
            last_value=value,
            checkpoint_value=torch.where(first, value, state.checkpoint_value),
            reduced=first | state.reduced,
        )

    def _at_checkpoint(
        self, state: APGDState, gradient: Tensor, due: Tensor
    ) -> tuple[APGDState, Tensor]:
        """Go back to the peak with another step size where the last steps did not pay."""
        if self.norm == "l1":
            state, back = self._adapt_l1(state, due)
        else:
            window = self._window(state)
            stalled = state.rises.to(window.dtype) <= _RISES * window
            stalled |= ~state.reduced & (state.checkpoint_value >= state.value_max)
            back = due & stalled
            state = state._replace(
                step_size=torch.where(back, state.step_size / 2, state.step_size),
                reduced=torch.where(due, stalled, state.reduced),
            )
        state = state._replace(
            current=_where(back, state.x_max, state.current),
            checkpoint_value=torch.where(due, state.value_max, state.checkpoint_value),
            rises=torch.where(due, 0, state.rises),
        )
        return state, _where(back, state.gradient_max, gradient)

    def _adapt_l1(self, state: APGDState, due: Tensor) -> tuple[APGDState, Tensor]:
        """In l1: follow the sparsity of the best perturbation, and shrink the step otherwise."""
        used = (state.x_max != state.inputs).sum(threat.feature_axes(state.x_max))
        support = used.to(state.eps.dtype).clamp_min(1.0)
        sparser = due & (support < 0.95 * state.support)
        radius = self._radius(state)
        shrunk = (state.step_size / _L1_SHRINK).clamp_min(radius * _L1_SMALLEST)
        size = torch.where(sparser, radius, shrunk)
        density = support / state.inputs[0].numel() / _L1_SHRINK
        return state._replace(
            step_size=torch.where(due, size, state.step_size),
            density=torch.where(due, density, state.density),
            support=torch.where(due, support, state.support),
        ), sparser

    def _window(self, state: APGDState) -> Tensor:
        """Steps between the checkpoint a row is at and the one before it."""
        places = torch.tensor((0, *self._checkpoints), device=state.step.device)
        at = torch.searchsorted(places, self._place(state))
        at = at.clamp(1, len(places) - 1)
        return (places[at] - places[at - 1]).to(state.eps.dtype)

    def _move(self, state: APGDState, gradient: Tensor, place: Tensor) -> APGDState:
        current, radius = state.current, self._radius(state)
        size = threat.per_sample(state.step_size, current)
        if self.norm == "l1":
            moved = current + size * self._sparse_step(state, gradient)
            moved = threat.project(moved, state.inputs, radius, "l1", self.bounds)
        else:
            moved = current + size * threat.steepest(gradient, self.norm)
            moved = threat.project(moved, state.inputs, radius, self.norm, self.bounds)
            first = threat.per_sample(place == 0, current)
            weight = torch.where(first, 1.0, _MOMENTUM)
            moved = current + weight * (moved - current) + (1 - weight) * (current - state.previous)
            moved = threat.project(moved, state.inputs, radius, self.norm, self.bounds)
        return state._replace(current=moved, previous=current, step=state.step + 1)

    def _sparse_step(self, state: APGDState, gradient: Tensor) -> Tensor:
        """Signs of the largest entries of the gradient, of l1 size 1 in all."""
        flat = gradient.flatten(1)
        magnitude, width = flat.abs(), flat.shape[1]
        most = max(1, min(width, math.ceil(float(state.density.max()) * width)))
        top = magnitude.topk(most, dim=1).values
        wanted = (state.density * width).to(torch.int64).clamp(1, most)
        threshold = top.gather(1, wanted[:, None] - 1)
        direction = torch.where(magnitude >= threshold, flat.sign(), 0.0)
        direction = direction / direction.abs().sum(1, keepdim=True).clamp_min(1.0)
        return direction.view(gradient.shape)

    def _start_phase(self, state: APGDState, rows: Tensor) -> APGDState:
        """Put rows at the beginning of their phase: a random start, or the last phase's peak."""
        radius = self._radius(state)
        fresh = rows & (self._place(state) == 0)
        start = state.x_max
        if bool(fresh.any()):
            numbers = seeding.uniform(
                state.keys, state.step // self._round, state.inputs[0].numel() + 1
            )
            delta = threat.point_in_ball(numbers, radius, self.norm).view(state.inputs.shape)
            start = _where(fresh, state.inputs + delta, start)
        start = threat.project(start, state.inputs, radius, self.norm, self.bounds)
        size = radius if self.norm == "l1" else 2 * radius
        width = state.inputs[0].numel()
        used = (start != state.inputs).sum(threat.feature_axes(start)).to(state.eps.dtype)
        density = torch.where(fresh, _L1_DENSITY, used.clamp_min(1.0) / width / _L1_SHRINK)
        support = torch.where(fresh, float(width), used.clamp_min(1.0))
        return state._replace(
            current=_where(rows, start, state.current),
            previous=_where(rows, start, state.previous),
            step_size=torch.where(rows, size, state.step_size),
            density=torch.where(rows, density, state.density),
            support=torch.where(rows, support, state.support),
        )


def _where(rows: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    return torch.where(threat.per_sample(rows, chosen), chosen, other)


def _among(place: Tensor, places: tuple[int, ...]) -> Tensor:
    """Whether each place is one of ``places``, bool ``(N,)``."""
    return torch.isin(place, torch.tensor(places, dtype=place.dtype, device=place.device))


def apgd(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    norm: Norm,
    steps: int = 100,
    loss: LossName = "cross_entropy",
    targets: int = 0,
    restarts: int = 1,
    bounds: Bounds = (0.0, 1.0),
    seed: int | torch.Generator | None = None,
    precision: Precision = "float32",
) -> Tensor:
    """Attack one batch by Auto-PGD (Croce and Hein 2020): no step size to choose.

    The step starts at twice the radius and halves where progress stalls, going back to the best
    point; moves carry momentum. In l1 steps are sparse and the ball shrinks from three times the
    radius (Croce and Hein 2021).

    Parameters
    ----------
    model, inputs, labels, eps, norm, bounds, precision
        As in `pgd`; ``labels`` are the true ones.
    steps
        Gradients of a round; default 100, the paper's.
    loss
        ``"cross_entropy"``, ``"margin"`` or ``"dlr"``.
    targets
        0 attacks away from the label. Otherwise a round is run towards each of this many
        likeliest wrong classes (9 in AutoAttack; all others where the model has fewer).
    restarts
        Times all rounds are run, each from another random start.
    seed
        Of the starts; None draws one number from torch's default generator.

    Returns
    -------
    Tensor
        A success where one was found, else the iterate of the largest objective; as in `pgd`.

    Examples
    --------
    >>> import torch
    >>> from advfeat.attacks import apgd
    >>> x = torch.rand(2, 4)
    >>> x_adv = apgd(torch.nn.Linear(4, 3), x, torch.tensor([0, 2]), eps=0.1, norm="l2", steps=9)
    >>> bool(((x_adv - x).norm(dim=1) <= 0.1 + 1e-6).all())
    True
    """
    attack = APGD(
        eps=eps,
        norm=norm,
        steps=steps,
        loss=loss,
        targets=targets,
        restarts=restarts,
        bounds=bounds,
        seed=seed,
    )
    return attack(model, inputs, labels, precision=precision)
