"""Accuracy on clean and on attacked inputs, with counts, outcomes and intervals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from typing_extensions import Self

from advfeat import checks, engine, seeding
from advfeat.attacks import PGD, Batch, checked_batch
from advfeat.attacks._attack import check_given
from advfeat.loading import Data, Rows, Source, with_progress
from advfeat.model import Network, Precision, attackable, device_of
from advfeat.threat import Bounds, Norm

_EVERYWHERE = (-math.inf, math.inf)


class Accuracy(float):
    """A share of right answers that works wherever a float does.

    Attributes
    ----------
    count, total
        Right answers and samples.
    correct
        Outcome of each sample, bool ``(total,)``, in the order of the rows.
    index
        Row number of each sample, int64 ``(total,)``.
    interval
        95% Wilson score interval of the share.

    Examples
    --------
    >>> accuracy = Accuracy.of(torch.tensor([True, True, True, False]))
    >>> accuracy > 0.7
    True
    >>> accuracy
    0.7500 (3/4, 95% interval 0.3006 to 0.9544)
    """

    count: int
    total: int
    correct: Tensor
    index: Tensor

    @classmethod
    def of(cls, correct: Tensor, index: Tensor | None = None) -> Self:
        """Count outcomes, bool ``(N,)``."""
        count, total = int(correct.sum()), len(correct)
        value = cls(count / total)
        value.count, value.total, value.correct = count, total, correct
        value.index = torch.arange(total) if index is None else index
        return value

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson score interval."""
        z = 1.959963984540054
        spread = z * math.sqrt(
            float(self) * (1 - float(self)) / self.total + z * z / (4 * self.total**2)
        )
        middle = float(self) + z * z / (2 * self.total)
        scale = 1 + z * z / self.total
        return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)

    def __repr__(self) -> str:
        """Share, count and interval."""
        low, high = self.interval
        return (
            f"{float(self):.4f} ({self.count}/{self.total}, 95% interval {low:.4f} to {high:.4f})"
        )

    __str__ = __repr__


class RobustAccuracy(Accuracy):
    """Accuracy under attack: a sample counts if it is right on its clean and its attacked input.

    Attributes
    ----------
    standard
        Accuracy on the clean inputs, from the same pass.
    """

    standard: Accuracy


@torch.no_grad()
def accuracy(
    model: nn.Module,
    data: Data,
    *,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Accuracy:
    """Standard accuracy, in evaluation mode.

    Parameters
    ----------
    model
        Any module that returns class logits.
    data
        A dataset, a loader or a list of batches ``(inputs, labels, ...)``; moved to the model's
        device.
    batch_size
        Rows to a forward pass; by default the loader's own, 128 for a dataset.
    progress
        Draw a bar; by default where stderr is a terminal and tqdm is installed.

    Returns
    -------
    Accuracy
        A float with ``count``, ``total``, ``correct``, ``index`` and ``interval``.

    Examples
    --------
    >>> import torch
    >>> import advfeat as af
    >>> data = torch.utils.data.TensorDataset(torch.eye(3), torch.tensor([0, 1, 0]))
    >>> af.accuracy(torch.nn.Identity(), data)
    0.6667 (2/3, 95% interval 0.2077 to 0.9385)
    """
    source = Source(data, batch_size)
    right, index = [], []
    with attackable(model) as net:
        for rows in _reading(source, model, "accuracy", progress):
            right.append(_clean(net, rows, _EVERYWHERE)[1].cpu())
            index.append(rows.ids.cpu())
    return Accuracy.of(torch.cat(right), torch.cat(index))


def robust_accuracy(
    model: nn.Module,
    data: Data,
    *,
    eps: float | None = None,
    norm: Norm | None = None,
    attack: PGD | None = None,
    steps: int = 20,
    step_size: float | None = None,
    restarts: int = 1,
    bounds: Bounds = (0.0, 1.0),
    seed: int | torch.Generator | None = None,
    batch_size: int | None = None,
    precision: Precision = "float32",
    progress: bool | None = None,
) -> RobustAccuracy:
    """Accuracy under attack, and on clean inputs in the same pass.

    A sample is robust if no iterate of the attack fools the model. Only samples that are right on
    clean data are attacked, and a fooled one is finished: its place goes to the next sample.

    Parameters
    ----------
    model, data, batch_size, progress
        As in `accuracy`. The batch size does not change the result.
    eps, norm
        The ball, in the units of the inputs; required unless ``attack`` is given.
    attack
        An attack's settings in place of the ones below: then ``eps``, ``norm`` and the rest are
        its own.
    steps, step_size, restarts
        Of the default attack, PGD on the cross-entropy from the clean input (from random starts
        with ``restarts`` above 1).
    bounds
        The box ``(low, high)`` of valid inputs.
    seed
        Of random starts; None draws one number from torch's default generator where needed.
    precision
        ``"bfloat16"`` takes gradients in bfloat16; every success is settled in float32.

    Returns
    -------
    RobustAccuracy
        A float, as in `Accuracy`, with ``standard`` beside it.

    Examples
    --------
    >>> import torch
    >>> import advfeat as af
    >>> data = torch.utils.data.TensorDataset(torch.eye(3), torch.tensor([0, 1, 0]))
    >>> robust = af.robust_accuracy(torch.nn.Identity(), data, eps=0.8, norm="linf", steps=5)
    >>> float(robust), robust.standard.count
    (0.0, 2)
    """
    if attack is None:
        if eps is None or norm is None:
            checks.fail("eps, norm", (eps, norm), "both are needed where no attack is given")
        checks.number("eps", eps, low=0.0)
        attack = PGD(
            eps=eps,
            norm=norm,
            steps=steps,
            step_size=step_size,
            restarts=restarts,
            bounds=bounds,
            seed=seed,
        )
    else:
        check_given(attack, eps, norm)
    attack = attack.until_fooled()
    if attack.is_random:
        # Law 3: one seed for the whole run; the rows' numbers make the noise differ.
        attack = dataclasses.replace(attack, seed=seeding.resolve(attack.seed))
    source = Source(data, batch_size)
    clean: list[tuple[Tensor, Tensor]] = []
    fooled: list[Tensor] = []
    with attackable(model, precision=precision) as net:

        def resisting() -> Iterator[Batch]:
            for rows in _reading(source, model, "robust accuracy", progress):
                batch, right = _clean(net, rows, attack.bounds)
                clean.append((rows.ids.cpu(), right.cpu()))
                if bool(right.any()):
                    yield Batch(*(field[right] for field in batch[:3]))

        for verdict in engine.survivors(attack, net, resisting(), source.pool_size):
            fooled.append(verdict.ids[verdict.success].cpu())
    index = torch.cat([rows for rows, _ in clean])
    right = torch.cat([outcome for _, outcome in clean])
    standing = right & ~torch.isin(index, torch.cat(fooled)) if fooled else right
    robust = RobustAccuracy.of(standing, index)
    robust.standard = Accuracy.of(right, index)
    return robust


def _reading(source: Source, model: nn.Module, label: str, progress: bool | None) -> Iterator[Rows]:
    batches = source.batches(device_of(model))
    yield from with_progress(batches, total=source.batch_count, label=label, progress=progress)


def _clean(net: Network, rows: Rows, bounds: Bounds) -> tuple[Batch, Tensor]:
    """Check a batch; return it prepared, with whether the model is right on each of its rows."""
    batch = checked_batch(net, rows.inputs, rows.labels, rows.ids, bounds)
    return batch, net.logits(batch.inputs).argmax(1) == batch.labels
