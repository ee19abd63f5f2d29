"""FAB-T, the targeted fast adaptive boundary attack (Croce and Hein 2020)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from advfeat import checks, losses, threat
from advfeat.attacks.base import verified_logits
from advfeat.attacks.minimum_norm import (
    MinimumNorm,
    evaluated,
    flat_bounds,
    lead_of,
    likely_others,
    to_hyperplane,
)
from advfeat.attacks.samples import Batch
from advfeat.losses import is_success
from advfeat.model import Evaluation, Network, Precision
from advfeat.suggestions import suggests
from advfeat.threat import FeatureBounds, Norm

# The paper's: the largest pull towards the clean input, the overshoot across the boundary, and
# what is left of a perturbation after the step back from an input that fools the model.
_ALPHA_MAX = 0.1
_ETA = 1.05
_BETA = 0.9


class FABState(NamedTuple):
    """Samples of a running FAB-T."""

    inputs: Tensor  # (N, ...) clean
    labels: Tensor  # (N,) int64
    targets: Tensor  # (N, T) int64, other classes, the most likely first
    step: Tensor  # (N,) int64, steps taken, towards all targets
    current: Tensor  # (N, ...)
    x_best: Tensor  # (N, ...), the closest that fools the model, else the last iterate
    distance: Tensor  # (N,) of x_best; infinite where nothing fools the model
    value: Tensor  # (N,) its negative
    success: Tensor  # (N,) bool, whether x_best fools the model (within eps)
    box: Tensor  # (N, 2, ...) bounds of each sample, or (N, 0) where they are the attack's


@suggests
@dataclass(frozen=True, kw_only=True)
class FAB(MinimumNorm):
    """FAB-T as a value; see `fab` for the meaning of each setting.

    With ``eps`` it serves `advfeat.robust_accuracy`: a sample is finished once it is fooled within
    ``eps``, and results lie within ``eps``.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(4, 3)
    >>> attack = FAB(norm="l2", steps=10)
    >>> attack(model, torch.rand(2, 4), torch.tensor([0, 2])).shape
    torch.Size([2, 4])
    """

    targets: int = 9
    targeted: bool = False

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        checks.count("targets", self.targets, low=1)

    def init(self, net: Network, batch: Batch) -> FABState:
        """Look up which classes to aim at; a sample that is wrong already has its result."""
        inputs, labels = batch.inputs, batch.labels
        logits = net.logits(inputs)
        others = labels[:, None] if self.targeted else likely_others(logits, labels, self.targets)
        state = FABState(
            inputs=inputs,
            labels=labels,
            targets=others,
            step=torch.zeros_like(labels),
            current=inputs,
            **self._nothing_kept(batch),
        )
        state = self._keep(state, inputs, is_success(logits, labels, self.targeted))
        kept: FABState = self._keep_start(net, state, batch.start)
        return kept

    def step(self, net: Network, state: FABState) -> FABState:
        """Move every sample to the linearised boundary; after all steps to one target, to the next.

        One gradient, and one forward pass of the new iterate.
        """
        lead = self._lead(state)
        # Within a ball low precision will do, for only what fools the model there has to be sure;
        # a distance is known no better than the logits.
        exact = self.eps is None
        found, _ = evaluated(net, state.current, lead, exact)
        current = self._moved(state, found)
        if exact:
            logits = net.logits(current)
        else:
            # What fools the model outside of the ball is on the way there, and no claim.
            inside = self._close_enough(threat.size(current - state.inputs, self.norm))
            logits = verified_logits(net, current, state.labels, self.targeted, inside)
        hits = self._fools(logits, state.labels)
        state = self._keep(state, current, hits)
        count = state.step + 1
        fraction = torch.ones_like(state.distance).masked_fill(hits, _BETA)
        fraction = fraction.masked_fill(count % self.steps == 0, 0.0)
        current = state.inputs + threat.per_sample(fraction, current) * (current - state.inputs)
        current = threat.clip(current, threat.bounds_of(state.box, self.bounds))
        return state._replace(current=current, step=count)

    @property
    def max_evaluations(self) -> int:
        """Steps towards all targets; fewer where the model has not so many classes."""
        return self.steps * (1 if self.targeted else self.targets)

    def evaluations(self, state: FABState) -> int:
        """Steps towards all targets that the model has."""
        return self.steps * state.targets.shape[1]

    def _lead(self, state: FABState) -> Callable[[Tensor], Tensor]:
        """Objective whose zero is the boundary to cross."""
        if self.targeted:
            return lambda logits: losses.margin_to_target(logits, state.labels)
        number = (state.step // self.steps).clamp_max(state.targets.shape[1] - 1)
        target = state.targets.gather(1, number[:, None]).squeeze(1)
        return lead_of(target, state.labels)

    def _moved(self, state: FABState, found: Evaluation) -> Tensor:
        """The paper's step: between both points projected on the boundary, and a bit beyond it."""
        current, inputs = state.current, state.inputs
        delta, weight = (current - inputs).flatten(1), found.gradient.flatten(1)
        missing = -found.value.to(weight.dtype)
        gap = torch.stack([missing, missing + (weight * delta).sum(1)], 1)
        points = torch.stack([current.flatten(1), inputs.flatten(1)], 1)
        bounds = threat.bounds_of(state.box, self.bounds)
        moves = to_hyperplane(points, weight, gap, self.norm, flat_bounds(bounds))
        lengths = threat.size(moves.flatten(0, 1), self.norm).view(-1, 2).clamp_min(1e-8)
        alpha = (lengths[:, 0] / lengths.sum(1)).clamp_max(_ALPHA_MAX)[:, None]
        step = _ETA * moves[:, 0] * (1 - alpha) + alpha * (_ETA * moves[:, 1] - delta)
        return threat.clip(current + step.view(current.shape), bounds)


@suggests
def fab(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    norm: Norm,
    steps: int = 100,
    targets: int = 9,
    targeted: bool = False,
    bounds: FeatureBounds = (0.0, 1.0),
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    precision: Precision = "float32",
    expectation: int = 1,
    extras: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Find close inputs that fool the model, by the targeted FAB attack (Croce and Hein 2020).

    Each step linearises the boundary between the label and one other class, and moves to it, with
    a pull towards the clean input; from an input that fools the model it steps back. Nothing has
    to be tuned, and it does not depend on the scale of the logits. No random numbers are used.

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
        Steps towards each target; a step takes one gradient and one forward pass.
    targets
        How many other classes to aim at in turn, the most likely first; at most all of them.
    targeted
        Search for the closest inputs classified as ``labels``; ``targets`` does not matter then.
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
        The closest inputs found that the model gets wrong, as whichever class; the clean input
        where that is wrong already. A sample where nothing was found holds the last iterate. The
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
    >>> x_adv = fab(model, x, torch.tensor([0]), norm="l2")
    >>> round(float((x_adv - x).norm()), 2)  # (3 * 0.8 - 4 * 0.3) / 5
    0.24
    """
    attack = FAB(
        norm=norm,
        steps=steps,
        targets=targets,
        targeted=targeted,
        bounds=bounds,
        mask=mask,
        scale=scale,
    )
    return attack(
        model, inputs, labels, precision=precision, expectation=expectation, extras=extras
    )
