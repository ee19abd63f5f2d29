"""The format of a constructed dataset in a folder.

A folder holds one ``.npy`` for each field, ``done.npy`` (one byte a sample: 1 where it is
finished) and ``manifest.json``, which is written last: a folder without it is not a dataset yet. A
sample is written to every field, then these are synchronised with the disk, then its byte in
``done.npy`` is set. So a finished sample is complete, whenever the process or the machine dies.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from advfeat import checks
from advfeat.durable import Folder, as_path, write_whole

FORMAT = 3


MANIFEST, DONE, LOCK = "manifest.json", "done", ".lock"


Array: TypeAlias = npt.NDArray[Any]


def check_field_name(name: object) -> None:
    """Check that the name of a field can be that of its file."""
    if not (isinstance(name, str) and name.isidentifier()):
        checks.fail("fields", name, "a name must be a Python identifier, as 'class_name' is")
    if name.lower() == DONE:
        checks.fail("fields", name, "the name of a file that says which samples are finished")


def read_manifest(folder: Folder) -> dict[str, Any] | None:
    """The manifest of a folder of this format; None where nothing was made yet."""
    path = as_path(folder) / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"folder={str(folder)!r}: {MANIFEST} is cut short or damaged: {error}"
        ) from error
    if manifest.get("format") != FORMAT:
        checks.fail(
            "folder",
            str(folder),
            f"format {manifest.get('format')}; this version reads {FORMAT}: make it anew, or use "
            "the version of advfeat that made it",
        )
    samples, fields = manifest.get("samples"), manifest.get("fields")
    if not isinstance(samples, int) or not isinstance(fields, dict):
        checks.fail(
            "folder", str(folder), f"{MANIFEST} does not give the number of samples and the fields"
        )
    for name, field in fields.items():
        # A path for a name would lead out of the folder.
        if not (
            name.isidentifier()
            and isinstance(field, dict)
            and isinstance(field.get("shape"), list)
            and "dtype" in field
        ):
            checks.fail("folder", str(folder), f"{MANIFEST} says nonsense of field {name!r}")
    return manifest


def check_same_manifest(folder: Folder, manifest: Mapping[str, Any]) -> None:
    """Raise an error for a folder that was made in another way, and say what differs.

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
            f"holds another dataset: {'; '.join(differences)}. Use another folder, or the call "
            "that began this one",
        )
    before, now = there.get("versions", {}), manifest["versions"]
    if is_finished(folder) or before == now:
        return
    if before.get("advfeat") != now["advfeat"]:
        checks.fail(
            "out",
            str(folder),
            f"begun by advfeat {before.get('advfeat')}, this is {now['advfeat']}: samples of "
            "both would be mixed. Resume with that version, or use another folder",
        )
    if before.get("torch") != now["torch"]:
        warnings.warn(
            f"out={str(folder)!r}: begun with torch {before.get('torch')}, this is {now['torch']}; "
            "the samples that are left may differ by rounding",
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
    if there.get("shard") != here.get("shard"):
        yield f"shard={there.get('shard')} there, {here.get('shard')} here"
    elif there.get("samples") != here["samples"]:
        yield f"{there.get('samples')} samples there, {here['samples']} here"
    elif there.get("data", {}).get("sha256") != here["data"]["sha256"]:
        yield "the source data differ (random augmentation?)"
    if there.get("model") != here["model"]:
        yield "the model or its weights differ"


def is_finished(folder: Folder) -> bool:
    """Whether a dataset is there, with all its samples."""
    manifest = read_manifest(folder)
    return manifest is not None and bool(read_done(as_path(folder), manifest).all())


def read_done(folder: Path, manifest: Mapping[str, Any]) -> Array:
    return _mapped(folder / f"{DONE}.npy", "uint8", (manifest["samples"],))


def open_fields(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Array]:
    return {
        name: _mapped(
            folder / f"{name}.npy", field["dtype"], (manifest["samples"], *field["shape"])
        )
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
            f"{path.name} is {mapped.dtype.name} {mapped.shape}, {MANIFEST} says {dtype} {shape}; "
            "every field has one entry for each sample",
        )
    return mapped


def complete_manifest(
    manifest: Mapping[str, Any], fields: Mapping[str, Array], samples: int | None = None
) -> dict[str, Any]:
    """The manifest with what says how to read the files."""
    layout = {
        name: {"dtype": array.dtype.name, "shape": list(array.shape[1:])}
        for name, array in fields.items()
    }
    samples = len(next(iter(fields.values()))) if samples is None else samples
    return {**manifest, "format": FORMAT, "samples": samples, "fields": layout}


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
