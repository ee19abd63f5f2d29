"""Standard and adversarial training of any module on any data."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CyclicLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
)

from advfeat import checks, seeding
from advfeat.attacks import PGD
from advfeat.attacks._attack import check_given
from advfeat.loading import Data, Rows, Source, training_batches, with_progress
from advfeat.metrics import accuracy, robust_accuracy
from advfeat.model import Precision, device_of, logits_of
from advfeat.threat import Bounds, Norm

Schedule: TypeAlias = "LRScheduler | Callable[[Optimizer], LRScheduler]"
OptimizerLike: TypeAlias = "Optimizer | Callable[[Any], Optimizer]"


@dataclass
class History:
    """What training recorded: one row an epoch, as plain dictionaries.

    Examples
    --------
    >>> print(History([{"epoch": 1, "loss": 0.5, "seconds": 1.0}]))
    epoch    loss  seconds
        1  0.5000   1.0000
    """

    rows: list[dict[str, float]] = field(default_factory=list)

    def __str__(self) -> str:
        """A table of all rows."""
        if not self.rows:
            return "(no epochs)"
        names = list(self.rows[-1])
        lines = [[_cell(row.get(name)) for name in names] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(names, *lines, strict=True)]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in [names, *lines]
        )


def fit(
    model: nn.Module,
    data: Data,
    *,
    epochs: int,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    optimizer: OptimizerLike | None = None,
    schedule: Schedule | None = None,
    batch_size: int | None = None,
    augment: Callable[[Tensor], Tensor] | None = None,
    validation: Data | None = None,
    on_epoch: Callable[[dict[str, float]], object] | None = None,
    seed: int | torch.Generator | None = None,
    progress: bool | None = None,
) -> History:
    """Train a model by cross-entropy, in place.

    Parameters
    ----------
    model
        Any module that returns class logits; trained where it is, in training mode, and left in
        the mode it had.
    data
        A loader, which is taken as it is (its order, its augmentation), or a dataset, which is
        shuffled anew each epoch by ``seed``.
    epochs
        Passes over the data.
    lr, momentum, weight_decay
        Of the default optimiser, SGD. Defaults are the paper's for D, D_R, D_NR and D_det
        (appendix C); it trains on D_rand with ``lr=0.01``.
    optimizer
        An optimiser, or a callable that makes one from the parameters; replaces the default.
    schedule
        A scheduler, or a callable that makes one from the optimiser. Stepped every epoch (every
        batch for OneCycleLR and CyclicLR). By default the rate falls by ten at one third and two
        thirds of the epochs, as in the paper (50 and 100 of 150).
    batch_size
        Rows to a step for a dataset; default 128. A last batch of a single row is left out.
    augment
        Called on each batch of inputs on the device.
    validation
        Data to measure after each epoch. Never the test set: choices are made on it.
    on_epoch
        Called with each epoch's row; returning ``False`` stops training.
    seed
        Of the order of a dataset. None draws one number from torch's default generator.
    progress
        Draw a bar; by default where stderr is a terminal and tqdm is installed.

    Returns
    -------
    History
        A row an epoch: epoch, loss, accuracy (of the training batches as they went by), lr,
        seconds, and validation accuracy where asked for.

    Examples
    --------
    >>> import torch
    >>> import advfeat as af
    >>> data = torch.utils.data.TensorDataset(torch.eye(3), torch.arange(3))
    >>> history = af.fit(torch.nn.Linear(3, 3), data, epochs=2, seed=0)
    >>> [row["epoch"] for row in history.rows]
    [1, 2]
    """
    checks.seed(seed)

    def loss(rows: Rows, step: int) -> tuple[Tensor, Tensor]:
        logits = _logits(model, rows.inputs, rows.labels)
        return F.cross_entropy(logits, rows.labels), logits

    def measure() -> dict[str, float]:
        assert validation is not None
        return {"val_accuracy": accuracy(model, validation, progress=False)}

    return _train(
        model,
        data,
        loss,
        measure if validation is not None else None,
        epochs=epochs,
        optimizer=_optimizer(model, optimizer, lr, momentum, weight_decay),
        schedule=schedule,
        batch_size=batch_size,
        augment=augment,
        validation=validation,
        on_epoch=on_epoch,
        seed=seeding.resolve(seed),
        progress=progress,
    )


def adversarial_fit(
    model: nn.Module,
    data: Data,
    *,
    eps: float | None = None,
    norm: Norm | None = None,
    epochs: int,
    steps: int = 7,
    step_size: float | None = None,
    random_start: bool = False,
    attack: PGD | None = None,
    attack_mode: Literal["eval", "train"] = "eval",
    mix: float = 0.0,
    bounds: Bounds = (0.0, 1.0),
    precision: Precision = "float32",
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    optimizer: OptimizerLike | None = None,
    schedule: Schedule | None = None,
    batch_size: int | None = None,
    augment: Callable[[Tensor], Tensor] | None = None,
    validation: Data | None = None,
    on_epoch: Callable[[dict[str, float]], object] | None = None,
    seed: int | torch.Generator | None = None,
    progress: bool | None = None,
) -> History:
    """Train a model on adversarial examples made as it learns (Madry et al. 2018), in place.

    Parameters
    ----------
    model, data, epochs, lr, momentum, weight_decay, optimizer, schedule, batch_size, augment, \
