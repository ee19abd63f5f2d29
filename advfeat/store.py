"""Constructed datasets, in memory or memory-mapped from a folder; knows no model."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from advfeat import checks

FORMAT = 1
_MANIFEST = "manifest.json"
_REQUIRED = ("images", "labels")

Array = npt.NDArray[Any]


class ConstructedDataset(Dataset[tuple[Tensor, int]]):
    """Images and labels made from a model and data, with what is known of each row.

    A dataset of ``(image, label)`` that goes straight into a DataLoader.

    Parameters
    ----------
    fields
        Arrays with one row a sample. ``images`` (float32) and ``labels`` (int64) are always there;
        ``index`` (the row in the source data), ``source_labels``, ``success``, ``size`` (norm of
        the perturbation), ``distance`` and others as the construction has them.
    manifest
        Provenance as plain JSON values: method, settings, seed, versions.

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
        """All images as one tensor ``(N, ...)``; a copy where they are memory-mapped."""
        return _tensor(self.fields["images"])

    @property
    def labels(self) -> Tensor:
        """All labels, int64 ``(N,)``."""
        return _tensor(self.fields["labels"])

    def field(self, name: str) -> Tensor:
        """Return a field as a tensor; see ``fields`` for what there is."""
        if name not in self.fields:
            checks.fail("name", name, f"this dataset has {sorted(self.fields)}")
        return _tensor(self.fields[name])

    def __len__(self) -> int:
        """Rows."""
        return len(self.fields["labels"])

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        """Image and label of a row."""
        return torch.as_tensor(np.array(self.fields["images"][row])), int(
            self.fields["labels"][row]
        )

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[Tensor, int]]:
        """Several rows at once, as a DataLoader asks for them."""
        images, labels = (self.fields[name][list(rows)] for name in _REQUIRED)
        return list(zip(torch.from_numpy(images), labels.tolist(), strict=True))

    def __repr__(self) -> str:
        """Method, size and fields."""
        shape = "x".join(map(str, self.fields["images"].shape[1:]))
        method = self.manifest.get("method", "unknown")
        return f"ConstructedDataset({method}: {len(self)} of {shape}; {', '.join(self.fields)})"

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a folder: one ``.npy`` for each field and ``manifest.json``.

        Nothing appears under the name until all of it is written.

        Raises
        ------
        FileExistsError
            The folder exists.
        """
        folder = Path(folder)
        if folder.exists():
            raise FileExistsError(f"folder={str(folder)!r}: exists; save under another name")
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            for name, array in self.fields.items():
                np.save(partial / f"{name}.npy", array, allow_pickle=False)
            manifest = {**self.manifest, "format": FORMAT, "fields": list(self.fields)}
            (partial / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
            partial.chmod(0o755)
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> ConstructedDataset:
        """Open a saved folder without reading it: fields stay on disk, memory-mapped.

        Raises
        ------
        FileNotFoundError
            There is no manifest in the folder.
        ValueError
            The folder is of another format, or a file in it is not the array it should be.
        """
        folder = Path(folder)
        path = folder / _MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"folder={str(folder)!r}: no {_MANIFEST}; not a saved dataset")
        try:
            manifest = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"folder={str(folder)!r}: {_MANIFEST} is cut short or damaged: {error}"
            ) from error
        if manifest.get("format") != FORMAT:
            checks.fail(
                "folder",
                str(folder),
                f"format {manifest.get('format')}; this version reads {FORMAT}",
            )
        names = manifest.get("fields", ())
        return cls({name: _mapped(folder / f"{name}.npy") for name in names}, manifest)


def _mapped(path: Path) -> Array:
    try:
        # Unlike np.load, it reads nothing else than an array: no archive, no pickle.
        mapped: Array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"folder: {path.name} is missing, cut short or no array: {error}"
        ) from error
    return mapped


def _tensor(array: Array) -> Tensor:
    return torch.from_numpy(array if array.flags.writeable else np.array(array))
