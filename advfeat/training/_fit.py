"""The two functions that users call."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from advfeat import checks, seeding
from advfeat.attacks import PGD
from advfeat.attacks.base import check_attack
from advfeat.loading import Data, Source, batch_count, row_count, split
from advfeat.model import Precision, refuse_wrapped
from advfeat.threat import Bounds, Norm
from advfeat.training._checkpoint import Folder, refuse_another_run
from advfeat.training._history import History
from advfeat.training._lessons import Adversarial, Free, Lesson, Method, Mode, Objective
from advfeat.training._loop import Callback, Plan, Run
from advfeat.training._optim import (
    OptimizerLike,
    Schedule,
    described,
    made_optimizer,
    made_scheduler,
)
from advfeat.training._options import Options
from advfeat.training._ranks import Ranks

# Weight of the second term: 1/lambda of TRADES (Zhang et al. 2019), lambda of MART (Wang et al.
# 2020), each as in the authors' runs on CIFAR-10.
_BETA = {"trades": 6.0, "mart": 5.0}
# Gradients for each example: the paper's (appendix C); one; the replays of Shafahi et al. (2019).
_STEPS = {"pgd": 7, "fast": 1, "free": 8}
# Step size as a share of eps: the paper's; Wong et al. (2020); Shafahi et al. (2019).
_STEP_SIZE = {"pgd": 0.2, "fast": 1.25, "free": 1.0}


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
    precision: Precision = "float32",
    validation: Data | float | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    on_step: Callback | None = None,
    on_epoch: Callback | None = None,
    options: Options | None = None,
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
        thirds of the epochs, as in the paper (50 and 100 of 150). ``"one_cycle"`` is torch's
        OneCycleLR over all epochs with its peak at ``lr``: the one for short runs.
    batch_size
        Samples to a step for a dataset, over all ranks; default 128. A last batch of a single
        sample is left out, of a loader too. A loader has its own.
    augment
        Called on each batch of inputs on the device, such as `advfeat.training.crop_flip`.
    precision
        ``"bfloat16"`` runs the model in bfloat16, forward and backward, where the hardware has it;
        weights, optimiser and loss stay in float32.
    validation
        Data to measure after each epoch, or the share of a dataset to split off for it, at random
        by ``seed``. Never the test set: choices are made on it.
    checkpoint
        A folder. ``last.pt`` is written there after each epoch and on SIGTERM, and ``best.pt`` in
        the epoch that is best on validation data; the same call goes on from ``last.pt`` (and from
        where Python's and NumPy's random states were), and ends with the weights of a run that was
        never cut. ``torch.load(file, weights_only=True)`` reads them; the entry ``"model"`` is for
        ``model.load_state_dict``.
    on_step, on_epoch
        Called with a dictionary after each step (epoch, step, loss, accuracy, lr) and with each
        epoch's row; ``on_epoch`` returning ``False`` stops training.
    options
        What few runs need: averaged weights, early stopping, compilation; see
        `advfeat.training.Options`.
    seed
        Of the order of a dataset, and of torch's default generators during training (dropout,
        augmentation, the order of a loader), which are put back after it. None draws one number
        from torch's default generator.
    progress
        Draw a bar; by default where stderr is a terminal and tqdm is installed.

    Returns
    -------
    History
        A row an epoch: epoch, loss, accuracy (of the training batches as they went by), lr,
        seconds, and validation accuracy where asked for.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause; for data, in the first batch.
    FloatingPointError
        Where training diverges, naming epoch, step and learning rate. ``last.pt`` stays as it was
        after the epoch before.

    Notes
    -----
    Where `torch.distributed` is initialised (under ``torchrun``, say), every rank makes the same
    call with the plain model: it is trained by `DistributedDataParallel`, a dataset's batches are
    shared out among the ranks, and figures are of all rows. The first rank writes and calls back;
    all of them read ``checkpoint``.

    Examples
    --------
    >>> import torch
    >>> import advfeat as af
    >>> data = torch.utils.data.TensorDataset(torch.eye(3), torch.arange(3))
    >>> history = af.fit(torch.nn.Linear(3, 3), data, epochs=2, seed=0)
    >>> [row["epoch"] for row in history.rows]
    [1, 2]
    """
    options = Options() if options is None else options
    plan = _plan(
        model,
        data,
        epochs=epochs,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        optimizer=optimizer,
        schedule=schedule,
        batch_size=batch_size,
        augment=augment,
        precision=precision,
        validation=validation,
        checkpoint=checkpoint,
        on_step=on_step,
        on_epoch=on_epoch,
        options=options,
        seed=seed,
        progress=progress,
    )
    return Run(plan, Lesson(options.label_smoothing, precision)).train()


