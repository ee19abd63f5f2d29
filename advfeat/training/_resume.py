"""Checkpoints of a run: what they hold, and how a run resumes from them."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from advfeat.training._checkpoint import State
from advfeat.training._history import History
from advfeat.training._learner import Learner
from advfeat.training._method import TrainingMethod
from advfeat.training._overfitting import OverfittingGuard
from advfeat.training._plan import Plan
from advfeat.training._random import global_state, set_global_state
from advfeat.training._settings import Row
from advfeat.training._totals import Totals

# Seconds. On a GPU an epoch may take one second, and writing a checkpoint to the disk as long.
_SAVE_EVERY = 10.0


@dataclass
class Position:
    """Where a run is."""

    epoch: int = 0  # finished
    batches: int = 0  # taken in the epoch after
    step: int = 0  # batches of all epochs
    first_rate: float = 0.0  # of that epoch
    largest: int = 0  # batch of that epoch
    history: History = field(default_factory=History)


class Checkpoints:
    """Saves a run, resumes it, and keeps the best epoch."""

    def __init__(
        self,
        plan: Plan,
        method: TrainingMethod,
        learner: Learner,
        guard: OverfittingGuard | None,
    ) -> None:
        self._plan, self._method, self._learner, self._guard = plan, method, learner, guard
        self._best: State | None = None  # kept here where there is no folder to keep it in
        self._epoch_start: State | None = None  # random states as the epoch began
        self._saved_at, self.saved_epoch = time.monotonic(), 0

    def begin_epoch(self) -> None:
        """Keep the random states that the order of an epoch follows from."""
        if self._plan.folder is not None:
            self._epoch_start = self._random_of_data()

    def _random_of_data(self) -> State:
        return {
            "global": global_state(self._plan.device),
            "data": copy.deepcopy(self._plan.generators.state_dict()),
        }

    def record(self, row: Row, at: Position, totals: Totals) -> None:
        """Add an epoch to the history, and keep the model where it is the best so far."""
        history, figure = at.history, self._method.figure
        history.rows.append(row)
        if figure not in row:
            return
        if history.best is None or row[figure] > history.rows[history.best - 1][figure]:
            history.best = at.epoch
            if self._plan.folder is not None:
                self.save(at, totals, name="best.pt")
            elif self._plan.settings.options.patience is not None:
                self._best = copy.deepcopy(self._learner.result_module.state_dict())

    def save(
        self, at: Position, totals: Totals, *, name: str = "last.pt", finished: bool = False
    ) -> None:
        """Write a checkpoint, on the first rank."""
        folder = self._plan.folder
        if folder is not None and self._plan.process.is_first:
            folder.write(self._state(at, totals, finished=finished), name)
            if name == "last.pt":
                self._saved_at, self.saved_epoch = time.monotonic(), at.epoch

    @property
    def is_due(self) -> bool:
        """Whether the last checkpoint is so old that another is worth its time."""
        return time.monotonic() - self._saved_at >= _SAVE_EVERY

    def _state(self, at: Position, totals: Totals, *, finished: bool) -> State:
        plan, learner = self._plan, self._learner
        return {
            "model": learner.result_state(in_training=at.batches > 0),
            "learned": learner.snapshot(),
            "groups": plan.optimizer.state_dict()["param_groups"],
            "schedule": plan.schedule.scheduler.state_dict(),
            "method": self._method.state_dict(),
            "guard": None if self._guard is None else self._guard.state_dict(),
            "epoch": at.epoch,
            "batches": at.batches,
            "step": at.step,
            "totals": totals.sums,
            "rate": at.first_rate,
            "random": global_state(plan.device),
            "own": plan.own.state_dict(),
            "epoch_start": self._epoch_start if at.batches else self._random_of_data(),
            "history": at.history.rows,
            "best": at.history.best,
            "seed": plan.seed,
            "identity": plan.identity,
            "finished": finished,
        }

    def resume(self, at: Position, totals: Totals) -> bool:
        """Continue from the checkpoint, or write the first; return whether nothing is left."""
        plan, found = self._plan, self._plan.found
        if found is None:
            self.save(at, totals)
            if plan.folder is not None and plan.process.is_first:
                plan.folder.check_readable()
            return False
        self._learner.restore(found["learned"], found["groups"])
        plan.schedule.scheduler.load_state_dict(found["schedule"])
        self._method.load_state_dict(found["method"])
        if self._guard is not None:
            self._guard.load_state_dict(found["guard"])
        at.epoch, at.batches, at.step = found["epoch"], found["batches"], found["step"]
        at.first_rate = found["rate"]
        totals.restore(found["totals"])
        at.history = History(found["history"], found["best"])
        self.saved_epoch = at.epoch
        start = found["epoch_start"]
        set_global_state(start["global"], plan.device, with_torch=False)
        plan.generators.load_state_dict(start["data"])
        plan.own.load_state_dict(found.get("own", {}))
        return self._is_over(found)

    def _is_over(self, found: State) -> bool:
        if found["epoch"] >= self._plan.settings.epochs:
            return True
        # Stopped by on_epoch or out of patience; or finished, and more epochs were asked for.
        return bool(found["finished"]) and found["epoch"] < found["identity"]["epochs"]

    def fingerprint(self) -> list[Any]:
        """What a callback may have changed: settings of the optimiser, and weights."""
        groups = self._plan.optimizer.state_dict()["param_groups"]
        tensors = list(_tensors(self._learner.result_module)) + list(_tensors(self._plan.module))
        sums = torch.stack([t.detach().double().sum() for t in tensors]) if tensors else None
        versions = [t._version for t in tensors]
        return [repr(groups), versions, None if sums is None else sums.tolist()]

    def leave(self, at: Position) -> None:
        """Leave the model as the average, or as it was in the best epoch."""
        plan, module = self._plan, self._plan.module
        if plan.settings.options.patience is not None and at.history.best is not None:
            best = self._best
            if plan.folder is not None:
                found = plan.folder.read("best.pt")
                assert found is not None
                best = found["model"]
            assert best is not None
            module.load_state_dict(best)
        elif self._learner.average is not None:
            module.load_state_dict(self._learner.average.module.state_dict())


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]
