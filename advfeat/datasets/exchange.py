"""Constructed datasets in the formats of others: the paper's released one, and folders of PNGs."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from advfeat import checks
from advfeat.datasets.dataset import ConstructedDataset, quantize
from advfeat.datasets.folder import Array
from advfeat.durable import Folder, as_path, whole_folder

__all__ = ["export_images", "export_released", "import_images", "import_released"]

_IMAGES, _LABELS = "CIFAR_ims", "CIFAR_lab"
_BATCH = 1000


def import_released(folder: Folder) -> ConstructedDataset:
    """Read a set in the format of the paper's release (`d_robust_CIFAR` and its like).

    Parameters
    ----------
    folder
        Holds ``CIFAR_ims`` and ``CIFAR_lab``, each a list of tensors saved by ``torch.save``. They
        are read with ``weights_only=True``: no code in them is run.

    Returns
    -------
    ConstructedDataset
        ``images`` float32 and ``labels``, in memory.

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
    return ConstructedDataset(fields, _manifest("released format", folder))


def export_released(dataset: ConstructedDataset, folder: Folder) -> None:
    """Write a set in the format of the paper's release; see `import_released`.

    Only images and labels are kept. Nothing appears under the name until all of it is written.

    Raises
    ------
    FileExistsError
        The folder exists.
    """
    parts = [dataset.subset(slice(at, at + _BATCH)) for at in range(0, len(dataset), _BATCH)]
    with whole_folder(folder) as partial:
        torch.save([part.images.clone() for part in parts], partial / _IMAGES)
        torch.save([part.labels.clone() for part in parts], partial / _LABELS)


def import_images(folder: Folder) -> ConstructedDataset:
    """Read a folder of images: one folder a class, in it one file an image.

    Parameters
    ----------
    folder
        Its folders are the classes: where all are named by numbers these are the labels,
        otherwise their alphabetical places are (as in torchvision's ``ImageFolder``). Images are of
        one size, of 8 bits; grey ones have one channel, others three. Names that begin with a dot
        are left out. Needs pillow.

    Returns
    -------
    ConstructedDataset
        ``images`` uint8 ``(N, C, H, W)``, read as [0, 1]; ``labels``; in memory.

    Raises
    ------
    ImportError
        pillow is missing.
    ValueError
        There is no image, a file is no image, or one is of another size.
    """
    image_module = _pillow()
    folder = as_path(folder)
    classes = [path for path in _visible(folder) if path.is_dir()]
    numbered = all(path.name.isdecimal() for path in classes)
    arrays: list[Array] = []
    labels: list[int] = []
    for place, of_class in enumerate(classes):
        for path in _visible(of_class):
            arrays.append(_pixels(image_module, path))
            labels.append(int(of_class.name) if numbered else place)
            if arrays[-1].shape != arrays[0].shape:
                checks.fail(
                    "folder", str(path), f"{arrays[-1].shape}, images before {arrays[0].shape}"
                )
    if not arrays:
        checks.fail("folder", str(folder), "no images; expected FOLDER/CLASS/IMAGE.png")
    fields = {"images": np.stack(arrays), "labels": np.array(labels, np.int64)}
    return ConstructedDataset(fields, _manifest("image folder", folder))


def export_images(dataset: ConstructedDataset, folder: Folder) -> None:
    """Write a folder of PNGs, ``FOLDER/LABEL/ROW.png``, that `import_images` and others read.

    A PNG has 256 levels: float images move by up to 1/510 of the box, which can undo a small
    perturbation. A set made with ``dtype="uint8"`` is written as it is. Needs pillow.

    Raises
    ------
    FileExistsError
        The folder exists.
    ImportError
        pillow is missing.
    ValueError
        The images do not have one or three channels.
    """
    image_module = _pillow()
    shape = tuple(dataset.fields["images"].shape)
    if len(shape) != 4 or shape[1] not in (1, 3):
        checks.fail("dataset", shape, "a PNG needs images (N, 1, H, W) or (N, 3, H, W)")
    label_digits, row_digits = len(str(int(dataset.labels.max()))), len(str(len(dataset) - 1))
    with whole_folder(folder) as partial:
        for row in range(len(dataset)):
            image, label = dataset[row]
            of_class = partial / f"{label:0{label_digits}}"
            of_class.mkdir(exist_ok=True)
            pixels = quantize(image, dataset.bounds).movedim(0, 2).squeeze(2).numpy()
            image_module.fromarray(pixels).save(of_class / f"{row:0{row_digits}}.png")


def _tensors(path: Path) -> Tensor:
    """The rows of a list of tensors, or of one tensor."""
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
