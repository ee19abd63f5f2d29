"""The loop over epochs and steps that `fit` and `adversarial_fit` share."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from advfeat import checks, seeding
from advfeat.durable import Termination
from advfeat.loading import Data, TrainBatch, row_count, training_batches
from advfeat.model import Precision, Trainee, attackable, buffers_kept, device_of, trainable
from advfeat.training._bar import Bar, progress_bar
from advfeat.training._checkpoint import (
    Folder,
    State,
    random_state,
    randomness,
    set_random_state,
)
from advfeat.training._guard import EVERY, Guard
from advfeat.training._history import History
from advfeat.training._lessons import Adversarial, Example, Lesson
from advfeat.training._optim import is_stepped_every_batch
from advfeat.training._options import Options
from advfeat.training._ranks import Ranks
from advfeat.training._weights import Average, perturbed

Row: TypeAlias = dict[str, float]
Callback: TypeAlias = Callable[[Row], object]
Called: TypeAlias = Callable[..., tuple[Tensor, ...]]

# Where looking at the loss means waiting for the device, steps between two looks.
_LOOK = 50


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A training run, checked."""

    model: nn.Module
    data: Data
    validation: Data | None
    epochs: int
    batch_size: int | None
    augment: Callable[[Tensor], Tensor] | None
    optimizer: Optimizer
    scheduler: LRScheduler
    precision: Precision
    options: Options
    guarded: bool
    folder: Folder | None
    found: State | None  # the checkpoint to go on from
    settings: State
    on_step: Callback | None
    on_epoch: Callback | None
    ranks: Ranks
    seed: int
    progress: bool | None


class Totals:
    """Loss, right answers and rows of an epoch so far, kept on the device."""

    def __init__(self, device: torch.device) -> None:
        kind = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(3, dtype=kind, device=device)
        self._first_bad = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, loss: Tensor, right: Tensor, count: int, step: int) -> None:
        """Count a step: the sum of its losses, its right answers, its rows."""
        self.sums += torch.stack([loss, right, torch.full_like(right, count)]).to(self.sums)
        bad = ~torch.isfinite(loss) & (self._first_bad == 0)
        self._first_bad = torch.where(bad, step, self._first_bad)

    def first_bad(self) -> int:
        """First step whose loss was not finite, 0 if there is none."""
        return int(self._first_bad)


