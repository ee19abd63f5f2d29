"""What a careful user checks before training on a constructed dataset, and its controls."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from advfeat import checks, plots, seeding, threat
from advfeat.datasets.dataset import ConstructedDataset
from advfeat.datasets.definition import (
    Feature,
    FeatureUsefulness,
    distance_left,
    feature_usefulness,
    notes,
)
from advfeat.datasets.folder import Array
from advfeat.datasets.source import check_source
from advfeat.loading import Data, Source
from advfeat.results import Result
from advfeat.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Inspection", "inspect", "moved_control", "noise_control"]

_BATCH = 1024
_BINS = 10


@dataclass(frozen=True, repr=False)
class Inspection(Result):
    """What `inspect` found; printed, a short table. None is what the dataset does not record."""

    method: str
    samples: int
    label_counts: tuple[int, ...]  # by class
    lowest: float
    highest: float
    outside: int  # images that leave the bounds, or hold NaN
    duplicates: int  # images that another sample has too
    size_counts: tuple[int, ...] | None  # histogram of the perturbations' norms
    size_edges: tuple[float, ...] | None
    success: float | None  # fraction of samples for which the model says the label
    success_unrounded: float | None  # before images were rounded to 256 levels
    own_label: float | None  # fraction of samples whose target is their true label, t = y
    distance_before: float | None  # mean distance of activations, at the start
    distance: float | None  # and at the end
    distance_unrounded: float | None
    rounding: float | None  # mean l2 that images were moved by rounding
    # Mean of abs(x_r - x) / abs(x_0 - x): what is left of the way to the original; needs `data`.
    distance_left: float | None = None
    # E[y f] of the given features on original and constructed data; needs `data`.
    features: Mapping[str, FeatureUsefulness] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what the definition asks and the numbers deny, with a remedy

    def _summary(self) -> str:
        return f"{self.method}, {self.samples} samples, {len(self.notes)} notes"

    def _content(self) -> Sequence[str | Table]:
        counts = self.label_counts
        lines = [
            f"{self.method}: {self.samples} samples, {len(counts)} classes of {min(counts)} to "
            f"{max(counts)} samples",
            f"pixels from {self.lowest:.4g} to {self.highest:.4g}; {self.outside} images outside "
            f"the bounds, {self.duplicates} duplicates",
        ]
        if self.size_counts is not None and self.size_edges is not None:
            lines += self._sizes(self.size_counts, self.size_edges)
        for name, value in (
            ("attack success", self.success),
            ("attack success before rounding", self.success_unrounded),
            ("fraction with t = y", self.own_label),
            ("distance before", self.distance_before),
            ("distance after", self.distance),
            ("distance after, before rounding", self.distance_unrounded),
            ("l2 moved by rounding", self.rounding),
            ("fraction of the way to the original that is left", self.distance_left),
        ):
            if value is not None:
                lines.append(f"{name}: {value:.4g}")
        lines += [
            f"usefulness of {name} features: {found}" for name, found in self.features.items()
        ]
        lines += [f"note: {text}" for text in self.notes]
        return lines

    def plot(self, ax: Axes | None = None) -> Axes:
        """Histogram of the perturbations' sizes; where there are none, samples of each class."""
        ax = plots.new_axes(ax)
        if self.size_counts is None or self.size_edges is None:
            ax.bar(range(len(self.label_counts)), self.label_counts, color=plots.COLORS[4])
            ax.set(xlabel="label", ylabel="samples")
        else:
            ax.stairs(self.size_counts, self.size_edges, fill=True, color=plots.COLORS[4])
            ax.set(xlabel="size of the perturbation", ylabel="samples")
        return ax

    @staticmethod
    def _sizes(counts: tuple[int, ...], edges: tuple[float, ...]) -> list[str]:
        """The histogram, or one line where all sizes agree to four digits, as on a ball's edge."""
        if f"{edges[0]:.4g}" == f"{edges[-1]:.4g}":
            return [f"size of the perturbation: {edges[-1]:.4g}"]
        bins = zip(edges, edges[1:], counts, strict=False)
        return ["size of the perturbation:"] + [
            f"    {low:.4g} to {high:.4g}: {count}" for low, high, count in bins
        ]


