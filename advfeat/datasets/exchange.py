"""Constructed datasets in the formats of others: the paper's released one, and folders of PNGs."""

from __future__ import annotations

import functools
import json
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from advfeat import checks
from advfeat.datasets.arrays import quantize
from advfeat.datasets.dataset import ConstructedDataset
from advfeat.datasets.folder import Array
from advfeat.durable import Folder, as_path, whole_folder, write_whole

__all__ = ["export_images", "export_released", "import_images", "import_released"]

_IMAGES, _LABELS = "CIFAR_ims", "CIFAR_lab"
# Beside the images: the manifest, and the fields of samples.
_ABOUT, _FIELDS = "advfeat.json", "advfeat.npz"
_BATCH = 1000


def import_released(folder: Folder) -> ConstructedDataset:
    """Read a dataset in the format of the paper's release (`d_robust_CIFAR` and its like).

    Parameters
    ----------
    folder
        Holds ``CIFAR_ims`` and ``CIFAR_lab``, each a list of tensors saved by ``torch.save``. They
        are read with ``weights_only=True``: no code in them is run. Bounds and the fields of
        samples are read too, where `export_released` left them.

    Returns
    -------
    ConstructedDataset
        ``images`` float32, ``labels`` and further fields, in memory.

    Raises
    ------
    FileNotFoundError
        One of the two files is not there.
    ValueError
        A file holds something else than tensors, or they do not fit each other.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> made = ConstructedDataset({"images": np.ones((2, 3, 4, 4), "f4"), "labels": np.arange(2)})
    >>> folder = tempfile.mkdtemp() + "/d_robust_CIFAR"
    >>> export_released(made, folder)
    >>> import_released(folder).labels
    tensor([0, 1])
    """
    folder = as_path(folder)
    images, labels = (_tensors(folder / name) for name in (_IMAGES, _LABELS))
    fields = {"images": images.float().numpy(), "labels": labels.to(torch.int64).numpy()}
    known, manifest = _read_about(folder, _manifest("released format", folder))
    if known and len(next(iter(known.values()))) != len(fields["labels"]):
        checks.fail("folder", str(folder), f"{_FIELDS} is of another dataset; remove it")
    return ConstructedDataset(fields | known, manifest)


def export_released(dataset: ConstructedDataset, folder: Folder) -> None:
    """Write a dataset in the format of the paper's release; see `import_released`.

    Fields of samples and bounds go into two further files, which readers of the release leave
    alone. Nothing appears under the name until all of it is written.

    Parameters
    ----------
    dataset
        Any constructed dataset.
    folder
        Must not exist.

    Returns
    -------
    None

    Raises
    ------
    FileExistsError
        The folder exists.

    Examples
    --------
    >>> from advfeat.datasets import export_released, import_released
    >>> export_released(dataset, "d_robust")  # doctest: +SKIP
    >>> len(import_released("d_robust"))  # doctest: +SKIP
    50000
    """
    parts = [dataset.subset(slice(at, at + _BATCH)) for at in range(0, len(dataset), _BATCH)]
    with whole_folder(folder) as partial:
        for name, tensors in (
            (_IMAGES, [part.images.clone() for part in parts]),
            (_LABELS, [part.labels.clone() for part in parts]),
        ):
            write_whole(partial / name, functools.partial(torch.save, tensors))
        _write_about(partial, dataset)


def import_images(folder: Folder) -> ConstructedDataset:
    """Read a folder of images: one folder a class, in it one file an image.

    Parameters
    ----------
    folder
        Its folders are the classes: where all are named by numbers these are the labels,
        otherwise their alphabetical places are (as in torchvision's ``ImageFolder``). Images are of
        one size, of 8 bits; grey ones have one channel, others three. Names that begin with a dot
        are left out. What `export_images` wrote of bounds, order and fields is read too. Needs
        pillow.

    Returns
    -------
    ConstructedDataset
        ``images`` uint8 ``(N, C, H, W)``, levels of the bounds, [0, 1] unless others are recorded;
        ``labels`` and further fields; in memory, in the order of the exported dataset.

    Raises
    ------
    ImportError
        pillow is missing.
    ValueError
        There is no image, a file is no image, or one is of another size.

    Examples
    --------
    >>> from advfeat.datasets import import_images
    >>> import_images("pngs").labels.unique()  # doctest: +SKIP
    tensor([0, 1, 2])
    """
    image_module = _pillow()
    folder = as_path(folder)
    paths, labels = _labelled(folder)
    known, manifest = _read_about(folder, _manifest("image folder", folder))
    if known:
        paths, labels, known = _in_order(folder, paths, labels, known)
    arrays: list[Array] = []
    for path in paths:
        arrays.append(_pixels(image_module, path))
        if arrays[-1].shape != arrays[0].shape:
            checks.fail("folder", str(path), f"{arrays[-1].shape}, images before {arrays[0].shape}")
    if not arrays:
        checks.fail("folder", str(folder), "no images; expected FOLDER/CLASS/IMAGE.png")
    fields = {"images": np.stack(arrays), "labels": np.array(labels, np.int64)}
    return ConstructedDataset(fields | known, manifest)


def _labelled(folder: Path) -> tuple[list[Path], list[int]]:
    """Images of a folder of classes, and their labels."""
    classes = [path for path in _visible(folder) if path.is_dir()]
    are_numbers = all(path.name.isdecimal() for path in classes)
    found = [
        (path, int(of_class.name) if are_numbers else place)
        for place, of_class in enumerate(classes)
        for path in _visible(of_class)
    ]
    return [path for path, _ in found], [label for _, label in found]


