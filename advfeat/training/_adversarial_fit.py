"""Adversarial training."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from advfeat.attacks import PGD
from advfeat.loading import Data
from advfeat.model import Precision
from advfeat.threat import Bounds, Norm
from advfeat.training._adversarial import AdversarialSettings, Method, Objective
from advfeat.training._history import History
from advfeat.training._loop import train
from advfeat.training._method import Loss
from advfeat.training._optimizer import OptimizerLike
from advfeat.training._options import Options
from advfeat.training._output import Output
from advfeat.training._pgd import AttackMode
from advfeat.training._schedule import Schedule
from advfeat.training._settings import Callback, TrainingSettings
from advfeat.unpacking import as_dataset


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
    attack_mode: AttackMode = "eval",
    mix: float = 0.0,
    warmup: float = 0.0,
    bounds: Bounds = (0.0, 1.0),
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
    """Train a model on adversarial examples made as it learns (Madry et al. 2018), in place.

    Parameters
    ----------
    model, data, epochs, lr, momentum, weight_decay, optimizer, schedule, schedule_every, \
batch_size, output, augment, checkpoint, on_step, on_epoch, options, seed, progress
        As in `fit`. The seed also governs random starts.
    eps, norm
        The ball, in the units of the inputs; required unless ``attack`` is given. The paper's are
        0.5 in ``"l2"`` for CIFAR-10 and 3 for Restricted ImageNet.
    objective
        ``"pgd"``: cross-entropy on adversarial examples (Madry et al. 2018). ``"trades"``: on clean
        inputs, plus ``beta`` times the divergence of the predictions for attacked ones, which the
        attack maximises (Zhang et al. 2019). ``"mart"``: a cross-entropy that includes the
        likeliest wrong class, plus ``beta`` times that divergence, weighted by the model's doubt
        about the label (Wang et al. 2020).
    beta
        Weight of the second term; default 6 for TRADES, 5 for MART.
    method
        How adversarial examples are computed. ``"pgd"``: with ``steps`` gradients. ``"fast"``: with
        one gradient from a random start (Wong et al. 2020). Every 20 steps a batch is attacked by
        PGD-10 too; if that loses more than half of the correct predictions (catastrophic
        overfitting), the weights of the previous check are restored, and training continues with
        one gradient more. ``"free"``: each batch is used ``steps`` times, and each backward pass
        gives both gradients (Shafahi et al. 2019); divide the epochs by this number. Here the
        examples are computed on the model in training mode.
    steps
        Gradients for each example; default 7 as in the paper (appendix C), 8 for ``"free"``.
    step_size
        Default ``eps / 5`` as in the paper, ``1.25 * eps`` for ``"fast"``, ``eps`` for ``"free"``.
    random_start
        Whether PGD starts at a random point of the ball. By default it starts at the input, for
        TRADES and MART close to it. ``"fast"`` always starts at a random point.
    attack
        A PGD object, instead of the settings above.
    attack_mode
        ``"eval"`` attacks the model with running BatchNorm statistics and no dropout;
        ``"train"`` with batch statistics and dropout. Neither changes the statistics.
    mix
        Fraction of each batch that is left clean, from 0 to 1, for the objective ``"pgd"``.
    warmup
        Number of epochs (a float) over which ``eps`` and the step size increase linearly; default
        0. Training in a large ball (linf 0.3 on MNIST) fails without it.
    loss
        As in `fit`: the loss of the training step; for TRADES its first term; not for MART. The
        attack maximises the cross-entropy, unless ``attack=PGD(..., loss=...)``.
    bounds
        The range ``(low, high)`` of valid inputs.
    precision
        As in `fit`; ``"bfloat16"`` is for the attack's gradients too.
    validation
        As in `fit`; measured clean and by PGD-20 in the same ball. The best epoch is the one with
        the highest robust accuracy.

    Returns
    -------
    History
        As in `fit`; ``accuracy`` is that on the attacked training batches.

    Raises
    ------
    ValueError, TypeError, FloatingPointError, BlockingIOError, OSError
        As in `fit`.

    Warns
    -----
    UserWarning
        As in `fit`; and where after three epochs or more the loss never left that of a uniform
        guess.

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
    method_settings = AdversarialSettings(
        eps=eps,
        norm=norm,
        objective=objective,
        beta=beta,
        method_name=method,
        steps=steps,
        step_size=step_size,
        random_start=random_start,
        attack=attack,
        attack_mode=attack_mode,
        mix=mix,
        warmup=warmup,
        bounds=bounds,
        settings=settings,
    )
    return train(settings, method_settings)
