"""A module as training calls it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from advfeat.model.access import innermost
from advfeat.model.formats import (
    Precision,
    contiguous_only,
    convolution_weights,
    in_channels_last,
    set_memory_format,
    supported_precision,
)
from advfeat.model.network import Network


class Trainee(nn.Module):
    """A module as training calls it: the logits of several batches in one pass, for DDP counts it.

    Made by `trainable`.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.module = network._module
        self._network = network

    def forward(self, *inputs: Tensor, **extras: Tensor) -> tuple[Tensor, ...]:
        """Logits ``(N, C)`` of each batch, with a gradient, in float32 (or float64).

        ``extras`` are further arguments of the module's forward, the same for all batches.
        """
        network = self._network
        with network.given(extras):
            return tuple(
                network._logits(
                    batch.contiguous(memory_format=network._memory_format(batch)),
                    network.low_precision,
                )
                for batch in inputs
            )


@contextmanager
def trainable(
    module: nn.Module, *, precision: Precision = "float32", compile: bool = False
) -> Iterator[Trainee]:
    """Put a module in training mode, yield its `Trainee`, and leave its flags as they were.

    A module that is in training mode keeps its frozen parts; of one in evaluation mode those parts
    stay so that have parameters, all of them frozen, for the statistics of a frozen backbone.
    A ``train`` of the module's own class is obeyed.
    Weights of convolutions are in channels_last meanwhile, the fastest format on CPU and CUDA.
    """
    own = innermost(module)
    flags = [(m, m.training) for m in module.modules()]
    weights = [p for p in convolution_weights(module) if p.is_contiguous()]
    if not module.training:
        module.train()
        _keep_frozen_in_evaluation(module)
    _obey_own_train(module)
    try:
        if own not in contiguous_only:
            set_memory_format(weights, torch.channels_last)
            in_channels_last[own] = weights
        called: Any = torch.compile(module) if compile else module
        yield Trainee(Network(called, supported_precision(precision, module)))
    finally:
        for m, flag in flags:
            m.training = flag
        set_memory_format(weights, torch.contiguous_format)
        in_channels_last.pop(own, None)


def _keep_frozen_in_evaluation(module: nn.Module) -> None:
    for part in module.modules():
        parameters = list(part.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            part.train(False)


def _obey_own_train(module: nn.Module) -> None:
    """Leave in evaluation mode what a module's own ``train`` puts there, as in a plain loop."""
    for part in module.modules():
        is_own = type(part).train is not nn.Module.train
        if is_own and part.training and not isinstance(part, torch.jit.ScriptModule):
            flags = [(m, m.training) for m in part.modules()]
            part.train()
            for m, flag in flags:
                m.training = flag and m.training


def averaging(module: nn.Module, like: nn.Module, precision: Precision) -> Trainee:
    """`Trainee` of a copy that learns nothing but BatchNorm statistics, where ``like`` does."""
    for own, other in zip(module.modules(), like.modules(), strict=True):
        own.training = other.training and isinstance(own, _BatchNorm)
    module.requires_grad_(False)
    in_channels_last[innermost(module)] = convolution_weights(module)
    return Trainee(Network(module, supported_precision(precision, module)))


def check_not_wrapped(module: nn.Module) -> None:
    """Raise an error for a module that is distributed already: training does that itself."""
    names = {base.__name__ for m in module.modules() for base in type(m).__mro__}
    if isinstance(module, nn.parallel.DistributedDataParallel):
        raise TypeError(
            "model: a DistributedDataParallel; pass the module inside, model.module: "
            "training wraps it itself where torch.distributed is initialised"
        )
    if names & {"FullyShardedDataParallel", "FSDPModule"}:
        raise TypeError(
            "model: sharded by FSDP, and an attack would gather all weights at every step; pass "
            "the plain module: training makes it data parallel (DDP)"
        )
