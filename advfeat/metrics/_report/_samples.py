"""The samples of a report: drawn at random, so that the first of them stand for all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from advfeat import checks, seeding
from advfeat.loading import Data, Source
from advfeat.unpacking import unpack


class Drawn:
    """Samples of any data in random order, read in parts.

    Parameters
    ----------
    data
        As in `advfeat.robust_accuracy`.
    most
        How many samples to draw at most; None is all.
    batch_size
        Samples to a batch; by default the loader's own; for a dataset 128, up to
        1024 on a GPU.
    seed
        Of the order.
    """

    def __init__(self, data: Data, most: int | None, batch_size: int | None, seed: int) -> None:
        source = Source(data, batch_size)
        self._collate: Any = default_collate
        self.batch_size = source.batch_size if batch_size is None else batch_size
        if source.is_stream:
            self._dataset: Any = _listed(source, most)
            numbers = list(range(len(self._dataset)))
            self.available: int | None = None
        else:
            self._dataset, numbers = source.dataset, source.indices
            self._collate = source.collate
            self.available = len(numbers)
        order = torch.randperm(len(numbers), generator=seeding.generator(seed)).tolist()
        self.numbers = [numbers[place] for place in order][:most]

    def __len__(self) -> int:
        """Samples drawn."""
        return len(self.numbers)

    def part(self, start: int, stop: int) -> DataLoader[Any]:
        """Some of the samples, by their places in the random order; numbered as in the dataset."""
        chosen: Any = self.numbers[start:stop]
        size = max(1, min(self.batch_size, len(chosen)))
        return DataLoader(self._dataset, batch_size=size, sampler=chosen, collate_fn=self._collate)

    def inputs_of(self, numbers: list[int]) -> dict[int, Tensor]:
        """Inputs of some of the samples, by their numbers."""
        chosen: Any = list(numbers)
        loader = DataLoader(
            self._dataset, batch_size=len(chosen), sampler=chosen, collate_fn=self._collate
        )
        (batch,) = Source(loader).batches(torch.device("cpu"))
        return dict(zip(batch.ids.tolist(), batch.inputs, strict=True))

    def labels(self, stop: int) -> dict[int, int]:
        """Label of each of the first samples, by its number."""
        found: dict[int, int] = {}
        for batch in Source(self.part(0, stop)).batches(torch.device("cpu")):
            found |= dict(zip(batch.ids.tolist(), batch.labels.tolist(), strict=True))
        return found


def _listed(source: Source, most: int | None) -> list[Any]:
    """Single samples of batches, all that they carry with them."""
    samples: list[Any] = []
    for batch in source.raw_batches():
        count = len(unpack(batch)[1])
        for place in range(count):
            if isinstance(batch, Mapping):
                samples.append({name: _one(each, place, count) for name, each in batch.items()})
            else:
                samples.append(tuple(_one(each, place, count) for each in batch))
        if most is not None and len(samples) >= most:
            break
    if not samples:
        checks.fail("data", 0, "it has no samples")
    return samples


def _one(field: Any, place: int, count: int) -> Any:
    has_samples = hasattr(field, "__len__") and len(field) == count and not isinstance(field, str)
    return field[place] if has_samples else field
