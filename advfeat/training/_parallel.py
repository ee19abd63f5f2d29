"""Training on several processes: what each of them must know of the others."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from advfeat import seeding
from advfeat.distributed import SINGLE, Process, current_process
from advfeat.loading import Data
from advfeat.metrics import Accuracy
from advfeat.training._identity import digest_samples, some_samples

# Samplers of torch that give every rank the same samples.
_WHOLE = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
# Attributes of a sampler that gives each rank its own.
_SHARDED = ("num_replicas", "rank", "world_size")


def training_process() -> Process:
    """Return this process among those that train together.

    Raises
    ------
    RuntimeError
        Several processes were started by torchrun, and no process group is initialised.
    """
    if dist.is_available() and dist.is_initialized():
        return current_process()
    if current_process().world_size > 1:
        raise RuntimeError(
            "started by torchrun on several processes, but each would train alone: call "
            "torch.distributed.init_process_group() first"
        )
    return SINGLE


def common_seed(process: Process, seed: int | torch.Generator | None) -> int:
    """Return the seed of all ranks: the one given, or the first rank's draw."""
    number = seeding.resolve(seed)
    return process.broadcast_int(number) if abs(number) <= seeding.MAX_SEED else number


def mean_accuracy(process: Process, accuracy: Accuracy, device: torch.device) -> float:
    """Return the accuracy over the samples of all ranks, from counts."""
    counts = torch.tensor([accuracy.count, accuracy.total], device=device)
    right, total = process.all_reduce_sum(counts).tolist()
    return float(right / total)


def broadcast_buffers(process: Process, module: nn.Module) -> None:
    """Give every rank the first one's buffers: BatchNorm statistics are each rank's own."""
    if process.world_size > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def check_sharded(process: Process, data: Data) -> None:
    """Raise an error for a loader, or a list of batches, that gives every rank the same samples."""
    if process.world_size == 1:
        return
    if isinstance(data, (list, tuple)):
        if process.all_equal(digest_samples(some_samples(data))):
            raise ValueError(_same(process, "this list of batches"))
        return
    if not isinstance(data, DataLoader) or isinstance(data.dataset, IterableDataset):
        return
    samplers: list[Any] = [data.sampler, data.batch_sampler]
    samplers.append(getattr(data.batch_sampler, "sampler", None))
    if any(hasattr(sampler, name) for sampler in samplers for name in _SHARDED):
        return
    if data.batch_sampler is not None and isinstance(data.sampler, _WHOLE):
        own = type(data.batch_sampler).__module__.split(".")[0] != "torch"
        if not own:
            raise ValueError(_same(process, "this loader"))
    warnings.warn(
        f"data: {type(data.batch_sampler).__name__} has none of the attributes "
        f"{', '.join(_SHARDED)}: make sure that it gives each of the {process.world_size} ranks "
        "samples of its own",
        stacklevel=2,
    )


def _same(process: Process, data: str) -> str:
    return (
        f"data: {data} gives each of the {process.world_size} ranks all samples; pass its "
        "dataset, which training shards itself, or give it a DistributedSampler"
    )