on_epoch, seed, progress
        As in `fit`. The seed also governs random starts.
    eps, norm
        The ball, in the units of the inputs; required unless ``attack`` is given. The paper's are
        0.5 in ``"l2"`` for CIFAR-10 and 3 for Restricted ImageNet.
    steps, step_size, random_start
        Of PGD. Defaults are the paper's (appendix C): 7 steps of ``eps / 5`` from the input.
    attack
        An attack's settings in place of the ones above.
    attack_mode
        ``"eval"`` attacks the model with running BatchNorm statistics and no dropout;
        ``"train"`` with batch statistics and dropout. Neither changes the statistics.
    mix
        Share of each batch that is left clean, from 0 to 1.
    bounds
        The box ``(low, high)`` of valid inputs.
    precision
        ``"bfloat16"`` takes the attack's gradients in bfloat16 where the hardware has it.
    validation
        Data to measure, clean and by PGD-20 in the same ball, after each epoch.

    Returns
    -------
    History
        As in `fit`; ``accuracy`` is of the batches as they were trained on, attacked.

    Examples
    --------
    >>> import torch
    >>> import advfeat as af
    >>> data = torch.utils.data.TensorDataset(torch.eye(3), torch.arange(3))
    >>> history = af.adversarial_fit(
    ...     torch.nn.Linear(3, 3), data, eps=0.1, norm="l2", epochs=2, seed=0
    ... )
    >>> sorted(history.rows[0])
    ['accuracy', 'epoch', 'loss', 'lr', 'seconds']
    """
    checks.fraction("mix", mix)
    checks.one_of("attack_mode", attack_mode, ("eval", "train"))
    checks.seed(seed)
    seed = seeding.resolve(seed)
    if attack is None:
        attack = _pgd(eps, norm, steps, step_size, random_start, bounds, seed)
    else:
        check_given(attack, eps, norm)
        if attack.seed is None:
            attack = dataclasses.replace(attack, seed=seed)

    def loss(rows: Rows, step: int) -> tuple[Tensor, Tensor]:
        clean = round(mix * len(rows.labels))
        inputs = rows.inputs
        if clean < len(inputs):
            # Numbered through all of training: every step's random starts are new.
            index = torch.arange(len(inputs) - clean, device=inputs.device) + (step << 32)
            attacked = attack(
                model,
                inputs[clean:],
                rows.labels[clean:],
                index=index,
                precision=precision,
                train=attack_mode == "train",
            )
            inputs = torch.cat([inputs[:clean], attacked.to(inputs.dtype)])
        logits = _logits(model, inputs, rows.labels)
        return F.cross_entropy(logits, rows.labels), logits

    def measure() -> dict[str, float]:
        assert validation is not None
        twenty = PGD(eps=attack.eps, norm=attack.norm, steps=20, bounds=attack.bounds)
        robust = robust_accuracy(model, validation, attack=twenty, progress=False)
        return {"val_accuracy": robust.standard, "val_robust_accuracy": robust}

    return _train(
        model,
        data,
        loss,
        measure if validation is not None else None,
        epochs=epochs,
        optimizer=_optimizer(model, optimizer, lr, momentum, weight_decay),
        schedule=schedule,
        batch_size=batch_size,
        augment=augment,
        validation=validation,
        on_epoch=on_epoch,
        seed=seed,
        progress=progress,
    )


Loss: TypeAlias = Callable[[Rows, int], tuple[Tensor, Tensor]]


def _train(
    model: nn.Module,
    data: Data,
    loss: Loss,
    measure: Callable[[], dict[str, float]] | None,
    *,
    epochs: int,
    optimizer: Optimizer,
    schedule: Schedule | None,
    batch_size: int | None,
    augment: Callable[[Tensor], Tensor] | None,
    validation: Data | None,
    on_epoch: Callable[[dict[str, float]], object] | None,
    seed: int,
    progress: bool | None,
) -> History:
    """Epochs of any loss: what `fit` and `adversarial_fit` share."""
    checks.count("epochs", epochs, low=1)
    checks.function("augment", augment)
    checks.function("on_epoch", on_epoch)
    _check_validation(validation)
    scheduler = _scheduler(optimizer, schedule, epochs)
    every_batch = isinstance(scheduler, (OneCycleLR, CyclicLR))
    device = device_of(model)
    history = History()
    step = 0
    with _training(model):
        for epoch in _epochs(epochs, progress):
            began = time.perf_counter()
            rate = optimizer.param_groups[0]["lr"]
            totals = torch.zeros(3, device=device)
            for rows in training_batches(data, batch_size, seed, epoch, device):
                rows = _checked(rows, augment)
                optimizer.zero_grad(set_to_none=True)
                value, logits = loss(rows, step)
                value.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                step += 1
                if every_batch:
                    scheduler.step()
                with torch.no_grad():
                    count = len(rows.labels)
                    right = (logits.argmax(1) == rows.labels).sum()
                    totals += torch.stack([value * count, right, right.new_tensor(count)])
            optimizer.zero_grad(set_to_none=True)
            mean, share = (totals[:2] / totals[2]).tolist()
            if mean != mean or mean in (float("inf"), float("-inf")):
                raise FloatingPointError(
                    f"loss={mean} in epoch {epoch} (step {step}, lr {rate:g}): training diverged; "
                    "usually the learning rate is too high"
                )
            row = {"epoch": epoch, "loss": mean, "accuracy": share, "lr": rate}
            row["seconds"] = time.perf_counter() - began
            row.update(measure() if measure else {})
            history.rows.append(row)
            if not every_batch:
                scheduler.step()
            if on_epoch is not None and on_epoch(row) is False:
                break
    return history


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Training mode, then the flags as they were; a model in training keeps its frozen parts."""
    flags = [(module, module.training) for module in model.modules()]
    if not model.training:
        model.train()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def _epochs(epochs: int, progress: bool | None) -> Iterable[int]:
    return with_progress(range(1, epochs + 1), total=epochs, label="epochs", progress=progress)


