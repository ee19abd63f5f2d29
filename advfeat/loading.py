"""Any dataset or loader as indexed samples on a device."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
)
from torch.utils.data.distributed import DistributedSampler

from advfeat import checks
from advfeat.unpacking import as_dataset, entries_of, unpack

Data: TypeAlias = "Dataset[Any] | DataLoader[Any] | Sequence[Any]"
T = TypeVar("T")


class Samples(NamedTuple):
    """A batch with the number of each of its samples."""

    ids: Tensor  # (N,) int64: the sample in the dataset, or the place in a stream
    inputs: Tensor  # (N, ...)
    labels: Tensor  # (N,)
    # Other entries of a batch that is a mapping, as they were read; the inputs' own is None.
    entries: Mapping[str, Any] = MappingProxyType({})


Check: TypeAlias = Callable[[Tensor, Tensor], None]


class Source:
    """A dataset, a loader or a list of batches, read in the order of its samples.

    A loader over a map-style dataset is read by sample number, whatever its order: shuffling cannot
    mispair anything, and ``drop_last`` drops nothing. A sharded loader keeps to its shard, without
    the samples that its sampler repeats to make shards equal.

    Parameters
    ----------
    data
        A map-style dataset, a DataLoader, or a list of batches. A loader over an iterable dataset
        must have a length; its samples are numbered in the order they come.
    batch_size
        Samples to a batch; by default the loader's own; for a dataset 128, up to 1024 on a GPU.
    device
        Where the batches go to.
    """

    def __init__(
        self, data: Data, batch_size: int | None = None, device: torch.device | None = None
    ) -> None:
        if batch_size is not None:
            checks.count("batch_size", batch_size, low=1)
        data = as_dataset(data)
        self._loader = data if isinstance(data, DataLoader) else None
        dataset = data.dataset if isinstance(data, DataLoader) else data
        self.is_stream = is_stream(data)
        self.batch_size = 128  # of a stream: what evaluation attacks together
        if self.is_stream:
            check_length(data)
            self._batches: Iterable[Any] = data  # type: ignore[assignment]
            self.indices: list[int] = []
            return
        self._dataset: Any = dataset
        self.collate: Callable[[list[Any]], Any] = default_collate
        if self._loader is not None and self._loader.collate_fn is not None:
            self.collate = self._loader.collate_fn
        own = None if self._loader is None else self._loader.batch_size
        self.indices = _sample_numbers(dataset, self._loader)
        if not self.indices and not _is_sharded(self._loader):
            checks.fail("data", type(data).__name__, "it has no samples")
        self.batch_size = batch_size or own or self._usual_batch_size(device)

    def __len__(self) -> int:
        """Samples, for map-style data."""
        return len(self.indices)

    def _usual_batch_size(self, device: torch.device | None) -> int:
        if device is None or device.type == "cpu":
            return 128
        # Small batches leave a GPU idle: as many features as 1024 images of CIFAR-10 have.
        inputs, _ = unpack(self.fetch(self.indices[:1]))
        return min(1024, max(128, 1024 * 3072 // max(1, inputs.numel())))

    @property
    def dataset(self) -> Any:
        """The dataset itself, of map-style data."""
        return self._dataset

    @property
    def dataset_size(self) -> int:
        """Samples of the dataset, of which a loader may cover a part; for map-style data."""
        return len(self._dataset)

    @property
    def batch_count(self) -> int:
        """Batches that `batches` gives."""
        if self.is_stream:
            return len(self._batches)  # type: ignore[arg-type]
        return -(-len(self.indices) // self.batch_size)

    def raw_batches(self) -> Iterator[Any]:
        """Batches of a stream as they come, not unpacked."""
        with torch.random.fork_rng(devices=[]):
            stream = iter(self._batches)
        yield from stream

    def batches(
        self, device: torch.device, chunks: list[list[int]] | None = None
    ) -> Iterator[Samples]:
        """Give all samples, in order, on the device; or those of the chunks, by their numbers.

        Workers of a loader start at this call, not at the first batch: `prefetched` reads batches
        in a thread, and a process that is forked from a thread may fail as it ends.
        """
        if self.is_stream:
            # A loader's iterator takes a number from the global generator, which is put back.
            with torch.random.fork_rng(devices=[]):
                stream = iter(self._batches)
            return _numbered(stream, device, _promised(self._batches))
        if chunks is None:
            chunks = [
                self.indices[start : start + self.batch_size]
                for start in range(0, len(self.indices), self.batch_size)
            ]
        read = zip(chunks, iter(self._read(chunks)), strict=True)
        return (_samples(_as_index(chunk), batch, device) for chunk, batch in read)

    def samples(
        self, indices: list[int], device: torch.device, check: Check | None = None
    ) -> Samples:
        """Give single samples by their numbers; map-style data only."""
        return _samples(_as_index(indices), self.fetch(indices), device, check)

    def _read(self, chunks: list[list[int]]) -> Iterable[Any]:
        workers = 0 if self._loader is None else self._loader.num_workers
        if workers == 0:
            return map(self.fetch, chunks)
        assert self._loader is not None
        return DataLoader(
            self._dataset,
            batch_sampler=chunks,
            collate_fn=self.collate,
            num_workers=workers,
            pin_memory=self._loader.pin_memory,
            worker_init_fn=self._loader.worker_init_fn,
            timeout=self._loader.timeout,
            multiprocessing_context=self._loader.multiprocessing_context,
            # Without one of its own, a loader takes a number from the global generator.
            generator=torch.Generator(),
        )

    def fetch(self, indices: list[int]) -> Any:
        """Read samples by their indices, as one batch that is not unpacked."""
        dataset = self._dataset
        if type(dataset) is TensorDataset and self.collate is default_collate:
            # Known to mean the same as sample by sample.
            index = _as_index(indices)
            return tuple(_chosen(values, index) for values in dataset.tensors)
        if hasattr(dataset, "__getitems__"):
            return self.collate(dataset.__getitems__(indices))
        return self.collate([dataset[i] for i in indices])


def _as_index(indices: list[int]) -> Tensor:
    return torch.from_numpy(np.array(indices, dtype=np.int64))  # a tenth of torch.tensor's time


def _chosen(values: Tensor, index: Tensor) -> Tensor:
    # A sixth of the time of indexing, which the devices may differ in.
    return values.index_select(0, index) if values.device.type == "cpu" else values[index]


def prefetched(items: Iterable[T]) -> Iterator[T]:
    """Read the next item in a thread while this one is in use."""
    iterator = iter(items)
    with ThreadPoolExecutor(1) as reader:
        following = reader.submit(next, iterator, None)
        while (item := following.result()) is not None:
            following = reader.submit(next, iterator, None)
            yield item


def _samples(
    index: Tensor, batch: object, device: torch.device, check: Check | None = None
) -> Samples:
    inputs, labels = unpack(batch)
    if inputs.shape[:1] != index.shape:
        checks.fail(
            "data", tuple(inputs.shape), f"a batch of {len(index)} came back so; collate_fn?"
        )
    if check is not None:
        check(inputs, labels)
    # TargetedDataset the CPU a copy that does not wait is read before it is there.
    away = device.type != "cpu"
    return Samples(
        index.to(device),
        inputs.to(device, non_blocking=away),
        labels.to(device, non_blocking=away),
        entries_of(batch),
    )


def _numbered(
    batches: Iterable[Any], device: torch.device, promised: int | None
) -> Iterator[Samples]:
    place = 0
    for batch in batches:
        inputs, _ = unpack(batch)
        yield _samples(torch.arange(place, place + len(inputs), device="cpu"), batch, device)
        place += len(inputs)
        if promised is not None and place > promised:
            checks.warn(
                f"the stream gives more samples than its length of {promised}: it repeats some, or "
                "its length is wrong. Each worker process of a loader reads an IterableDataset "
                "from its beginning: divide it by torch.utils.data.get_worker_info()",
                topic="length",
            )
            promised = None
    if place == 0:
        checks.fail("data", type(batches).__name__, "it gave no samples")
    if promised is not None and place < promised:
        says = f"the stream gave {place} samples, and its length is {promised}"
        checks.warn(f"{says}: was some of it read before?", topic="length")


def _promised(batches: Any) -> int | None:
    """Samples that a loader of a stream should give; None where that is not known."""
    if not isinstance(batches, DataLoader) or batches.batch_size is None:
        return None
    # Of several ranks each may have a part; workers may each drop a last batch.
    divided = batches.drop_last or (dist.is_available() and dist.is_initialized())
    return None if divided else len(batches.dataset)  # type: ignore[arg-type]


def is_stream(data: object) -> bool:
    """Whether data come as batches, whose samples cannot be read by index."""
    if isinstance(data, DataLoader):
        return isinstance(data.dataset, IterableDataset) or data.batch_sampler is None
    if isinstance(data, (list, tuple)):
        if len(data) == 2 and isinstance(data[0], Tensor):
            shapes = [tuple(getattr(part, "shape", ())) for part in data]
            raise TypeError(
                f"data: a pair of tensors of shapes {shapes}; expected inputs (N, ...) and labels "
                "(N,), or a list of batches"
            )
        return True
    if isinstance(data, Mapping):
        raise TypeError(
            f"data: a mapping with the keys {sorted(map(str, data))}; pass one of its datasets, "
            "data['train'], or its tensors as a pair, (inputs, labels)"
        )
    if isinstance(data, (str, os.PathLike)):
        raise TypeError(
            f"data: a path, {data!r}; load it, for example with ImageFolder of torchvision"
        )
    if isinstance(data, IterableDataset):
        raise TypeError("data: an IterableDataset gives single samples; wrap it in a DataLoader")
    if isinstance(data, Dataset) or (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        return False
    hint = "; an iterator ends after one pass, pass the loader" if hasattr(data, "__next__") else ""
    kind = type(data).__name__
    raise TypeError(
        f"data: expected a Dataset, a DataLoader or a list of batches, got {kind}{hint}"
    )


def check_length(data: object) -> None:
    """Raise an error for a loader that has no length, or no batches."""
    try:
        empty = isinstance(data, Sized) and len(data) == 0
    except TypeError as error:
        raise TypeError(
            "data: the loader has no length and may never end; give its dataset a __len__, or pass "
            "list(itertools.islice(loader, batches))"
        ) from error
    if empty:
        checks.fail("data", type(data).__name__, "it has no batches")


def _sample_numbers(dataset: Any, loader: DataLoader[Any] | None) -> list[int]:
    """Samples of the dataset that a loader covers, in the dataset's order where it shuffles."""
    try:
        count = len(dataset)
    except TypeError as error:
        raise TypeError(f"data: {type(dataset).__name__} has no length (__len__)") from error
    if loader is None:
        return list(range(count))
    batch_sampler: Any = loader.batch_sampler
    if type(batch_sampler) is not BatchSampler:
        samples = itertools.chain.from_iterable(batch_sampler)
        return _bounded(samples, count, type(batch_sampler).__name__)
    sampler: Any = batch_sampler.sampler
    name = type(sampler).__name__
    if isinstance(sampler, SequentialSampler):
        return list(range(count))
    if isinstance(sampler, RandomSampler):
        if sampler.replacement or len(sampler) != count:
            checks.fail("data", name, "drawing other samples each time; pass the dataset itself")
        return list(range(count))
    if isinstance(sampler, SubsetRandomSampler):
        return _bounded(sampler.indices, count, name)
    if isinstance(sampler, DistributedSampler):
        return list(range(sampler.rank, count, sampler.num_replicas))
    return _bounded(sampler, count, name)


def _is_sharded(loader: DataLoader[Any] | None) -> bool:
    """Whether a loader has a part of the samples, which is empty where there are more ranks."""
    return loader is not None and isinstance(loader.sampler, DistributedSampler)


def _bounded(sampler: Iterable[int], count: int, name: str) -> list[int]:
    """Sorted sample numbers of a user's own sampler, which must end and give each sample once."""
    # It may draw from the global generator, which is put back.
    with torch.random.fork_rng(devices=[]):
        numbers = [int(i) for i in itertools.islice(sampler, count + 1)]
    if len(numbers) > count or len(set(numbers)) != len(numbers):
        checks.fail("data", name, "this sampler repeats samples or never ends; pass the dataset")
    return sorted(numbers)
