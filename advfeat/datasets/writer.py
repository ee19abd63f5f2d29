"""Constructed datasets that are being written, in memory or in a folder."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import Self

from advfeat import checks
from advfeat.datasets.dataset import ConstructedDataset
from advfeat.datasets.folder import (
    DONE,
    LOCK,
    MANIFEST,
    Array,
    complete_manifest,
    open_fields,
    read_done,
    read_manifest,
    write_manifest,
)
from advfeat.durable import Folder, as_path, lock_file


class MemoryWriter:
    """A dataset that is being made, held in memory.

    Parameters
    ----------
    example
        One sample of every field.
    count
        How many there will be.
    manifest
        Its provenance.
    """

    def __init__(self, example: Mapping[str, Array], count: int, manifest: dict[str, Any]) -> None:
        self._fields = {
            name: np.empty((count, *array.shape[1:]), array.dtype)
            for name, array in example.items()
        }
        self._manifest = manifest
        self.done = np.zeros(count, np.uint8)

    def put(self, places: Array, found: Mapping[str, Array]) -> None:
        """Keep finished samples."""
        for name, array in self._fields.items():
            array[places] = found[name]

    def flush(self) -> None:
        """Nothing is on its way."""

    def dataset(self) -> ConstructedDataset:
        """All that was made."""
        return ConstructedDataset(self._fields, self._manifest)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class FolderWriter:
    """A dataset that is being made in a folder, where it can be interrupted and resumed.

    Samples are written by a thread while the next ones are computed. Ranks of one run share the
    folder, each writing samples of its own. The folder is one that `create` made.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = as_path(folder)
        manifest = read_manifest(self.folder)
        if manifest is None:
            raise FileNotFoundError(
                f"out={str(folder)!r}: the dataset cannot be seen from here; ranks need "
                "a folder that all of them share"
            )
        self.done = read_done(self.folder, manifest)
        self._files = {
            name: _SampleFile(self.folder / f"{name}.npy", array)
            for name, array in open_fields(self.folder, manifest).items()
        }
        self._done = _SampleFile(self.folder / f"{DONE}.npy", self.done)
        self._writer = ThreadPoolExecutor(1)
        self._written: Future[None] | None = None

    def put(self, places: Array, found: Mapping[str, Array]) -> None:
        """Hand over finished samples; returns once the samples before them are on disk."""
        self.flush()
        self._written = self._writer.submit(self._write, places, found)

    def flush(self) -> None:
        """Wait until every sample that was handed over is on disk."""
        if self._written is not None:
            try:
                self._written.result()
            finally:
                # After an interrupt it is on its way still.
                if self._written.done():
                    self._written = None

    def dataset(self) -> ConstructedDataset:
        """All that was made, memory-mapped."""
        return ConstructedDataset.open(self.folder)

    def _write(self, places: Array, found: Mapping[str, Array]) -> None:
        try:
            for name, file in self._files.items():
                file.write(places, found[name])
            for file in self._files.values():
                file.sync()
            self._done.write(places, np.ones(len(places), np.uint8))
        except OSError as error:
            raise OSError(
                error.errno,
                f"out={str(self.folder)!r}: {error.strerror}; {int(self.done.sum())} of "
                f"{len(self.done)} samples are safe there: free some space, call again to resume",
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.flush()
            self._done.sync()
        finally:
            self._writer.shutdown()
            for file in (*self._files.values(), self._done):
                file.close()


class _SampleFile:
    """Writes samples of an array file in place.

    By writing to the file, not to a memory map: there a full disk would be a bus error, and every
    page that was written would count as this process's memory.
    """

    def __init__(self, path: Path, array: Array) -> None:
        assert isinstance(array, np.memmap)
        self._offset, self._dtype, self._shape = array.offset, array.dtype, array.shape[1:]
        self._sample_size = array.dtype.itemsize * int(np.prod(array.shape[1:], dtype=np.int64))
        self._file = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))

    def write(self, places: Array, values: Array) -> None:
        if values.dtype != self._dtype or values.shape[1:] != self._shape:
            checks.fail(
                "data",
                (str(values.dtype), *values.shape[1:]),
                f"samples before were {(str(self._dtype), *self._shape)}; all must be alike",
            )
        ends = np.flatnonzero(np.diff(places) != 1) + 1
        for run, part in zip(np.split(places, ends), np.split(values, ends), strict=True):
            os.lseek(self._file, self._offset + int(run[0]) * self._sample_size, os.SEEK_SET)
            left = np.ascontiguousarray(part).data.cast("B")
            while left:
                left = left[os.write(self._file, left) :]

    def sync(self) -> None:
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)


def lock_folder(folder: Folder) -> AbstractContextManager[None]:
    """Make the folder if it is not there, and keep other processes out while the context lasts.

    Raises
    ------
    FileExistsError
        The folder holds something else, or is a file.
    BlockingIOError
        Another process is at work in it.
    """
    folder = as_path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in folder.iterdir()}
        if not os.access(folder, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except PermissionError as error:
        raise PermissionError(
            error.errno, f"out={str(folder)!r}: no permission to write there"
        ) from error
    except FileExistsError as error:
        raise FileExistsError(
            error.errno,
            f"out={str(folder)!r}: expected a folder, and this is a file or broken link",
        ) from error
    if names and not names & {MANIFEST, LOCK}:
        raise FileExistsError(
            f"out={str(folder)!r}: not empty, and what is in it ({min(names)}, ...) is no "
            "constructed dataset; use another name"
        )
    return lock_file(folder / LOCK)


def create_folder(
    folder: Folder, example: Mapping[str, Array], count: int, manifest: Mapping[str, Any]
) -> None:
    """Lay out the files of a dataset of which no sample is finished, the manifest last.

    Raises
    ------
    OSError
        The disk is too small for all of it; nothing is left there.
    """
    folder = as_path(folder)
    fields = {**example, DONE: np.zeros(1, np.uint8)}
    try:
        for name, array in fields.items():
            _allocate(folder / f"{name}.npy", (count, *array.shape[1:]), array.dtype)
        write_manifest(folder, complete_manifest(manifest, example, count))
    except BaseException as error:
        for name in fields:
            (folder / f"{name}.npy").unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        needed = sum(count * array[:1].nbytes for array in fields.values())
        raise OSError(
            error.errno,
            f"out={str(folder)!r}: {error.strerror}; the dataset needs {needed / 1e6:.3g} MB there",
        ) from error


def _allocate(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Write an array file whose samples are zero, with its space on the disk reserved."""
    path.unlink(missing_ok=True)
    np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    with path.open("r+b") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        os.fsync(file.fileno())
