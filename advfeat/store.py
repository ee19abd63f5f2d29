"""Constructed datasets, in memory or memory-mapped from a folder; knows no model.

A folder holds one ``.npy`` for each field, ``done.npy`` (one byte a row: 1 where it is finished)
and ``manifest.json``, which is written last: a folder without it is nothing yet. A row is written
to every field, then these are synchronised with the disk, then its byte in ``done.npy`` is set. So
a row that counts as finished is whole, at whatever moment the process or the machine dies.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import Self

from advfeat import checks
from advfeat.loading import Data, Source
from advfeat.threat import Bounds

FORMAT = 2
DTYPES = ("float32", "uint8")
_MANIFEST, _DONE, _LOCK = "manifest.json", "done", ".lock"
_REQUIRED = ("images", "labels")

Array: TypeAlias = npt.NDArray[Any]
Folder: TypeAlias = str | os.PathLike[str]
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
        return dequantised(tensor, self.bounds) if tensor.dtype == torch.uint8 else tensor

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
            for name, array in {**self.fields, _DONE: done}.items():
                np.save(partial / f"{name}.npy", array, allow_pickle=False)
            _write_manifest(partial, _complete(self.manifest, self.fields))

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
            return _joined([cls.open(share) for share in shares], folder)
        if manifest is None:
            raise FileNotFoundError(f"folder={str(folder)!r}: no {_MANIFEST}; not a saved dataset")
        finished, rows = int(_finished(folder, manifest).sum()), manifest["rows"]
        if finished < rows:
            checks.fail(
                "folder",
                str(folder),
                f"unfinished, {finished} of {rows} rows; the call that began it, with the same "
                "out, goes on",
            )
        return cls(_fields(folder, manifest), manifest)


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


class _JoinedArray:
    """Rows of several arrays, in an order of their own, as one array; read when asked for."""

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


def _joined(shares: list[ConstructedDataset], folder: Path) -> ConstructedDataset:
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
    order = np.argsort(np.concatenate([share.fields["index"] for share in shares]))
    fields: dict[str, Any] = {
        name: _JoinedArray([share.fields[name] for share in shares], order)
        for name in shares[0].fields
    }
    return ConstructedDataset(fields, {**alike, "rows": len(order), "versions": first["versions"]})


def quantised(images: Tensor, bounds: Bounds) -> Tensor:
    """The nearest of 256 even levels of the box, uint8."""
    low, high = bounds
    return ((images - low) / (high - low) * 255).round().to(torch.uint8)


def dequantised(levels: Tensor, bounds: Bounds) -> Tensor:
    """Pixels of uint8 levels, float32."""
    low, high = bounds
    return levels.to(torch.float32) / 255 * (high - low) + low


@contextmanager
def whole_folder(folder: Folder) -> Iterator[Path]:
    """Give a folder to write to, which takes its name when all of it is written, or never."""
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"folder={str(folder)!r}: exists; save under another name")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield partial
        partial.chmod(0o755)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


# --- Sets that are being made ---


class InMemory:
    """A set that is being made, held in memory.

    Parameters
    ----------
    example
        One row of every field.
    rows
        How many there will be.
    manifest
        Its provenance.
    """

    def __init__(self, example: Mapping[str, Array], rows: int, manifest: dict[str, Any]) -> None:
        self._fields = {
            name: np.empty((rows, *array.shape[1:]), array.dtype) for name, array in example.items()
        }
        self._manifest = manifest
        self.done = np.zeros(rows, np.uint8)

    def put(self, places: Array, found: Mapping[str, Array]) -> None:
        """Keep finished rows."""
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


class OnDisk:
    """A set that is being made in a folder, where it can be left and taken up again at any time.

    Rows are written by a thread while the next ones are computed. Ranks of one run share the
    folder, each writing rows of its own. The folder is one that `create` made.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        if manifest is None:
            raise FileNotFoundError(
                f"out={str(folder)!r}: the set that was begun cannot be seen from here; ranks need "
                "a folder that all of them share"
            )
        self.done = _finished(self.folder, manifest)
        self._files = {
            name: _Rows(self.folder / f"{name}.npy", array)
            for name, array in _fields(self.folder, manifest).items()
        }
        self._done = _Rows(self.folder / f"{_DONE}.npy", self.done)
        self._writer = ThreadPoolExecutor(1)
        self._written: Future[None] | None = None

    def put(self, places: Array, found: Mapping[str, Array]) -> None:
        """Hand over finished rows; returns once the rows before them are on disk."""
        self.flush()
        self._written = self._writer.submit(self._write, places, found)

    def flush(self) -> None:
        """Wait until every row that was handed over is on disk."""
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
                f"{len(self.done)} rows are safe there: make room, and the same call goes on",
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