class Run:
    """One run of a plan: everything that changes while a model is trained."""

    def __init__(self, plan: Plan, lesson: Lesson) -> None:
        self._plan, self._lesson, self._ranks = plan, lesson, plan.ranks
        self._device = device_of(plan.model)
        self._parameters: list[nn.Parameter] = [
            p for group in plan.optimizer.param_groups for p in group["params"]
        ]
        self._history = History()
        self._epoch = 0  # finished
        self._batches = 0  # taken in the epoch after
        self._step = 0  # batches in all epochs
        self._first_rate = 0.0  # of that epoch
        self._largest = 0  # batch of that epoch
        self._totals = Totals(self._device)
        self._classes: int | None = None
        self._largest_label = -1
        self._average: Average | None = None
        self._guard: Guard | None = None
        self._best: State | None = None  # kept here where there is no folder to keep it in
        self._order: Tensor | None = None  # generator of a loader, as the epoch began
        self._termination = Termination()

    def train(self) -> History:
        """All epochs that are left; the model is then as it is to be used."""
        plan, options = self._plan, self._plan.options
        total = row_count(plan.data)
        if total is not None and isinstance(plan.data, DataLoader):
            total *= self._ranks.count  # each rank's loader has rows of its own
        with trainable(plan.model, precision=plan.precision, compile=options.compile) as trainee:
            if options.ema:
                self._average = Average(plan.model, options.ema, plan.precision)
            if plan.guarded:
                assert isinstance(self._lesson, Adversarial)
                self._guard = Guard(self._lesson, self._ranks, self._learned, self._unlearn)
            finished = self._resume()
            called = self._called(trainee)
            with (
                self._termination.watched(plan.folder is not None),
                progress_bar(
                    plan.progress,
                    total=None if total is None else plan.epochs * total,
                    done=0 if total is None else self._epoch * total,
                    first=self._ranks.first,
                ) as bar,
            ):
                while not finished:
                    finished = self._train_epoch(trainee, called, bar)
        self._leave()
        if self._ranks.count > 1:
            # DDP refers to itself. Alive when the user destroys the process group, it now and then
            # aborts the process as it ends.
            del called
            gc.collect()
        return self._history

    # --- An epoch ---

    def _train_epoch(self, trainee: Trainee, called: Called, bar: Bar) -> bool:
        """Train an epoch, record it, save it; whether training is over."""
        plan, began = self._plan, time.perf_counter()
        row: Row = {"epoch": self._epoch + 1}
        if self._batches == 0:
            self._first_rate = self._rate()
        with randomness(self._own_seed(), self._epoch + 1, self._device):
            self._take_steps(trainee, called, bar)
            self._refuse_broken_weights()
            loss, right, count = self._ranks.summed(self._totals.sums).tolist()
            row |= {"loss": loss / count, "accuracy": right / count, "lr": self._first_rate}
            row["seconds"] = time.perf_counter() - began
            row |= self._measured()
        if not is_stepped_every_batch(plan.scheduler):
            plan.scheduler.step()
        self._epoch, self._batches = self._epoch + 1, 0
        self._totals = Totals(self._device)
        self._record(row)
        # Written before on_epoch is asked: killed in there, a run out of patience is still over.
        over = self._epoch == plan.epochs or self._is_out_of_patience()
        self._save(finished=over)
        if self._is_told_to_stop(row) and not over:
            over = True
            self._save(finished=over)
        self._end_if_told(saved=True)
        return over

    def _take_steps(self, trainee: Trainee, called: Called, bar: Bar) -> None:
        plan = self._plan
        skipped = self._batches
        if skipped == 0:
            self._lesson.begin_epoch()
        self._order = self._loader_generator_state()
        self._largest, last = 0, None
        for number, rows in enumerate(self._portions(), 1):
            self._largest, last = max(self._largest, len(rows.ids)), rows
            if number <= skipped:
                bar.advance(rows.total, dict)
                if number == skipped:
                    assert plan.found is not None
                    set_random_state(plan.found["random"], self._device, torchs=True)
                continue
            self._batches, self._step = number, self._step + 1
            self._take_step(trainee, called, self._augmented(rows), bar)
            self._end_if_told()
        if last is None:
            checks.fail("data", type(plan.data).__name__, "too few rows for a batch on each rank")
        self._refuse_divergence()
        if self._guard is not None and self._batches % EVERY:
            # The rows as they were read, which a run that was ended after its last step has too.
            self._guard.look(trainee.module, last, self._step)

    def _take_step(self, trainee: Trainee, called: Called, rows: TrainBatch, bar: Bar) -> None:
        plan, rate = self._plan, self._rate()
        loss, right = self._learn(trainee, called, rows)
        count = len(rows.labels)
        self._totals.add(loss, right, count, self._step)
        if self._device.type == "cpu" or self._step % _LOOK == 0:
            self._refuse_divergence()
        if is_stepped_every_batch(plan.scheduler):
            plan.scheduler.step()
        if self._guard is not None and self._batches % EVERY == 0:
            self._guard.look(trainee.module, rows, self._step)
        if plan.on_step is not None and self._ranks.first:
            row: Row = {"epoch": self._epoch + 1, "step": self._step}
            row |= {"loss": float(loss) / count, "accuracy": float(right) / count, "lr": rate}
            plan.on_step(row)
        bar.advance(rows.total, lambda: self._figures(rows))

    def _learn(self, trainee: Trainee, called: Called, rows: TrainBatch) -> tuple[Tensor, Tensor]:
        """Update the weights from a batch; the sum of losses, and the right answers."""
        plan, options = self._plan, self._plan.options
        for _ in range(self._lesson.rounds):
            examples = [
                self._lesson.example(trainee.module, part, self._step)
                for part in rows.parts(options.accumulate, self._largest)
            ]
            if options.awp:
                with buffers_kept(plan.model):
                    loss, right = self._backward(called, examples, rows.total)
                with perturbed(self._parameters, options.awp):
                    self._backward(called, examples, rows.total)
            else:
                loss, right = self._backward(called, examples, rows.total)
            if options.clip_norm is not None:
                nn.utils.clip_grad_norm_(self._parameters, options.clip_norm)
            plan.optimizer.step()
            self._forget_gradients()
            if self._average is not None:
                seen = [example.inputs for example in examples]
                self._average.update(plan.model, self._step, seen)
        return loss, right

    def _backward(
        self, called: Called, examples: list[Example], total: int
    ) -> tuple[Tensor, Tensor]:
        """Gradient of the mean loss of a batch, its examples one after another."""
        self._forget_gradients()
        loss, right = torch.zeros((), device=self._device), torch.zeros((), device=self._device)
        for example in examples:
            with self._synchronised(called, example is examples[-1]):
                logits = called(*example.inputs)
                losses = self._lesson.loss(logits, example.labels)
                # DDP takes the mean over ranks, which may have unequal parts of the batch.
                (losses.sum() * (self._ranks.count / total)).backward()  # type: ignore[no-untyped-call]
            self._lesson.learned(example)
            loss += losses.detach().sum()
            right += (logits[-1].detach().argmax(1) == example.labels).sum()
        return loss, right

    def _forget_gradients(self) -> None:
        # The model's as well: an optimiser may have only some of its parameters.
        self._plan.optimizer.zero_grad(set_to_none=True)
        self._plan.model.zero_grad(set_to_none=True)

    @staticmethod
    def _synchronised(called: Called, last: bool) -> AbstractContextManager[None]:
        if isinstance(called, DistributedDataParallel) and not last:
            found: AbstractContextManager[None] = called.no_sync()
            return found
        return nullcontext()

    # --- Data ---

    def _portions(self) -> Any:
        plan = self._plan
        return training_batches(
            plan.data,
            plan.batch_size,
            plan.seed,
            self._epoch + 1,
            self._device,
            rank=self._ranks.rank,
            ranks=self._ranks.count,
            check=self._check,
        )

    def _check(self, inputs: Tensor, labels: Tensor) -> None:
        checks.inputs(inputs, self._lesson.bounds)
        checks.labels(labels, inputs)
        self._largest_label = int(labels.max())
        if self._classes is not None:
            checks.class_range(self._largest_label, self._classes)

    def _augmented(self, rows: TrainBatch) -> TrainBatch:
        inputs, labels = rows.inputs, rows.labels.to(torch.int64)
        augment = self._plan.augment
        if augment is not None:
            inputs = augment(inputs)
        if self._classes is None:
            if augment is not None:
                checks.inputs(inputs, self._lesson.bounds, "augment")
            with attackable(self._plan.model) as net:
                self._classes = net.class_count(net.prepare(inputs[:1]))
            checks.class_range(self._largest_label, self._classes)
        return rows._replace(inputs=inputs, labels=labels)

    # --- What is recorded ---

    def _measured(self) -> Row:
        plan, model = self._plan, self._judged()
        self._ranks.equalise(plan.model)
        self._ranks.equalise(model)
        if plan.validation is None:
            return {}
        data = self._ranks.own_part(plan.validation)
        found = self._lesson.measured(model, data)
        return {name: self._ranks.share(value, self._device) for name, value in found.items()}

    def _record(self, row: Row) -> None:
        history, figure = self._history, self._lesson.figure
        history.rows.append(row)
        if figure not in row:
            return
        if history.best is None or row[figure] > history.rows[history.best - 1][figure]:
            history.best = self._epoch
            if self._plan.folder is not None:
                self._save(name="best.pt")
            elif self._plan.options.patience is not None:
                self._best = copy.deepcopy(self._judged().state_dict())

    def _is_told_to_stop(self, row: Row) -> bool:
        plan = self._plan
        told = plan.on_epoch is not None and self._ranks.first and plan.on_epoch(row) is False
        return self._ranks.firsts(told, self._device)

    def _is_out_of_patience(self) -> bool:
        patience, best = self._plan.options.patience, self._history.best
        return patience is not None and best is not None and self._epoch - best >= patience

    def _figures(self, rows: TrainBatch) -> Row:
        """What the bar shows: of the epoch so far, and of a model in use on clean inputs."""
        loss, right, count = self._totals.sums.tolist()
        with attackable(self._plan.model) as net:
            answers = net.logits(net.prepare(rows.inputs)).argmax(1)
        clean = float((answers == rows.labels).float().mean())
        name = "robust" if "robust" in self._lesson.figure else "accuracy"
        return {"loss": loss / count, "clean": clean, name: right / count}

    def _rate(self) -> float:
        return float(self._plan.optimizer.param_groups[0]["lr"])

    def _refuse_divergence(self) -> None:
        step = self._totals.first_bad()
        if step:
            self._diverged("the loss is not finite", step)

    def _refuse_broken_weights(self) -> None:
        tensors = [t for t in self._plan.model.state_dict().values() if t.is_floating_point()]
        if tensors and not bool(torch.stack([torch.isfinite(t).all() for t in tensors]).all()):
            self._diverged("a weight is not finite", self._step)

    def _diverged(self, what: str, step: int) -> None:
        folder, kept = self._plan.folder, ""
        if folder is not None:
            kept = f"; {folder.path / 'last.pt'} holds epoch {self._epoch}"
        raise FloatingPointError(
            f"{what} in epoch {self._epoch + 1} (step {step}, lr {self._rate():g}): training "
            f"diverged; usually the learning rate is too high{kept}"
        )

    # --- Ranks ---

    def _called(self, trainee: Trainee) -> Called:
        if self._ranks.count == 1:
            return trainee
        devices = [self._device] if self._device.type == "cuda" else None
        return DistributedDataParallel(trainee, device_ids=devices)

    def _own_seed(self) -> int:
        """Of this rank's random numbers; the order of the rows is the same on all ranks."""
        return seeding.derive(self._plan.seed, -1 - self._ranks.rank)

    # --- Checkpoints ---

    def _judged(self) -> nn.Module:
        """The model that is measured, saved as ``model``, and left at the end."""
        return self._plan.model if self._average is None else self._average.module

    def _learned(self) -> State:
        """What one step changes, apart from counters; the learning rate is the schedule's."""
        state = {
            "raw": self._plan.model.state_dict(),
            "moments": self._plan.optimizer.state_dict()["state"],
        }
        if self._average is not None:
            state["average"] = self._average.module.state_dict()
        return state

    def _unlearn(self, state: State) -> None:
        self._plan.model.load_state_dict(state["raw"])
        groups = self._plan.optimizer.state_dict()["param_groups"]
        self._plan.optimizer.load_state_dict({"state": state["moments"], "param_groups": groups})
        if self._average is not None:
            self._average.module.load_state_dict(state["average"])

    def _save(self, name: str = "last.pt", finished: bool = False) -> None:
        folder = self._plan.folder
        if folder is not None and self._ranks.first:
            folder.write(self._state(finished), name)

    def _state(self, finished: bool) -> State:
        plan = self._plan
        learned = self._learned()
        return {
            "model": self._judged().state_dict(),
            "learned": learned if self._average is not None else learned | {"raw": None},
            "groups": plan.optimizer.state_dict()["param_groups"],
            "schedule": plan.scheduler.state_dict(),
            "lesson": self._lesson.state(),
            "guard": None if self._guard is None else self._guard.state(),
            "epoch": self._epoch,
            "batches": self._batches,
            "step": self._step,
            "totals": self._totals.sums,
            "rate": self._first_rate,
            "random": random_state(self._device),
            "order": self._order if self._batches else self._loader_generator_state(),
            "history": self._history.rows,
            "best": self._history.best,
            "seed": plan.seed,
            "settings": plan.settings,
            "finished": finished,
        }

    def _resume(self) -> bool:
        """Go on from the checkpoint, or write the first; whether there is nothing left to do."""
        plan, found = self._plan, self._plan.found
        if found is None:
            self._save()
            if plan.folder is not None and self._ranks.first:
                plan.folder.read()  # a schedule's own objects may keep it from being read
            return False
        learned = found["learned"]
        if learned["raw"] is None:
            learned["raw"] = found["model"]
        plan.optimizer.load_state_dict({"state": {}, "param_groups": found["groups"]})
        self._unlearn(learned)
        plan.scheduler.load_state_dict(found["schedule"])
        self._lesson.resume(found["lesson"])
        if self._guard is not None:
            self._guard.resume(found["guard"])
        self._epoch, self._batches, self._step = found["epoch"], found["batches"], found["step"]
        self._first_rate = found["rate"]
        self._totals.sums += found["totals"].to(self._totals.sums)
        self._history = History(found["history"], found["best"])
        set_random_state(found["random"], self._device, torchs=False)
        if found["order"] is not None:
            self._loader_generator().set_state(found["order"])  # type: ignore[union-attr]
        return bool(found["finished"]) or self._epoch >= plan.epochs

    def _loader_generator(self) -> torch.Generator | None:
        data = self._plan.data
        return data.generator if isinstance(data, DataLoader) else None

    def _loader_generator_state(self) -> Tensor | None:
        generator = self._loader_generator()
        return None if generator is None else generator.get_state()

    def _end_if_told(self, saved: bool = False) -> None:
        """Save and end where SIGTERM came; several ranks go on from the last whole epoch."""
        if self._termination.noticed:
            if self._ranks.count == 1 and not saved:
                # A run that has diverged unseen is not to replace the last good checkpoint.
                self._refuse_divergence()
                self._refuse_broken_weights()
                self._save()
            self._termination.pass_on()

    def _leave(self) -> None:
        """Leave the model as the average, or as it was in the best epoch."""
        plan = self._plan
        if plan.options.patience is not None and self._history.best is not None:
            best = self._best
            if plan.folder is not None:
                found = plan.folder.read("best.pt")
                assert found is not None
                best = found["model"]
            assert best is not None
            plan.model.load_state_dict(best)
        elif self._average is not None:
            plan.model.load_state_dict(self._average.module.state_dict())