def _checked(rows: Rows, augment: Callable[[Tensor], Tensor] | None) -> Rows:
    checks.labels(rows.labels, rows.inputs)
    inputs = rows.inputs if augment is None else augment(rows.inputs)
    return Rows(rows.ids, inputs, rows.labels.to(torch.int64))


def _check_validation(validation: Data | None) -> None:
    """Refuse data that could not be measured after the first epoch, before it."""
    try:
        if validation is not None:
            Source(validation)
    except (TypeError, ValueError) as error:
        raise type(error)(f"validation: {error}") from error


def _logits(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    logits = checks.logits(logits_of(model(inputs)), inputs)
    # On a GPU a label out of range would end the process.
    checks.class_range(int(labels.max()), logits.shape[1])
    return logits.float()


def _pgd(
    eps: float | None,
    norm: Norm | None,
    steps: int,
    step_size: float | None,
    random_start: bool,
    bounds: Bounds,
    seed: int,
) -> PGD:
    if eps is None or norm is None:
        checks.fail("eps, norm", (eps, norm), "both are needed where no attack is given")
    checks.number("eps", eps, low=0.0, strict=True)
    return PGD(
        eps=eps,
        norm=norm,
        steps=steps,
        step_size=eps / 5 if step_size is None else step_size,
        random_start=random_start,
        bounds=bounds,
        seed=seed,
    )


def _optimizer(
    model: nn.Module,
    optimizer: OptimizerLike | None,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> Optimizer:
    checks.model(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if isinstance(optimizer, Optimizer):
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
    return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)


def _scheduler(optimizer: Optimizer, schedule: Schedule | None, epochs: int) -> LRScheduler:
    if schedule is None:
        third, two_thirds = max(1, epochs // 3), max(1, 2 * epochs // 3)
        return MultiStepLR(optimizer, sorted({third, two_thirds}), 0.1)
    if not isinstance(schedule, LRScheduler):
        checks.function("schedule", schedule)
        schedule = schedule(optimizer)
    if isinstance(schedule, ReduceLROnPlateau):
        checks.fail("schedule", "ReduceLROnPlateau", "it needs a metric; step it in on_epoch")
    return schedule


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{float(value):.4f}"
