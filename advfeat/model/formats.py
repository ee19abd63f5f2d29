"""Memory formats and precisions: channels_last, bfloat16."""

from __future__ import annotations

import warnings
import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from advfeat.model.access import device_of

Precision: TypeAlias = Literal["float32", "bfloat16"]


CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


# Modules that failed on channels_last inputs (an x.view in them, say) get contiguous ones.
contiguous_only: weakref.WeakSet[nn.Module] = weakref.WeakSet()


# Weights that training put in channels_last, and that go back where the module fails on it.
in_channels_last: weakref.WeakKeyDictionary[nn.Module, list[nn.Parameter]] = (
    weakref.WeakKeyDictionary()
)


# As many functions from the output a global pooling is searched for.
_NEAR_THE_OUTPUT = 8


def convolution_weights(module: nn.Module) -> list[nn.Parameter]:
    """Weights of convolutions; others of four dimensions may be meant to be viewed."""
    own = (m.parameters(recurse=False) for m in module.modules() if isinstance(m, CONVOLUTIONS))
    return list(dict.fromkeys(p for part in own for p in part if p.ndim == 4))


def set_memory_format(parameters: list[nn.Parameter], memory_format: torch.memory_format) -> None:
    for parameter in parameters:
        parameter.data = parameter.data.contiguous(memory_format=memory_format)


def keep_pooled_gradient_in_channels_last(output: Tensor) -> None:
    """Have the gradient of a global pooling laid out like the activations that were pooled.

    Torch spreads it over the image in the contiguous format, and on the CPU the backward pass of a
    ReLU takes ten times as long on two formats: some percent of a small network's step.
    """
    node = output.grad_fn
    for _ in range(_NEAR_THE_OUTPUT):
        if node is None:
            return
        if node.name() == "MeanBackward1":
            node.register_hook(lambda by_inputs, _: tuple(map(_channels_last, by_inputs)))
            return
        node = next((n for n, _ in node.next_functions if n is not None), None)


def _channels_last(gradient: Tensor) -> Tensor:
    fits = gradient.ndim == 4
    return gradient.contiguous(memory_format=torch.channels_last) if fits else gradient


def supported_precision(precision: Precision, module: nn.Module) -> Precision:
    if precision == "bfloat16" and not supports_bfloat16(device_of(module)):
        warnings.warn(
            "precision='bfloat16': this processor only emulates bfloat16, many times slower "
            "than float32; gradients are taken in float32",
            stacklevel=4,
        )
        return "float32"
    return precision


def supports_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return True


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Against the user's own autocast, which would decide the precision of a backward pass too."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.to(torch.float32)
