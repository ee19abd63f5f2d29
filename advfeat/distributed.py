"""Processes that work together: rank, world size, broadcast, barrier.

The library never initialises or destroys the default process group: that is the user's. Where
``torchrun`` started several processes and the user has initialised none, a private gloo group over
the same rendezvous serves the few numbers that are exchanged here.
"""

from __future__ import annotations

import hashlib
import os
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# The slowest rank may come days after the fastest.
_TIMEOUT = timedelta(days=365)
_groups: dict[object, Any] = {}


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
        sent = torch.tensor([number])
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

    def shard(self, data: Any) -> Any:
        """The rank's samples of a dataset; a loader or a list is taken as it is."""
        if self.world_size == 1 or isinstance(data, (DataLoader, list, tuple)):
            return data
        sampler: DistributedSampler[Any] = DistributedSampler(
            data, self.world_size, self.rank, shuffle=False
        )
        return DataLoader(data, batch_size=128, sampler=sampler)

    def barrier(self) -> None:
        """Return once every rank has called this."""
        if self.world_size > 1:
            _gloo_group().barrier().wait()


SINGLE = Process(0, 1)


def current_process() -> Process:
    """Rank and world size of the initialised process group, else of torchrun, else (0, 1)."""
    if not dist.is_available():
        return SINGLE
    if dist.is_initialized():
        return Process(dist.get_rank(), dist.get_world_size())
    if all(name in os.environ for name in _ENVIRONMENT):
        return Process(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    return SINGLE


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