def adversarial_fit(
    model: nn.Module,
    data: Data,
    *,
    eps: float | None = None,
    norm: Norm | None = None,
    epochs: int,
    objective: Objective = "pgd",
    beta: float | None = None,
    method: Method = "pgd",
    steps: int | None = None,
    step_size: float | None = None,
    random_start: bool = False,
    attack: PGD | None = None,
    attack_mode: Mode = "eval",
    mix: float = 0.0,
    bounds: Bounds = (0.0, 1.0),
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    optimizer: OptimizerLike | None = None,
    schedule: Schedule | None = None,
    batch_size: int | None = None,
    augment: Callable[[Tensor], Tensor] | None = None,
    precision: Precision = "float32",
    validation: Data | float | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    on_step: Callback | None = None,
    on_epoch: Callback | None = None,
    options: Options | None = None,
    seed: int | torch.Generator | None = None,
    progress: bool | None = None,
) -> History:
    """Train a model on adversarial examples made as it learns (Madry et al. 2018), in place.

    Parameters
    ----------
    model, data, epochs, lr, momentum, weight_decay, optimizer, schedule, batch_size, augment, \
checkpoint, on_step, on_epoch, options, seed, progress
        As in `fit`. The seed also governs random starts.
    eps, norm
        The ball, in the units of the inputs; required unless ``attack`` is given. The paper's are
        0.5 in ``"l2"`` for CIFAR-10 and 3 for Restricted ImageNet.
    objective
        ``"pgd"``: cross-entropy on adversarial examples (Madry et al. 2018). ``"trades"``: on clean
        inputs, plus ``beta`` times the divergence of the answers to attacked ones, which the
        attack climbs (Zhang et al. 2019). ``"mart"``: a cross-entropy that looks at the likeliest
        wrong class too, plus ``beta`` times that divergence where the model doubts the label
        (Wang et al. 2020).
    beta
        Weight of the second term; default 6 for TRADES, 5 for MART.
    method
        How examples are made. ``"pgd"``: by ``steps`` gradients. ``"fast"``: by one, from a random
        start (Wong et al. 2020), with a guard against catastrophic overfitting: every 20 steps a
        batch is attacked by PGD-10 as well; where that leaves less than half of the right answers,
        training goes back to the look before, and on with one gradient more. ``"free"``: each
        batch is trained on ``steps`` times, each pass giving both gradients (Shafahi et al. 2019);
        divide the epochs by as much. Its examples are those of the model in training mode.
    steps
        Gradients for each example; default 7 as in the paper (appendix C), 8 for ``"free"``.
    step_size
        Default ``eps / 5`` as in the paper, ``1.25 * eps`` for ``"fast"``, ``eps`` for ``"free"``.
    random_start
        Whether PGD starts at a random point of the ball; by default at the input, for TRADES and
        MART just beside it. ``"fast"`` always does.
    attack
        An attack's settings in place of the ones above.
    attack_mode
        ``"eval"`` attacks the model with running BatchNorm statistics and no dropout;
        ``"train"`` with batch statistics and dropout. Neither changes the statistics.
    mix
        Share of each batch that is left clean, from 0 to 1, for the objective ``"pgd"``.
    bounds
        The box ``(low, high)`` of valid inputs.
    precision
        As in `fit`; ``"bfloat16"`` is for the attack's gradients too.
    validation
        As in `fit`; measured clean and by PGD-20 in the same ball. The best epoch is the one with
        the highest robust accuracy.

    Returns
    -------
    History
        As in `fit`; ``accuracy`` is of the batches as they were trained on, attacked.

    Raises
    ------
    ValueError, TypeError, FloatingPointError
        As in `fit`.

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
    options = Options() if options is None else options
    checks.one_of("objective", objective, ("pgd", "trades", "mart"))
    checks.one_of("method", method, ("pgd", "fast", "free"))
    checks.one_of("attack_mode", attack_mode, ("eval", "train"))
    checks.fraction("mix", mix)
    if attack is None:
        attack = _attack(eps, norm, method, steps, step_size, random_start, bounds)
    else:
        check_attack(attack, eps, norm)
        if not isinstance(attack, PGD):
            raise TypeError(f"attack={attack!r}: training takes PGD or FGSM")
    _refuse_combination(objective, method, attack, eps, steps, mix, beta, options)
    beta = _BETA.get(objective, 0.0) if beta is None else beta
    plan = _plan(
        model,
        data,
        epochs=epochs,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        optimizer=optimizer,
        schedule=schedule,
        batch_size=batch_size,
        augment=augment,
        precision=precision,
        validation=validation,
        checkpoint=checkpoint,
        on_step=on_step,
        on_epoch=on_epoch,
        options=options,
        seed=seed,
        progress=progress,
        guarded=method == "fast",
        particular={
            "objective": objective,
            "beta": beta,
            "method": method,
            "attack": _described(attack),
            "attack_mode": attack_mode,
            "mix": mix,
        },
    )
    lesson: Lesson
    if method == "free":
        lesson = Free(attack, options.label_smoothing, precision)
    else:
        lesson = Adversarial(
            attack,
            objective,
            beta=beta,
            mix=mix,
            mode=attack_mode,
            label_smoothing=options.label_smoothing,
            precision=precision,
            seed=plan.seed if attack.seed is None else seeding.resolve(attack.seed),
        )
    return Run(plan, lesson).train()


def _attack(
    eps: float | None,
    norm: Norm | None,
    method: Method,
    steps: int | None,
    step_size: float | None,
    random_start: bool,
    bounds: Bounds,
) -> PGD:
    if eps is None or norm is None:
        checks.fail("eps, norm", (eps, norm), "both are needed where no attack is given")
    checks.number("eps", eps, low=0.0, strict=True)
    return PGD(
        eps=eps,
        norm=norm,
        steps=_STEPS[method] if steps is None else steps,
        step_size=_STEP_SIZE[method] * eps if step_size is None else step_size,
        random_start=random_start or method == "fast",
        bounds=bounds,
    )


def _refuse_combination(
    objective: Objective,
    method: Method,
    attack: PGD,
    given_eps: float | None,
    steps: int | None,
    mix: float,
    beta: float | None,
    options: Options,
) -> None:
    """Refuse settings that would be ignored, or that do not go together."""
    if beta is not None:
        if objective == "pgd":
            checks.fail("beta", beta, "the objective 'pgd' has one term; 'trades' and 'mart' two")
        checks.number("beta", beta, low=0.0)
    if objective != "pgd":
        if mix:
            checks.fail("mix", mix, f"{objective!r} trains on clean inputs anyway; set beta")
        if not isinstance(attack, PGD):
            raise TypeError(f"attack={attack!r}: {objective!r} climbs its own loss, by PGD")
    if objective == "mart" and options.label_smoothing:
        checks.fail("label_smoothing", options.label_smoothing, "MART has a loss of its own")
    if method != "pgd" and given_eps is None:
        checks.fail("attack", attack, f"method={method!r} is how examples are made; pass eps, norm")
    if method == "fast" and steps is not None:
        checks.fail("steps", steps, "the method 'fast' takes one step; 'pgd' takes several")
    if method == "free":
        if objective != "pgd" or mix:
            checks.fail("method", method, "one pass gives both gradients: of objective 'pgd' alone")
        if options.accumulate > 1 or options.awp:
            checks.fail("method", method, "one pass gives both gradients: no accumulate, no awp")


def _described(attack: PGD) -> str:
    """An attack's settings, the same in every process: a callable by its name."""
    values = {field.name: getattr(attack, field.name) for field in dataclasses.fields(attack)}
    values.pop("seed", None)
    named = {k: getattr(v, "__qualname__", v) if callable(v) else v for k, v in values.items()}
    return f"{type(attack).__name__}({named})"


