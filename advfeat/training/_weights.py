"""Weights that are averaged, and weights that are perturbed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn

from advfeat.model import Extras, Precision, averaging

# What went through the model in one pass.
Seen: TypeAlias = tuple[tuple[Tensor, ...], Extras]


class Average:
    """Exponential moving average of a module's weights, with BatchNorm statistics of its own."""

    def __init__(
        self,
        module: nn.Module,
        decay: float,
        precision: Precision,
        as_called: Callable[[nn.Module], nn.Module],
    ) -> None:
        self.module = copy.deepcopy(module)
        self._called = averaging(as_called(self.module), as_called(module), precision)
        self._decay = decay
        # What the average learns from batches itself; any other buffer is the module's.
        self._learning = [m for m in self.module.modules() if m.training]

    @torch.no_grad()
    def update(self, module: nn.Module, step: int, batches: Iterable[Seen]) -> None:
        """Move towards the module, and let BatchNorm see what the module was trained on."""
        weight = 1 - min(self._decay, (1 + step) / (10 + step))
        for own, other in zip(self.module.parameters(), module.parameters(), strict=True):
            own.lerp_(other, weight)
        learned = {id(buffer) for m in self._learning for buffer in m.buffers()}
        for mine, its in zip(self.module.buffers(), module.buffers(), strict=True):
            if id(mine) not in learned:
                mine.copy_(its)
        if learned:
            for inputs, extras in batches:
                self._called(*inputs, **extras)


@contextmanager
def perturbed(parameters: Iterable[nn.Parameter], fraction: float) -> Iterator[None]:
    """Weights moved along their gradients by a fraction of their own norm (Wu et al. 2020)."""
    kept = []
    try:
        with torch.no_grad():
            for p in parameters:
                # Biases and BatchNorm's scales stay, as in the paper.
                if p.grad is not None and p.ndim > 1:
                    kept.append((p, p.clone()))
                    tiny = torch.finfo(p.dtype).tiny
                    p.add_(p.grad * (fraction * p.norm() / p.grad.norm().clamp_min(tiny)))
        yield
    finally:
        with torch.no_grad():
            for p, value in kept:
                p.copy_(value)
