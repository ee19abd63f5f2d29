"""The loop over epochs and steps that `fit` and `adversarial_fit` share."""

from __future__ import annotations

import gc
import inspect
import math
import time
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from advfeat import checks, seeding
from advfeat.distributed import on_one_rank
from advfeat.durable import Termination
from advfeat.model import (
    ExtraArguments,
    attackable,
    device_of,
    rare_comparisons,
    trainable,
    without_autocast,
)
from advfeat.training._batch_checks import BatchChecks
from advfeat.training._batches import BatchReader, TrainBatch
from advfeat.training._history import History
from advfeat.training._learner import Learner
from advfeat.training._method import AdversarialMethod, TrainingMethod
from advfeat.training._optimizer import needs_closure
from advfeat.training._output import OutputInspector
from advfeat.training._overfitting import EVERY, OverfittingGuard
from advfeat.training._parallel import broadcast_buffers, mean_accuracy
from advfeat.training._pgd import PGDTraining
from advfeat.training._plan import Plan, as_called, make_plan, own_seed
from advfeat.training._progress import TrainingBar, progress_bar
from advfeat.training._random import set_global_state
from advfeat.training._resume import Checkpoints, Position
from advfeat.training._settings import MethodSettings, Row, TrainingSettings
from advfeat.training._totals import Totals, means

# Steps between two reads of whether the loss is still finite: each waits for the device.
_DIVERGENCE_EVERY = 50
# Training has not left chance with a loss above this fraction of a uniform guess's, and an accuracy
# of no more than this above one in so many classes ...
_CHANCE_LOSS, _CHANCE_ACCURACY = 0.9, 0.15
# ... or with a loss above this fraction, whatever the accuracy ...
_CHANCE_LOSS_ALONE = 0.97
# ... after so many epochs and steps.
_CHANCE_EPOCHS, _CHANCE_STEPS = 3, 30


def train(settings: TrainingSettings, method_settings: MethodSettings) -> History:
    """Train a model; the one way from both public functions."""
    with (
        # What is on around the call is not meant for training.
        torch.inference_mode(False),
        torch.enable_grad(),
        without_autocast(device_of(settings.model)),
        checks.warns_once(),
        make_plan(settings, method_settings) as plan,
    ):
        method = method_settings.method(settings, plan.seed)
        _check_closure(plan, method)
        return TrainingLoop(plan, method).run()


def _check_closure(plan: Plan, method: TrainingMethod) -> None:
    """Check that the loss is the same again, if the optimiser evaluates it again."""
    if not needs_closure(plan.optimizer):
        return
    name = type(plan.optimizer).__name__
    if plan.settings.options.awp:
        checks.fail("optimizer", name, "its closure would not see the weights that awp perturbs")
    if method.updates_per_batch > 1:
        checks.fail("optimizer", name, "needs a closure; method 'free' has one pass for each step")


