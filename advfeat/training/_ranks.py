"""Training on several processes: what each of them is to know of the others."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from advfeat import seeding
from advfeat.loading import Data
from advfeat.metrics import Accuracy


@dataclass(frozen=True)
class Ranks:
    """A process among those that train together; one of one without torch.distributed."""

    rank: int = 0
    count: int = 1

    @classmethod
    def here(cls) -> Ranks:
        """Ask torch.distributed; refuse torchrun without a process group."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise RuntimeError(
                "started by torchrun on several processes, but each would train alone: call "
                "torch.distributed.init_process_group() first"
            )
        return cls()

    @property
    def first(self) -> bool:
        """Whether this is the one that draws bars, calls back and writes files."""
        return self.rank == 0

    def summed(self, values: Tensor) -> Tensor:
        """Sum of a tensor over all ranks."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def firsts(self, decision: bool, device: torch.device) -> bool:
        """What the first rank decided."""
        return bool(self.summed(torch.tensor(decision and self.first, device=device).long()))

    def firsts_number(self, seed: int | torch.Generator | None) -> int:
        """Seed of all ranks: the one given, or the first rank's draw."""
        number = [seeding.resolve(seed)]
        if self.count > 1:
            dist.broadcast_object_list(number, 0)
        return number[0]

    def share(self, accuracy: Accuracy, device: torch.device) -> float:
        """Accuracy over the rows of all ranks, from counts."""
        counts = torch.tensor([accuracy.count, accuracy.total], device=device)
        right, total = self.summed(counts).tolist()
        return float(right / total)

    def own_part(self, validation: Data) -> Data:
        """The rank's rows of a dataset to measure on; a loader or a list is taken as it is."""
        if self.count == 1 or isinstance(validation, (DataLoader, list, tuple)):
            return validation
        rows: Any = validation
        sampler: DistributedSampler[Any] = DistributedSampler(
            rows, self.count, self.rank, shuffle=False
        )
        return DataLoader(rows, batch_size=128, sampler=sampler)

    def equalise(self, module: nn.Module) -> None:
        """Give every rank the first one's buffers: BatchNorm statistics are each rank's own."""
        if self.count > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)

    def refuse_shared(self, data: Data) -> None:
        """Refuse a loader that gives every rank the same rows."""
        if self.count == 1 or not isinstance(data, DataLoader):
            return
        if isinstance(data.dataset, IterableDataset):
            return
        if type(data.sampler) in (SequentialSampler, RandomSampler) and data.batch_sampler:
            raise ValueError(
                f"data: this loader gives each of the {self.count} ranks all rows; pass its "
                "dataset, which training shards itself, or give it a DistributedSampler"
            )
