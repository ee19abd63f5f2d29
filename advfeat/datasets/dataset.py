"""Constructed datasets, in memory or memory-mapped from a folder."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import Self

from advfeat import checks
from advfeat.datasets.arrays import ConcatArray, dequantize, portable, restored
from advfeat.datasets.folder import (
    DONE,
    MANIFEST,
    Array,
    check_field_name,
    complete_manifest,
    open_fields,
    read_done,
    read_manifest,
    write_manifest,
)
from advfeat.datasets.hub import from_hub, to_hub
from advfeat.datasets.source import check_source
from advfeat.durable import Folder, as_path, whole_folder
from advfeat.loading import Data, Source
from advfeat.threat import Bounds

DTYPES = ("float32", "uint8")


_REQUIRED = ("images", "labels")


Dtype: TypeAlias = Literal["float32", "uint8"]
D = TypeVar("D", bound="ConstructedDataset")


class ConstructedDataset(Dataset[tuple[Tensor, int]]):
    """Images and labels made from a model and data, with what is known of each sample.

    A dataset of ``(image, label)`` that goes straight into a DataLoader. A slice or a list of
    positions gives a batch, ``(images, labels)``, as of a TensorDataset. A subclass that overrides
    ``__getitem__`` is read through it by loaders, ``Subset`` and everything in this package. Opened
    from a folder, it is pickled by the names of its files, so a worker of a loader gets no copy.

    Parameters
    ----------
    fields
        Arrays with one entry for each sample, by names that are Python identifiers. ``images``
        (float32, or uint8 levels of the bounds) and ``labels`` (int64) are always there; ``index``
        (the position in the source data), ``source_labels``, ``success``, ``size`` (norm of the
        perturbation), ``distance`` and others as the construction has them.
    manifest
        Provenance as plain JSON values: method, settings, seed, model, data, versions.

    Raises
    ------
    ValueError, TypeError
        If images or labels are missing, fields differ in length, a name cannot be that of a file,
        or labels are not integers.

    Examples
    --------
    >>> import numpy as np
    >>> made = ConstructedDataset(
    ...     {"images": np.zeros((2, 1, 4, 4), np.float32), "labels": np.array([3, 5])}
    ... )
    >>> image, label = made[1]
    >>> image.shape, label
    (torch.Size([1, 4, 4]), 5)
    >>> images, labels = made[:2]
    >>> images.shape, labels
    (torch.Size([2, 1, 4, 4]), tensor([3, 5]))
    """

    def __init__(
        self, fields: Mapping[str, Array | Tensor], manifest: Mapping[str, Any] | None = None
    ) -> None:
        missing = [name for name in _REQUIRED if name not in fields]
        if missing:
            checks.fail("fields", sorted(fields), f"{' and '.join(missing)} must be among them")
        for name in fields:
            check_field_name(name)
        lengths = {name: len(array) for name, array in fields.items()}
        if len(set(lengths.values())) != 1:
            checks.fail("fields", lengths, "every field has one entry for each sample")
        self.fields = {
            name: array.detach().cpu().numpy() if isinstance(array, Tensor) else array
            for name, array in fields.items()
        }
        labels = self.fields["labels"]
        if len(labels.shape) != 1 or np.dtype(labels.dtype).kind not in "iu":
            kind = f"{labels.dtype} of shape {tuple(labels.shape)}"
            raise TypeError(f"fields['labels']: expected integers (N,), got {kind}")
        self.manifest = dict(manifest or {})

    @property
    def images(self) -> Tensor:
        """All images as one floating tensor ``(N, ...)``; a copy where they are memory-mapped."""
        return self._pixels(self.fields["images"])

    @property
    def labels(self) -> Tensor:
        """All labels, int64 ``(N,)``."""
        return _tensor(self.fields["labels"])

    @property
    def bounds(self) -> Bounds:
        """The valid range ``(low, high)`` of the images."""
        low, high = self.manifest.get("settings", {}).get("bounds", (0.0, 1.0))
        return low, high

    def field(self, name: str) -> Tensor:
        """Return a field as it is stored, as a tensor; see ``fields`` for what there is."""
        if name not in self.fields:
            checks.fail("name", name, f"this dataset has {sorted(self.fields)}")
        return _tensor(self.fields[name])

    def subset(self, indices: Sequence[int] | slice | Array | Tensor) -> Self:
        """Return some of the samples, all fields of them, as a dataset in memory.

        Parameters
        ----------
        indices
            Positions (from the end where negative), a slice (of a memory-mapped dataset it stays on
            disk), or a mask: bool ``(N,)``, as in ``made.subset(made.field("success"))``.

        Returns
        -------
        ConstructedDataset
            Of the same class, with the same manifest.

        Raises
        ------
        IndexError
            There is no sample at a position.
        ValueError, TypeError
            If these are no positions, or a mask of another length.

        Examples
        --------
        >>> import numpy as np
        >>> made = ConstructedDataset({"images": np.zeros((3, 4), "f4"), "labels": np.arange(3)})
        >>> made.subset([0, -1]).labels
        tensor([0, 2])
        """
        chosen = indices if isinstance(indices, slice) else self._positions(indices)
        part = copy.copy(self)
        part.fields = {name: array[chosen] for name, array in self.fields.items()}
        part.manifest = dict(self.manifest)
        return part

    def pairs(self, data: Data) -> Dataset[tuple[Tensor, Tensor]]:
        """Give the dataset of ``(source image, image)``, sample by sample.

        Parameters
        ----------
        data
            What this dataset was constructed from: a map-style dataset, or a loader of one. Its
            size and up to 256 samples are compared with what the manifest records.

        Returns
        -------
        Dataset
            As long as this one.

        Raises
        ------
        ValueError
            If the data are others (of another size, augmented, in another order), or a sample read
            from them has another label than it had when the dataset was made.

        Examples
        --------
        >>> import torch
        >>> import advfeat as af
        >>> data = torch.utils.data.TensorDataset(torch.eye(3), torch.arange(3))
        >>> made = af.construct_det_dataset(torch.nn.Identity(), data, eps=0.1, steps=2)
        >>> source, image = made.pairs(data)[1]
        >>> bool(((image - source).norm() <= 0.1 + 1e-6))
        True
        """
        return _Pairs(self, Source(data))

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.fields["labels"])

    def __getitem__(self, index: Any) -> tuple[Tensor, Any]:
        """Image and label at a position; of a slice or several positions, images and labels."""
        if isinstance(index, slice):
            return self._batch(index)
        try:
            place = operator.index(index)
        except TypeError:
            return self._batch(self._positions(index))
        if not -len(self) <= place < len(self):
            raise IndexError(f"index={place}: the dataset has {len(self)} samples")
        image = self._pixels(np.array(self.fields["images"][place]))
        return image, int(self.fields["labels"][place])

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """Several samples at once, as a DataLoader asks for them."""
        if type(self).__getitem__ is not ConstructedDataset.__getitem__:
            return [self[index] for index in indices]  # a subclass has a say
        images, labels = self._batch(np.asarray(indices, np.int64))
        return list(zip(images, labels.tolist(), strict=True))

    def __repr__(self) -> str:
        """Method, size and fields."""
        shape = "x".join(map(str, self.fields["images"].shape[1:]))
        method = self.manifest.get("method", "unknown")
        return f"ConstructedDataset({method}: {len(self)} of {shape}; {', '.join(self.fields)})"

    def __getstate__(self) -> dict[str, Any]:
        """Memory-mapped fields by the names of their files."""
        fields = {name: portable(array) for name, array in self.fields.items()}
        return {**self.__dict__, "fields": fields}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Map them again."""
        fields = {name: restored(array) for name, array in state["fields"].items()}
        self.__dict__.update(state, fields=fields)

    def _batch(self, chosen: slice | Array) -> tuple[Tensor, Tensor]:
        images, labels = (np.array(self.fields[name][chosen]) for name in _REQUIRED)
        return self._pixels(images), _tensor(labels)

    def _positions(self, indices: Any) -> Array:
        """Check positions or a mask."""
        try:
            chosen = np.asarray(indices)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"indices: expected positions or a mask: {error}") from error
        if chosen.ndim == 1 and not len(chosen):
            chosen = chosen.astype(np.int64)  # an empty list has no type of its own
        if chosen.ndim == 0:
            raise TypeError(
                f"indices={indices!r}: expected several positions, a slice or a mask; for one "
                "sample write dataset[i], or subset([i])"
            )
        if chosen.ndim != 1 or chosen.dtype.kind not in "iub":
            kind = f"{chosen.dtype} of shape {chosen.shape}"
            raise TypeError(f"indices: expected integers or a mask, of one axis; got {kind}")
        if chosen.dtype == np.bool_:
            if len(chosen) != len(self):
                cause = f"a mask needs one entry for each sample, ({len(self)},)"
                checks.fail("indices", chosen.shape, cause)
            return chosen
        outside = chosen[(chosen < -len(self)) | (chosen >= len(self))]
        if len(outside):
            raise IndexError(f"indices: {outside[0]} is outside; there are {len(self)} samples")
        return np.where(chosen < 0, chosen + len(self), chosen)

    def _pixels(self, stored: Array) -> Tensor:
        tensor = _tensor(stored)
        return dequantize(tensor, self.bounds) if tensor.dtype == torch.uint8 else tensor

    def save(self, folder: Folder) -> None:
        """Write a folder: one ``.npy`` for each field and ``manifest.json``.

        Nothing appears under the name until all of it is written.

        Raises
        ------
        FileExistsError
            The folder exists.
        OSError
            Naming the folder, where the disk is full, say; nothing is left there.
        """
        for name in self.fields:
            check_field_name(name)
        done = np.ones(len(self), np.uint8)
        with whole_folder(folder) as partial:
            for name, array in {**self.fields, DONE: done}.items():
                np.save(partial / f"{name}.npy", array, allow_pickle=False)
            write_manifest(partial, complete_manifest(self.manifest, self.fields))

    @classmethod
    def open(cls, folder: Folder) -> Self:
        """Open a finished folder without reading it: fields stay on disk, memory-mapped.

        A folder of folders ``rank-0``, ``rank-1``, ... that ranks made each for itself is opened as
        one dataset, in the order of the source samples.

        Raises
        ------
        FileNotFoundError
            There is no manifest in the folder.
        ValueError
            The folder is of another format or unfinished, or a file in it is not the array it
            should be.
        """
        folder = as_path(folder)
        manifest = read_manifest(folder)
        if manifest is None and (shards := sorted(folder.glob("rank-*"))):
            return _concat_shards([cls.open(shard) for shard in shards], folder)
        if manifest is None:
            raise FileNotFoundError(f"folder={str(folder)!r}: no {MANIFEST}; not a saved dataset")
        finished, count = int(read_done(folder, manifest).sum()), manifest["samples"]
        if finished < count:
            checks.fail(
                "folder",
                str(folder),
                f"unfinished, {finished} of {count} samples; the call that began it, with the same "
                "out, resumes",
            )
        return cls(open_fields(folder, manifest), manifest)

    def to_hf(self) -> Any:
        """Return a ``datasets.Dataset`` of Hugging Face's library (extra ``hf``).

        Columns are ``image`` and ``label`` and the other fields by their names, in their own types:
        nothing is rounded. The manifest, and with it the bounds, is kept; `from_hf` reads it.

        Raises
        ------
        ImportError
            The library is missing.
        """
        return to_hub(self.fields, self.manifest)

    @classmethod
    def from_hf(cls, dataset: Any) -> Self:
        """Read a ``datasets.Dataset``, or a folder that its ``save_to_disk`` wrote, into memory.

        One from `to_hf` comes back as it was. Of any other, the columns of images (of one size, of
        8 bits) and labels are read.

        Raises
        ------
        TypeError, ValueError
            It is a dictionary of splits, has no such columns, or images differ in size.
        FileNotFoundError, ImportError
            There is no such folder, or the library is missing.
        """
        return cls(*from_hub(dataset))


