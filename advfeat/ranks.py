"""Processes that share one piece of work; torch.distributed says which of them this one is."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# The slowest rank may come days after the fastest.
_PATIENCE = timedelta(days=365)
_groups: dict[object, dist.ProcessGroup] = {}


class Team(NamedTuple):
    """One process among those that work together."""

    rank: int
    size: int

    def agreed(self, number: int) -> int:
        """The first rank's number, on every rank."""
        if self.size == 1:
            return number
        told = torch.tensor(number)
        dist.broadcast(told, src=0, group=_group())
        return int(told)

    def wait(self) -> None:
        """Return once every rank has come here."""
        if self.size > 1:
            dist.barrier(_group())


ALONE = Team(0, 1)


def team() -> Team:
    """The ranks of this run: those of torchrun or of an initialised process group, else one."""
    if not dist.is_available():
        return ALONE
    if not dist.is_initialized():
        if not all(name in os.environ for name in _NEEDED) or os.environ["WORLD_SIZE"] == "1":
            return ALONE
        dist.init_process_group("gloo")
    return Team(dist.get_rank(), dist.get_world_size())


def _group() -> dist.ProcessGroup:
    """All ranks over gloo, whatever the backend of the user's own group."""
    world = dist.group.WORLD
    if world not in _groups:
        _groups[world] = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return _groups[world]
