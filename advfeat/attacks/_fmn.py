"""FMN, the fast minimum-norm attack (Pintor et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from advfeat import checks, losses, threat
from advfeat.attacks.minimum_norm import (
    DUAL,
    RELATIVE_STEP,
    MinimumNorm,
    evaluated,
    lead_of,
    likely_others,
    nearest_class,
)
from advfeat.attacks.samples import Batch
from advfeat.losses import is_success
from advfeat.model import Evaluation, Network, Precision
from advfeat.suggestions import suggests
from advfeat.threat import FeatureBounds, Norm

# The paper's: by which fraction the radius grows or shrinks, at first and at last; and the last
# step's size as a fraction of the first's.
_GAMMA_FIRST, _GAMMA_LAST = 0.05, 0.001
_STEP_LAST = 0.01


class FMNState(NamedTuple):
    """Samples of a running FMN."""

    inputs: Tensor  # (N, ...) clean
    labels: Tensor  # (N,) int64, true labels or targets
    target: Tensor  # (N,) int64, the class to aim at
    low: Tensor  # (N, ...) threat.limits_of the inputs; (N, 0) in linf, where they depend on radius
    high: Tensor
    farthest: Tensor  # (N,) distance of the farthest corner of the bounds
    step: Tensor  # (N,) int64, steps taken
    current: Tensor  # (N, ...)
    radius: Tensor  # (N,) of the ball that the current iterate was projected on
    x_best: Tensor  # (N, ...), the closest that fools the model, else the last iterate
    distance: Tensor  # (N,) of x_best; infinite where nothing fools the model
    value: Tensor  # (N,) its negative
    success: Tensor  # (N,) bool, whether x_best fools the model (within eps)
    box: Tensor  # (N, 2, ...) bounds of each sample, or (N, 0) where they are the attack's


@lru_cache(maxsize=16)
def _schedule(
    norm: Norm, steps: int, step_size: float | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """By which factor the radius shrinks and grows, and a step's length, ``(steps + 1, 3)``.

    The length is a fraction of the radius, or an l2 length where ``step_size`` is given.
    """
    # From 1 to 0 along half a cosine.
    fresh = (1 + (torch.arange(steps + 1, device=device).to(dtype) * (math.pi / steps)).cos()) / 2
    gamma = _GAMMA_LAST + (_GAMMA_FIRST - _GAMMA_LAST) * fresh
    if step_size is None:
        first, last = RELATIVE_STEP[norm]
        length = last + (first - last) * fresh
    else:
        length = step_size * (_STEP_LAST + (1 - _STEP_LAST) * fresh)
    return torch.stack([1 - gamma, 1 + gamma, length], 1)


@suggests
@dataclass(frozen=True, kw_only=True)
class FMN(MinimumNorm):
    """FMN as a value; see `fmn` for the meaning of each setting.

    With ``eps`` it serves `advfeat.robust_accuracy`: a sample is finished once it is fooled within
    ``eps``, and results lie within ``eps``.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(4, 3)
    >>> attack = FMN(norm="l2", steps=10)
    >>> attack(model, torch.rand(2, 4), torch.tensor([0, 2])).shape
    torch.Size([2, 4])
    """

    step_size: float | None = None
    targets: int = 9
    targeted: bool = False

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        if self.step_size is not None:
            checks.number("step_size", self.step_size, low=0.0, strict=True)
        checks.count("targets", self.targets, low=1)

    def init(self, net: Network, batch: Batch) -> FMNState:
        """Put every sample at its clean input; a sample that is wrong already has its result."""
        inputs, labels = batch.inputs, batch.labels
        logits = net.logits(inputs)
        bounds = threat.bounds_of(batch.box, self.bounds)
        low, high = threat.limits_of(inputs, 0.0, "l2", bounds)
        farthest = threat.size(torch.maximum(high, -low), self.norm)
        if self.norm == "linf":
            low = high = inputs.new_empty(len(labels), 0)
        state = FMNState(
            inputs=inputs,
            labels=labels,
            target=labels if self.targeted else self._nearest(net, batch, logits),
            low=low,
            high=high,
            farthest=farthest,
            step=torch.zeros_like(labels),
            current=inputs,
            radius=inputs.new_zeros(inputs.shape[0]),
            **self._nothing_kept(batch),
        )
        state = self._keep(state, inputs, is_success(logits, labels, self.targeted))
        kept: FMNState = self._keep_start(net, state, batch.start)
        return kept

    def step(self, net: Network, state: FMNState) -> FMNState:
        """Evaluate the current iterate, adapt each sample's radius, and take a gradient step."""
        found, uncertain = evaluated(net, state.current, self._objective(state))
        hits = self._fools(found.output, state.labels, uncertain)
        distance = threat.size(state.current - state.inputs, self.norm)
        state = self._keep(state, state.current, hits, distance)
        return self._moved(state, found, hits, distance)

    def run(self, net: Network, state: FMNState) -> FMNState:
        """Take all steps, and evaluate the last iterate too."""
        for _ in range(self.steps):
            state = self.step(net, state)
        hits = self._fools(net.logits(state.current), state.labels)
        settled: FMNState = self._keep(state, state.current, hits)
        return settled

    @property
    def max_evaluations(self) -> int:
        """All steps, and the evaluation of the last iterate."""
        return self.steps + 1

    def _nearest(self, net: Network, batch: Batch, logits: Tensor) -> Tensor:
        """Of the likely classes, the one whose linearised boundary is nearest within the bounds."""
        likely = likely_others(logits, batch.labels, self.targets)
        bounds = threat.bounds_of(batch.box, self.bounds)
        return nearest_class(net, batch, likely, self.norm, bounds)

    def _objective(self, state: FMNState) -> Callable[[Tensor], Tensor]:
        if not self.targeted:
            return lead_of(state.target, state.labels)
        return lambda logits: losses.margin_to_target(logits, state.labels)

    def _moved(
        self, state: FMNState, found: Evaluation, hits: Tensor, distance: Tensor
    ) -> FMNState:
        current, radius = state.current, state.radius
        table = _schedule(self.norm, self.steps, self.step_size, radius.dtype, radius.device)
        place = state.step.clamp_max(self.steps)
        shrink, grow, length = table.index_select(0, place).unbind(1)
        slope = threat.size(found.gradient, DUAL[self.norm])
        wider, narrower = radius * grow, torch.minimum(radius * shrink, state.distance)
        never = state.distance == torch.inf
        if not threat.known_none(never):
            to_boundary = (found.value.to(radius.dtype).abs() / slope).nan_to_num(torch.inf)
            wider = torch.where(never, distance + to_boundary, wider)
        radius = torch.where(hits, narrower, wider).minimum(state.farthest)
        if self.step_size is None:
            length = length * radius
        gradient, length = found.gradient.to(current.dtype), threat.per_sample(length, current)
        if self.norm == "linf" and self.step_size is None:
            moved = torch.addcmul(current, gradient.sign(), length)
        else:
            known = slope if self.norm == "l2" else None
            moved = threat.ascend_l2(current, gradient, length, known)
        limits = None if self.norm == "linf" else (state.low, state.high)
        bounds = threat.bounds_of(state.box, self.bounds)
        current = threat.project(
            moved, state.inputs, radius, self.norm, bounds, limits, inplace=True
        )
        return state._replace(current=current, radius=radius, step=state.step + 1)


