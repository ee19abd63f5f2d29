"""Samplers of constructed datasets."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

from advfeat import checks
from advfeat.datasets.dataset import ConstructedDataset

__all__ = ["StartSampler"]


class StartSampler(Sampler[int]):
    """Draw one sample for each image of the data and epoch, from a random one of its starts.

    An epoch is then as long as one of the dataset with a single start, so that datasets with
    different ``starts`` are compared at equal numbers of steps.

    Parameters
    ----------
    dataset
        A dataset constructed with ``starts``; of one start, the sampler shuffles.
    generator
        Of the order and the starts; by default torch's default generator.

    Raises
    ------
    ValueError
        The dataset does not record the ``index`` of its samples.

    Examples
    --------
    >>> import torch
    >>> import advfeat as af
    >>> data = torch.utils.data.TensorDataset(torch.rand(8, 6), torch.arange(8) % 3)
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
    >>> d_r = af.construct_robust_dataset(model, data, starts=3, steps=5, seed=0)
    >>> len(d_r), len(StartSampler(d_r))
    (24, 8)
    >>> loader = torch.utils.data.DataLoader(d_r, batch_size=4, sampler=StartSampler(d_r))
    """

    def __init__(
        self, dataset: ConstructedDataset, generator: torch.Generator | None = None
    ) -> None:
        if "index" not in dataset.fields:
            checks.fail("dataset", repr(dataset), "it does not record the index of its samples")
        index = dataset.field("index")
        # Positions in the dataset, grouped by image; where each group begins, and its length.
        self._positions = index.argsort(stable=True)
        self._counts = torch.from_numpy(np.unique(index.numpy(), return_counts=True)[1])
        self._first = self._counts.cumsum(0) - self._counts
        self.generator = generator

    def __len__(self) -> int:
        """Number of images."""
        return len(self._counts)

    def __iter__(self) -> Iterator[int]:
        """Positions in the dataset, one for each image, in random order."""
        uniform = torch.rand(len(self), generator=self.generator, dtype=torch.float64)
        chosen = self._first + (uniform * self._counts).long()
        order = torch.randperm(len(self), generator=self.generator)
        yield from self._positions[chosen[order]].tolist()