def inspect(
    dataset: ConstructedDataset,
    data: Data | None = None,
    *,
    features: Mapping[str, Feature] | None = None,
    samples: int = 2000,
    seed: int | torch.Generator | None = None,
) -> Inspection:
    """Check every sample of a dataset for what would spoil training on it.

    Reads a part of the images at a time, so a dataset on disk may be larger than memory. With the
    data that it was constructed from, it also measures how much of the original images came back,
    and with ``features`` whether it satisfies its definition: equations 5 (D_R), 8 (D_rand) and 9
    (D_det) of the paper.

    Parameters
    ----------
    dataset, data
        Any constructed dataset, and what it was constructed from.
    features
        By name: a function ``inputs -> (N, F)``, a model (its units before the last Linear), or
        ``(model, layer)``. Those named ``"robust"``, and ``"standard"`` or ``"nonrobust"``, are
        compared with what the definition asks: ``{"robust": robust, "standard": standard}``.
    samples
        How many samples features are measured on; half of them choose signs and weights.
    seed
        Of these samples and the bootstrap; None draws one number from torch's generator.

    Returns
    -------
    Inspection
        Prints as a short table; ``notes`` has a sentence for each thing to change.

    Raises
    ------
    ValueError, TypeError
        ``features`` without ``data``, or another kind of dataset.

    Examples
    --------
    >>> import torch
    >>> import advfeat as af
    >>> data = torch.utils.data.TensorDataset(torch.eye(3), torch.arange(3))
    >>> made = af.construct_det_dataset(torch.nn.Identity(), data, eps=0.9, steps=10)
    >>> found = inspect(made)
    >>> found.success, found.own_label, found.label_counts
    (1.0, 0.0, (1, 1, 1))
    """
    checks.count("samples", samples, low=4)
    checks.seed(seed)
    if features and data is None:
        checks.fail("data", None, "features are compared with the original samples; pass data=")
    if not isinstance(dataset, ConstructedDataset):
        raise TypeError(f"dataset: expected a ConstructedDataset, got {type(dataset).__name__}")
    found = _inspect(dataset)
    if data is None:
        return found
    source, measured = _source(dataset, data), {}
    if features:
        measured = feature_usefulness(dataset, source, features, samples=samples, seed=seed)
    before, after = found.distance_before, found.distance
    left = after / before if before and after is not None else None
    remarks = tuple(notes(found.method, measured, success=found.success, left=left))
    return replace(
        found, distance_left=distance_left(dataset, source), features=measured, notes=remarks
    )


def _inspect(dataset: ConstructedDataset) -> Inspection:
    """Everything that the dataset tells by itself."""
    low, high = dataset.bounds
    lowest, highest, outside = np.inf, -np.inf, 0
    seen: dict[bytes, int] = {}
    for part in _parts(dataset):
        smallest, largest = part.flatten(1).aminmax(dim=1)
        lowest, highest = min(lowest, float(smallest.min())), max(highest, float(largest.max()))
        # NaN fails this comparison too.
        outside += int((~((smallest >= low - 1e-6) & (largest <= high + 1e-6))).sum())
        for image in part.contiguous().numpy():
            key = hashlib.blake2b(image.data, digest_size=16).digest()
            seen[key] = seen.get(key, 0) + 1
    has = dataset.fields.keys()
    # In float64: bins between norms that differ by rounding alone have no width in float32.
    sizes = dataset.field("size").double() if "size" in has else None
    counts, edges = (None, None) if sizes is None else np.histogram(sizes, _BINS)
    own = dataset.labels == dataset.field("source_labels") if "source_labels" in has else None

    def mean(name: str) -> float | None:
        return float(dataset.field(name).double().mean()) if name in has else None

    return Inspection(
        method=str(dataset.manifest.get("method", "unknown")),
        samples=len(dataset),
        label_counts=tuple(torch.bincount(dataset.labels).tolist()),
        lowest=lowest,
        highest=highest,
        outside=outside,
        duplicates=sum(count for count in seen.values() if count > 1),
        size_counts=None if counts is None else tuple(counts.tolist()),
        size_edges=None if edges is None else tuple(edges.tolist()),
        success=mean("success"),
        success_unrounded=mean("success_unrounded"),
        own_label=None if own is None else float(own.double().mean()),
        distance_before=mean("distance_before"),
        distance=mean("distance"),
        distance_unrounded=mean("distance_unrounded"),
        rounding=mean("rounding"),
    )


