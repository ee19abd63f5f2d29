"""Constructed datasets, in memory or memory-mapped from a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from advfeat import checks
from advfeat.datasets.folder import (
    DONE,
    MANIFEST,
    Array,
    complete_manifest,
    open_fields,
    read_done,
    read_manifest,
    write_manifest,
)
from advfeat.durable import Folder, whole_folder
from advfeat.loading import Data, Source
from advfeat.threat import Bounds

DTYPES = ("float32", "uint8")


_REQUIRED = ("images", "labels")


Dtype: TypeAlias = Literal["float32", "uint8"]


class ConstructedDataset(Dataset[tuple[Tensor, int]]):
    """Images and labels made from a model and data, with what is known of each row.

    A dataset of ``(image, label)`` that goes straight into a DataLoader.

    Parameters
    ----------
    fields
        Arrays with one row a sample. ``images`` (float32, or uint8 levels of the box) and
        ``labels`` (int64) are always there; ``index`` (the row in the source data),
        ``source_labels``, ``success``, ``size`` (norm of the perturbation), ``distance`` and others
        as the construction has them.
    manifest
        Provenance as plain JSON values: method, settings, seed, model, data, versions.

    Examples
    --------
    >>> import numpy as np
    >>> made = ConstructedDataset(
    ...     {"images": np.zeros((2, 1, 4, 4), np.float32), "labels": np.array([3, 5])}
    ... )
    >>> image, label = made[1]
    >>> image.shape, label
    (torch.Size([1, 4, 4]), 5)
    """

    def __init__(
        self, fields: Mapping[str, Array], manifest: Mapping[str, Any] | None = None
    ) -> None:
        missing = [name for name in _REQUIRED if name not in fields]
        if missing:
            checks.fail("fields", sorted(fields), f"{' and '.join(missing)} must be among them")
        lengths = {name: len(array) for name, array in fields.items()}
        if len(set(lengths.values())) != 1:
            checks.fail("fields", lengths, "every field has one row for each sample")
        self.fields = dict(fields)
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
        """The box ``(low, high)`` of the images."""
        low, high = self.manifest.get("settings", {}).get("bounds", (0.0, 1.0))
        return low, high

    def field(self, name: str) -> Tensor:
        """Return a field as it is stored, as a tensor; see ``fields`` for what there is."""
        if name not in self.fields:
            checks.fail("name", name, f"this dataset has {sorted(self.fields)}")
        return _tensor(self.fields[name])

    def subset(self, rows: Sequence[int] | slice | Array | Tensor) -> ConstructedDataset:
        """Return these rows, all fields of them, as a dataset in memory.

        Parameters
        ----------
        rows
            Row numbers, a slice (of a memory-mapped dataset it stays on disk), or a mask: bool
            ``(N,)``, as in ``made.subset(made.field("success"))``.
        """
        chosen = rows if isinstance(rows, slice) else np.asarray(rows)
        if not isinstance(chosen, slice) and chosen.dtype == np.bool_ and len(chosen) != len(self):
            checks.fail(
                "rows", tuple(chosen.shape), f"a mask needs one entry a row, ({len(self)},)"
            )
        return ConstructedDataset(
            {name: array[chosen] for name, array in self.fields.items()}, self.manifest
        )

    def pairs(self, data: Data) -> Dataset[tuple[Tensor, Tensor]]:
        """Give the dataset of ``(source image, image)``, row by row.

        Parameters
        ----------
        data
            What this set was constructed from: a map-style dataset, or a loader of one.

        Raises
        ------
        ValueError
            If the data has no such row, or a row read from it has another label than it had when
            the set was made.

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
        """Rows."""
        return len(self.fields["labels"])

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        """Image and label of a row."""
        image = self._pixels(np.array(self.fields["images"][row]))
        return image, int(self.fields["labels"][row])

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[Tensor, int]]:
        """Several rows at once, as a DataLoader asks for them."""
        images, labels = (self.fields[name][list(rows)] for name in _REQUIRED)
        return list(zip(self._pixels(images), labels.tolist(), strict=True))

    def __repr__(self) -> str:
        """Method, size and fields."""
        shape = "x".join(map(str, self.fields["images"].shape[1:]))
        method = self.manifest.get("method", "unknown")
        return f"ConstructedDataset({method}: {len(self)} of {shape}; {', '.join(self.fields)})"

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
        """
        done = np.ones(len(self), np.uint8)
        with whole_folder(folder) as partial:
            for name, array in {**self.fields, DONE: done}.items():
                np.save(partial / f"{name}.npy", array, allow_pickle=False)
            write_manifest(partial, complete_manifest(self.manifest, self.fields))

    @classmethod
    def open(cls, folder: Folder) -> ConstructedDataset:
        """Open a finished folder without reading it: fields stay on disk, memory-mapped.

        A folder of folders ``rank-0``, ``rank-1``, ... that ranks made each for itself is opened as
        one set, in the order of the source rows.

        Raises
        ------
        FileNotFoundError
            There is no manifest in the folder.
        ValueError
            The folder is of another format or unfinished, or a file in it is not the array it
            should be.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if manifest is None and (shares := sorted(folder.glob("rank-*"))):
            return _concat_shards([cls.open(share) for share in shares], folder)
        if manifest is None:
            raise FileNotFoundError(f"folder={str(folder)!r}: no {MANIFEST}; not a saved dataset")
        finished, rows = int(read_done(folder, manifest).sum()), manifest["rows"]
        if finished < rows:
            checks.fail(
                "folder",
                str(folder),
                f"unfinished, {finished} of {rows} rows; the call that began it, with the same "
                "out, goes on",
            )
        return cls(open_fields(folder, manifest), manifest)