class _Pairs(Dataset[tuple[Tensor, Tensor]]):
    """Source image and image."""

    def __init__(self, made: ConstructedDataset, source: Source) -> None:
        self._made, self._source = made, source
        check_source(made.manifest, source)
        last = int(made.field("index").max())
        if last not in set(source.indices):
            checks.fail("data", len(source), f"it has no sample {last}; is it another dataset?")

    def __len__(self) -> int:
        return len(self._made)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        image, _ = self._made[place]
        index, fields = int(self._made.fields["index"][place]), self._made.fields
        source = self._source.samples([index], torch.device("cpu"))
        label = int(fields.get("source_labels", fields["labels"])[place])
        if int(source.labels[0]) != label:
            checks.fail(
                "data",
                f"label {int(source.labels[0])} at sample {index}",
                f"it was {label} when the dataset was made: other data, or another order",
            )
        return source.inputs[0], image


def _concat_shards(shards: list[D], folder: Path) -> D:
    """Join the datasets that ranks made each for itself."""
    first, *others = (dict(shard.manifest) for shard in shards)
    ranks = sorted(shard.manifest.get("shard", {}).get("rank", -1) for shard in shards)
    size = first.get("shard", {}).get("of")
    if size is None or ranks != list(range(size)):
        checks.fail("folder", str(folder), f"holds the shards of ranks {ranks} of {size}")
    own = ("samples", "shard", "versions")
    alike = {name: value for name, value in first.items() if name not in own}
    for other in others:
        if alike != {name: value for name, value in other.items() if name not in own}:
            checks.fail("folder", str(folder), "the shards in it were not made by the same call")
    keys = [name for name in ("index", "start_number") if name in shards[0].fields]
    order = np.lexsort([np.concatenate([shard.fields[key] for shard in shards]) for key in keys])
    fields: dict[str, Any] = {
        name: ConcatArray([shard.fields[name] for shard in shards], order)
        for name in shards[0].fields
    }
    return type(shards[0])(fields, {**alike, "samples": len(order), "versions": first["versions"]})


def _tensor(array: Array) -> Tensor:
    own = isinstance(array, np.ndarray) and array.flags.writeable and min(array.strides) >= 0
    return torch.from_numpy(array if own else np.array(array, order="C"))
