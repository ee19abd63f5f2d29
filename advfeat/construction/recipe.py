"""How a dataset is built, and what is particular to it."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from advfeat import checks, distributed, seeding
from advfeat.attacks import Attack, Batch
from advfeat.datasets.dataset import DTYPES, Dtype
from advfeat.datasets.folder import read_manifest
from advfeat.durable import Folder, as_path
from advfeat.model import Layer, Network, Precision, Purpose

# In the name of a folder it stands for the rank.
_RANK = "{rank}"
# A sample's id is its index in the data, and above these bits the number of its start: each start
# has random numbers of its own, and the first one those of a dataset with a single start.
_START_SHIFT = 40

Index = TypeVar("Index", int, Tensor)


def sample_id(index: Index, start: int) -> Index:
    """The id of a constructed sample, or ids of several."""
    return index | start << _START_SHIFT


def source_index(ids: Tensor) -> Tensor:
    """The indices in the data of samples with these ids."""
    return ids & ((1 << _START_SHIFT) - 1)


def start_number(ids: Tensor) -> Tensor:
    """The numbers of the starts of samples with these ids."""
    return ids >> _START_SHIFT


@dataclass(frozen=True)
class BuildOptions:
    """How a dataset is made, whichever it is."""

    batch_size: int | None
    precision: Precision
    progress: bool | None
    out: Folder | None
    dtype: Dtype
    compile: bool = False
    expectation: int = 1

    def __post_init__(self) -> None:
        """Check the settings."""
        checks.one_of("dtype", self.dtype, DTYPES)
        if not (self.out is None or isinstance(self.out, (str, os.PathLike))):
            raise TypeError(f"out={self.out!r}: expected the name of a folder")

    @property
    def has_own_folder(self) -> bool:
        """Whether each rank has a folder of its own."""
        return self.out is not None and _RANK in os.fspath(self.out)

    @property
    def folder(self) -> Path | None:
        """Where this rank's samples go."""
        if self.out is None:
            return None
        rank = distributed.current_process().rank if self.has_own_folder else 0
        return as_path(os.fspath(self.out).replace(_RANK, str(rank)))

    def seed(self, seed: int | torch.Generator | None) -> int:
        """The seed to use: that of the dataset begun in ``out``, unless another is given."""
        drawn = seeding.resolve(seed)
        if seed is not None or self.folder is None:
            return drawn
        manifest = read_manifest(self.folder)
        if manifest is not None:
            drawn = manifest.get("settings", {}).get("seed", drawn)
        return distributed.current_process().broadcast_int(drawn)


class DatasetRecipe(ABC):
    """What is particular to a dataset."""

    method: str
    attack: Attack
    layer: Layer = None
    starts: int = 1  # constructed samples for each sample of the data
    straight_through: bool = False
    purpose: Purpose = "attack"

    @abstractmethod
    def settings(self, model: nn.Module) -> dict[str, Any]:
        """What goes into the manifest beside the attack's own settings."""

    def companions(self, ids: list[int]) -> list[int]:
        """The samples that are to be read along with these: one for each, or none at all."""
        return []

    def given_starts(self, ids: list[int]) -> Tensor | None:
        """Starts that come from the user, one for each sample."""
        return None

    def provenance(self, net: Network, batch: Batch) -> dict[str, Any]:
        """What is found out about the model, for the manifest."""
        return {}

    @abstractmethod
    def begin(self, net: Network, batch: Batch) -> Batch:
        """Give the batch to attack: targets for labels, or another start.

        The start that comes in is the user's, or the companions' inputs, where there are any.
        """

    @abstractmethod
    def describe(
        self, net: Network, batch: Batch, attacked: Batch, images: Tensor
    ) -> dict[str, Tensor]:
        """Fields to keep beside the images, ``labels`` among them, measured in float32.

        Of the model, the samples as they came, the batch as it was attacked, and the very images
        that are kept.
        """