@suggests
def fmn(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    norm: Norm,
    steps: int = 100,
    step_size: float | None = None,
    targets: int = 9,
    targeted: bool = False,
    bounds: FeatureBounds = (0.0, 1.0),
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    precision: Precision = "float32",
    expectation: int = 1,
    extras: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Find close inputs that fool the model, by adaptive norm constraints (Pintor et al. 2021).

    Gradient steps on a difference of logits within a ball whose radius shrinks while the iterate
    fools the model and grows while it does not. One run gives every sample's distance, and with it
    the accuracy at every radius. No random numbers are used.

    Where the paper climbs towards whichever other class leads, which is the farther one for some
    samples, this aims at the class whose linearised boundary is nearest to the clean input.

    Parameters
    ----------
    model
        Any module that returns class logits ``(N, C)``; see `advfeat.pgd`.
    inputs
        Floating point, ``(N, ...)`` of any rank from 2, within ``bounds``.
    labels
        Class indices ``(N,)``: true labels, or the targets when ``targeted``.
    norm
        What is minimised: ``"l1"``, ``"l2"`` or ``"linf"``.
    steps
        Gradients a sample takes.
    step_size
        l2 length of the first step, whatever the norm, as in the paper (1 for images in [0, 1]);
        it falls along a cosine to a hundredth of that. By default a step is as long as the radius
        of the sample's ball, in ``norm``: the normalised gradient at l2 length 1 radius in l2 and
        0.4 in l1, the signs of the gradient at half the radius in linf. Then nothing has to be
        tuned to the norm, the number of features or the model.
    targets
        Among how many other classes to find the nearest, the most likely first: a gradient each,
        before the first step.
    targeted
        Look for inputs that the model classifies as ``labels``.
    bounds, mask
        As in `advfeat.pgd`.
    scale
        Change of each feature that counts as 1, a tensor that broadcasts against one sample:
        ``||delta / scale||`` is minimised. A feature of scale 0 is fixed. None for the norm.
    precision
        ``"bfloat16"`` takes the gradients in bfloat16 where the hardware has it; what fools the
        model is settled in float32.
    expectation, extras
        As in `advfeat.pgd`.

    Returns
    -------
    Tensor
        The closest inputs found that the model gets wrong (or classifies as the targets); the clean
        input where that is so already. A sample where nothing was found holds the last iterate. The
        shape of ``inputs``, float32 (float64 for float64 inputs).

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause, before any work is done.

    Examples
    --------
    The distance from the boundary between two classes of a linear model is known:

    >>> import torch
    >>> model = torch.nn.Linear(2, 2, bias=False)
    >>> model.weight.data = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    >>> x = torch.tensor([[0.8, 0.3]])
    >>> x_adv = fmn(model, x, torch.tensor([0]), norm="l2")
    >>> round(float((x_adv - x).norm()), 2)  # (3 * 0.8 - 4 * 0.3) / 5
    0.24
    """
    attack = FMN(
        norm=norm,
        steps=steps,
        step_size=step_size,
        targets=targets,
        targeted=targeted,
        bounds=bounds,
        mask=mask,
        scale=scale,
    )
    return attack(
        model, inputs, labels, precision=precision, expectation=expectation, extras=extras
    )
