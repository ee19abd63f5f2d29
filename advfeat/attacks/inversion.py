"""Representation inversion: an image whose activations at a layer are those of another image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from advfeat import checks, threat
from advfeat.attacks import settings
from advfeat.attacks.base import Attack, prepare_batch, track_patience
from advfeat.attacks.pool import attack_batch
from advfeat.attacks.samples import Batch
from advfeat.model import Layer, Network, Precision, attackable
from advfeat.threat import FeatureBounds


class InversionState(NamedTuple):
    """Samples of a running inversion."""

    goal: Tensor  # (N, F) activations of the source inputs
    current: Tensor  # (N, ...)
    velocity: Tensor  # (N, ...), or (N, 0) without momentum
    step: Tensor  # (N,) int64, steps taken
    value_max: Tensor  # (N,) negative squared distance that counts as the largest so far
    waited: Tensor  # (N,) int64, steps since it rose


@dataclass(frozen=True, kw_only=True)
class Inversion(Attack):
    """Representation inversion as a value; see `invert` for the meaning of each setting."""

    steps: int = 1000
    step_size: float = 0.1
    momentum: float = 0.0
    bounds: FeatureBounds = (0.0, 1.0)
    patience: int | None = None

    targeted = False

    def __post_init__(self) -> None:
        """Check the settings."""
        checks.count("steps", self.steps, low=1)
        checks.number("step_size", self.step_size, low=0.0, strict=True)
        checks.number("momentum", self.momentum, low=0.0)
        if self.momentum >= 1:
            checks.fail("momentum", self.momentum, "must be below 1: moves would grow for ever")
        object.__setattr__(self, "bounds", settings.bounds(self.bounds))
        if self.patience is not None:
            checks.count("patience", self.patience, low=1)

    def init(self, net: Network, batch: Batch) -> InversionState:
        """Look up the activations to reach, and put every sample at its start."""
        start = batch.inputs if batch.start is None else batch.start
        goal, none = net.features(batch.inputs), torch.zeros_like(batch.ids)
        return InversionState(
            goal=goal,
            current=start,
            velocity=torch.zeros_like(start) if self.momentum else start.new_empty(len(start), 0),
            step=none,
            value_max=goal.new_full(none.shape, -torch.inf),
            waited=none,
        )

    def step(self, net: Network, state: InversionState) -> InversionState:
        """Move every sample by one step of fixed l2 length, and back into the bounds."""

        def closeness(features: Tensor) -> Tensor:
            # The distance's gradient has the same direction, but none where it is zero.
            return -(features - state.goal).square().sum(1)

        evaluation = net.features_gradient(state.current, closeness)
        move = threat.steepest(evaluation.gradient, "l2")
        velocity = state.velocity
        if self.momentum:
            velocity = move = self.momentum * velocity + move
        moved = state.current + self.step_size * move
        current = threat.project(moved, moved, None, "l2", self.bounds)
        stepped = state._replace(current=current, velocity=velocity, step=state.step + 1)
        if self.patience is not None:
            stepped = track_patience(state, stepped, evaluation.value, self.finished(state))
        return stepped

    @property
    def max_evaluations(self) -> int:
        """Gradients a sample takes."""
        return self.steps

    @property
    def is_fixed_length(self) -> bool:
        """Without patience every sample takes all steps."""
        return self.patience is None

    def finished(self, state: InversionState) -> Tensor:
        """Samples whose steps are spent, or their patience."""
        spent = state.step >= self.steps
        return spent if self.patience is None else spent | (state.waited >= self.patience)

    def result(self, state: InversionState) -> Tensor:
        """The last iterate, as in the paper."""
        return state.current


def invert(
    model: nn.Module,
    inputs: Tensor,
    start: Tensor,
    *,
    layer: Layer = None,
    steps: int = 1000,
    step_size: float = 0.1,
    momentum: float = 0.0,
    bounds: FeatureBounds = (0.0, 1.0),
    patience: int | None = None,
    straight_through: bool = False,
    precision: Precision = "float32",
    expectation: int = 1,
    extras: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Move ``start`` until the model's activations on it are those on ``inputs``.

    Minimises ||g(start) - g(inputs)||_2 by steps of fixed l2 length along the gradient, clipped to
    the bounds after each (Ilyas et al. 2019, appendix C). There is no ball.

    Parameters
    ----------
    model
        Any module.
    inputs
        Where the activations are taken, ``(N, ...)`` within ``bounds``.
    start
        First iterates: other images or noise, in the shape of ``inputs``. Several starts for each
        input have a further axis in front, ``(starts, N, ...)``.
    layer
        What g is: a module's name or the module (its output), a callable of the inputs, or None
        for the input of the Linear that gives the logits (the penultimate layer of the paper).
    steps, step_size
        Default 1000 steps of l2 length 0.1, the paper's choice for CIFAR-10.
    momentum
        Fraction of the last move that is added to the next (heavy ball), in [0, 1); in the paper 0.
        With 0.9 the same distance needs fewer steps (27 instead of 100 in docs/benchmarks.md),
        because moves grow from ``step_size`` to at most 1 / (1 - momentum) times that.
    bounds
        Lowest and highest valid input, ``(low, high)``, numbers or tensors that broadcast against
        one sample.
    patience
        Leave a sample where it is once its squared distance has not fallen by a thousandth in so
        many steps; by default every sample takes all steps, as in the paper.
    straight_through
        Let gradients pass the last ReLU before the layer unchanged, as the paper's released code
        does. By default the gradient of an inactive unit is zero.
    precision
        ``"bfloat16"`` takes the gradients in bfloat16 where the hardware has it.
    expectation, extras
        As in `advfeat.pgd`; activations are means over ``expectation`` calls.

    Returns
    -------
    Tensor
        The last iterates, the shape of ``start``, float32 (float64 for float64 inputs).

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause.

    Examples
    --------
    >>> import torch
    >>> from advfeat.attacks import invert
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    >>> x, start = torch.rand(4, 6), torch.rand(4, 6)
    >>> invert(model, x, start, steps=5).shape
    torch.Size([4, 6])
    """
    attack = Inversion(
        steps=steps, step_size=step_size, momentum=momentum, bounds=bounds, patience=patience
    )
    checks.inputs(inputs, attack.bounds)
    checks.inputs(start, attack.bounds, "start")
    several = start.ndim == inputs.ndim + 1
    if start.shape[1 if several else 0 :] != inputs.shape:
        cause = f"expected the shape of inputs, {tuple(inputs.shape)}, or (starts, N, ...)"
        checks.fail("start.shape", tuple(start.shape), cause)
    with attackable(
        model,
        precision=precision,
        expectation=expectation,
        layer=layer,
        straight_through=straight_through,
        purpose="features",
    ) as net:
        labels = torch.zeros(inputs.shape[0], dtype=torch.int64, device=inputs.device)
        net.expect_extras(extras)
        batch = prepare_batch(net, inputs, labels, None, attack.bounds, extras=extras)
        inverted = []
        for one in start if several else [start]:
            started = batch._replace(start=threat.clip(net.prepare(one), attack.bounds))
            inverted.append(attack.result(attack_batch(attack, net, started)).contiguous())
    return torch.stack(inverted) if several else inverted[0]
