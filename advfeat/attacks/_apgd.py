"""Auto-PGD (Croce and Hein 2020; in l1, Croce and Hein 2021): PGD that adapts its step size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Self

from advfeat import checks, losses, seeding, threat
from advfeat.attacks._apgd_schedule import Schedule, phases, schedule_of
from advfeat.attacks._l1_step import ascend_l1
from advfeat.attacks.base import Attack, checked_objective, per_sample_eps, random_points
from advfeat.attacks.restricted import check_not_restricted
from advfeat.attacks.samples import Batch
from advfeat.attacks.settings import canonical
from advfeat.losses import LossName, Objective, is_success
from advfeat.model import Evaluation, Network, Precision
from advfeat.suggestions import suggests
from advfeat.threat import FeatureBounds, Norm

# In l1: first step's fraction of entries, what a checkpoint divides entries and step by, and the
# smallest step as a fraction of the radius.
_L1_DENSITY, _L1_SHRINK, _L1_SMALLEST = 0.2, 1.5, 0.1


class APGDState(NamedTuple):
    """Samples of a running APGD; a round is a restart, or the attack on one target class."""

    inputs: Tensor  # (N, ...) clean
    labels: Tensor  # (N,) int64
    eps: Tensor  # (N,)
    low: Tensor  # (N, ...) threat.limits_of the inputs
    high: Tensor  # (N, ...)
    keys: Tensor  # (N,) int64, random keys
    targets: Tensor  # (N, rounds) int64, the class each round is about
    step: Tensor  # (N,) int64, evaluations in all rounds
    current: Tensor  # (N, ...)
    previous: Tensor  # (N, ...) the iterate before
    step_size: Tensor  # (N,)
    density: Tensor  # (N,) fraction of entries that an l1 step moves
    x_max: Tensor  # (N, ...) iterate of the largest objective in this phase
    direction_max: Tensor  # (N, ...) direction of the step from there
    value_max: Tensor  # (N,)
    last_value: Tensor  # (N,) objective at the previous iterate
    rises: Tensor  # (N,) int64, steps since the last checkpoint that raised the objective
    checkpoint_value: Tensor  # (N,) largest value at the last checkpoint
    reduced: Tensor  # (N,) bool, whether that checkpoint reduced the step size
    support: Tensor  # (N,) entries that the l1 perturbation used at the last checkpoint
    x_best: Tensor  # (N, ...) what is returned
    value: Tensor  # (N,) objective there
    success: Tensor  # (N,) bool
    box: Tensor  # (N, 2, ...) bounds of each sample, or (N, 0) where they are the attack's


@suggests
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
    loss: LossName | Objective = "cross_entropy"
    targets: int = 0
    targeted: bool = False
    restarts: int = 1
    returns: Literal["best", "first"] = "best"
    bounds: FeatureBounds = (0.0, 1.0)
    mask: Tensor | None = None
    seed: int | torch.Generator | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        canonical(self)
        checks.count("steps", self.steps, low=1)
        checks.loss(self.loss)
        checks.count("targets", self.targets, low=0)
        if self.targeted and self.targets:
            checks.fail("targets", self.targets, "with targeted=True the labels are the targets")
        checks.count("restarts", self.restarts, low=1)
        checks.one_of("returns", self.returns, ("best", "first"))
        checks.seed(self.seed)

    def init(self, net: Network, batch: Batch) -> APGDState:
        """Choose each sample's targets and put it at a random point of the ball."""
        check_not_restricted(self, batch)
        inputs, labels = batch.inputs, batch.labels
        count = inputs.shape[0]
        eps = per_sample_eps(self.eps, inputs)
        low, high = threat.limits_of(
            inputs, eps, self.norm, threat.bounds_of(batch.box, self.bounds)
        )
        lowest = inputs.new_full((count,), -torch.inf)
        state = APGDState(
            inputs=inputs,
            labels=labels,
            eps=eps,
            low=low,
            high=high,
            keys=seeding.keys(seeding.resolve(self.seed), batch.ids),
            targets=self._targets(net, batch),
            step=torch.zeros_like(labels),
            current=inputs,
            previous=inputs,
            step_size=eps,
            density=torch.full_like(eps, _L1_DENSITY),
            x_max=inputs,
            direction_max=inputs,
            value_max=lowest,
            last_value=lowest,
            rises=torch.zeros_like(labels),
            checkpoint_value=lowest,
            reduced=torch.ones_like(labels, dtype=torch.bool),
            support=torch.full_like(eps, inputs[0].numel()),
            x_best=inputs,
            value=lowest,
            success=torch.zeros_like(labels, dtype=torch.bool),
            box=batch.state_box,
        )
        return self._start_round(state, torch.ones_like(state.success))

    def step(self, net: Network, state: APGDState) -> APGDState:
        """Evaluate every sample's iterate and move on; at the end of a phase, begin the next."""
        schedule = schedule_of(self.norm, self.steps, state.step.device)
        place = state.step % self._round  # evaluations that each sample had in this round
        found = net.logits_gradient(state.current, self._objective(state))
        direction = found.gradient.to(state.current.dtype)
        direction = direction.sign() if self.norm == "linf" else threat.scaled(direction)
        state = self._keep(state, found, place)
        state = self._update_max(state, found.value.to(state.value.dtype), direction)
        due = schedule.due.index_select(0, place)
        if not threat.known_none(due):
            adapt = self._adapt_l1 if self.norm == "l1" else self._adapt
            state, direction = adapt(state, direction, due, schedule, place)
        move = self._move_l1 if self.norm == "l1" else self._move
        state = move(state, direction, schedule, place)
        if state.targets.shape[1] > 1:  # rounds
            starting = state.step % self._round == 0
            # On an accelerator this is the one value that a step reads back.
            if not threat.known_none(starting) and bool(starting.any()):
                state = self._start_round(state, starting)
        return state

    @property
    def is_fixed_length(self) -> bool:
        """Whether no sample stops at its first success."""
        return self.returns == "best"

    def evaluations(self, state: APGDState) -> int:
        """Evaluations of all rounds, of which a model of few classes has fewer."""
        return state.targets.shape[1] * self._round

    def finished(self, state: APGDState) -> Tensor:
        """Samples whose rounds are spent, or that have the first success they were to return."""
        spent = state.step >= self.evaluations(state)
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
    def _round(self) -> int:
        return sum(steps + 1 for _, steps in phases(self.norm, self.steps))

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
            return checked_objective(self.loss, state.labels, self.targeted)
        turn = (state.step // self._round).clamp_max(state.targets.shape[1] - 1)
        target = state.targets.gather(1, turn[:, None]).squeeze(1)
        return lambda logits: checks.objective(
            losses.towards(self.loss, logits, state.labels, target), logits
        )

    def _keep(self, state: APGDState, found: Evaluation, place: Tensor) -> APGDState:
        """Keep each sample's iterate if it is a first success, or the best of the failures."""
        hits = is_success(found.output, state.labels, self.targeted)
        better = (hits & ~state.success) | ((hits == state.success) & ~(found.value <= state.value))
        if self.norm == "l1":  # only the last phase's ball is the one that was asked for
            better &= place >= self._round - 1 - phases(self.norm, self.steps)[-1][1]
        return state._replace(
            x_best=threat.choose(better, state.current, state.x_best),
            value=torch.where(better, found.value.to(state.value.dtype), state.value),
            success=state.success | (better & hits),
        )

    def _update_max(self, state: APGDState, value: Tensor, direction: Tensor) -> APGDState:
        """Account for the objective at the current iterate."""
        higher = ~(value <= state.value_max)
        return state._replace(
            x_max=threat.choose(higher, state.current, state.x_max),
            direction_max=threat.choose(higher, direction, state.direction_max),
            value_max=torch.where(higher, value, state.value_max),
            rises=state.rises + (value > state.last_value),
            last_value=value,
        )

    def _adapt(
        self, state: APGDState, direction: Tensor, due: Tensor, schedule: Schedule, place: Tensor
    ) -> tuple[APGDState, Tensor]:
        """Go back to the best iterate with half the step where the last steps did not pay."""
        stalled = state.rises <= schedule.rises[place]
        stalled |= ~state.reduced & (state.checkpoint_value >= state.value_max)
        back = due & stalled
        state = state._replace(
            current=threat.choose(back, state.x_max, state.current),
            step_size=torch.where(back, state.step_size / 2, state.step_size),
            reduced=torch.where(due, stalled, state.reduced),
            checkpoint_value=torch.where(due, state.value_max, state.checkpoint_value),
            rises=state.rises.masked_fill(due, 0),
        )
        return state, threat.choose(back, state.direction_max, direction)

    def _adapt_l1(
        self, state: APGDState, direction: Tensor, due: Tensor, schedule: Schedule, place: Tensor
    ) -> tuple[APGDState, Tensor]:
        """Follow the sparsity of the best perturbation, and shrink the step otherwise."""
        support = _support(state.x_max, state.inputs)
        back = due & (support < 0.95 * state.support)
        radius = state.eps * schedule.radius[place]
        shrunk = torch.maximum(state.step_size / _L1_SHRINK, radius * _L1_SMALLEST)
        size = torch.where(back, radius, shrunk)
        density = support / state.inputs[0].numel() / _L1_SHRINK
        if state.box.numel():
            # Towards single entries: equal steps of several may be what the projection takes back.
            density = torch.minimum(density, state.density / _L1_SHRINK)
        state = state._replace(
            current=threat.choose(back, state.x_max, state.current),
            step_size=torch.where(due, size, state.step_size),
            density=torch.where(due, density, state.density),
            support=torch.where(due, support, state.support),
        )
        return state, threat.choose(back, state.direction_max, direction)

    def _move(
        self, state: APGDState, direction: Tensor, schedule: Schedule, place: Tensor
    ) -> APGDState:
        """Step along the direction, with momentum, in l2 and linf."""
        current, inputs = state.current, state.inputs
        size = threat.per_sample(state.step_size, current)
        alpha = threat.per_sample(schedule.alpha.index_select(0, place), current)
        if self.norm == "linf":
            moved = torch.addcmul(current, direction, size)
        else:
            moved = threat.ascend_scaled_l2(current, direction, size)
        limits, bounds = (state.low, state.high), threat.bounds_of(state.box, self.bounds)
        project = partial(threat.project, limits=limits, inplace=True)
        moved = project(moved, inputs, state.eps, self.norm, bounds)
        moved = torch.addcmul(current, moved.sub_(current), alpha, out=moved)
        moved.addcmul_(current - state.previous, torch.rsub(alpha, 1.0))  # momentum
        moved = project(moved, inputs, state.eps, self.norm, bounds)
        return state._replace(current=moved, previous=current, step=state.step + 1)

    def _move_l1(
        self, state: APGDState, direction: Tensor, schedule: Schedule, place: Tensor
    ) -> APGDState:
        """Step along few entries, or begin the next phase at the best iterate of this one."""
        starting = schedule.start[place + 1]
        radius = state.eps * schedule.radius[place + 1]
        size = threat.per_sample(state.step_size, state.current)
        bounds = threat.bounds_of(state.box, self.bounds)
        if state.box.numel():  # the published step would be lost at a face
            width = state.inputs[0].numel()
            entries = (state.density * width).to(torch.int64).clamp_min(1)
            moved = ascend_l1(state.current, direction, state.step_size, bounds, entries)
        else:
            moved = torch.addcmul(state.current, self._sparse_step(state, direction), size)
        moved = threat.choose(starting, state.x_max, moved)
        limits = state.low, state.high
        moved = threat.project(moved, state.inputs, radius, "l1", bounds, limits)
        state = state._replace(current=moved, previous=moved, step=state.step + 1)
        if threat.known_none(starting):
            return state
        support = _support(moved, state.inputs)
        density = support / state.inputs[0].numel() / _L1_SHRINK
        return self._reset(state, starting, moved, radius, density, support)

    def _sparse_step(self, state: APGDState, gradient: Tensor) -> Tensor:
        """Signs of the largest entries of the gradient, of l1 size 1 in all."""
        flat = gradient.flatten(1)
        magnitude, width = flat.abs(), flat.shape[1]
        most = width
        if flat.device.type == "cpu":  # elsewhere the largest density would have to be waited for
            most = max(1, min(width, math.ceil(state.density.numpy().max() * width)))
        top = magnitude.topk(most, dim=1).values
        wanted = (state.density * width).to(torch.int64).clamp(1, most)
        threshold = top.gather(1, wanted[:, None] - 1)
        direction = flat.sign().mul_(magnitude >= threshold)
        direction /= direction.abs().sum(1, keepdim=True).clamp_min(1.0)
        return direction.view(gradient.shape)

    def _start_round(self, state: APGDState, samples: Tensor) -> APGDState:
        """Put samples at random points of their first phase's ball."""
        width = state.inputs[0].numel()
        radius = state.eps * phases(self.norm, self.steps)[0][0]
        numbers = seeding.uniform(state.keys, state.step // self._round, width + 1)
        start = random_points(state, radius, self.norm, self.bounds, numbers)
        size = radius if self.norm == "l1" else 2 * radius
        density, support = (torch.full_like(radius, x) for x in (_L1_DENSITY, float(width)))
        state = state._replace(
            current=threat.choose(samples, start, state.current),
            previous=threat.choose(samples, start, state.previous),
        )
        return self._reset(state, samples, start, size, density, support)

    @staticmethod
    def _reset(
        state: APGDState,
        samples: Tensor,
        start: Tensor,
        step_size: Tensor,
        density: Tensor,
        support: Tensor,
    ) -> APGDState:
        """Forget what samples that begin a phase met in the phase before."""
        return state._replace(
            step_size=torch.where(samples, step_size, state.step_size),
            density=torch.where(samples, density, state.density),
            support=torch.where(samples, support, state.support),
            x_max=threat.choose(samples, start, state.x_max),
            value_max=state.value_max.masked_fill(samples, -torch.inf),
            last_value=state.last_value.masked_fill(samples, torch.inf),  # the first is no rise
            rises=state.rises.masked_fill(samples, 0),
            reduced=state.reduced | samples,
        )


def _support(points: Tensor, inputs: Tensor) -> Tensor:
    """Entries in which each point differs from its input, at least 1, ``(N,)``."""
    differs = (points != inputs).sum(threat.feature_axes(points))
    return differs.to(inputs.dtype).clamp_min(1.0)


@suggests
def apgd(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    norm: Norm,
    steps: int = 100,
    loss: LossName | Objective = "cross_entropy",
    targets: int = 0,
    targeted: bool = False,
    restarts: int = 1,
    bounds: FeatureBounds = (0.0, 1.0),
    mask: Tensor | None = None,
    seed: int | torch.Generator | None = None,
    precision: Precision = "float32",
    expectation: int = 1,
    extras: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Attack one batch by Auto-PGD (Croce and Hein 2020): no step size to choose.

    The step starts at twice the radius and halves where progress stalls, going back to the best
    point; moves carry momentum. In l1 steps are sparse and the ball shrinks from three times the
    radius (Croce and Hein 2021).

    Parameters
    ----------
    model, inputs, labels, eps, norm, bounds, mask, precision, expectation, extras
        As in `pgd`; ``labels`` are the targets where ``targeted``.
    steps
        Gradients of a round; default 100, the paper's.
    loss
        ``"cross_entropy"``, ``"margin"``, ``"dlr"``, or a callable as in `pgd`.
    targeted
        Search for inputs classified as ``labels`` instead of away from them.
    targets
        0 attacks away from the label. Otherwise a round is run towards each of this many
        likeliest wrong classes (9 in AutoAttack; all others where the model has fewer).
    restarts
        Times all rounds are run, each from another random start.
    seed
        Seed of the starts. None draws one number from torch's default generator.

    Returns
    -------
    Tensor
        A success where one was found, else the iterate of the largest objective; as in `pgd`.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause.

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
        targeted=targeted,
        restarts=restarts,
        bounds=bounds,
        mask=mask,
        seed=seed,
    )
    return attack(
        model, inputs, labels, precision=precision, expectation=expectation, extras=extras
    )