class _Rows:
    """Writes rows of an array file in place.

    By writing to the file, not to a memory map: there a full disk would be a bus error, and every
    page that was written would count as this process's memory.
    """

    def __init__(self, path: Path, array: Array) -> None:
        assert isinstance(array, np.memmap)
        self._offset, self._dtype, self._shape = array.offset, array.dtype, array.shape[1:]
        self._row_size = array.dtype.itemsize * int(np.prod(array.shape[1:], dtype=np.int64))
        self._file = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))

    def write(self, places: Array, values: Array) -> None:
        if values.dtype != self._dtype or values.shape[1:] != self._shape:
            checks.fail(
                "data",
                (str(values.dtype), *values.shape[1:]),
                f"rows before were {(str(self._dtype), *self._shape)}; all rows must be alike",
            )
        ends = np.flatnonzero(np.diff(places) != 1) + 1
        for run, part in zip(np.split(places, ends), np.split(values, ends), strict=True):
            os.lseek(self._file, self._offset + int(run[0]) * self._row_size, os.SEEK_SET)
            left = np.ascontiguousarray(part).data.cast("B")
            while left:
                left = left[os.write(self._file, left) :]

    def sync(self) -> None:
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes out; over with this process, however that ends."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            _take(file)
        except OSError as error:
            holder = os.read(file, 200).decode(errors="replace").strip() or "another process"
            raise BlockingIOError(
                error.errno, f"out={str(path.parent)!r}: in use by {holder}"
            ) from error
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(file)


def _take(file: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        # Not flock: workers of a loader would inherit it, and outlive a killed process.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def claim(folder: Folder) -> AbstractContextManager[None]:
    """Make the folder if it is not there, and keep other processes out while the context lasts.

    Raises
    ------
    FileExistsError
        The folder holds something else, or is a file.
    BlockingIOError
        Another process is at work in it.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in folder.iterdir()}
        if not os.access(folder, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except PermissionError as error:
        raise PermissionError(
            error.errno, f"out={str(folder)!r}: no permission to write there"
        ) from error
    if names and not names & {_MANIFEST, _LOCK}:
        raise FileExistsError(
            f"out={str(folder)!r}: not empty, and what is in it ({min(names)}, ...) is no "
            "constructed dataset; use another name"
        )
    return _locked(folder / _LOCK)


def create(
    folder: Folder, example: Mapping[str, Array], rows: int, manifest: Mapping[str, Any]
) -> None:
    """Lay out the files of a set of which no row is finished, the manifest last.

    Raises
    ------
    OSError
        The disk has no room for all of it; nothing is left there.
    """
    folder = Path(folder)
    fields = {**example, _DONE: np.zeros(1, np.uint8)}
    try:
        for name, array in fields.items():
            _allocate(folder / f"{name}.npy", (rows, *array.shape[1:]), array.dtype)
        _write_manifest(folder, _complete(manifest, example, rows))
    except BaseException as error:
        for name in fields:
            (folder / f"{name}.npy").unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        needed = sum(rows * array[:1].nbytes for array in fields.values())
        raise OSError(
            error.errno,
            f"out={str(folder)!r}: {error.strerror}; the set needs {needed / 1e6:.0f} MB there",
        ) from error


def _allocate(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Write an array file whose rows are zero, with its room on the disk reserved."""
    path.unlink(missing_ok=True)
    np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    with path.open("r+b") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        os.fsync(file.fileno())


# --- What is in a folder ---


def read_manifest(folder: Folder) -> dict[str, Any] | None:
    """The manifest of a folder of this format; None where nothing was made yet."""
    path = Path(folder) / _MANIFEST
    if not path.is_file():
        return None
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
            f"format {manifest.get('format')}; this version reads {FORMAT}: make it anew, or use "
            "the version of advfeat that made it",
        )
    rows, fields = manifest.get("rows"), manifest.get("fields")
    if not isinstance(rows, int) or not isinstance(fields, dict):
        checks.fail("folder", str(folder), f"{_MANIFEST} does not say its rows and fields")
    for name, field in fields.items():
        # A path for a name would lead out of the folder.
        if not (
            name.isidentifier()
            and isinstance(field, dict)
            and isinstance(field.get("shape"), list)
            and "dtype" in field
        ):
            checks.fail("folder", str(folder), f"{_MANIFEST} says nonsense of field {name!r}")
    return manifest


