"""PGD on smoothed gradients: for models whose own gradients are masked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from typing_extensions import Self

from advfeat import checks, seeding, threat
from advfeat.attacks._l1_step import ascend_l1
from advfeat.attacks.base import Attack, checked_objective, per_sample_eps, verified_logits
from advfeat.attacks.misleading import check_gradients, check_size
from advfeat.attacks.restricted import check_not_restricted
from advfeat.attacks.samples import Batch
from advfeat.attacks.settings import canonical
from advfeat.losses import LossName, Objective, is_success
from advfeat.model import Network, Precision
from advfeat.threat import FeatureBounds, Norm

StraightThroughUse: TypeAlias = Literal["auto", "always", "never"]

_MOMENTUM = 0.5  # decay of the accumulated gradients, each of l1 size 1
_FIRST_STEP, _LAST_STEP = 0.5, 0.01  # step sizes as fractions of eps
_L1_DENSITY = 0.05  # fraction of entries that an l1 step moves
# Of the margin, what the first run has to close before others are tried (docs/benchmarks.md).
_LEAST_CLOSED = 0.6
_DUAL: dict[str, Norm] = {"l1": "linf", "l2": "l2", "linf": "l1"}


class SmoothedPGDState(NamedTuple):
    """Samples of a running `SmoothedPGD`; a run is a restart with a noise scale of its own."""

    inputs: Tensor  # (N, ...) clean
    labels: Tensor  # (N,) int64
    eps: Tensor  # (N,)
    keys: Tensor  # (N,) int64, random keys
    step: Tensor  # (N,) int64, steps taken in all runs
    max_steps: Tensor  # (N,) int64, steps after which the sample is finished
    current: Tensor  # (N, ...)
    velocity: Tensor  # (N, ...) accumulated gradients
    expected: Tensor  # (N,) objective that the first run has to exceed for others to follow
    x_best: Tensor  # (N, ...) what is returned
    value: Tensor  # (N,) objective there
    success: Tensor  # (N,) bool, whether it fools the model
    through: Tensor  # (N,) bool, whether straight-through gradients differ from the model's own
    box: Tensor  # (N, 2, ...) bounds of each sample, or (N, 0) where they are the attack's


@dataclass(frozen=True, kw_only=True)
class SmoothedPGD(Attack):
    """PGD on smoothed gradients as an object; see `smoothed_pgd` for the meaning of each setting.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(4, 3)
    >>> attack = SmoothedPGD(eps=0.1, norm="l2", steps=5, seed=0)
    >>> attack(model, torch.rand(2, 4), torch.tensor([0, 2])).shape
    torch.Size([2, 4])
    """

    eps: float | Tensor
    norm: Norm
    steps: int = 120
    scales: tuple[float, ...] = (6.0,)
    masking_ratio: float = 0.0
    straight_through: StraightThroughUse = "auto"
    loss: LossName | Objective = "margin"
    targeted: bool = False
    returns: Literal["best", "first"] = "best"
    bounds: FeatureBounds = (0.0, 1.0)
    mask: Tensor | None = None
    seed: int | torch.Generator | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        canonical(self)
        checks.count("steps", self.steps, low=1)
        if not isinstance(self.scales, tuple) or not self.scales:
            checks.fail("scales", self.scales, "a tuple of noise scales, one for each run")
        for scale in self.scales:
            checks.number("scales", scale, low=0.0)
        checks.number("masking_ratio", self.masking_ratio, low=0.0)
        checks.one_of("straight_through", self.straight_through, ("auto", "always", "never"))
        checks.loss(self.loss)
        checks.one_of("returns", self.returns, ("best", "first"))
        checks.seed(self.seed)

    def init(self, net: Network, batch: Batch) -> SmoothedPGDState:
        """Start every sample at its input; with `masking_ratio`, evaluate the gradient there."""
        check_not_restricted(self, batch)
        inputs, labels = batch.inputs, batch.labels
        eps = per_sample_eps(self.eps, inputs)
        expected = torch.full_like(eps, -torch.inf)
        through = torch.zeros_like(labels, dtype=torch.bool)
        if self.masking_ratio:
            expected, through = self._inspected(net, batch, eps)
        runs = 1 if self.masking_ratio else len(self.scales)
        return SmoothedPGDState(
            inputs=inputs,
            labels=labels,
            eps=eps,
            keys=seeding.keys(seeding.resolve(self.seed), batch.ids),
            step=torch.zeros_like(labels),
            max_steps=torch.full_like(labels, runs * self.steps),
            current=inputs if batch.start is None else batch.start,
            velocity=torch.zeros_like(inputs),
            expected=expected,
            x_best=inputs,
            value=torch.full_like(eps, -torch.inf),
            success=torch.zeros_like(labels, dtype=torch.bool),
            through=through,
            box=batch.state_box,
        )

    def _inspected(self, net: Network, batch: Batch, eps: Tensor) -> tuple[Tensor, Tensor]:
        """The objective of `expected`, and where straight-through gradients differ."""
        inputs, objective = batch.inputs, self._objective(batch.labels)
        bounds, size = threat.bounds_of(batch.box, self.bounds), check_size(eps, self.norm, inputs)
        found = check_gradients(net, inputs, batch.labels, size, bounds, self.targeted)
        value, gradient = found.margin, found.gradient
        if self.loss != "margin":
            own = net.logits_gradient(inputs, objective)
            value, gradient = own.value, _finite(own.gradient).flatten(1)
        slope = threat.size(gradient, _DUAL[self.norm]).to(eps.dtype)
        value = value.to(eps.dtype)
        expected = value + self.masking_ratio * eps * slope
        if self.loss == "margin":
            expected = expected.maximum((1 - _LEAST_CLOSED) * value)
        through = torch.zeros_like(found.misled)
        if self.straight_through == "auto" and len(self.scales) > 1:
            other = net.logits_gradient(inputs, objective, straight_through=True)
            differs = _finite(other.gradient).flatten(1).to(gradient.dtype) != gradient
            through = found.misled & differs.any(1)
        return expected.masked_fill(found.misled, -torch.inf), through

    def step(self, net: Network, state: SmoothedPGDState) -> SmoothedPGDState:
        """Move every sample by one gradient at a noisy copy, and evaluate where it arrives."""
        state = self._restarted(state)
        gradient = self._gradient(net, state)
        length = threat.size(gradient, "l1").clamp_min(torch.finfo(gradient.dtype).tiny)
        velocity = _MOMENTUM * state.velocity + gradient / threat.per_sample(length, gradient)
        current = self._moved(state, velocity)
        state = state._replace(current=current, velocity=velocity, step=state.step + 1)
        return self._extended(self._keep(net, state))

    def finished(self, state: SmoothedPGDState) -> Tensor:
        """Samples whose runs are over, or that have the first success they were to return."""
        over = state.step >= state.max_steps
        return over | state.success if self.returns == "first" else over

    def result(self, state: SmoothedPGDState) -> Tensor:
        """A success if there was one, else the iterate of the largest objective."""
        return state.x_best

    def stop_at_success(self) -> Self:
        """The same attack, which returns the first success."""
        return replace(self, returns="first")

    @property
    def max_evaluations(self) -> int:
        """Steps of all runs."""
        return len(self.scales) * self.steps

    def _objective(self, labels: Tensor) -> Callable[[Tensor], Tensor]:
        return checked_objective(self.loss, labels, self.targeted)

    def _remaining(self, state: SmoothedPGDState) -> Tensor:
        """Fraction of its run that each sample still has before it, ``(N,)``, from 1 to 1/steps."""
        return 1 - (state.step % self.steps).to(state.eps.dtype) / self.steps

    def _noisy(self, state: SmoothedPGDState) -> Tensor:
        """A copy of each iterate with Gaussian noise, which shrinks to nothing during a run."""
        width = state.inputs[0].numel()
        unit = {"l2": width**-0.5, "linf": 3**-0.5, "l1": width**-0.5 / 4}[self.norm]
        scales = torch.tensor(self.scales, dtype=state.eps.dtype, device=state.eps.device)
        scale = scales[(state.step // self.steps).clamp_max(len(self.scales) - 1)]
        deviation = scale * unit * state.eps * self._remaining(state)
        uniform = seeding.uniform(state.keys, state.step, width).view(state.current.shape)
        noise = math.sqrt(2) * torch.erfinv(2 * uniform - 1)
        return state.current + threat.per_sample(deviation, noise) * noise.to(state.current.dtype)

    def _gradient(self, net: Network, state: SmoothedPGDState) -> Tensor:
        """Gradient at the noisy copies; straight-through where the own one is of no use."""
        points, objective = self._noisy(state), self._objective(state.labels)
        through = self.straight_through
        found = net.logits_gradient(points, objective, straight_through=through == "always")
        gradient = _finite(found.gradient).to(points.dtype)
        if through == "auto":
            second = (state.step // self.steps) % 2 == 1
            flat = threat.size(gradient, "linf") == 0
            flat = (flat | (second & state.through)).nonzero().squeeze(1)
            if len(flat):
                own = self._objective(state.labels[flat])
                with net.selected(flat):
                    other = net.logits_gradient(points[flat], own, straight_through=True)
                filled = _finite(other.gradient).to(points.dtype)
                gradient = gradient.index_copy(0, flat, filled)
        return gradient

    def _moved(self, state: SmoothedPGDState, direction: Tensor) -> Tensor:
        bounds = threat.bounds_of(state.box, self.bounds)
        size = state.eps * (_FIRST_STEP * self._remaining(state) + _LAST_STEP)
        if self.norm == "l1":
            count = max(1, math.ceil(_L1_DENSITY * state.inputs[0].numel()))
            moved = ascend_l1(state.current, direction, size, bounds, count)
        else:
            unit = threat.steepest(direction, self.norm)
            moved = state.current + threat.per_sample(size, unit) * unit
        return threat.project(moved, state.inputs, state.eps, self.norm, bounds)

    def _keep(self, net: Network, state: SmoothedPGDState) -> SmoothedPGDState:
        """Keep each sample's iterate if it is a first success, or the best of the failures."""
        labels, active = state.labels, ~state.success
        logits = verified_logits(net, state.current, labels, self.targeted, active)
        value = self._objective(state.labels)(logits).to(state.value.dtype)
        hits = is_success(logits, state.labels, self.targeted)
        better = (hits & ~state.success) | ((hits == state.success) & ~(value <= state.value))
        if self.returns == "first":
            better &= ~state.success
        keeps = threat.per_sample(better, state.current)
        return state._replace(
            x_best=torch.where(keeps, state.current, state.x_best),
            value=torch.where(better, value, state.value),
            success=state.success | (better & hits),
        )

    def _extended(self, state: SmoothedPGDState) -> SmoothedPGDState:
        """Give the other runs to the samples whose first run shows that gradients are masked."""
        if not self.masking_ratio or len(self.scales) == 1:
            return state
        masked = (state.step == self.steps) & (state.value > state.expected)
        most = torch.full_like(state.max_steps, self.max_evaluations)
        return state._replace(max_steps=torch.where(masked, most, state.max_steps))

    def _restarted(self, state: SmoothedPGDState) -> SmoothedPGDState:
        """Put samples at the beginning of a further run back to their inputs."""
        due = (state.step > 0) & (state.step % self.steps == 0)
        due = threat.per_sample(due, state.current)
        return state._replace(
            current=torch.where(due, state.inputs, state.current),
            velocity=torch.where(due, 0.0, state.velocity),
        )


