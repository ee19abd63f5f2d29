"""A training run, checked, before the first batch is read."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from advfeat import checks, seeding
from advfeat.distributed import Process
from advfeat.loading import Data, Source, check_length, is_stream
from advfeat.model import check_not_wrapped, device_of, innermost, unwrapped
from advfeat.training import _identity as identity
from advfeat.training._batch_checks import check_labels
from advfeat.training._batches import split
from advfeat.training._checkpoint import CheckpointFolder, State
from advfeat.training._optimizer import make_optimizer
from advfeat.training._output import OutputChoice
from advfeat.training._parallel import check_sharded, common_seed, training_process
from advfeat.training._random import OwnState, global_state, same_state
from advfeat.training._schedule import ScheduleStepper, make_scheduler, stepped_every
from advfeat.training._settings import MethodSettings, TrainingSettings

# What a longer run may have otherwise than the finished one that it continues.
_MAY_GROW = ("epochs",)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run is made of; see `make_plan`."""

    settings: TrainingSettings
    model: nn.Module  # as the user calls it
    module: nn.Module  # without the wrapper of torch.compile: whose state is saved
    device: torch.device
    data: Data
    generators: OwnState  # of the data
    own: OwnState  # of the model, the loss and the augmentation
    validation: Data | None
    optimizer: Optimizer
    schedule: ScheduleStepper
    needs_guard: bool
    folder: CheckpointFolder | None
    found: State | None  # the checkpoint to resume from
    identity: State  # what the checkpoint of another run differs in
    process: Process
    seed: int

    @property
    def samples(self) -> int | None:
        """Samples of an epoch of all ranks, where that is known without reading it."""
        count = sample_count(self.data)
        is_loader = isinstance(self.data, DataLoader)  # each rank has samples of its own
        return count if count is None or not is_loader else count * self.process.world_size

    @property
    def batches(self) -> int:
        """Batches of an epoch, as far as a loader's length is true."""
        return batch_count(self.data, self.settings.batch_size)


@contextmanager
def make_plan(settings: TrainingSettings, method: MethodSettings) -> Iterator[Plan]:
    """Check everything that does not need the data's first batch, and find where to resume.

    The checkpoint folder is locked while the context lasts.
    """
    check_not_wrapped(settings.model)
    process = training_process()
    check_sharded(process, settings.data)
    _check_batch_size(settings.batch_size, settings.data)
    check_labels(settings.data)
    folder = None if settings.checkpoint is None else CheckpointFolder(settings.checkpoint)
    with _locked(folder, process):
        found = None if folder is None else folder.read()
        keeps_seed = found is not None and settings.seed is None
        seed = found["seed"] if keeps_seed and found else common_seed(process, settings.seed)
        data, validation = _split(settings, seed)
        module = original(settings.model)
        optimizer = make_optimizer(
            module, settings.optimizer, settings.lr, settings.momentum, settings.weight_decay
        )
        described_optimizer = identity.describe_optimizer(optimizer)
        steps = lambda: batch_count(data, settings.batch_size)  # noqa: E731
        scheduler = make_scheduler(optimizer, settings.schedule, settings.epochs, steps)
        every = stepped_every(scheduler, settings.schedule_every, settings.epochs, steps)
        generators = OwnState(data)
        plan = Plan(
            settings=settings,
            model=as_called(settings, settings.model),
            module=module,
            device=device_of(module),
            data=data,
            generators=generators,
            own=OwnState(folder and [module, settings.loss, settings.augment]),
            validation=validation,
            optimizer=optimizer,
            schedule=ScheduleStepper(scheduler, every),
            needs_guard=method.needs_guard,
            folder=folder,
            found=found,
            identity={} if folder is None else {
                "epochs": settings.epochs,
                **_describe(settings, method, module, scheduler, every, seed),
                "optimizer": described_optimizer,
                **_describe_data(settings, generators, process),
            },
            process=process,
            seed=seed,
        )  # fmt: skip
        _check_same_run(plan)
        yield plan


def as_called(settings: TrainingSettings, module: nn.Module) -> nn.Module:
    """Return a module, or a copy of it, so that it returns what the user chose as logits."""
    return module if settings.output is None else OutputChoice(module, settings.output)


def original(model: nn.Module) -> nn.Module:
    """Return the module inside of ``torch.compile``'s and DataParallel's wrappers."""
    return unwrapped(innermost(unwrapped(model)))


def batch_count(data: Data, batch_size: int | None) -> int:
    """Batches of an epoch, counting a last one that may be too small."""
    if isinstance(data, DataLoader):
        check_length(data)
        return len(data)
    return Source(data, batch_size).batch_count


def sample_count(data: Data) -> int | None:
    """Samples of an epoch, where that is known without reading it; of a loader, of this rank."""
    if isinstance(data, DataLoader):
        check_length(data)
        return None if data.batch_size is None else len(data) * data.batch_size
    return None if is_stream(data) else len(Source(data))


@contextmanager
def _locked(folder: CheckpointFolder | None, process: Process) -> Iterator[None]:
    """Lock the folder on the first rank; raise the error on every rank where that fails."""
    if folder is None:
        yield
        return
    error: OSError | None = None
    lock = folder.locked()
    if process.is_first:
        try:
            lock.__enter__()
        except OSError as found:
            error = found
    if process.broadcast_bool(error is not None):
        raise error or BlockingIOError(f"checkpoint={str(folder.path)!r}: in use")
    try:
        yield
    finally:
        if process.is_first:
            lock.__exit__(None, None, None)


