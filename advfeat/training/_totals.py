"""Sums of an epoch, kept on the device."""

from __future__ import annotations

import math
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
        loss = float(self.loss) / weight if weight else math.nan
        return {"loss": loss, "accuracy": float(self.hits) / self.samples}


class Totals:
    """Sums over an epoch so far.

    Steps are kept as they come, on the device, and added when the sums are read.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = [0.0, 0.0, 0.0, 0.0]  # loss, hits, count, weight
        self._new: list[tuple[int, StepResult]] = []
        self._first_bad = 0

    @property
    def sums(self) -> Tensor:
        """Sums of loss, hits, samples and weights, ``(4,)``; reads from the device."""
        self._flush()
        return torch.tensor(self._sums, dtype=self._dtype, device=self._device)

    def add(self, result: StepResult, step: int) -> None:
        """Add a step."""
        self._new.append((step, result))

    def restore(self, sums: Tensor) -> None:
        """Continue from the `sums` of a checkpoint."""
        self._sums = sums.tolist()

    def first_bad(self) -> int:
        """First step whose loss was not finite, 0 if there is none; reads from the device."""
        self._flush()
        return self._first_bad

    def _flush(self) -> None:
        steps, self._new = self._new, []
        if not steps:
            return
        results = [result for _, result in steps]
        losses = torch.stack([result.loss for result in results]).tolist()
        hits = torch.stack([result.hits for result in results]).tolist()
        weights = [result.weight for result in results if result.weight is not None]
        weighed = torch.stack(weights).tolist() if weights else [r.samples for r in results]
        # One after another: the sums do not depend on when they are read.
        for (step, result), *values, weight in zip(steps, losses, hits, weighed, strict=True):
            more = (*values, result.samples, weight)
            self._sums = [total + value for total, value in zip(self._sums, more, strict=True)]
            if not math.isfinite(values[0]):
                self._first_bad = self._first_bad or step


def means(sums: Tensor) -> dict[str, float]:
    """Mean loss (NaN without any weight) and accuracy of sums; reads from the device."""
    loss, hits, count, weight = sums.tolist()
    return {"loss": loss / weight if weight else math.nan, "accuracy": hits / count}