def _finite(gradient: Tensor) -> Tensor:
    return torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)


def smoothed_pgd(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    norm: Norm,
    steps: int = 120,
    scales: tuple[float, ...] = (6.0,),
    masking_ratio: float = 0.0,
    straight_through: StraightThroughUse = "auto",
    loss: LossName | Objective = "margin",
    targeted: bool = False,
    bounds: FeatureBounds = (0.0, 1.0),
    mask: Tensor | None = None,
    seed: int | torch.Generator | None = None,
    precision: Precision = "float32",
    expectation: int = 1,
    extras: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Attack one batch by PGD on smoothed gradients, for models whose gradients are masked.

    Each gradient is taken at the iterate plus one draw of Gaussian noise, whose standard deviation
    falls linearly to zero during a run, as the step size does. Noise wakes up dead ReLUs and blurs
    steps, so the attack passes regions where the model's own gradient is zero or misleading. It
    complements other attacks: it loses some samples that plain PGD wins.

    Parameters
    ----------
    model, inputs, labels, eps, norm, bounds, mask, precision, expectation, extras
        As in `pgd`; ``labels`` are the targets where ``targeted``.
    steps
        Gradients of a run; each step also evaluates the iterate without noise.
    scales
        Standard deviation of the noise at the beginning of each run, in units of
        ``eps / sqrt(d)`` (l2), ``eps / sqrt(3)`` (linf) or ``eps / (4 sqrt(d))`` (l1), with ``d``
        features. There are as many runs as scales, each from the input.
    masking_ratio
        With a positive number, only samples that seem masked get more than the first run: those
        whose objective rose by more than this multiple of what the gradient at the input predicts
        (``eps`` times its dual norm) and, with the loss ``"margin"``, to less than 40% of the
        distance to 0, or whose gradient does not predict small changes. On models with sound
        gradients the ratio rarely exceeds 1.1.
        0 gives all runs to every sample.
    straight_through
        Let gradients pass rounding, thresholding and index layers
        (`advfeat.model.straight_through`): ``"always"``, ``"never"``, or ``"auto"``: where the
        gradient is exactly zero, and with ``masking_ratio`` in every second run where it does not
        predict small changes.
    loss
        ``"margin"``, ``"cross_entropy"``, ``"dlr"``, or a callable as in `pgd`.
    targeted
        Search for inputs classified as ``labels`` instead of away from them.
    seed
        Of the noise; None draws one number from torch's default generator.

    Returns
    -------
    Tensor
        A success where one was found, else the iterate of the largest objective; as in `pgd`.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause, before any work is done.

    Examples
    --------
    >>> import torch
    >>> from advfeat.attacks import smoothed_pgd
    >>> x = torch.rand(2, 4)
    >>> model = torch.nn.Linear(4, 3)
    >>> x_adv = smoothed_pgd(model, x, torch.tensor([0, 2]), eps=0.1, norm="l2", steps=9, seed=0)
    >>> bool(((x_adv - x).norm(dim=1) <= 0.1 + 1e-6).all())
    True
    """
    attack = SmoothedPGD(
        eps=eps,
        norm=norm,
        steps=steps,
        scales=scales,
        masking_ratio=masking_ratio,
        straight_through=straight_through,
        loss=loss,
        targeted=targeted,
        bounds=bounds,
        mask=mask,
        seed=seed,
    )
    return attack(
        model, inputs, labels, precision=precision, expectation=expectation, extras=extras
    )
