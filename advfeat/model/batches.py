"""Models that need one batch size: smaller batches are padded to one that works."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TypeAlias

import torch
from torch import Tensor

Select: TypeAlias = Callable[[Tensor], AbstractContextManager[None]]

# What a wrong batch size raises, from torch, from an exported module, or from `checks.logits`.
_OF_A_BATCH_SIZE = (RuntimeError, ValueError, AssertionError, IndexError)
# What BatchNorm says of a single sample: copies of it would make statistics of no use.
_STATISTICS = "more than 1 value per channel"


class BatchPadding:
    """Calls a function of a batch, and pads a batch that fails where a larger one did not.

    A model that was exported with a fixed batch fails on a smaller one, and a model that squeezes
    its output fails on a single sample. Both are found when it happens, and remembered.

    Parameters
    ----------
    select
        Context in which the function is called for these samples of the batch.
    """

    def __init__(self, select: Select) -> None:
        self._select = select
        self.usual = 0  # batch size that the data come in, if it is known
        self._largest = 0  # batch that worked
        self._needed = 0  # smaller batches than this are padded to it

    def call(self, function: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        """Return the function's output ``(N, ...)`` on inputs ``(N, ...)``."""
        count = len(inputs)
        if count < self._needed:
            return self._padded(function, inputs, self._needed)
        try:
            output = function(inputs)
        except _OF_A_BATCH_SIZE as error:
            if isinstance(error, torch.OutOfMemoryError) or _STATISTICS in str(error):
                raise
            larger = (size for size in (self._largest, self.usual, 2) if size > count)
            found = self._first_that_works(function, inputs, larger)
            if found is None:
                raise  # the first error is the one that says what is wrong
            return found
        self._largest = max(self._largest, count)
        return output

    def _first_that_works(
        self, function: Callable[[Tensor], Tensor], inputs: Tensor, sizes: Iterable[int]
    ) -> Tensor | None:
        for size in sizes:
            try:
                output = self._padded(function, inputs, size)
            except Exception:
                continue
            self._needed = size
            return output
        return None

    def _padded(self, function: Callable[[Tensor], Tensor], inputs: Tensor, size: int) -> Tensor:
        chosen = torch.arange(size, device=inputs.device)
        chosen = torch.where(chosen < len(inputs), chosen, 0)
        with self._select(chosen):
            return function(inputs[chosen])[: len(inputs)]
