"""Minimum-norm PGD: PGD whose radius follows the closest adversarial example found so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from advfeat import checks, seeding, threat
from advfeat.attacks.minimum_norm import (
    RELATIVE_STEP,
    MinimumNorm,
    evaluated,
    lead_of,
    likely_others,
    linearised_distances,
    step_direction,
)
from advfeat.attacks.samples import Batch
from advfeat.losses import is_success
from advfeat.model import Network, Precision
from advfeat.threat import FeatureBounds, Norm

# By which factor the radius shrinks or grows, at first and at last. Measured in docs/benchmarks.md.
_GAMMA_FIRST: dict[Norm, float] = {"l1": 0.3, "l2": 0.15, "linf": 0.15}
_GAMMA_LAST = 0.005
_MOMENTUM = 0.6
# The first radius is at most this fraction of the distance to the farthest corner of the bounds.
_FIRST_RADIUS = 0.1
# The fraction of the steps after which no noise is added any more.
_NOISE_END = 0.6
# Of so many steps one is taken from the iterate itself, which is where success is checked; the
# others add noise.
_CYCLE = 3


class MinimumPGDState(NamedTuple):
    """State of a minimum-norm PGD."""

    inputs: Tensor  # (N, ...) clean
    labels: Tensor  # (N,) int64
    keys: Tensor  # (N,) int64, random keys
    classes: Tensor  # (N, T) int64, the classes to aim at
    slopes: Tensor  # (N, T) what each class's logit gains in a step of unit norm to it; 0 unknown
    linear: Tensor  # (N,) distance of the nearest class by the gradients at the input
    target: Tensor  # (N,) int64, the class aimed at now
    step: Tensor  # (N,) int64, steps taken
    current: Tensor  # (N, ...)
    velocity: Tensor  # (N, ...)
    radius: Tensor  # (N,) of the ball that the current iterate lies in
    farthest: Tensor  # (N,) distance of the farthest corner of the bounds
    x_best: Tensor  # (N, ...), the closest that fools the model, else the last iterate
    distance: Tensor  # (N,) of x_best; infinite where nothing fools the model
    value: Tensor  # (N,) its negative
    success: Tensor  # (N,) bool, whether x_best fools the model (within eps)
    box: Tensor  # (N, 2, ...) bounds of each sample, or (N, 0) where they are the attack's


@dataclass(frozen=True, kw_only=True)
class MinimumPGD(MinimumNorm):
    """Minimum-norm PGD as an attack object; see `minimum_pgd` for the meaning of each setting.

    With ``eps`` it serves `advfeat.robust_accuracy`: a sample is finished once it is fooled within
    ``eps``, and results lie within ``eps``.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(4, 3)
    >>> attack = MinimumPGD(norm="l2", steps=10, seed=0)
    >>> attack(model, torch.rand(2, 4), torch.tensor([0, 2])).shape
    torch.Size([2, 4])
    """

    restarts: int = 1
    step_size: float | None = None
    noise: float = 6.0
    targets: int = 4
    targeted: bool = False
    seed: int | torch.Generator | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        checks.count("restarts", self.restarts, low=1)
        if self.step_size is not None:
            checks.number("step_size", self.step_size, low=0.0, strict=True)
        checks.number("noise", self.noise, low=0.0)
        checks.count("targets", self.targets, low=1)
        checks.seed(self.seed)

    @property
    def is_random(self) -> bool:
        """Whether noise is added to the points where gradients are taken."""
        return self.noise > 0

    @property
    def max_evaluations(self) -> int:
        """All steps of all restarts, and the evaluation of the last iterate of each."""
        return self.restarts * self._round

    @property
    def _round(self) -> int:
        return self.steps + 1

    def init(self, net: Network, batch: Batch) -> MinimumPGDState:
        """Put every sample at its clean input, and measure how far each class seems to be."""
        inputs, labels = batch.inputs, batch.labels
        logits = net.logits(inputs)
        classes = labels[:, None]
        if not self.targeted:
            classes = likely_others(logits, labels, self.targets)
        low, high = bounds = threat.bounds_of(batch.box, self.bounds)
        distances, gaps = linearised_distances(
            net, batch, classes, self.norm, bounds, self.targeted
        )
        nearest = distances.argmin(1, keepdim=True)
        farthest = threat.size(torch.maximum(high - inputs, inputs - low), self.norm)
        radius = distances.amin(1).minimum(_FIRST_RADIUS * farthest)
        seeded = self.is_random
        state = MinimumPGDState(
            inputs=inputs,
            labels=labels,
            keys=seeding.keys(seeding.resolve(self.seed), batch.ids) if seeded else batch.ids,
            classes=classes,
            slopes=(gaps / distances).nan_to_num(0.0, 0.0, 0.0),
            linear=distances.amin(1),
            target=classes.gather(1, nearest).squeeze(1),
            step=torch.zeros_like(labels),
            current=inputs,
            velocity=torch.zeros_like(inputs),
            radius=radius,
            farthest=farthest,
            **self._nothing_kept(batch),
        )
        state = self._keep(state, inputs, is_success(logits, labels, self.targeted))
        kept: MinimumPGDState = self._keep_start(net, state, batch.start)
        # Without a start that fools the model, a sample begins at its clean input.
        found = kept.distance.isfinite()
        return kept._replace(
            current=torch.where(threat.per_sample(found, inputs), kept.x_best, inputs),
            radius=torch.where(found, kept.distance, radius),
        )

    def step(self, net: Network, state: MinimumPGDState) -> MinimumPGDState:
        """Evaluate the iterate or a noisy copy of it, adapt the radius, and take a step."""
        scale = self._noise_scale(state)
        plain = scale == 0
        points = state.current if not self.is_random else self._with_noise(state, scale)
        lead = lead_of(state.target, state.labels, self.targeted)
        found, uncertain = evaluated(net, points, lead)
        hits = plain & self._fools(found.output, state.labels, uncertain)
        state = self._keep(state, state.current, hits)
        target = torch.where(plain, self._nearest(state, found.output), state.target)
        moved = self._moved(state, found.gradient, plain, hits)._replace(target=target)
        return self._restarted(moved) if self.restarts > 1 else moved

    def _nearest(self, state: MinimumPGDState, logits: Tensor) -> Tensor:
        """The class whose boundary is nearest by its own slope, of those to aim at."""
        own = logits.gather(1, state.labels[:, None])
        lead = (logits.gather(1, state.classes) - own).to(state.slopes.dtype)
        score = (lead / state.slopes).masked_fill(state.slopes <= 0, -torch.inf)
        return state.classes.gather(1, score.argmax(1, keepdim=True)).squeeze(1)

    def _progress(self, state: MinimumPGDState) -> Tensor:
        """From 0 to 1 in each restart, ``(N,)``."""
        return (state.step % self._round).to(state.radius.dtype) / self.steps

    def _noise_scale(self, state: MinimumPGDState) -> Tensor:
        """Standard deviation of the noise, ``(N,)``; 0 where the iterate itself is evaluated."""
        fade = (1 - self._progress(state) / _NOISE_END).clamp_min(0.0)
        noisy = state.step % self._round % _CYCLE != _CYCLE - 1
        dimensions = state.inputs[0].numel()
        unit = {
            "l1": 1 / (4 * math.sqrt(dimensions)),
            "l2": 1 / math.sqrt(dimensions),
            "linf": 1 / math.sqrt(3),
        }[self.norm]
        return torch.where(noisy, self.noise * unit * fade * state.radius, 0.0)

    def _with_noise(self, state: MinimumPGDState, scale: Tensor) -> Tensor:
        uniform = seeding.uniform(state.keys, state.step, state.inputs[0].numel())
        noise = (uniform.to(scale.dtype) - 0.5) * (math.sqrt(12) * scale[:, None])
        return state.current + noise.view(state.inputs.shape)

    def _moved(
        self, state: MinimumPGDState, gradient: Tensor, plain: Tensor, hits: Tensor
    ) -> MinimumPGDState:
        # From 1 to 0 along half a cosine, by each sample's own count.
        fresh = (1 + (self._progress(state) * math.pi).cos()) / 2
        scale = 1.0 if self.step_size is None else self.step_size
        gamma = _GAMMA_LAST + (scale * _GAMMA_FIRST[self.norm] - _GAMMA_LAST) * fresh
        adapted = state.radius * torch.where(hits, 1 - gamma, 1 + gamma)
        radius = torch.where(plain, adapted, state.radius).minimum(state.distance)
        radius = radius.minimum(state.farthest)
        first, last = RELATIVE_STEP[self.norm]
        length = (last + (scale * first - last) * fresh) * radius
        velocity = _MOMENTUM * state.velocity + step_direction(gradient, self.norm)
        moved = state.current + threat.per_sample(length, velocity) * velocity
        bounds = threat.bounds_of(state.box, self.bounds)
        current = threat.project(moved, state.inputs, radius, self.norm, bounds)
        return state._replace(
            current=current, velocity=velocity, radius=radius, step=state.step + 1
        )

    def _restarted(self, state: MinimumPGDState) -> MinimumPGDState:
        """Put samples at the end of a restart back at their clean input."""
        over = state.step % self._round == 0
        chosen = threat.per_sample(over, state.inputs)
        return state._replace(
            current=torch.where(chosen, state.inputs, state.current),
            velocity=torch.where(chosen, 0.0, state.velocity),
            radius=torch.where(over, state.radius.minimum(state.distance), state.radius),
        )


@dataclass(frozen=True, kw_only=True)
class MinimumPGDOnMaskedGradients(MinimumPGD):
    """Minimum-norm PGD with further restarts where gradients are masked.

    A sample takes the restarts after the second only if those two have found a point at less than
    ``masking_ratio`` times the distance that the gradients at the input predict. Without masking,
    points are rarely nearer than predicted. A stage of ensembles.

    Examples
    --------
    >>> MinimumPGDOnMaskedGradients(norm="l1", eps=1.0).restarts
    16
    """

    restarts: int = 16
    masking_ratio: float = 0.7

    def finished(self, state: MinimumPGDState) -> Tensor:
        """Samples as of `MinimumPGD`, and after two restarts those without masking."""
        sound = ~(state.distance < self.masking_ratio * state.linear)
        return super().finished(state) | (sound & (state.step >= 2 * self._round))


def minimum_pgd(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    norm: Norm,
    steps: int = 100,
    restarts: int = 1,
    step_size: float | None = None,
    noise: float = 6.0,
    targets: int = 4,
    targeted: bool = False,
    bounds: FeatureBounds = (0.0, 1.0),
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    seed: int | torch.Generator | None = None,
    precision: Precision = "float32",
    expectation: int = 1,
    extras: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Find close inputs that fool the model, by PGD in a ball that follows the closest one.

    Steps go along the gradient of a difference of two logits, in a ball whose radius shrinks while
    the iterate fools the model and grows while it does not, as in DDN (Rony et al. 2019) and FMN
    (Pintor et al. 2021). Three things are new. Lengths are relative to the radius, in the attack's
    own norm. The class to aim at is the one whose boundary is nearest by the slope at the clean
    input. In the first 60% of the steps, two of three gradients are taken at a copy of the iterate
    with noise, which falls to zero: averaged gradients lead past dead ReLUs, where a network's own
    gradient says nothing.

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
        Gradients of each restart.
    restarts
        Further runs from the clean input, each in the ball of the closest result so far. More than
        about 100 gradients are better spent on restarts than on steps.
    step_size
        Length of the first step as a fraction of the default, which is the radius in l2, half of
        it in linf and 0.4 of it in l1. It falls along a cosine to a few percent of that. The radius
        adapts in proportion.
    noise
        Size of the first noise, in units of a point of the ball; 0 takes none, and no random
        numbers.
    targets
        Among how many other classes to find the nearest, the most likely first: a gradient each,
        before the first step.
    targeted
        Search for the closest inputs classified as ``labels``; ``targets`` does not matter then.
    bounds, mask
        As in `advfeat.pgd`.
    scale
        Change of each feature that counts as 1, a tensor that broadcasts against one sample:
        ``||delta / scale||`` is minimised. A feature of scale 0 is fixed. None for the norm.
    seed
        Seed of the noise; None draws one from torch's default generator.
    precision
        ``"bfloat16"`` takes the gradients in bfloat16 where the hardware has it; whether the model
        is fooled is decided in float32.
    expectation, extras
        As in `advfeat.pgd`.

    Returns
    -------
    Tensor
        The closest inputs found that the model gets wrong; the clean input where that is wrong
        already. A sample where nothing was found holds the last iterate. The shape of ``inputs``,
        float32 (float64 for float64 inputs).

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
    >>> x_adv = minimum_pgd(model, x, torch.tensor([0]), norm="l2", seed=0)
    >>> round(float((x_adv - x).norm()), 2)  # (3 * 0.8 - 4 * 0.3) / 5
    0.24
    """
    attack = MinimumPGD(
        norm=norm,
        steps=steps,
        restarts=restarts,
        step_size=step_size,
        noise=noise,
        targets=targets,
        targeted=targeted,
        bounds=bounds,
        mask=mask,
        scale=scale,
        seed=seed,
    )
    return attack(
        model, inputs, labels, precision=precision, expectation=expectation, extras=extras
    )