class TrainingLoop:
    """Epochs and steps of one run."""

    def __init__(self, plan: Plan, method: TrainingMethod) -> None:
        self._plan, self._settings, self._method = plan, plan.settings, method
        self._checks = BatchChecks(method.bounds)
        self._reader = BatchReader(
            plan.data,
            batch_size=plan.settings.batch_size,
            seed=plan.seed,
            device=plan.device,
            process=plan.process,
            checked=self._checks,
            weight_field=plan.settings.options.sample_weight,
            choose_extras=ExtraArguments(plan.model).choose,
        )
        self._batches = plan.batches
        self._totals = Totals(plan.device)
        self._at = Position()
        self._termination = Termination()

    def run(self) -> History:
        """Train for the epochs that are left; the model is then as it is to be used."""
        plan, settings, options = self._plan, self._settings, self._settings.options
        total = plan.samples
        with (
            rare_comparisons(),
            trainable(plan.model, precision=settings.precision, compile=options.compile) as trainee,
        ):
            self._learner = Learner(plan, self._method, trainee)
            self._guard = self._make_guard()
            self._checkpoints = Checkpoints(plan, self._method, self._learner, self._guard)
            finished = self._checkpoints.resume(self._at, self._totals)
            with (
                self._termination.watched(plan.folder is not None),
                progress_bar(
                    settings.progress,
                    total=None if total is None else settings.epochs * total,
                    done=0 if total is None else self._at.epoch * total,
                    first=plan.process.is_first,
                ) as bar,
            ):
                while not finished:
                    finished = self._train_epoch(bar)
            self._learner.set_mode("eval")
        self._checkpoints.leave(self._at)
        self._warn_at_chance()
        if plan.process.world_size > 1:
            # DDP refers to itself. Alive when the user destroys the process group, it now and then
            # aborts the process as it ends.
            del self._learner, self._checkpoints, self._guard
            gc.collect()
        return self._at.history

    def _make_guard(self) -> OverfittingGuard | None:
        if not self._plan.needs_guard:
            return None
        assert isinstance(self._method, PGDTraining)
        learner = self._learner
        return OverfittingGuard(self._method, self._plan.process, learner.snapshot, learner.restore)

    # --- An epoch ---

    def _train_epoch(self, bar: TrainingBar) -> bool:
        """Train an epoch, record it, save it; return whether training is over."""
        plan, at, began = self._plan, self._at, time.perf_counter()
        row: Row = {"epoch": at.epoch + 1}
        if at.batches == 0:
            at.first_rate = self._rate()
        with seeding.default_generators(own_seed(plan), at.epoch + 1, plan.device):
            self._learner.set_mode("train")
            self._take_steps(bar)
            self._learner.set_mode("eval")
            self._check_weights()
            row |= means(plan.process.all_reduce_sum(self._totals.sums))
            if math.isnan(row["loss"]):
                checks.fail("weights", 0, "every sample of the epoch has a weight of 0")
            row |= {"lr": at.first_rate, "seconds": time.perf_counter() - began}
            row |= self._validate()
        plan.schedule.after_epoch(row, self._method.figure)
        at.epoch, at.batches = at.epoch + 1, 0
        self._totals = Totals(plan.device)
        self._checkpoints.record(row, at, self._totals)
        return self._finish_epoch(row)

    def _finish_epoch(self, row: Row) -> bool:
        """Save the epoch, and ask the user whether to stop."""
        at = self._at
        # Saved before on_epoch is called: killed in there, a run out of patience is still over.
        over = at.epoch >= self._settings.epochs or self._is_out_of_patience()
        # A user's on_epoch may raise an error or change something: it finds its epoch saved.
        if due := over or self._settings.on_epoch is not None or self._checkpoints.is_due:
            self._save(finished=over)
        before = self._checkpoints.fingerprint() if self._settings.on_epoch else None
        stops = self._calls_to_stop(row) and not over
        # And after it where it changed something, a rate for example.
        if stops or (before is not None and before != self._checkpoints.fingerprint()):
            self._save(finished=over or stops)
        self._end_if_terminated(saved=due)
        return over or stops

    def _take_steps(self, bar: TrainingBar) -> None:
        plan, at = self._plan, self._at
        skipped = at.batches
        if skipped == 0:
            self._method.begin_epoch()
        self._checkpoints.begin_epoch()
        at.largest, last = 0, None
        for number, batch in enumerate(self._reader.epoch(at.epoch + 1), 1):
            at.largest, last = max(at.largest, len(batch.ids)), batch
            if number <= skipped:
                bar.skip(batch.total)
                if number == skipped:
                    assert plan.found is not None
                    set_global_state(plan.found["random"], plan.device, with_torch=True)
                continue
            at.batches, at.step = number, at.step + 1
            self._take_step(self._augmented(batch), bar)
            self._end_if_terminated()
        if last is None:
            checks.fail("data", type(plan.data).__name__, "too few samples to train on")
        self._check_divergence()
        if self._guard is not None and at.batches % EVERY:
            # The samples as they were read, which a run that was ended after its last step has too.
            self._guard.check(self._learner.trainee.module, last, at.step)

    def _take_step(self, batch: TrainBatch, bar: TrainingBar) -> None:
        plan, at, rate = self._plan, self._at, self._rate()
        self._method.begin_step(at.epoch + min(1.0, at.batches / self._batches))
        result = self._learner.update(batch, at.step, at.largest)
        self._totals.add(result, at.step)
        if at.step % _DIVERGENCE_EVERY == 0:
            self._check_divergence()
        plan.schedule.after_step()
        if self._guard is not None and at.batches % EVERY == 0:
            self._guard.check(self._learner.trainee.module, batch, at.step)
        if self._settings.on_step is not None and plan.process.is_first:
            with on_one_rank():
                self._settings.on_step(
                    {"epoch": at.epoch + 1, "step": at.step, **result.means(), "lr": rate}
                )
        bar.advance(batch.total, lambda: self._figures(batch))

    def _augmented(self, batch: TrainBatch) -> TrainBatch:
        augment = self._settings.augment
        if augment is not None:
            batch = _augment(augment, batch)
        if self._checks.classes is None:
            if augment is not None:
                checks.inputs(batch.inputs, self._method.bounds, "augment")
            model = self._plan.model
            if self._settings.output is None:
                model = OutputInspector(model)
            # A loss of the user's own may well take probabilities.
            plain = self._settings.loss is None
            with attackable(model, purpose="training" if plain else "predictions") as net:
                inputs = net.prepare(batch.inputs)
                with net.given(batch.extras):
                    net.inspect(inputs, self._method.bounds)
                    classes = net.class_count(inputs)
            self._checks.set_classes(classes, self._plan.data)
            self._learner.check_classes(classes)
        return batch

    # --- Figures ---

    def _validate(self) -> Row:
        plan, model = self._plan, self._learner.result_module
        broadcast_buffers(plan.process, plan.module)
        broadcast_buffers(plan.process, model)
        if plan.validation is None:
            return {}
        model = as_called(self._settings, model)
        found = self._method.validate(model, plan.validation)
        return {k: mean_accuracy(plan.process, v, plan.device) for k, v in found.items()}

    def _figures(self, batch: TrainBatch) -> Row:
        """What the bar shows: of the epoch so far, and of the model on clean inputs."""
        so_far = means(self._totals.sums)
        with attackable(self._plan.model) as net, net.given(batch.extras):
            predicted = net.logits(net.prepare(batch.inputs)).argmax(1)
        clean = float((predicted == batch.labels).float().mean())
        name = "robust" if "robust" in self._method.figure else "accuracy"
        return {"loss": so_far["loss"], "clean": clean, name: so_far["accuracy"]}

    def _rate(self) -> float:
        return float(self._plan.optimizer.param_groups[0]["lr"])

    def _calls_to_stop(self, row: Row) -> bool:
        """Whether ``on_epoch`` returned False, of Python, NumPy or torch."""
        stops = False
        if self._settings.on_epoch is not None and self._plan.process.is_first:
            with on_one_rank():
                answer: Any = self._settings.on_epoch(row)
            is_bool = isinstance(answer, (bool, np.bool_))
            is_bool |= isinstance(answer, Tensor) and answer.dtype == torch.bool
            stops = is_bool and not answer
        return self._plan.process.broadcast_bool(stops)

    def _is_out_of_patience(self) -> bool:
        patience, best = self._settings.options.patience, self._at.history.best
        return patience is not None and best is not None and self._at.epoch - best >= patience

    def _warn_at_chance(self) -> None:
        """Warn where adversarial training has learned nothing."""
        rows, classes = self._at.history.rows, self._checks.classes
        if not isinstance(self._method, AdversarialMethod) or classes is None:
            return
        chance, best = math.log(classes), min(row["loss"] for row in rows)
        accuracy = max(row["accuracy"] for row in rows)
        # A loss of two terms says less, and one of the user's own nothing for certain.
        plain = type(self._method) is PGDTraining and self._settings.loss is None
        left = best < _CHANCE_LOSS * chance or (
            accuracy > 1 / classes + _CHANCE_ACCURACY
            and not (plain and best > _CHANCE_LOSS_ALONE * chance)
        )
        if left or len(rows) < _CHANCE_EPOCHS or self._at.step < _CHANCE_STEPS:
            return
        warnings.warn(
            f"the loss never left chance: {best:.3f} at best, and {chance:.3f} for a uniform guess "
            f"among {classes} classes. The ball is too large to start with, or the rate too high: "
            f"pass warmup={max(1, len(rows) // 3)} (epochs over which eps rises), or a lower lr",
            stacklevel=2,
        )

    # --- Errors and signals ---

    def _check_divergence(self) -> None:
        step = self._totals.first_bad()
        if step:
            self._diverged("the loss is not finite", step)

    def _check_weights(self) -> None:
        tensors = [t for t in self._plan.module.state_dict().values() if _is_floating(t)]
        if tensors and not bool(torch.stack([torch.isfinite(t).all() for t in tensors]).all()):
            self._diverged("a weight is not finite", self._at.step)

    def _diverged(self, what: str, step: int) -> None:
        folder, kept = self._plan.folder, ""
        if folder is not None:
            kept = f"; {folder.path / 'last.pt'} holds epoch {self._checkpoints.saved_epoch}"
        raise FloatingPointError(
            f"{what} in epoch {self._at.epoch + 1} (step {step}, lr {self._rate():g}): training "
            f"diverged; usually the learning rate is too high{kept}"
        )

    def _save(self, *, finished: bool = False) -> None:
        self._checkpoints.save(self._at, self._totals, finished=finished)

    def _end_if_terminated(self, saved: bool = False) -> None:
        """On a signal, save and end the process; several ranks resume from the last whole epoch."""
        if self._termination.noticed is None:
            return
        if self._plan.process.world_size == 1 and not saved:
            # A run that has diverged unseen must not replace the last good checkpoint.
            self._check_divergence()
            self._check_weights()
            self._save()
        self._termination.pass_on()