def _in_order(
    folder: Path, paths: list[Path], labels: list[int], known: dict[str, Array]
) -> tuple[list[Path], list[int], dict[str, Array]]:
    """Bring images into the order of the exported dataset, by the numbers that are their names."""
    count = len(next(iter(known.values())))
    places = [int(path.stem) if path.stem.isdecimal() else count for path in paths]
    if len(set(places)) < len(places) or max(places, default=0) >= count:
        warnings.warn(
            f"folder={str(folder)!r}: images were added that {_FIELDS} does not know; index and "
            "other fields are left out, and the order is that of the folder",
            stacklevel=3,
        )
        return paths, labels, {}
    order = np.argsort(places)
    kept = np.array(places, np.int64)[order]  # images that were removed have no sample
    fields = {name: array[kept] for name, array in known.items()}
    return [paths[i] for i in order], [labels[i] for i in order], fields


def export_images(dataset: ConstructedDataset, folder: Folder) -> None:
    """Write a folder of PNGs, ``FOLDER/LABEL/NUMBER.png``, that `import_images` and others read.

    A PNG has 256 levels: float images move by up to 1/510 of the bounds' width, which can undo a
    small perturbation. A dataset made with ``dtype="uint8"`` is written as it is. torchvision's
    ``ImageFolder`` reads the folder; its labels are places among the classes that occur. Bounds and
    fields are kept in two further files. Needs pillow.

    Parameters
    ----------
    dataset
        With images of one or three channels.
    folder
        Must not exist.

    Returns
    -------
    None

    Raises
    ------
    FileExistsError
        The folder exists.
    ImportError
        pillow is missing.
    ValueError
        The images do not have one or three channels.

    Examples
    --------
    >>> from advfeat.datasets import export_images, import_images
    >>> export_images(dataset, "pngs")  # doctest: +SKIP
    >>> import_images("pngs").images.shape  # doctest: +SKIP
    torch.Size([50000, 3, 32, 32])
    """
    image_module = _pillow()
    shape = tuple(dataset.fields["images"].shape)
    if len(shape) != 4 or shape[1] not in (1, 3):
        checks.fail("dataset", shape, "a PNG needs images (N, 1, H, W) or (N, 3, H, W)")
    label_digits, digits = len(str(int(dataset.labels.max()))), len(str(len(dataset) - 1))
    with whole_folder(folder) as partial:
        for number in range(len(dataset)):
            image, label = dataset[number]
            of_class = partial / f"{label:0{label_digits}}"
            of_class.mkdir(exist_ok=True)
            pixels = quantize(image, dataset.bounds).movedim(0, 2).squeeze(2).numpy()
            image_module.fromarray(pixels).save(of_class / f"{number:0{digits}}.png")
        _write_about(partial, dataset)


def _write_about(folder: Path, dataset: ConstructedDataset) -> None:
    """Write what is known of a dataset beside its images."""
    fields = {
        name: array for name, array in dataset.fields.items() if name not in ("images", "labels")
    }
    kept: dict[str, Any] = {name: np.array(array) for name, array in fields.items()}
    np.savez(folder / _FIELDS, **kept)
    write_whole(folder / _ABOUT, json.dumps(dataset.manifest, indent=2) + "\n")


def _read_about(folder: Path, manifest: dict[str, Any]) -> tuple[dict[str, Array], dict[str, Any]]:
    """Read fields and manifest that are beside images; none, and the one given, elsewhere."""
    if not (folder / _ABOUT).is_file() or not (folder / _FIELDS).is_file():
        return {}, manifest
    try:
        kept = json.loads((folder / _ABOUT).read_text())
        with np.load(folder / _FIELDS, allow_pickle=False) as arrays:
            fields = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"folder={str(folder)!r}: {_ABOUT} or {_FIELDS} is damaged") from error
    return fields, kept


def _tensors(path: Path) -> Tensor:
    """The samples of a list of tensors, or of one tensor."""
    if not path.is_file():
        raise FileNotFoundError(f"folder={str(path.parent)!r}: there is no {path.name}")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"folder={str(path.parent)!r}: {path.name} is damaged, or holds something else than "
            f"tensors: {error}"
        ) from error
    parts = [found] if isinstance(found, Tensor) else found
    if not isinstance(parts, list) or not all(isinstance(part, Tensor) for part in parts):
        checks.fail("folder", str(path.parent), f"{path.name} is not a list of tensors")
    try:
        return torch.cat(parts)
    except (RuntimeError, ValueError) as error:  # none at all, or of different shapes
        raise ValueError(
            f"folder={str(path.parent)!r}: the tensors in {path.name} do not make one: {error}"
        ) from error


def _visible(folder: Path) -> list[Path]:
    """What is in a folder, by name, but for what file managers and notebooks leave there."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _pixels(image_module: Any, path: Path) -> Array:
    try:
        with image_module.open(path) as image:
            image.load()
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"it has more than 8 bits a channel (mode {image.mode})")
            pixels = np.array(image if image.mode == "L" else image.convert("RGB"))
    except (OSError, ValueError) as error:
        raise ValueError(f"folder: {str(path)!r} is no image of 8 bits: {error}") from error
    channels: Array = np.moveaxis(np.atleast_3d(pixels), 2, 0)
    return channels


def _manifest(method: str, folder: Path) -> dict[str, Any]:
    return {"method": f"from {method}", "source": folder.name}


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "reading and writing images needs pillow: pip install 'advfeat[images]'"
        ) from error
    return Image