def noise_control(
    dataset: ConstructedDataset, data: Data, *, seed: int | torch.Generator | None = None
) -> ConstructedDataset:
    """Make the same dataset with noise in place of the perturbations: what its labels alone teach.

    Every image is the one that the perturbation started from, moved by noise of the same norm, with
    the same label. A model trained on it should be at chance (D_rand) or at what the true labels
    say of the targets (D_det: always wrong).

    Parameters
    ----------
    dataset
        D_det or D_rand, or D_R or D_NR with ``start="images"``.
    data
        What it was constructed from.
    seed
        Of the noise; None draws one number from torch's default generator.

    Returns
    -------
    ConstructedDataset
        In memory: ``images``, ``labels``, ``index`` and ``size``.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause.

    Examples
    --------
    >>> import torch
    >>> import advfeat as af
    >>> data = torch.utils.data.TensorDataset(torch.rand(8, 6), torch.arange(8) % 3)
    >>> model = torch.nn.Linear(6, 3)
    >>> made = af.construct_det_dataset(model, data, eps=0.1, steps=5)
    >>> control = noise_control(made, data, seed=0)
    >>> bool((control.field("size") - made.field("size")).abs().max() < 1e-4)
    True
    """
    checks.seed(seed)
    drawn = seeding.resolve(seed)
    source, norm, (low, high) = _source(dataset, data), _norm(dataset), dataset.bounds
    images = np.empty(dataset.fields["images"].shape, np.float32)
    for places, base in _bases(dataset, source):
        keys = seeding.keys(drawn, torch.from_numpy(places))
        normal = torch.special.ndtri(seeding.uniform(keys, 0, base[0].numel())).view(base.shape)
        # In l_inf a perturbation goes all the way in every pixel.
        noise = normal.sign() if norm == "linf" else normal
        wanted = dataset.field("size")[places]
        images[places] = _moved(base, noise, wanted, norm, low, high).numpy()
    return _control(dataset, source, images, np.arange(len(dataset)), "noise")


