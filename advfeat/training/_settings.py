"""What `fit` and `adversarial_fit` were called with, as one object that is handed on."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import nn

from advfeat import checks
from advfeat.loading import Data
from advfeat.model import Precision
from advfeat.training._method import Loss, TrainingMethod
from advfeat.training._optimizer import OptimizerLike
from advfeat.training._options import Options
from advfeat.training._output import Output, check_output
from advfeat.training._schedule import Schedule

Row: TypeAlias = dict[str, float]
Callback: TypeAlias = Callable[[Row], object]
Augment: TypeAlias = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """The arguments that `fit` and `adversarial_fit` share, checked."""

    model: nn.Module
    data: Data
    epochs: int
    lr: float
    momentum: float
    weight_decay: float
    optimizer: OptimizerLike | None
    schedule: Schedule | None
    schedule_every: Literal["step", "epoch"] | None
    batch_size: int | None
    output: Output | None
    loss: Loss | None
    augment: Augment | None
    precision: Precision
    validation: Data | float | None
    checkpoint: str | os.PathLike[str] | None
    on_step: Callback | None
    on_epoch: Callback | None
    options: Options
    seed: int | torch.Generator | None
    progress: bool | None

    def __post_init__(self) -> None:
        """Check what needs neither the data nor the model's output."""
        checks.model(self.model)
        checks.count("epochs", self.epochs, low=1)
        checks.one_of("precision", self.precision, checks.PRECISIONS)
        if self.schedule_every is not None:
            checks.one_of("schedule_every", self.schedule_every, ("step", "epoch"))
        for name in ("loss", "augment", "on_step", "on_epoch"):
            checks.function(name, getattr(self, name))
        check_output(self.output)
        _check_loss(self.loss)
        if not isinstance(self.options, Options):
            raise TypeError(f"options={self.options!r}: expected advfeat.training.Options(...)")
        if self.loss is not None and self.options.label_smoothing:
            checks.fail(
                "label_smoothing",
                self.options.label_smoothing,
                "it is of the cross-entropy, and loss= is your own; smooth the labels in it",
            )
        checks.seed(self.seed)


class MethodSettings(Protocol):
    """The arguments that are of one method of training."""

    @property
    def needs_guard(self) -> bool:
        """Whether the method needs the guard against catastrophic overfitting."""
        ...

    def identity(self) -> dict[str, Any]:
        """Describe the settings, for a checkpoint to compare."""
        ...

    def method(self, settings: TrainingSettings, seed: int) -> TrainingMethod:
        """Build the method."""
        ...


@dataclass(frozen=True)
class StandardSettings:
    """Of standard training: none."""

    needs_guard = False

    def identity(self) -> dict[str, Any]:
        """Nothing to compare."""
        return {}

    def method(self, settings: TrainingSettings, seed: int) -> TrainingMethod:
        """Build standard training."""
        options = settings.options
        return TrainingMethod(settings.precision, options.label_smoothing, settings.loss)


def _check_loss(loss: Loss | None) -> None:
    reduction = getattr(loss, "reduction", "none")
    if isinstance(loss, nn.Module) and reduction != "none":
        checks.fail(
            "loss", f"{type(loss).__name__}(reduction={reduction!r})", "pass reduction='none'"
        )
