"""Standard training."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from advfeat.loading import Data
from advfeat.model import Precision
from advfeat.training._history import History
from advfeat.training._loop import train
from advfeat.training._method import Loss
from advfeat.training._optimizer import OptimizerLike
from advfeat.training._options import Options
from advfeat.training._output import Output
from advfeat.training._schedule import Schedule
from advfeat.training._settings import Callback, StandardSettings, TrainingSettings
from advfeat.unpacking import as_dataset


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
        Any module that returns class logits. It is trained in place and on its device, in training
        mode; afterwards it has its former mode. If it is in eval mode, modules whose parameters
        are all frozen stay in eval mode, so a frozen backbone keeps its BatchNorm statistics. Of a
        compiled model the original module is saved.
    data
        A dataset or a loader. A dataset is shuffled in each epoch by ``seed``, and read ahead in a
        thread unless reading it draws random numbers. A loader is used unchanged, with its order
        and augmentation. Labels are class indices ``(N,)`` or class probabilities ``(N, C)``.
    epochs
        Passes over the data.
    lr, momentum, weight_decay
        Settings of the default optimiser, SGD. The defaults are the paper's for the original data,
        D_R, D_NR and D_det (appendix C). For D_rand the paper has ``lr=0.01``.
    optimizer
        An optimiser, or a callable that makes one from the parameters; replaces the default. If its
        ``step`` needs a closure (LBFGS, SAM), it gets one. If it has ``train`` and ``eval``
        (schedule-free), they are called, and the model is measured, saved and left in ``eval``.
    schedule
        A scheduler, or a callable that makes one from the optimiser. By default the rate is divided
        by ten at one third and two thirds of the epochs, as in the paper (50 and 100 of 150).
        ``"one_cycle"`` is torch's OneCycleLR over all epochs with its maximum at ``lr``, for short
        runs. ReduceLROnPlateau gets the validation accuracy (in mode "min" 1 minus it), or
        without validation the training loss (in mode "max" the training accuracy).
    schedule_every
        When the scheduler is stepped, ``"step"`` or ``"epoch"``. Default: every epoch; every step
        for OneCycleLR and CyclicLR (also inside other schedulers), for a warm-up that is longer
        than the number of epochs, and for a scheduler whose length is the number of steps.
    batch_size
        Samples in a training step, over all ranks, if ``data`` is a dataset; default 128. A loader
        has its own. A last batch of a single sample is skipped.
    output
        Where the logits are in the model's output: a key, a position, or a function of the output.
        Default: the tensor itself, ``.logits``, the key "logits" or the first item of a tuple.
    loss
        A callable ``(logits, labels)`` that returns one value for each sample, ``(N,)``, in place
        of the cross-entropy. See `advfeat.training.Options` for class and sample weights.
    augment
        A function of a batch of inputs on the device, such as `advfeat.training.crop_flip`. If it
        has two arguments, it is called with inputs and labels and returns both, so mixup and
        cutmix can return class probabilities.
    precision
        ``"bfloat16"`` runs the model in bfloat16, forward and backward, where the hardware has it;
        weights, optimiser and loss stay in float32.
    validation
        Data to evaluate after each epoch, or the fraction of the dataset to hold out for this, at
        random by ``seed``. Never pass the test set: the best epoch is chosen on it.
    checkpoint
        A folder. ``last.pt`` is written after an epoch (after each with ``on_epoch``; otherwise
        at most every ten seconds), at the end, and on SIGTERM and Ctrl-C; ``best.pt`` after the
        epoch that is best on validation data. The same call resumes from ``last.pt`` and ends
        with the weights of an uninterrupted run. With more ``epochs`` a finished run is trained
        further. If data, model or settings differ from those of the folder, an error names the
        difference. ``torch.load(file, weights_only=True)`` reads the files; the entry ``"model"``
        is for ``model.load_state_dict``.
    on_step, on_epoch
        Functions that are called with a dictionary after each step (epoch, step, loss, accuracy,
        lr) and after each epoch. If ``on_epoch`` returns ``False``, training stops. Changes that
        they make to the model and the optimiser are saved.
    options
        Rarely used settings: averaged weights, early stopping, compilation, weights in the loss;
        see `advfeat.training.Options`.
    seed
        Seed of the order of a dataset, and of torch's default generators during training (dropout,
        augmentation, the order of a loader); their state is restored afterwards. None draws one
        number from torch's default generator.
    progress
        Show stage, count and time left: one line in a terminal or notebook, lines at intervals
        in a log. None shows it after ten seconds, True from the beginning, False never.

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