def moved_control(
    dataset: ConstructedDataset, data: Data, *, seed: int | torch.Generator | None = None
) -> ConstructedDataset:
    """Move each perturbation to another image with the same label: what perturbations alone teach.

    Every perturbation and every image occurs once; the only sample of a label is left out. Of a
    dataset with several starts, perturbations are exchanged among samples of the same start.

    Parameters
    ----------
    dataset, data
        As in `noise_control`.
    seed
        Of the exchange; None draws one number from torch's default generator.

    Returns
    -------
    ConstructedDataset
        In memory: ``images``, ``labels``, ``index``, ``size`` and ``moved_from``, the sample of
        ``dataset`` that the perturbation is from.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause.

    Examples
    --------
    >>> import torch
    >>> import advfeat as af
    >>> data = torch.utils.data.TensorDataset(torch.rand(8, 6), torch.arange(8) % 2)
    >>> made = af.construct_det_dataset(torch.nn.Linear(6, 2), data, eps=0.1, steps=5)
    >>> control = moved_control(made, data, seed=0)
    >>> bool((control.field("moved_from") != torch.arange(8)).all())
    True
    """
    checks.seed(seed)
    generator = seeding.generator(seeding.resolve(seed))
    source, labels, (low, high) = _source(dataset, data), dataset.labels, dataset.bounds
    giver = torch.full((len(dataset),), -1)
    groups = labels
    if "start_number" in dataset.fields:
        # Within a start every image occurs once: none is given a perturbation of its own.
        groups = labels + (int(labels.max()) + 1) * dataset.field("start_number")
    for group in sorted(set(groups.tolist())):
        members = (groups == group).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        if len(members) > 1:
            giver[members] = members.roll(1)
    kept = (giver >= 0).nonzero().squeeze(1)
    if not len(kept):
        checks.fail("dataset", len(dataset), "no label has two samples to exchange")
    deltas = torch.empty(dataset.fields["images"].shape)
    for places, base in _bases(dataset, source):
        deltas[places] = dataset.subset(places).images - base
    images = np.empty(deltas.shape, np.float32)
    for places, base in _bases(dataset, source):
        images[places] = (base + deltas[giver[places]]).clamp(low, high).numpy()
    control = _control(dataset, source, images[kept.numpy()], kept.numpy(), "moved perturbations")
    control.fields["moved_from"] = giver[kept].numpy()
    return control


def _control(
    dataset: ConstructedDataset, source: Source, images: Array, places: Array, name: str
) -> ConstructedDataset:
    fields = {"images": images} | {
        field: np.array(dataset.fields[field][places])
        for field in ("labels", "index", "source_labels", "start_index", "start_number")
        if field in dataset.fields
    }
    manifest = {**dataset.manifest, "method": f"{dataset.manifest.get('method')}, {name}"}
    control = ConstructedDataset(fields, manifest)
    sizes = [
        threat.size(control.subset(part).images - base, _norm(dataset))
        for part, base in _bases(control, source)
    ]
    control.fields["size"] = torch.cat(sizes).numpy()
    return control


def _moved(
    base: Tensor, noise: Tensor, wanted: Tensor, norm: threat.Norm, low: float, high: float
) -> Tensor:
    """Images at the wanted distance along the noise, as far as the bounds lets them."""
    scale = wanted / threat.size(noise, norm)
    for _ in range(20):
        moved = (base + threat.per_sample(scale, noise) * noise).clamp(low, high)
        # What the bounds took is made up for by a longer step.
        scale = scale * (wanted / threat.size(moved - base, norm).clamp_min(1e-12)).clamp(0.5, 2)
    return moved


def _bases(dataset: ConstructedDataset, source: Source) -> Iterator[tuple[Array, Tensor]]:
    """The samples a part at a time, each with the images that its perturbations started from."""
    has_start = "start_index" in dataset.fields
    if "distance" in dataset.fields and not has_start:
        checks.fail("dataset", repr(dataset), "a control needs start='images'")
    index = dataset.field("start_index" if has_start else "index").numpy()
    for at in range(0, len(dataset), _BATCH):
        places = np.arange(at, min(at + _BATCH, len(dataset)))
        found = source.samples(index[places].tolist(), torch.device("cpu")).inputs
        yield places, found.to(torch.float32)


def _source(dataset: ConstructedDataset, data: Data) -> Source:
    """The data of a dataset, if they are the ones that it was constructed from."""
    source = Source(data)
    check_source(dataset.manifest, source)
    return source


def _norm(dataset: ConstructedDataset) -> threat.Norm:
    norm: threat.Norm = dataset.manifest.get("settings", {}).get("norm", "l2")
    return norm


def _parts(dataset: ConstructedDataset) -> Iterator[Tensor]:
    for at in range(0, len(dataset), _BATCH):
        yield dataset.subset(slice(at, at + _BATCH)).images
