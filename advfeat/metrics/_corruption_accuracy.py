"""Accuracy under common corruptions: built-in ones, or a folder in the layout of CIFAR-10-C."""

from __future__ import annotations

import itertools
import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from advfeat import checks, plots, seeding
from advfeat.attacks.base import prepare_batch
from advfeat.durable import as_path
from advfeat.loading import Data, Source
from advfeat.losses import is_success
from advfeat.metrics._accuracy import accuracy, tensor
from advfeat.metrics._corruptions import CORRUPTIONS, SEVERITIES, Constants, available, corrupted
from advfeat.metrics._outcome import Accuracy
from advfeat.model import attackable, device_of
from advfeat.progress import with_progress
from advfeat.results import Result
from advfeat.suggestions import suggests
from advfeat.tables import Table
from advfeat.threat import Bounds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Accuracies = dict[str, tuple[Accuracy, ...]]


@dataclass(frozen=True, eq=False, repr=False)
class CorruptionAccuracy(Result):
    """Accuracy for each corruption and severity.

    Attributes
    ----------
    accuracy
        By the corruption's name, an `Accuracy` for each severity.
    severities
        Which they are, from 1 to 5.
    clean
        Accuracy without corruption; None for a folder or a mapping, which hold corrupted data only.
    baseline
        The same accuracies of the baseline model; None where there is none.
    """

    accuracy: Accuracies
    severities: tuple[int, ...]
    clean: Accuracy | None = None
    baseline: Accuracies | None = None

    @property
    def error(self) -> dict[str, float]:
        """Error of each corruption, the mean over its severities."""
        return {name: _mean_error(found) for name, found in self.accuracy.items()}

    @property
    def mean(self) -> float:
        """Mean accuracy over corruptions and severities."""
        return 1 - sum(self.error.values()) / len(self.error)

    @property
    def mce(self) -> float:
        """Mean corruption error (mCE).

        With a baseline, the mean over corruptions of the error divided by the baseline's error
        summed over severities, as for ImageNet-C (where the baseline is AlexNet, 1.0 then). Without
        one, the mean error, as is usual for CIFAR-10-C.
        """
        if self.baseline is None:
            return 1 - self.mean
        own, other = self.error, {n: _mean_error(found) for n, found in self.baseline.items()}
        ratios = [own[n] / other[n] if other[n] else float("inf") for n in own]
        return sum(ratios) / len(ratios)

    def _summary(self) -> str:
        return f"{len(self.accuracy)} corruptions, mean accuracy {self.mean:.4f}"

    def _content(self) -> Sequence[str | Table]:
        rows = [(name, *a, 1 - self.error[name]) for name, a in self.accuracy.items()]
        head = ("accuracy", *(f"severity {s}" for s in self.severities), "mean")
        clean = "" if self.clean is None else f"clean {float(self.clean):.4f}, "
        kind = "mean error" if self.baseline is None else "against the baseline"
        return [
            Table(head, rows),
            f"{clean}mean over corruptions {self.mean:.4f}, mCE ({kind}) {self.mce:.4f}",
        ]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Accuracy in percent by corruption and severity, as a heat map."""
        ax = plots.new_axes(ax, 1.0 * len(self.severities) + 2.4, 0.5 * len(self.accuracy) + 1.4)
        values = torch.tensor([[float(a) for a in row] for row in self.accuracy.values()])
        plots.heat_map(ax, 100 * values, list(self.accuracy), [str(s) for s in self.severities])
        ax.set(xlabel="severity", title="accuracy (%)")
        return ax


def _mean_error(found: Sequence[Accuracy]) -> float:
    return 1 - sum(map(float, found)) / len(found)


@suggests
@checks.warns_once()
@torch.no_grad()
def corruption_accuracy(
    model: nn.Module,
    data: Data | str | os.PathLike[str] | Mapping[str, Mapping[int, Data]],
    *,
    corruptions: str | Sequence[str] | None = None,
    severities: int | Sequence[int] = (1, 2, 3, 4, 5),
    constants: Constants = "cifar10",
    baseline: nn.Module | None = None,
    bounds: Bounds = (0.0, 1.0),
    batch_size: int | None = None,
    seed: int | torch.Generator | None = 0,
    progress: bool | None = None,
) -> CorruptionAccuracy:
    """Measure accuracy on corrupted inputs: which features survive noise, blur, contrast, JPEG.

    Parameters
    ----------
    model
        Any module that returns class logits.
    data
        Clean data, as in `accuracy`: they are corrupted here. Or a folder in the layout of
        CIFAR-10-C: ``labels.npy`` and for each corruption an array ``name.npy`` of 8 bits,
        ``(5 * N, H, W, C)``, severity after severity. Or for each corruption its data by severity,
        such as image folders of ImageNet-C.
    corruptions
        A name or several. Built in are "gaussian_noise", "impulse_noise" and "speckle_noise" for
        inputs of any shape, and for images "gaussian_blur", "contrast", "brightness" and, with
        Pillow, "jpeg_compression". By default all that fit the data, or that are in the folder.
    severities
        From 1 to 5, one or several.
    constants
        ``"cifar10"`` or ``"imagenet"``: how strong the built-in ones are at each severity, as in
        the code of CIFAR-10-C and ImageNet-C. Unlike there, values are not cut to 8 bits (except
        by JPEG).
    baseline
        Another model, whose errors normalise those of ``model`` in ``mce``.
    bounds
        Valid range of the inputs.
    batch_size, progress
        As in `accuracy`.
    seed
        Of the noise; a sample's noise depends on it and the sample's index.

    Returns
    -------
    CorruptionAccuracy
        An `Accuracy` for each corruption and severity, and the mean corruption error.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause, before any work is done.
    FileNotFoundError
        There is no such file in the folder.
    ImportError
        JPEG is asked for and Pillow is missing.

    Examples
    --------
    >>> import torch
    >>> from advfeat.metrics import corruption_accuracy
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> data = torch.utils.data.TensorDataset(torch.rand(6, 1, 8, 8), torch.arange(6) % 3)
    >>> found = corruption_accuracy(model, data, corruptions=["contrast"], severities=[1, 5])
    >>> len(found.accuracy["contrast"])
    2
    """
    severities = _checked_severities(severities)
    corruptions = [corruptions] if isinstance(corruptions, str) else corruptions
    checks.one_of("constants", constants, ("cifar10", "imagenet"))
    checks.seed(seed)
    models = [model] if baseline is None else [model, baseline]
    for each in models:
        checks.model(each)
    if isinstance(data, (str, os.PathLike)):
        data = _read_folder(as_path(data), corruptions, severities, bounds)
    if isinstance(data, Mapping):
        named = _chosen(data, corruptions, severities)
        found = [
            {
                name: tuple(
                    accuracy(each, by[s], batch_size=batch_size, progress=progress)
                    for s in severities
                )
                for name, by in named.items()
            }
            for each in models
        ]
        return CorruptionAccuracy(found[0], severities, None, found[1] if baseline else None)
    source = Source(data, batch_size, device_of(model))
    own = _BuiltIn(source, corruptions, severities, constants, seeding.resolve(seed), bounds)
    measured = [own.measure(each, progress) for each in models]
    clean, accuracies = measured[0]
    other = measured[1][1] if baseline is not None else None
    return CorruptionAccuracy(accuracies, severities, clean, other)


def _checked_severities(severities: int | Sequence[int]) -> tuple[int, ...]:
    found = tuple(severities) if isinstance(severities, Iterable) else (severities,)
    if not found or any(s not in range(1, SEVERITIES + 1) for s in found):
        checks.fail("severities", list(found), "numbers from 1 to 5")
    return tuple(int(s) for s in found)


class _BuiltIn:
    """Clean data, corrupted batch by batch."""

    def __init__(
        self,
        source: Source,
        names: Sequence[str] | None,
        severities: tuple[int, ...],
        constants: Constants,
        seed: int,
        bounds: Bounds,
    ) -> None:
        self._source, self._severities, self._constants = source, severities, constants
        self._names = None if names is None else tuple(names)
        self._seed, (self._low, self._high) = seed, checks.bounds(bounds)
        for name in self._names or ():
            checks.one_of("corruptions", name, tuple(CORRUPTIONS))
        if self._names == ():
            checks.fail("corruptions", [], "name at least one, or leave it out for all")

    def measure(
        self, model: nn.Module, progress: bool | None
    ) -> tuple[Accuracy, dict[str, tuple[Accuracy, ...]]]:
        """Accuracy on clean inputs, and on all corrupted ones, in one reading of the data."""
        index, clean = array("q"), array("b")
        right: dict[tuple[str, int], array[int]] = {}
        batches = with_progress(
            self._source.batches(device_of(model)),
            total=self._source.batch_count,
            label="corruptions",
            progress=progress,
        )
        low, size = self._low, self._high - self._low
        with attackable(model, purpose="predictions") as net:
            net.batches.usual = self._source.batch_size
            for read in batches:
                own = low, self._high
                batch = prepare_batch(
                    net, read.inputs, read.labels, read.ids, own, extras=read.entries
                )
                unit = ((batch.inputs - low) / size).contiguous()
                keys = seeding.keys(self._seed, batch.ids)
                index.extend(batch.ids.tolist())
                cases = list(itertools.product(self._fitting(unit), self._severities))
                with net.given(batch.extras):
                    hits = is_success(net.logits(batch.inputs), batch.labels, True)
                    clean.extend(hits.tolist())
                    for name, severity in cases:
                        images = corrupted(unit, name, severity, self._constants, keys)
                        inputs = net.prepare(low + size * images)
                        hits = is_success(net.logits(inputs), batch.labels, True)
                        right.setdefault((name, severity), array("b")).extend(hits.tolist())
        numbers = tensor(index)
        found = {key: Accuracy.of(tensor(hits).bool(), numbers) for key, hits in right.items()}
        names = dict.fromkeys(name for name, _ in found)
        return Accuracy.of(tensor(clean).bool(), numbers), {
            name: tuple(found[name, severity] for severity in self._severities) for name in names
        }

    def _fitting(self, images: Tensor) -> tuple[str, ...]:
        shape = tuple(images.shape)
        if self._names is None:
            return available(shape)
        for name in self._names:
            if CORRUPTIONS[name].images_only and len(shape) != 4:
                checks.fail("corruptions", name, f"needs images (N, C, H, W); these are {shape}")
        return self._names


def _chosen(
    data: Mapping[str, Mapping[int, Data]],
    names: Sequence[str] | None,
    severities: tuple[int, ...],
) -> dict[str, Mapping[int, Data]]:
    chosen = {}
    for name in list(data) if names is None else names:
        if name not in data:
            checks.fail("corruptions", name, f"the data have {sorted(data)}")
        if not isinstance(data[name], Mapping):
            kind = type(data[name]).__name__
            raise TypeError(f"data[{name!r}]: expected data by severity, {{1: ...}}, got {kind}")
        missing = [s for s in severities if s not in data[name]]
        if missing:
            checks.fail("severities", missing, f"{name!r} has {sorted(data[name])}")
        chosen[name] = data[name]
    if not chosen:
        checks.fail("corruptions", names, "no corruption is there")
    return chosen


class _ImagesOfFile(Dataset[tuple[Tensor, int]]):
    """Images of 8 bits in an array file, read where they are needed."""

    def __init__(self, images: Any, labels: Any, first: int, bounds: Bounds) -> None:
        self._images, self._labels, self._first, self._bounds = images, labels, first, bounds

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        low, high = self._bounds
        image = torch.from_numpy(np.array(self._images[self._first + place])).movedim(-1, 0)
        return low + (high - low) * (image.float() / 255), int(self._labels[place])


def _read_folder(
    folder: Path, names: Sequence[str] | None, severities: tuple[int, ...], bounds: Bounds
) -> dict[str, dict[int, Data]]:
    """Open a folder in the layout of CIFAR-10-C."""
    bounds = checks.bounds(bounds)
    labels = _read_array(folder / "labels.npy")
    found = sorted(path.stem for path in folder.glob("*.npy") if path.stem != "labels")
    read: dict[str, dict[int, Data]] = {}
    for name in found if names is None else names:
        images = _read_array(folder / f"{name}.npy")
        count, rest = divmod(len(images), SEVERITIES)
        if images.dtype != np.uint8 or images.ndim != 4 or rest or len(labels) not in (
            count, len(images),
        ):  # fmt: skip
            kind = f"{images.dtype} {images.shape} with {len(labels)} labels"
            checks.fail("data", f"{name}.npy", f"expected uint8 (5 * N, H, W, C), got {kind}")
        places = {s: (s - 1) * count for s in severities}
        own = {s: labels[(p if len(labels) > count else 0) :][:count] for s, p in places.items()}
        read[name] = {s: _ImagesOfFile(images, own[s], p, bounds) for s, p in places.items()}
    return read


def _read_array(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"data={str(path.parent)!r}: there is no {path.name}")
    return np.load(path, mmap_mode="r", allow_pickle=False)
