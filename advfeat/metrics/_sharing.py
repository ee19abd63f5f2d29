"""Samples that are measured by several ranks, and their results on every rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from advfeat import distributed, seeding
from advfeat.loading import Source


class SharedSamples:
    """Narrows a source to the samples of this rank, and gathers what all ranks found.

    Ranks that come with equal data share its samples among them. Ranks that come with samples of
    their own (of a DistributedSampler) keep those. A stream, whose samples have no numbers that
    all ranks agree on, is each rank's own.

    Parameters
    ----------
    source
        The data; narrowed in place.
    caller
        What is called, for a warning where a rank waits for the others.
    """

    def __init__(self, source: Source, caller: str) -> None:
        process = distributed.current_process()
        self.process = distributed.SINGLE if source.is_stream else process
        if self.process.world_size == 1:
            return
        self.process.barrier(
            f"{caller} waits for other ranks: they share the samples, so every rank must call it. "
            "To measure on one rank alone, call it inside of advfeat.distributed.on_one_rank()"
        )
        if self.process.all_equal(str(source.indices)):
            source.indices = source.indices[process.rank :: process.world_size]

    def seed(self, seed: int | torch.Generator | None) -> int | torch.Generator | None:
        """One seed for all ranks."""
        if self.process.world_size == 1 or isinstance(seed, int):
            return seed
        return self.process.broadcast_int(seeding.resolve(seed))

    def sum(self, number: int) -> int:
        """Sum of a number over the ranks."""
        return int(torch.cat(self.process.all_gather(torch.tensor([number], device="cpu"))).sum())

    def gather(self, index: Tensor, *fields: Tensor | None) -> Any:
        """Sample numbers and fields of all ranks, in the order of the samples, none twice."""
        if self.process.world_size == 1:
            return index, *fields
        numbers = torch.cat(self.process.all_gather(index))
        order = numbers.argsort(stable=True)
        ranked = numbers[order]
        order = order[torch.cat([ranked.new_ones(1), ranked.diff()]) != 0]
        found: list[Tensor | None] = [numbers[order]]
        for field in fields:
            if field is None:
                found.append(None)
                continue
            parts = [part for part in self.process.all_gather(field) if len(part)]
            found.append(torch.cat(parts)[order])
        return tuple(found)
