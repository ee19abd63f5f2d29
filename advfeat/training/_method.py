"""What a step of training learns from: how examples are made, and the loss on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advfeat import checks, threat
from advfeat.attacks import PGD
from advfeat.loading import Data
from advfeat.metrics import Accuracy, accuracy, robust_accuracy
from advfeat.model import Extras, Precision
from advfeat.threat import Bounds
from advfeat.training._batches import TrainBatch

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]

# Steps of the attack that measures robust accuracy on validation data.
_VALIDATION_STEPS = 20


class Example(NamedTuple):
    """What goes through the model in one pass (or two), and what the loss compares it with."""

    inputs: tuple[Tensor, ...]
    labels: Tensor  # (N,) class indices
    targets: Tensor  # the same, or (N, C) class probabilities
    weights: Tensor | None  # (N,)
    extras: Extras  # further arguments of forward, (N, ...) each


class TrainingMethod:
    """Standard training: the inputs as they are, and the cross-entropy."""

    figure = "val_accuracy"  # what the best epoch is chosen by
    bounds: Bounds = (-torch.inf, torch.inf)
    updates_per_batch = 1

    def __init__(self, precision: Precision, label_smoothing: float, loss: Loss | None) -> None:
        self._precision: Precision = precision
        self._label_smoothing = label_smoothing
        self._loss = loss

    def begin_epoch(self) -> None:
        """Drop what must not pass from one epoch to the next."""

    def begin_step(self, epochs: float) -> None:
        """Prepare for the step that ends after so many epochs, a fraction."""

    def example(self, model: nn.Module, batch: TrainBatch, step: int) -> Example:
        """Return what the model is trained on for these samples."""
        return as_example((batch.inputs,), batch)

    def losses(self, logits: tuple[Tensor, ...], example: Example) -> Tensor:
        """Return one value for each sample."""
        if self._loss is not None:
            return checks.objective(self._loss(logits[0], example.targets), logits[0])
        return F.cross_entropy(
            logits[0], example.targets, reduction="none", label_smoothing=self._label_smoothing
        )

    def after_backward(self, example: Example) -> None:
        """Use the gradients of an example after the backward pass of its loss."""

    def validate(self, model: nn.Module, data: Data) -> dict[str, Accuracy]:
        """Measure a model on validation data."""
        return {"val_accuracy": accuracy(model, data, progress=False)}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold of the method."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""


class AdversarialMethod(TrainingMethod):
    """What all adversarial methods share: an attack, its warm-up, and robust validation."""

    figure = "val_robust_accuracy"

    def __init__(
        self,
        attack: PGD,
        precision: Precision,
        label_smoothing: float,
        loss: Loss | None,
        warmup: float,
    ) -> None:
        super().__init__(precision, label_smoothing, loss)
        self.attack = attack
        self.bounds = threat.hull(attack.bounds)
        self._warmup = warmup
        self._radius = 1.0  # fraction of eps in this step

    def begin_step(self, epochs: float) -> None:
        """Set the fraction of eps: it rises linearly over the epochs of the warm-up."""
        self._radius = min(1.0, epochs / self._warmup) if self._warmup else 1.0

    @property
    def current_attack(self) -> PGD:
        """The attack of this step."""
        return self.attack if self._radius == 1 else scaled(self.attack, self._radius)

    def validate(self, model: nn.Module, data: Data) -> dict[str, Accuracy]:
        """Measure accuracy, and robust accuracy by PGD-20 in the ball of training."""
        attack = PGD(
            eps=self.attack.eps, norm=self.attack.norm, steps=_VALIDATION_STEPS, bounds=self.bounds
        )
        robust = robust_accuracy(
            model, data, attack=attack, precision=self._precision, progress=False
        )
        return {"val_accuracy": robust.standard, "val_robust_accuracy": robust}


def scaled(attack: PGD, factor: float) -> PGD:
    """Return the attack in a ball of ``factor`` times the radius."""
    size = None if attack.step_size is None else attack.step_size * factor
    return dataclasses.replace(attack, eps=attack.eps * factor, step_size=size)


def as_example(inputs: tuple[Tensor, ...], batch: TrainBatch) -> Example:
    """Return inputs with the labels and weights of their batch."""
    targets = batch.labels if batch.targets is None else batch.targets
    return Example(inputs, batch.labels, targets, batch.weights, batch.extras or {})
