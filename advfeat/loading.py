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

Data: TypeAlias = "Dataset[Any] | DataLoader[Any] | Sequence[Any]"
T = TypeVar("T")

_INPUT_KEYS = (
    *("inputs", "input", "images", "image", "pixel_values", "img", "x", "data"),
    *("inputs_embeds", "input_values", "input_features"),
)
# Types that hardly any operation of torch takes.
_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
_LABEL_KEYS = ("labels", "label", "targets", "target", "y", "fine_label")


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
            return _numbered(stream, device)
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


def unpack(batch: object) -> tuple[Tensor, Tensor]:
    """Find inputs and labels in a batch: a tuple with any extra items, or a mapping."""
    if isinstance(batch, Mapping):
        inputs, labels = (
            next((batch[key] for key in keys if key in batch), None)
            for keys in (_INPUT_KEYS, _LABEL_KEYS)
        )
        if inputs is None or labels is None:
            checks.fail(
                "batch keys",
                sorted(map(str, batch)),
                f"expected one of {_INPUT_KEYS} and one of {_LABEL_KEYS}",
            )
    elif isinstance(batch, (tuple, list)) and len(batch) >= 2:
        inputs, labels = batch[0], batch[1]
    else:
        kind = type(batch).__name__
        if isinstance(batch, (tuple, list)):
            kind += f" of {len(batch)}, without labels"
        raise TypeError(f"data: a batch is a {kind}; expected (inputs, labels, ...) or a mapping")
    inputs, labels = _as_tensor(inputs), _as_tensor(labels)
    if isinstance(labels, Tensor) and labels.dtype in _UNSIGNED:
        labels = labels.to(torch.int64)
    if isinstance(inputs, Tensor) and isinstance(labels, Tensor):
        return inputs, labels
    raise TypeError(_no_tensors(inputs, labels))


def entries_of(batch: object) -> dict[str, Any]:
    """Entries of a mapping but the labels, which a model may take by name; the inputs as None."""
    if not isinstance(batch, Mapping):
        return {}
    own = next(key for key in _INPUT_KEYS if key in batch)
    others = {k: v for k, v in batch.items() if isinstance(k, str) and k not in _LABEL_KEYS}
    return others | {own: None}


def _as_tensor(value: Any) -> Any:
    """A NumPy array as a tensor, anything else as it is."""
    numeric = isinstance(value, np.ndarray) and value.dtype.kind in "fiub"
    return torch.from_numpy(value) if numeric else value


def as_dataset(data: Any) -> Any:
    """A pair of tensors or arrays, inputs and labels, as a dataset; other data as they are."""
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        return data
    inputs, labels = map(_as_tensor, data)
    is_pair = isinstance(inputs, Tensor) and isinstance(labels, Tensor)
    if not is_pair or labels.ndim != 1 or inputs.shape[:1] != labels.shape:
        return data
    return TensorDataset(inputs, labels)


def _no_tensors(inputs: object, labels: object) -> str:
    """What is wrong with a batch whose inputs or labels are no tensors, and what to do."""
    name, value = ("labels", labels) if isinstance(inputs, Tensor) else ("inputs", inputs)
    found = f"data: {name} of a batch are {type(value).__name__}; expected a tensor. "
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    if name == "labels" and isinstance(first, str):
        return found + "Number the classes: classes.index(label), with classes = sorted(names)"
    if isinstance(first, (int, np.integer)) and not isinstance(value, (list, tuple)):
        return found + (
            "A list of samples? It is read as a list of batches: wrap it in a loader, "
            "DataLoader(samples, batch_size=128)"
        )
    if name == "labels":
        return found + "Have the dataset return an integer, or collate_fn a tensor"
    return found + "For images, add a transform that makes tensors"


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
    batches: Iterable[Any], device: torch.device, check: Check | None = None
) -> Iterator[Samples]:
    place = 0
    for batch in batches:
        inputs, _ = unpack(batch)
        yield _samples(torch.arange(place, place + len(inputs), device="cpu"), batch, device, check)
        place += len(inputs)
    if place == 0:
        checks.fail("data", type(batches).__name__, "it gave no samples")


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
