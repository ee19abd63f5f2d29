"""Processes that work together: rank, world size, broadcast, barrier.

The library never initialises or destroys the default process group: that is the user's. Where
``torchrun`` started several processes and the user has initialised none, a private gloo group over
the same rendezvous serves the few numbers that are exchanged here.
"""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# The slowest rank may come days after the fastest.
_TIMEOUT = timedelta(days=365)
# Seconds after which a rank says that it waits for the others.
_PATIENCE = 30.0
_DTYPES = (torch.bool, torch.int64, torch.float32, torch.float64)
_groups: dict[object, Any] = {}
_alone: ContextVar[bool] = ContextVar("alone", default=False)


class Process(NamedTuple):
    """One process among those that work together."""

    rank: int
    world_size: int

    @property
    def is_first(self) -> bool:
        """Whether this is the process that draws bars, calls back and writes files."""
        return self.rank == 0

    def broadcast_int(self, number: int, root: int = 0) -> int:
        """The number of the first rank, or of another, on every rank."""
        if self.world_size == 1:
            return number
        sent = torch.tensor([number], device="cpu")
        _gloo_group().broadcast(sent, root).wait()
        return int(sent)

    def broadcast_bool(self, decision: bool) -> bool:
        """The first rank's decision, on every rank."""
        return bool(self.broadcast_int(int(decision)))

    def all_equal(self, text: str) -> bool:
        """Whether every rank has the same text."""
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        return len({self.broadcast_int(number, rank) for rank in range(self.world_size)}) == 1

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum of a tensor over all ranks of the user's process group, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def all_gather(self, values: Tensor) -> list[Tensor]:
        """The tensors of all ranks, on the CPU."""
        if self.world_size == 1:
            return [values]
        found, own = [], values.detach().cpu().contiguous()
        for root in range(self.world_size):
            kind = self.broadcast_int(_DTYPES.index(own.dtype), root)
            shape = [self.broadcast_int(own.ndim, root)]
            shape = [
                self.broadcast_int(own.shape[axis] if root == self.rank else 0, root)
                for axis in range(shape[0])
            ]
            sent = (
                own if root == self.rank else torch.empty(shape, dtype=_DTYPES[kind], device="cpu")
            )
            if sent.numel():
                # Bytes, for gloo does not know every type.
                _gloo_group().broadcast(sent.view(-1).view(torch.uint8), root).wait()
            found.append(sent)
        return found

    def barrier(self, waiting: str | None = None) -> None:
        """Return once every rank has called this; warn with a text while others are missing."""
        if self.world_size == 1:
            return
        work = _gloo_group().barrier()
        warned = waiting is None
        began = time.monotonic()
        while not warned and not work.is_completed():
            time.sleep(0.001)
            if time.monotonic() - began > _PATIENCE:
                warnings.warn(str(waiting), stacklevel=3)
                warned = True
        work.wait()


SINGLE = Process(0, 1)


def current_process() -> Process:
    """Rank and world size of the initialised process group, else of torchrun, else (0, 1)."""
    if _alone.get() or not dist.is_available():
        return SINGLE
    if dist.is_initialized():
        return Process(dist.get_rank(), dist.get_world_size())
    if all(name in os.environ for name in _ENVIRONMENT):
        return Process(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    return SINGLE


@contextmanager
def on_one_rank() -> Iterator[None]:
    """Work on this rank alone, as if there were no others.

    Under ``torchrun``, `advfeat.accuracy` and `advfeat.robust_accuracy` share the samples among
    the ranks, so every rank must call them. What one rank is to measure alone goes in here.

    Examples
    --------
    >>> import torch
    >>> import advfeat as af
    >>> rank, data = 0, torch.utils.data.TensorDataset(torch.eye(3), torch.arange(3))
    >>> if rank == 0:
    ...     with af.distributed.on_one_rank():
    ...         print(float(af.accuracy(torch.nn.Identity(), data)))
    1.0
    """
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def _gloo_group() -> Any:
    """All ranks over gloo, whatever the backend of the user's own group."""
    world = dist.group.WORLD if dist.is_initialized() else None
    if world not in _groups:
        beside = world is not None
        _groups[world] = (
            dist.new_group(backend="gloo", timeout=_TIMEOUT) if beside else _private_group()
        )
    return _groups[world]


def _private_group() -> Any:
    """A group that torch.distributed does not register: the default one stays the user's."""
    # Imported here: a torch that was built without distributed has none of these.
    from torch.distributed.distributed_c10d import PrefixStore, ProcessGroupGloo
    from torch.distributed.rendezvous import rendezvous

    store, rank, world_size = next(rendezvous("env://", timeout=_TIMEOUT))
    return ProcessGroupGloo(PrefixStore("advfeat", store), rank, world_size, _TIMEOUT)
