"""Weights that are averaged, and weights that are perturbed."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from advfeat import model as border
from advfeat.model import Precision


class Average:
    """Exponential moving average of a module's weights, with BatchNorm statistics of its own."""

    def __init__(self, module: nn.Module, decay: float, precision: Precision) -> None:
        self.module = copy.deepcopy(module)
        self._called = border.averaging(self.module, module, precision)
        self._decay = decay
        self._has_statistics = any(
            m.training and isinstance(m, _BatchNorm) for m in self.module.modules()
        )

    @torch.no_grad()
    def update(self, module: nn.Module, step: int, batches: Iterable[tuple[Tensor, ...]]) -> None:
        """Move towards the module, and let BatchNorm see what the module was trained on."""
        weight = 1 - min(self._decay, (1 + step) / (10 + step))
        for own, other in zip(self.module.parameters(), module.parameters(), strict=True):
            own.lerp_(other, weight)
        if self._has_statistics:
            for inputs in batches:
                self._called(*inputs)
            return
        for mine, its in zip(self.module.buffers(), module.buffers(), strict=True):
            mine.copy_(its)


@contextmanager
def perturbed(parameters: Iterable[nn.Parameter], share: float) -> Iterator[None]:
    """Weights moved along their gradients by a share of their own norm (Wu et al. 2020)."""
    kept = []
    with torch.no_grad():
        for p in parameters:
            # Biases and BatchNorm's scales stay, as in the paper.
            if p.grad is not None and p.ndim > 1:
                kept.append((p, p.clone()))
                tiny = torch.finfo(p.dtype).tiny
                p.add_(p.grad * (share * p.norm() / p.grad.norm().clamp_min(tiny)))
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in kept:
                p.copy_(value)