def _split(settings: TrainingSettings, seed: int) -> tuple[Data, Data | None]:
    """Return training and validation data."""
    given, options = settings.validation, settings.options
    data, validation = settings.data, None
    if isinstance(given, (int, float)):
        checks.fraction("validation", given)
        data, validation = split(data, given, seed)
    elif given is not None:
        validation = given
        try:
            Source(given)
        except (TypeError, ValueError) as error:
            raise type(error)(f"validation: {error}") from error
    if options.patience is not None and validation is None:
        checks.fail("patience", options.patience, "needs validation, to say which epoch is best")
    return data, validation


def _check_batch_size(batch_size: int | None, data: Data) -> None:
    if batch_size is None:
        return
    checks.count("batch_size", batch_size, low=1)
    if isinstance(data, (DataLoader, list, tuple)):
        checks.fail("batch_size", batch_size, "the data come in batches; pass the dataset itself")


# --- Identity ---


def _describe(
    settings: TrainingSettings,
    method: MethodSettings,
    module: nn.Module,
    scheduler: Any,
    every: str,
    seed: int,
) -> State:
    """Describe all but the data."""
    given = settings.schedule
    # What follows from the number of epochs differs where a finished run is trained on.
    named = given if given is None or isinstance(given, str) else None
    schedule = (
        named if named is not None or given is None else identity.describe_scheduler(scheduler)
    )
    return {
        "model": {"class": type(module).__qualname__, "modules": identity.structure(module)},
        "lr": settings.lr,
        "momentum": settings.momentum,
        "weight_decay": settings.weight_decay,
        "schedule": "default" if schedule is None else schedule,
        "schedule_every": every,
        "output": identity.describe(settings.output),
        "loss": identity.describe(settings.loss),
        "augment": identity.describe(settings.augment),
        "batch_size": settings.batch_size,
        "precision": settings.precision,
        "options": identity.describe(settings.options),
        "seed": seed,
        **method.identity(),
    }


def _describe_data(settings: TrainingSettings, generators: OwnState, process: Process) -> State:
    """Describe training and validation data, and warn of what a resumed run cannot repeat."""
    if not process.is_first:
        return {}
    data, validation = settings.data, settings.validation
    with generators.fixed():
        before = global_state(torch.device("cpu"))
        samples = [identity.digest(sample) for sample in identity.some_samples(data)]
        draws = not same_state(before, global_state(torch.device("cpu"))) or len(generators) > 0
    again = _read_again(data, generators, len(samples))
    repeats = again == samples[: len(again)]
    _warn_of_what_is_not_kept(data, draws=draws, repeats=repeats)
    described = identity.describe_data(data, iter(samples if repeats else ["differs"]))
    if validation is None or isinstance(validation, (int, float)):
        return {"data": described, "validation": validation}
    own = OwnState(validation)
    with own.fixed():
        found = identity.describe_data(validation, identity.some_samples(validation))
    return {"data": described, "validation": found}


def _read_again(data: Data, generators: OwnState, count: int) -> list[str]:
    """Read the first samples once more, with the same random numbers."""
    with generators.fixed():
        samples = identity.some_samples(data)
        return [identity.digest(sample) for sample, _ in zip(samples, range(2), strict=False)]


def _warn_of_what_is_not_kept(data: Data, *, draws: bool, repeats: bool) -> None:
    reason = None
    if not repeats:
        reason = (
            "reading a sample twice gives two values, from random numbers that are out of reach; "
            "draw them from torch's, NumPy's or Python's global generators, or from a generator "
            "that is an attribute of the dataset"
        )
    elif isinstance(data, DataLoader) and data.persistent_workers and draws:
        reason = (
            "persistent_workers=True keeps random states in the worker processes; use "
            "persistent_workers=False"
        )
    if reason is not None:
        warnings.warn(
            f"checkpoint: a run that is interrupted and resumed will differ from one that is not: "
            f"{reason}",
            stacklevel=2,
        )


def _check_same_run(plan: Plan) -> None:
    """Raise an error for a checkpoint of another run, on all ranks alike."""
    found, error = plan.found, None
    if found is not None and plan.process.is_first:
        try:
            own = {k: v for k, v in plan.identity.items() if k not in _MAY_GROW}
            identity.check_same_run(found["identity"], own)
            _check_epochs(found, plan.settings)
        except ValueError as caught:
            error = caught
    if plan.folder is not None and plan.process.broadcast_bool(error is not None):
        raise error or ValueError("checkpoint: of another run; see the first rank's error")


def _check_epochs(found: State, settings: TrainingSettings) -> None:
    had, has = found["identity"]["epochs"], settings.epochs
    follows = settings.schedule is None or isinstance(settings.schedule, str)
    if has < found["epoch"]:
        checks.fail(
            "epochs", has, f"the run in this checkpoint folder has {found['epoch']} already"
        )
    if had != has and follows and found["epoch"] < had:
        checks.fail(
            "epochs",
            has,
            f"the run in this checkpoint folder had {had!r}, and its schedule follows from that; "
            "finish it first, then pass more epochs to train on",
        )


def own_seed(plan: Plan) -> int:
    """Seed of this rank's random numbers; the order of the samples is the same on all ranks."""
    return seeding.derive(plan.seed, -1 - plan.process.rank)
