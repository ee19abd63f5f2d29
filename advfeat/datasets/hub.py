"""Datasets of Hugging Face's library ``datasets``: to and from constructed ones."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from advfeat import checks
from advfeat.datasets.folder import Array
from advfeat.durable import Folder, as_path

_BATCH = 1000
# Columns of the same meaning in other people's datasets.
_IMAGES = ("image", "images", "img", "pixel_values")
_LABELS = ("label", "labels", "fine_label")
_OURS = "advfeat "


def to_hub(fields: dict[str, Array], manifest: dict[str, Any]) -> Any:
    """Build a ``datasets.Dataset``: columns ``image``, ``label`` and the fields; no rounding."""
    library = _library()
    columns = {_column(name): array for name, array in fields.items()}
    features = library.Features({name: _feature(library, a) for name, a in columns.items()})
    info = library.DatasetInfo(description=_OURS + json.dumps(manifest), features=features)
    count = len(columns["label"])
    parts = [
        library.Dataset.from_dict(
            {name: list(np.array(array[at : at + _BATCH])) for name, array in columns.items()},
            features=features,
            info=info,
        )
        for at in range(0, max(count, 1), _BATCH)
    ]
    return library.concatenate_datasets(parts, info=info) if len(parts) > 1 else parts[0]


def from_hub(dataset: Any) -> tuple[dict[str, Array], dict[str, Any]]:
    """Read fields and manifest of a ``datasets.Dataset``, or of a folder of one."""
    library = _library()
    if isinstance(dataset, (str, os.PathLike)):
        dataset = library.load_from_disk(_folder(dataset))
    if not isinstance(dataset, library.Dataset):
        kind = type(dataset).__name__
        cause = "; choose a split: dataset['train']" if "Dict" in kind else ""
        raise TypeError(f"dataset: expected a datasets.Dataset or its folder, got {kind}{cause}")
    description = dataset.info.description or ""
    if description.startswith(_OURS):
        manifest = json.loads(description[len(_OURS) :])
        names = {"image": "images", "label": "labels"}
        fields = {names.get(name, name): _read(dataset, name) for name in dataset.column_names}
        return fields, manifest
    image, label = (
        next((name for name in names if name in dataset.column_names), None)
        for names in (_IMAGES, _LABELS)
    )
    if image is None or label is None:
        checks.fail(
            "dataset", dataset.column_names, f"expected a column of {_IMAGES} and of {_LABELS}"
        )
    images = [_pixels(value, place) for place, value in _values(dataset, image)]
    shapes = {array.shape for array in images}
    if len(shapes) != 1:
        checks.fail("dataset", sorted(shapes), "images must be of one size; resize them first")
    fields = {"images": np.stack(images), "labels": _read(dataset, label).astype(np.int64)}
    return fields, {"method": "from Hugging Face datasets"}


def _column(name: str) -> str:
    return {"images": "image", "labels": "label"}.get(name, name)


def _feature(library: Any, array: Array) -> Any:
    """The feature of a column that keeps the array's type."""
    dtype = np.dtype(array.dtype).name
    shape = tuple(array.shape[1:])
    if not shape:
        return library.Value(dtype)
    if len(shape) == 1:
        return library.List(library.Value(dtype), length=shape[0])
    if len(shape) > 5:
        checks.fail("fields", shape, "arrays of a column have at most 5 axes")
    return getattr(library, f"Array{len(shape)}D")(shape=shape, dtype=dtype)


def _read(dataset: Any, name: str) -> Array:
    feature = dataset.features[name]
    dtype = getattr(feature, "feature", feature).dtype
    # Without a type it gives int64 and float32, whatever is stored.
    table = dataset.select_columns([name]).with_format("numpy", dtype=np.dtype(dtype))
    parts = [np.asarray(table[at : at + _BATCH][name]) for at in range(0, len(table), _BATCH)]
    return np.concatenate(parts)


def _values(dataset: Any, name: str) -> Iterator[tuple[int, Any]]:
    yield from enumerate(example[name] for example in dataset.select_columns([name]))


def _pixels(image: Any, place: int) -> Array:
    """Levels ``(C, H, W)`` of a picture, or an array as it is."""
    if not hasattr(image, "convert"):
        return np.asarray(image)
    if image.mode.startswith(("I", "F")):
        checks.fail(f"sample {place}: image mode", image.mode, "expected 8 bits a channel")
    pixels = np.array(image if image.mode == "L" else image.convert("RGB"))
    return np.moveaxis(np.atleast_3d(pixels), 2, 0)


def _folder(folder: Folder) -> str:
    path = as_path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"dataset={str(path)!r}: there is no such folder")
    return str(path)


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "datasets of Hugging Face need their library: pip install 'advfeat[hf]'"
        ) from error
    return datasets