def refuse_other(folder: Folder, manifest: Mapping[str, Any]) -> None:
    """Refuse a folder that was made in another way, and say what differs.

    Parameters
    ----------
    manifest
        That of the call at hand.
    """
    there = read_manifest(folder)
    if there is None:
        return
    differences = list(_differences(there, manifest))
    if differences:
        checks.fail(
            "out",
            str(folder),
            f"holds another set: {'; '.join(differences)}. Use another folder, or the call that "
            "began this one",
        )
    before, now = there.get("versions", {}), manifest["versions"]
    if is_finished(folder) or before == now:
        return
    if before.get("advfeat") != now["advfeat"]:
        checks.fail(
            "out",
            str(folder),
            f"begun by advfeat {before.get('advfeat')}, this is {now['advfeat']}: rows of "
            "both would be mixed. Go on with that version, or use another folder",
        )
    if before.get("torch") != now["torch"]:
        warnings.warn(
            f"out={str(folder)!r}: begun with torch {before.get('torch')}, this is {now['torch']}; "
            "the rows that are left may differ by rounding",
            stacklevel=2,
        )


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    if there.get("method") != here["method"]:
        yield f"method is {there.get('method')} there, {here['method']} here"
        return
    settings = there.get("settings", {})
    for name in sorted({*settings, *here["settings"]}):
        before, now = settings.get(name), here["settings"].get(name)
        if before != now:
            yield f"{name}={before!r} there, {now!r} here"
    if there.get("share") != here.get("share"):
        yield f"share={there.get('share')} there, {here.get('share')} here"
    elif there.get("rows") != here["rows"]:
        yield f"{there.get('rows')} rows there, {here['rows']} here"
    elif there.get("data") != here["data"]:
        yield "the source data differ (random augmentation?)"
    if there.get("model") != here["model"]:
        yield "the model or its weights differ"


def is_finished(folder: Folder) -> bool:
    """Whether a set is there, with all its rows."""
    manifest = read_manifest(folder)
    return manifest is not None and bool(_finished(Path(folder), manifest).all())


def _finished(folder: Path, manifest: Mapping[str, Any]) -> Array:
    return _mapped(folder / f"{_DONE}.npy", "uint8", (manifest["rows"],))


def _fields(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Array]:
    return {
        name: _mapped(folder / f"{name}.npy", field["dtype"], (manifest["rows"], *field["shape"]))
        for name, field in manifest["fields"].items()
    }


def _mapped(path: Path, dtype: str, shape: tuple[int, ...]) -> Array:
    try:
        # Unlike np.load, it reads nothing else than an array: no archive, no pickle.
        mapped: Array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"folder={str(path.parent)!r}: {path.name} is missing, cut short or no array: {error}"
        ) from error
    if mapped.dtype.name != dtype or mapped.shape != shape:
        checks.fail(
            "folder",
            str(path.parent),
            f"{path.name} is {mapped.dtype.name} {mapped.shape}, {_MANIFEST} says {dtype} {shape}; "
            "every field has one row for each sample",
        )
    return mapped


def _complete(
    manifest: Mapping[str, Any], fields: Mapping[str, Array], rows: int | None = None
) -> dict[str, Any]:
    """The manifest with what says how to read the files."""
    layout = {
        name: {"dtype": array.dtype.name, "shape": list(array.shape[1:])}
        for name, array in fields.items()
    }
    rows = len(next(iter(fields.values()))) if rows is None else rows
    return {**manifest, "format": FORMAT, "rows": rows, "fields": layout}


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    write_whole(folder / _MANIFEST, json.dumps(manifest, indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file of text whole or not at all, in the place of what was there."""
    partial = path.with_name(f".{path.name}")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _tensor(array: Array) -> Tensor:
    own = isinstance(array, np.ndarray) and array.flags.writeable
    return torch.from_numpy(array if own else np.array(array))
