"""Adversarial examples of one model on another."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advfeat import checks, seeding
from advfeat.attacks import Attack, AutoAttack
from advfeat.attacks.base import check_attack, is_success, prepare_batch
from advfeat.loading import Data, Source
from advfeat.model import attackable, device_of
from advfeat.progress import with_progress


@dataclass(frozen=True)
class TransferMatrix:
    """How often the examples made on a source (row) fool a target (column).

    Attributes
    ----------
    sources, targets
        Names of rows and columns.
    of_all
        Share of all samples that the target gets wrong on the source's example, ``(S, T)``.
    of_fooled
        The same among samples that the source had right and was fooled on, ``(S, T)``; NaN where
        there are none.
    clean_error
        Share of samples that each target gets wrong on the clean input, ``(T,)``: what ``of_all``
        would be without an attack.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    of_all: Tensor
    of_fooled: Tensor
    clean_error: Tensor

    def __str__(self) -> str:
        """A table: of all samples / of those fooled on the source."""
        width = max(15, *(len(name) + 2 for name in self.targets))
        first = max(len(name) for name in ("source", *self.sources))
        lines = ["source".ljust(first) + "".join(name.rjust(width) for name in self.targets)]
        for name, all_row, fooled_row in zip(
            self.sources, self.of_all.tolist(), self.of_fooled.tolist(), strict=True
        ):
            cells = [f"{a:.3f} / {b:.3f}" for a, b in zip(all_row, fooled_row, strict=True)]
            lines.append(name.ljust(first) + "".join(cell.rjust(width) for cell in cells))
        return "\n".join(lines)


def transfer_matrix(
    sources: Mapping[str, nn.Module],
    targets: Mapping[str, nn.Module],
    data: Data,
    attack: Attack | AutoAttack,
    *,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> TransferMatrix:
    """Attack every source model, and try the examples on every target model.

    Parameters
    ----------
    sources, targets
        Models by name; a model may be in both.
    data, batch_size, progress
        As in `accuracy`.
    attack
        Run to its end on each source. Untargeted.

    Returns
    -------
    TransferMatrix
        With both denominators, and each target's clean error.

    Examples
    --------
    >>> import torch
    >>> from advfeat.attacks import PGD
    >>> from advfeat.metrics import transfer_matrix
    >>> data = torch.utils.data.TensorDataset(torch.eye(3), torch.arange(3))
    >>> models = {"a": torch.nn.Identity(), "b": torch.nn.Softmax(1)}
    >>> matrix = transfer_matrix(models, models, data, PGD(eps=0.9, norm="linf"))
    >>> matrix.of_all.shape, float(matrix.of_fooled[0, 1])
    (torch.Size([2, 2]), 1.0)
    """
    for models in (sources, targets):
        if not isinstance(models, Mapping) or not models:
            raise TypeError("sources, targets: expected mappings from a name to a model")
        for model in models.values():
            checks.model(model)
    if not isinstance(attack, AutoAttack):
        check_attack(attack, None, None)
    source_data = Source(data, batch_size)
    if attack.is_random:
        # One seed for all sources: each is attacked from the same random starts.
        attack = attack.with_seed(seeding.resolve(getattr(attack, "seed", None)))
    counts = torch.zeros(2, len(sources), len(targets))
    fooled_of, wrong, total = torch.zeros(len(sources)), torch.zeros(len(targets)), 0
    batches = source_data.batches(device_of(next(iter(sources.values()))))
    for rows in with_progress(
        batches, total=source_data.batch_count, label="transfer", progress=progress
    ):
        total += len(rows.ids)
        wrong += torch.stack([_wrong(t, rows.inputs, rows.labels).sum() for t in targets.values()])
        for i, source in enumerate(sources.values()):
            device = device_of(source)
            ids, inputs, labels = (field.to(device) for field in rows)
            made = attack(source, inputs, labels, index=ids)
            fooled = ~_wrong(source, inputs, labels) & _wrong(source, made, labels)
            fooled_of[i] += fooled.sum()
            for j, target in enumerate(targets.values()):
                missed = _wrong(target, made, labels)
                counts[0, i, j] += missed.sum()
                counts[1, i, j] += (missed & fooled).sum()
    return TransferMatrix(
        tuple(sources),
        tuple(targets),
        counts[0] / total,
        counts[1] / fooled_of[:, None],
        wrong / total,
    )


def _wrong(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Where a model is wrong, bool ``(N,)`` on the CPU."""
    device = device_of(model)
    with attackable(model) as net:
        batch = prepare_batch(
            net, inputs.to(device), labels.to(device), None, (-math.inf, math.inf)
        )
        return is_success(net.logits(batch.inputs), batch.labels, targeted=False).cpu()