class _Pairs(Dataset[tuple[Tensor, Tensor]]):
    """Source image beside image."""

    def __init__(self, made: ConstructedDataset, source: Source) -> None:
        self._made, self._source = made, source
        last = int(made.field("index").max())
        if last not in source.indices:
            checks.fail("data", len(source), f"it has no row {last}; is it another dataset?")

    def __len__(self) -> int:
        return len(self._made)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        image, _ = self._made[row]
        index, fields = int(self._made.fields["index"][row]), self._made.fields
        source = self._source.rows([index], torch.device("cpu"))
        label = int(fields.get("source_labels", fields["labels"])[row])
        if int(source.labels[0]) != label:
            checks.fail(
                "data",
                f"label {int(source.labels[0])} at row {index}",
                f"it was {label} when this set was made; is it another dataset, or another order?",
            )
        return source.inputs[0], image


class _ConcatArray:
    """Samples of several arrays, in an order of their own, as one array; read when asked for."""

    def __init__(self, parts: list[Array], order: Array) -> None:
        self._parts, self._order = parts, order
        self._starts = np.cumsum([0, *map(len, parts)])
        self.dtype, self.shape = parts[0].dtype, (len(order), *parts[0].shape[1:])

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, key: Any) -> Array:
        wanted = self._order[key]
        found: Array = self._read(np.atleast_1d(wanted))
        return found if np.ndim(wanted) else found[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return self._read(self._order).astype(self.dtype if dtype is None else dtype, copy=False)

    def _read(self, rows: Array) -> Array:
        found = np.empty((len(rows), *self.shape[1:]), self.dtype)
        of = np.searchsorted(self._starts, rows, side="right") - 1
        for number, part in enumerate(self._parts):
            found[of == number] = part[rows[of == number] - self._starts[number]]
        return found


def _concat_shards(shares: list[ConstructedDataset], folder: Path) -> ConstructedDataset:
    """One set of those that ranks made each for itself."""
    first, *others = (dict(share.manifest) for share in shares)
    ranks = sorted(share.manifest.get("share", {}).get("rank", -1) for share in shares)
    size = first.get("share", {}).get("of")
    if size is None or ranks != list(range(size)):
        checks.fail("folder", str(folder), f"holds the shares of ranks {ranks} of {size}")
    own = ("rows", "share", "versions")
    alike = {name: value for name, value in first.items() if name not in own}
    for other in others:
        if alike != {name: value for name, value in other.items() if name not in own}:
            checks.fail("folder", str(folder), "the shares in it were not made by the same call")
    keys = [name for name in ("index", "start_number") if name in shares[0].fields]
    order = np.lexsort([np.concatenate([part.fields[key] for part in shares]) for key in keys])
    fields: dict[str, Any] = {
        name: _ConcatArray([share.fields[name] for share in shares], order)
        for name in shares[0].fields
    }
    return ConstructedDataset(fields, {**alike, "rows": len(order), "versions": first["versions"]})


def quantize(images: Tensor, bounds: Bounds) -> Tensor:
    """The nearest of 256 even levels of the box, uint8."""
    low, high = bounds
    return ((images - low) / (high - low) * 255).round().to(torch.uint8)


def dequantize(levels: Tensor, bounds: Bounds) -> Tensor:
    """Pixels of uint8 levels, float32."""
    low, high = bounds
    return levels.to(torch.float32) / 255 * (high - low) + low


def _tensor(array: Array) -> Tensor:
    own = isinstance(array, np.ndarray) and array.flags.writeable
    return torch.from_numpy(array if own else np.array(array))
