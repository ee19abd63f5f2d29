"""Epochs of batches to train on: from a loader as it is, or from a dataset that is shuffled."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from advfeat import checks, seeding
from advfeat.datasets import ConstructedDataset
from advfeat.distributed import Process
from advfeat.loading import (
    Data,
    Source,
    check_length,
    is_stream,
    prefetched,
)
from advfeat.model import Extras
from advfeat.training._batch_checks import BatchChecks
from advfeat.unpacking import entries_of, unpack

# Where a batch may hold the weight of each sample.
Field = str | int
# Of the entries of a batch, and its inputs, those that the model's forward takes.
ChooseExtras = Callable[[Mapping[str, Any], Tensor], Extras | None]


class TrainBatch(NamedTuple):
    """What one rank has of a batch to train on."""

    ids: Tensor  # (N,) int64: the sample's index in the dataset, or its place in a stream
    inputs: Tensor  # (N, ...)
    labels: Tensor  # (N,) int64; of soft labels the likeliest class
    place: Tensor  # (N,) int64, on the CPU: where each sample stands in the batch of all ranks
    total: int  # samples of that batch
    targets: Tensor | None = None  # (N, C) class probabilities, where labels are soft
    weights: Tensor | None = None  # (N,) of the samples in the loss
    extras: Extras | None = None  # further arguments of forward, (N, ...) each
    idle: bool = False  # repeats samples of another rank, and counts for nothing

    def parts(self, count: int, whole: int) -> list[TrainBatch]:
        """Split into parts no longer than those of ``whole`` samples in ``count`` parts.

        So few samples that are left over stay together: BatchNorm cannot train on a single one.
        """
        pieces = -(-len(self.ids) // -(-whole // count))
        if pieces == 1:
            return [self]
        fields = [
            torch.tensor_split(field, pieces) if isinstance(field, Tensor) else [field] * pieces
            for field in self
        ]
        extras = {n: torch.tensor_split(v, pieces) for n, v in (self.extras or {}).items()}
        return [
            TrainBatch(*values)._replace(extras={n: v[place] for n, v in extras.items()} or None)
            for place, values in enumerate(zip(*fields, strict=True))
        ]


class BatchReader:
    """Reads epochs of batches for one rank.

    Of a dataset every rank has a part of the same batches that one rank would have; a loader gives
    the rank's own samples. A single sample that is left over is left out: BatchNorm cannot train
    on it. Values are checked where they come from, before they are moved: on the CPU that needs
    no waiting for the device.
    """

    def __init__(
        self,
        data: Data,
        *,
        batch_size: int | None,
        seed: int,
        device: torch.device,
        process: Process,
        checked: BatchChecks,
        weight_field: Field | None,
        choose_extras: ChooseExtras = lambda entries, inputs: None,
    ) -> None:
        self._data, self._seed, self._device, self._process = data, seed, device, process
        self._checked, self._weight_field = checked, weight_field
        self._choose_extras = choose_extras
        self._is_loader = isinstance(data, DataLoader) or is_stream(data)
        if not self._is_loader:
            self._source = Source(data, batch_size)
            self._size = min(batch_size or 128, len(self._source))
            # Unknown until an epoch was read in this thread.
            self._draws: bool | None = _draws_random_numbers(data)

    def epoch(self, epoch: int) -> Iterator[TrainBatch]:
        """Give the batches of an epoch, counted from 1."""
        return self._from_loader(epoch) if self._is_loader else self._from_dataset(epoch)

    def _from_loader(self, epoch: int) -> Iterator[TrainBatch]:
        data: Any = self._data
        check_length(data)
        set_epoch(data, epoch)
        ranks, largest, place = self._process.world_size, 0, 0
        for number, raw in enumerate(data, 1):
            inputs, labels = unpack(raw)
            count = len(inputs)
            names = partial(_in_batch, number)
            batch = self._batch(raw, inputs, labels, torch.arange(place, place + count), names)
            place, largest = place + count, max(largest, count)
            if count > 1 or largest == 1:
                places = self._process.rank + ranks * torch.arange(count)
                yield batch._replace(place=places, total=count * ranks)
        if place == 0:
            checks.fail("data", type(data).__name__, "it gave no batches")

    def _from_dataset(self, epoch: int) -> Iterator[TrainBatch]:
        order = torch.randperm(len(self._source), generator=seeding.generator(self._seed, epoch))
        batches = self._read(torch.split(order, self._size))
        if self._draws is False and not self._is_in_memory():
            # Random numbers of the dataset would mix with those of the model.
            batches = prefetched(batches)
        yield from batches
        if self._draws is None:
            self._draws = False

    def _read(self, chunks: Iterable[Tensor]) -> Iterator[TrainBatch]:
        rank, ranks = self._process
        for chunk in chunks:
            count = len(chunk)
            if count == 1 and not (self._size == 1 and ranks == 1):
                continue
            # BatchNorm needs two samples on each rank. Ranks that would have fewer repeat some of
            # the batch, which counts for nothing.
            active = min(ranks, max(1, count // 2))
            own = torch.arange(rank if rank < active else 0, count, active)
            chosen = chunk[own]
            raw = self._fetch(chosen.tolist())
            batch = self._batch(raw, *unpack(raw), chosen, self._names)
            if rank >= active:
                batch = batch._replace(idle=True)
            yield batch._replace(place=own, total=count)

    def _fetch(self, indices: list[int]) -> Any:
        if self._draws is not None:
            return self._source.fetch(indices)
        before = _global_states()
        raw = self._source.fetch(indices)
        if _global_states() != before:
            self._draws = True
        return raw

    def _batch(
        self,
        raw: Any,
        inputs: Tensor,
        labels: Tensor,
        ids: Tensor,
        names: Callable[[int, int], str],
    ) -> TrainBatch:
        if inputs.shape[:1] != ids.shape:
            checks.fail("data", tuple(inputs.shape), f"a batch of {len(ids)}; collate_fn?")
        self._checked.batch(inputs, labels, ids, names)
        weights = None if self._weight_field is None else self._weights(raw, inputs, ids, names)
        targets = None
        if labels.is_floating_point():
            targets = self._moved(labels.to(torch.get_default_dtype()))
            labels = labels.argmax(1)
        inputs = self._moved(inputs)
        return TrainBatch(
            ids.to(self._device),
            inputs,
            self._moved(labels).to(torch.int64),
            ids,
            len(ids),
            targets,
            weights,
            self._choose_extras(entries_of(raw), inputs),
        )

    def _weights(
        self, raw: Any, inputs: Tensor, ids: Tensor, names: Callable[[int, int], str]
    ) -> Tensor:
        field: Any = self._weight_field
        try:
            weights: Any = raw[field]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"sample_weight={field!r}: no such field in a batch of the data"
            ) from error
        if not isinstance(weights, Tensor) or weights.shape != inputs.shape[:1]:
            shape = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            checks.fail("sample_weight", shape, f"expected one weight a sample, ({len(inputs)},)")
        weights = weights.to(torch.get_default_dtype())
        wrong = ~(weights.isfinite() & (weights >= 0))
        for position in wrong.nonzero().flatten()[:1].tolist():
            name = f"sample_weight{names(int(ids[position]), position)}"
            checks.fail(name, float(weights[position]), "expected finite numbers of at least 0")
        return self._moved(weights)

    def _moved(self, tensor: Tensor) -> Tensor:
        # Towards the CPU a copy that does not wait is read before it is there.
        return tensor.to(self._device, non_blocking=self._device.type != "cpu")

    def _names(self, sample: int, _: int) -> str:
        return sample_name(self._data, sample)

    def _is_in_memory(self) -> bool:
        return type(_innermost(self._data)) is TensorDataset and self._device.type == "cpu"


def split(data: Data, fraction: float, seed: int) -> tuple[Data, Data]:
    """Split a fraction of a dataset off, at random by the seed; return the rest and that part."""
    if isinstance(data, DataLoader) or is_stream(data):
        checks.fail(
            "validation", fraction, "only a dataset can be split; pass the loader's dataset as data"
        )
    count = len(Source(data))
    held = round(fraction * count)
    if not 0 < held < count:
        checks.fail("validation", fraction, f"leaves {held} of {count} samples to measure on")
    order = torch.randperm(count, generator=seeding.generator(seed)).tolist()
    rest, apart = sorted(order[held:]), sorted(order[:held])
    return Subset(data, rest), Subset(data, apart)  # type: ignore[arg-type]


def _in_batch(number: int, _: int, position: int) -> str:
    """Name a sample of a loader, whose index only its sampler knows."""
    return f" (batch {number})[{position}]"


def sample_name(data: Any, sample: int) -> str:
    """Name a sample of a dataset by its index there, also of a part that was split off."""
    while isinstance(data, Subset):
        data, sample = data.dataset, int(data.indices[sample])
    return f"[{sample}]"


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell samplers that shuffle by epoch which one it is."""
    samplers: list[Any] = [getattr(loader, name, None) for name in ("sampler", "batch_sampler")]
    samplers.append(getattr(samplers[1], "sampler", None))
    for sampler in {id(s): s for s in samplers}.values():
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)


def _innermost(data: Any) -> Any:
    while isinstance(data, Subset):
        data = data.dataset
    return data


def _draws_random_numbers(data: Any) -> bool | None:
    """Whether reading a dataset draws from the global generators; None where that is unknown."""
    known = (TensorDataset, ConstructedDataset)
    return False if type(_innermost(data)) in known else None


def _global_states() -> tuple[bytes, object, bytes]:
    numpy: Any = np.random.get_state()  # noqa: NPY002 - what users draw from
    keys, *rest = numpy[1:]
    return (
        torch.get_rng_state().numpy().tobytes(),
        random.getstate(),
        np.asarray(keys).tobytes() + repr(rest).encode(),
    )
