"""Standard training."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from advfeat.loading import Data, as_dataset
from advfeat.model import Precision
from advfeat.training._history import History
from advfeat.training._loop import train
from advfeat.training._method import Loss
from advfeat.training._optimizer import OptimizerLike
from advfeat.training._options import Options
from advfeat.training._output import Output
from advfeat.training._schedule import Schedule
from advfeat.training._settings import Callback, StandardSettings, TrainingSettings


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
    schedule_every: Literal["step", "epoch"] | None = None,
    batch_size: int | None = None,
    output: Output | None = None,
    loss: Loss | None = None,
    augment: Callable[..., Any] | None = None,
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
        the mode it had. Of a model in evaluation mode, the modules whose parameters are all frozen
        stay in it: a frozen backbone keeps its BatchNorm statistics. A compiled model is saved as
        the model inside.
    data
        A loader, which is used as it is (its order, its augmentation), or a dataset, which is
        shuffled anew each epoch by ``seed`` and read ahead in a thread, unless reading it draws
        random numbers. Labels are class indices ``(N,)`` or class probabilities ``(N, C)``.
    epochs
        Passes over the data.
    lr, momentum, weight_decay
        Of the default optimiser, SGD. Defaults are the paper's for D, D_R, D_NR and D_det
        (appendix C); it trains on D_rand with ``lr=0.01``.
    optimizer
        An optimiser, or a callable that makes one from the parameters; replaces the default. One
        whose ``step`` needs a closure (LBFGS, SAM) gets it; one that has ``train`` and ``eval``
        (schedule-free) is switched, and the model is measured, saved and left in ``eval``.
    schedule
        A scheduler, or a callable that makes one from the optimiser. By default the rate falls by
        ten at one third and two thirds of the epochs, as in the paper (50 and 100 of 150).
        ``"one_cycle"`` is torch's OneCycleLR over all epochs with its peak at ``lr``, for short
        runs. ReduceLROnPlateau gets the validation figure (in mode "min" what it lacks of 1);
        without validation the loss of training, in mode "max" the accuracy.
    schedule_every
        ``"step"`` or ``"epoch"``: when the schedule is stepped. By default every epoch, but every
        step for OneCycleLR and CyclicLR, also inside of other schedules, for a warm-up that would
        not end within the epochs, and for one whose length is the number of steps.
    batch_size
        Samples to a step for a dataset, over all ranks; default 128. A last batch of a single
        sample is left out, of a loader too. A loader has its own.
    output
        Which part of what the model returns are the logits: a key, a position, or a function of
        it. By default the tensor itself, ``.logits``, the key "logits" or the first of a tuple.
    loss
        A callable ``(logits, labels)`` that returns one value for each sample, ``(N,)``, in place
        of the cross-entropy. See `advfeat.training.Options` for class and sample weights.
    augment
        Called on each batch of inputs on the device, such as `advfeat.training.crop_flip`. One
        that needs two arguments is called with inputs and labels and returns both, so that
        mixup and cutmix can return class probabilities.
    precision
        ``"bfloat16"`` runs the model in bfloat16, forward and backward, where the hardware has it;
        weights, optimiser and loss stay in float32.
    validation
        Data to measure after each epoch, or the fraction of a dataset to split off for it, at
        random by ``seed``. Never the test set: choices are made on it.
    checkpoint
        A folder. ``last.pt`` is written there after an epoch (each one with ``on_epoch``; else
        at most every ten seconds), at the end, and on SIGTERM and Ctrl-C, and
        ``best.pt`` in the epoch that is best on validation data. The same call resumes from
        ``last.pt`` and ends with the weights of a run that was never interrupted; with more
        ``epochs`` it trains a finished run on. Other data, another model or other settings raise
        an error that names the difference. ``torch.load(file, weights_only=True)`` reads the
        files; the entry ``"model"`` is for ``model.load_state_dict``.
    on_step, on_epoch
        Called with a dictionary after each step (epoch, step, loss, accuracy, lr) and with each
        epoch's figures; ``on_epoch`` returning ``False`` stops training. What it changes of
        the model and the optimiser is saved.
    options
        What few runs need: averaged weights, early stopping, compilation, weights in the loss; see
        `advfeat.training.Options`.
    seed
        Of the order of a dataset, and of torch's default generators during training (dropout,
        augmentation, the order of a loader), which are put back after it. None draws one number
        from torch's default generator.
    progress
        Show stage, count and time left: one line in a terminal or notebook, lines at intervals
        in a log, there by default from ten seconds on. True says it at once, False never.

    Returns
    -------
    History
        For each epoch: epoch, loss, accuracy (of the training batches as they went by), lr,
        seconds, and validation accuracy where asked for.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause. Labels that a dataset keeps
        apart from its samples are checked before the first step, others in their batch; a bad
        sample is named by its index.
    FloatingPointError
        Where training diverges, naming epoch, step and learning rate. ``last.pt`` stays as it was
        after the epoch before.
    BlockingIOError
        Another run, in this process or another, writes to the checkpoint folder.
    OSError
        Naming a checkpoint that cannot be written (the last good one stays) or read.

    Warns
    -----
    UserWarning
        Where a resumed run will differ from an uninterrupted one: samples that draw from an
        unknown source of random numbers, or ``persistent_workers`` that draw any.

    Notes
    -----
    Where `torch.distributed` is initialised (under ``torchrun``, say), every rank makes the same
    call with the plain model: it is trained by `DistributedDataParallel`, a dataset's batches are
    split among the ranks, and figures are of all samples. The first rank writes and calls back;
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
    settings = TrainingSettings(
        model=model,
        data=as_dataset(data),
        epochs=epochs,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        optimizer=optimizer,
        schedule=schedule,
        schedule_every=schedule_every,
        batch_size=batch_size,
        output=output,
        loss=loss,
        augment=augment,
        precision=precision,
        validation=as_dataset(validation),
        checkpoint=checkpoint,
        on_step=on_step,
        on_epoch=on_epoch,
        options=Options() if options is None else options,
        seed=seed,
        progress=progress,
    )
    return train(settings, StandardSettings())
