"""Sums of an epoch, kept on the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class StepResult(NamedTuple):
    """Sums over the samples of a batch, scalars on the device."""

    loss: Tensor  # of weighted losses
    hits: Tensor  # samples that the model has right
    samples: int
    weight: Tensor | None  # of the samples; None where each counts 1

    def plus(self, other: StepResult) -> StepResult:
        """Add the samples of another part of the batch."""
        weight = None
        if self.weight is not None and other.weight is not None:
            weight = self.weight + other.weight
        return StepResult(
            self.loss + other.loss, self.hits + other.hits, self.samples + other.samples, weight
        )

    def without_idle(self) -> StepResult:
        """What samples count that another rank has already."""
        weight = None if self.weight is None else torch.zeros_like(self.weight)
        return StepResult(torch.zeros_like(self.loss), torch.zeros_like(self.hits), 0, weight)

    def means(self) -> dict[str, float]:
        """Mean loss and accuracy; reads from the device."""
        weight = self.samples if self.weight is None else float(self.weight)
        return {"loss": float(self.loss) / weight, "accuracy": float(self.hits) / self.samples}


class Totals:
    """Sums over an epoch so far."""

    def __init__(self, device: torch.device) -> None:
        kind = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(4, dtype=kind, device=device)  # loss, hits, count, weight
        self._first_bad = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, result: StepResult, step: int) -> None:
        """Add a step."""
        loss, hits, count, weight = result
        number = torch.full_like(loss, count)
        weight = number if weight is None else weight
        self.sums += torch.stack([loss, hits, number, weight])
        bad = ~torch.isfinite(loss) & (self._first_bad == 0)
        self._first_bad = torch.where(bad, step, self._first_bad)

    def first_bad(self) -> int:
        """First step whose loss was not finite, 0 if there is none; reads from the device."""
        return int(self._first_bad)


def means(sums: Tensor) -> dict[str, float]:
    """Mean loss and accuracy of sums; reads from the device."""
    loss, hits, count, weight = sums.tolist()
    return {"loss": loss / weight, "accuracy": hits / count}
