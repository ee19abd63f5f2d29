"""Find the user's own module, its device, and the logits in what it returns."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def unwrapped(module: nn.Module) -> nn.Module:
    """The user's own module below a data-parallel wrapper, which would synchronise gradients."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return module.module if isinstance(module, wrappers) else module


def innermost(module: nn.Module) -> nn.Module:
    """The user's own module inside of wrappers that keep it as ``_orig_mod``: torch.compile's."""
    while isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
        module = inner
    return module


def device_of(module: nn.Module) -> torch.device:
    """Where the module's first parameter or buffer is; the CPU if it has none."""
    tensor = next(module.parameters(), next(module.buffers(), None))
    return torch.device("cpu") if tensor is None else tensor.device


def logits_of(output: object) -> object:
    """Find the logits in what a module returned: tensor, tuple or list, mapping or ``.logits``."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if hasattr(output, "logits"):
        return output.logits
    if isinstance(output, (tuple, list)) and output:
        return output[0]
    return output


def logit_candidates(output: object, count: int) -> list[tuple[int, ...]]:
    """Shapes of the tensors of a returned tuple or list that could all be logits ``(N, C)``."""
    if isinstance(output, (Tensor, Mapping)) or hasattr(output, "logits"):
        return []
    items = output if isinstance(output, (tuple, list)) else ()
    return [
        tuple(item.shape)
        for item in items
        if isinstance(item, Tensor)
        and item.is_floating_point()
        and item.ndim == 2
        and len(item) == count
        and item.shape[1] > 1
    ]
