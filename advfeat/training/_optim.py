"""Optimiser and schedule, from what the user gave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import (
    CyclicLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
)

from advfeat import checks

Schedule: TypeAlias = "LRScheduler | Callable[[Optimizer], LRScheduler] | Literal['one_cycle']"
OptimizerLike: TypeAlias = "Optimizer | Callable[[Any], Optimizer]"


def made_optimizer(
    model: nn.Module,
    optimizer: OptimizerLike | None,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> Optimizer:
    """The optimiser given, one made by the callable given, or SGD."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if isinstance(optimizer, Optimizer):
        own = {id(p) for p in model.parameters()}
        if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            checks.fail(
                "optimizer",
                type(optimizer).__name__,
                "none of its parameters is the model's; was it made for a copy of the model?",
            )
        return optimizer
    if not parameters:
        checks.fail("model", type(model).__name__, "no parameter requires a gradient: all frozen?")
    if optimizer is not None:
        checks.function("optimizer", optimizer)
        made: object = optimizer(parameters)
        if not isinstance(made, Optimizer):
            raise TypeError(f"optimizer: made {type(made).__name__}; expected an Optimizer")
        return made
    checks.number("lr", lr, low=0.0, strict=True)
    checks.number("momentum", momentum, low=0.0)
    checks.number("weight_decay", weight_decay, low=0.0)
    return SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)


def described(optimizer: Optimizer) -> str:
    """Class and best-known settings, the same in every version of torch."""
    known = ("lr", "momentum", "betas", "weight_decay", "nesterov")
    found = [f"{name}={value}" for name, value in optimizer.defaults.items() if name in known]
    return f"{type(optimizer).__name__}({', '.join(found)})"


def made_scheduler(
    optimizer: Optimizer, schedule: Schedule | None, epochs: int, steps: Callable[[], int]
) -> LRScheduler:
    """The schedule given, one made by the callable given, or the paper's.

    ``steps`` counts the optimiser's steps in an epoch.
    """
    if schedule is None:
        third, two_thirds = max(1, epochs // 3), max(1, 2 * epochs // 3)
        return MultiStepLR(optimizer, sorted({third, two_thirds}), 0.1)
    if isinstance(schedule, str):
        checks.one_of("schedule", schedule, ("one_cycle",))
        peaks = [group["lr"] for group in optimizer.param_groups]
        return OneCycleLR(optimizer, peaks, total_steps=epochs * steps())
    if not isinstance(schedule, LRScheduler):
        checks.function("schedule", schedule)
        schedule = schedule(optimizer)
    if schedule.optimizer is not optimizer:
        checks.fail(
            "schedule",
            type(schedule).__name__,
            "it steps another optimizer; pass that one too: optimizer=",
        )
    if isinstance(schedule, ReduceLROnPlateau):
        checks.fail("schedule", "ReduceLROnPlateau", "it needs a metric; step it in on_epoch")
    return schedule


def is_stepped_every_batch(scheduler: LRScheduler) -> bool:
    """Whether a scheduler counts batches and not epochs."""
    return isinstance(scheduler, (OneCycleLR, CyclicLR))