def _plan(
    model: nn.Module,
    data: Data,
    *,
    epochs: int,
    lr: float,
    momentum: float,
    weight_decay: float,
    optimizer: OptimizerLike | None,
    schedule: Schedule | None,
    batch_size: int | None,
    augment: Callable[[Tensor], Tensor] | None,
    precision: Precision,
    validation: Data | float | None,
    checkpoint: str | os.PathLike[str] | None,
    on_step: Callback | None,
    on_epoch: Callback | None,
    options: Options,
    seed: int | torch.Generator | None,
    progress: bool | None,
    guarded: bool = False,
    particular: dict[str, Any] | None = None,
) -> Plan:
    """Check everything that does not need the data's first batch; find where to go on from."""
    checks.model(model)
    refuse_wrapped(model)
    checks.count("epochs", epochs, low=1)
    checks.one_of("precision", precision, checks.PRECISIONS)
    for name, function in (("augment", augment), ("on_step", on_step), ("on_epoch", on_epoch)):
        checks.function(name, function)
    if not isinstance(options, Options):
        raise TypeError(f"options={options!r}: expected advfeat.training.Options(...)")
    checks.seed(seed)
    ranks = Ranks.here()
    ranks.refuse_shared(data)
    _check_batch_size(batch_size, data)
    folder = None if checkpoint is None else Folder(checkpoint)
    found = None if folder is None else folder.read()
    number = found["seed"] if found is not None and seed is None else ranks.firsts_number(seed)
    held: Data | None
    if isinstance(validation, (int, float)):
        checks.fraction("validation", validation)
        data, held = split(data, validation, number)
    else:
        held = validation
        _check_validation(held)
    if options.patience is not None and held is None:
        checks.fail("patience", options.patience, "needs validation, to say which epoch is best")
    made = made_optimizer(model, optimizer, lr, momentum, weight_decay)
    scheduler = made_scheduler(made, schedule, epochs, lambda: batch_count(data, batch_size))
    settings = {
        "epochs": epochs,
        "lr": lr,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "optimizer": described(made),
        "schedule": type(scheduler).__name__,
        "augment": getattr(augment, "__qualname__", type(augment).__name__),
        "batch_size": batch_size,
        "precision": precision,
        "options": repr(options),
        "seed": number,
        "rows": row_count(data),
        **(particular or {}),
    }
    if found is not None:
        refuse_another_run(found["settings"], settings)
    return Plan(
        model=model,
        data=data,
        validation=held,
        epochs=epochs,
        batch_size=batch_size,
        augment=augment,
        optimizer=made,
        scheduler=scheduler,
        precision=precision,
        options=options,
        guarded=guarded,
        folder=folder,
        found=found,
        settings=settings,
        on_step=on_step,
        on_epoch=on_epoch,
        ranks=ranks,
        seed=number,
        progress=progress,
    )


def _check_batch_size(batch_size: int | None, data: Data) -> None:
    if batch_size is None:
        return
    checks.count("batch_size", batch_size, low=1)
    if isinstance(data, (DataLoader, list, tuple)):
        checks.fail("batch_size", batch_size, "the data come in batches; pass the dataset itself")


def _check_validation(validation: Data | None) -> None:
    """Refuse data that could not be measured after the first epoch, before it."""
    try:
        if validation is not None:
            Source(validation)
    except (TypeError, ValueError) as error:
        raise type(error)(f"validation: {error}") from error