def _is_floating(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _augment(augment: Any, batch: TrainBatch) -> TrainBatch:
    """Augment inputs, or inputs and labels where ``augment`` takes both."""
    if not takes_labels(augment):
        inputs = augment(batch.inputs)
        if isinstance(inputs, Tensor) and inputs.shape[:1] != batch.labels.shape:
            checks.fail("augment", tuple(inputs.shape), f"expected {len(batch.labels)} samples")
        return batch._replace(inputs=inputs)
    targets = batch.labels if batch.targets is None else batch.targets
    found = augment(batch.inputs, targets)
    if not (isinstance(found, tuple) and len(found) == 2):
        raise TypeError("augment: it takes inputs and labels, so it must return (inputs, labels)")
    inputs, labels = found
    checks.soft_or_hard_labels(labels, inputs, "augment")
    if labels.is_floating_point():
        return batch._replace(inputs=inputs, labels=labels.argmax(1), targets=labels)
    return batch._replace(inputs=inputs, labels=labels.to(torch.int64), targets=None)


def takes_labels(augment: Any) -> bool:
    """Whether ``augment`` needs two positional arguments: inputs and labels."""
    try:
        parameters = inspect.signature(augment).parameters.values()
    except (TypeError, ValueError):
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and p.default is p.empty for p in parameters) == 2
