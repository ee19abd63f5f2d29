"""The schedule of the learning rate: which one, and when it is stepped."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias

import torch
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CyclicLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
)

from advfeat import checks

Schedule: TypeAlias = "LRScheduler | Callable[[Optimizer], LRScheduler] | Literal['one_cycle']"
Every: TypeAlias = Literal["step", "epoch"]

# Steps up to which a schedule is tried out, to see whether it counts steps or epochs.
_TRIED = 5000
# A schedule whose rate stays below this fraction of what it reaches in so many steps counts steps.
_FRACTION = 0.5
# A horizon this near to the number of steps is meant to be that.
_NEAR = 0.1


def make_scheduler(
    optimizer: Optimizer, schedule: Schedule | None, epochs: int, steps: Callable[[], int]
) -> LRScheduler:
    """Return the schedule given, one made by the callable given, or the paper's.

    ``steps`` counts the optimiser's steps in an epoch.
    """
    if schedule is None:
        third, two_thirds = max(1, epochs // 3), max(1, 2 * epochs // 3)
        return MultiStepLR(optimizer, sorted({third, two_thirds}), 0.1)
    if isinstance(schedule, str):
        checks.one_of("schedule", schedule, ("one_cycle",))
        peaks = [group["lr"] for group in optimizer.param_groups]
        cycles = any(name in optimizer.param_groups[0] for name in ("momentum", "betas"))
        return OneCycleLR(optimizer, peaks, total_steps=epochs * steps(), cycle_momentum=cycles)
    if not isinstance(schedule, LRScheduler):
        checks.function("schedule", schedule)
        schedule = schedule(optimizer)
    if not isinstance(schedule, LRScheduler):
        raise TypeError(f"schedule: made {type(schedule).__name__}; expected an LRScheduler")
    if schedule.optimizer is not optimizer:
        checks.fail(
            "schedule",
            type(schedule).__name__,
            "it steps another optimizer; pass that one too: optimizer=",
        )
    return schedule


class ScheduleStepper:
    """Steps a schedule after every batch or every epoch, and leaves it at its end."""

    def __init__(self, scheduler: LRScheduler, every: Every) -> None:
        self.scheduler, self.every = scheduler, every

    def after_step(self) -> None:
        """Step a schedule that counts batches."""
        if self.every == "step":
            self._step()

    def after_epoch(self, row: dict[str, float], figure: str) -> None:
        """Step a schedule that counts epochs.

        ReduceLROnPlateau gets the validation figure, or what it lacks of 1 where the schedule
        waits for a value to fall; without validation the accuracy or the loss of training.
        """
        if isinstance(self.scheduler, ReduceLROnPlateau):
            if self.scheduler.mode == "max":
                self.scheduler.step(row.get(figure, row["accuracy"]))
            else:
                self.scheduler.step(1 - row[figure] if figure in row else row["loss"])
        elif self.every == "epoch":
            self._step()

    def _step(self) -> None:
        scheduler = self.scheduler
        if isinstance(scheduler, OneCycleLR) and scheduler.last_epoch >= scheduler.total_steps - 1:
            return
        try:
            scheduler.step()
        except ValueError as error:
            # A OneCycleLR inside of another schedule, and a loader that is longer than it said.
            if "Tried to step" not in str(error):
                raise


def stepped_every(
    scheduler: LRScheduler, every: Every | None, epochs: int, steps: Callable[[], int]
) -> Every:
    """Return when a schedule is to be stepped: as told, or as its class says.

    OneCycleLR and CyclicLR count steps. So does a schedule that reaches its full rate within the
    steps of the run and not within its epochs (a warm-up over steps), and one whose horizon is the
    number of steps.
    """
    if isinstance(scheduler, ReduceLROnPlateau):
        if every == "step":
            checks.fail("schedule_every", every, "ReduceLROnPlateau waits for a figure an epoch")
        return "epoch"
    if every is not None:
        return every
    parts = list(_parts(scheduler))
    if any(isinstance(part, (OneCycleLR, CyclicLR)) for part in parts):
        return "step"
    if all(isinstance(part, MultiStepLR) for part in parts):
        return "epoch"
    total = epochs * steps()
    if total <= epochs:
        return "epoch"
    if any(abs(h - total) <= _NEAR * total and h > epochs for h in _horizons(scheduler, parts)):
        return "step"
    rates = _tried(scheduler, min(total, _TRIED))
    if rates is None or max(rates[:epochs]) >= _FRACTION * max(rates):
        return "epoch"
    return "step"


def _parts(scheduler: Any) -> Iterator[Any]:
    yield scheduler
    for part in getattr(scheduler, "_schedulers", ()):
        yield from _parts(part)


def _horizons(scheduler: Any, parts: list[Any]) -> list[float]:
    """Numbers after which schedules have done what they do."""
    ends: list[float] = []
    for part in parts:
        if isinstance(part, CosineAnnealingLR):
            ends.append(part.T_max)
        elif isinstance(part, (LinearLR, PolynomialLR)):
            ends.append(part.total_iters)
        elif isinstance(part, LambdaLR):
            ends += [n for f in part.lr_lambdas for n in _numbers_bound(f)]
    milestones = getattr(scheduler, "_milestones", ())
    return [*ends, *(end + milestone for milestone in milestones for end in ends)]


def _numbers_bound(function: Any) -> list[float]:
    """Numbers in the partial arguments and the closure of a function."""
    cells = getattr(function, "__closure__", None) or ()
    bound = [cell.cell_contents for cell in cells]
    bound += [*getattr(function, "args", ()), *getattr(function, "keywords", {}).values()]
    return [n for n in bound if isinstance(n, (int, float)) and not isinstance(n, bool)]


def _tried(scheduler: LRScheduler, steps: int) -> list[float] | None:
    """Rates of the first group over so many steps, by a copy; None where it cannot be copied."""
    own = scheduler.optimizer
    groups = [{k: v for k, v in group.items() if k != "params"} for group in own.param_groups]
    twin = SGD([{"params": [torch.zeros(1)]} for _ in groups], lr=0.1)
    for mine, theirs in zip(twin.param_groups, groups, strict=True):
        mine.update(copy.deepcopy(theirs))
    rates = []
    try:
        tried = copy.deepcopy(scheduler, {id(own): twin})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the optimiser is not stepped
            for _ in range(steps):
                rates.append(float(twin.param_groups[0]["lr"]))
                tried.step()
    except Exception:  # a schedule of the user's own may do anything
        return rates or None
    return rates
