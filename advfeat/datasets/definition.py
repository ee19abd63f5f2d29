"""Does a constructed dataset satisfy its definition? Equations 5, 8 and 9, measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from advfeat import checks, seeding
from advfeat.class_correlation import signed_correlation
from advfeat.datasets.dataset import ConstructedDataset
from advfeat.loading import Source
from advfeat.model import Layer, attackable, device_of
from advfeat.results import Result

# Features of a batch, ``(N, ...)``; or a model (the input of its last Linear), or with a layer.
Feature: TypeAlias = Callable[[Tensor], Tensor] | nn.Module | tuple[nn.Module, Layer]

_BATCH, _RESAMPLES = 256, 200
# How much of their usefulness features may keep that should have none, and must keep that should.
_MOST_KEPT, _LEAST_KEPT = 0.5, 0.5


@dataclass(frozen=True, repr=False)
class FeatureUsefulness(Result):
    """E[y f] of a group of features, on the original and on the constructed data.

    The mean over units and classes, weighted by how useful each is. Signs and weights are from one
    half of the original samples, everything else from the other half. Intervals are 95%, from a
    bootstrap over samples.
    """

    original: float
    original_interval: tuple[float, float]
    constructed: float
    constructed_interval: tuple[float, float]

    @property
    def kept(self) -> float:
        """Constructed over original: 1 where all usefulness is kept, below 0 where reversed."""
        return self.constructed / self.original if self.original else float("nan")

    def _summary(self) -> str:
        low, high = self.original_interval
        least, most = self.constructed_interval
        return (
            f"{self.original:.3f} ({low:.3f} to {high:.3f}) on original data, "
            f"{self.constructed:+.3f} ({least:+.3f} to {most:+.3f}) on constructed"
        )


class _Pair(NamedTuple):
    """Some samples: original and constructed, with their labels."""

    inputs: Tensor
    labels: Tensor
    made: Tensor
    targets: Tensor


def feature_usefulness(
    dataset: ConstructedDataset,
    source: Source,
    features: Mapping[str, Feature],
    *,
    samples: int,
    seed: int | torch.Generator | None,
) -> dict[str, FeatureUsefulness]:
    """Measure each group of features on the original and the constructed samples."""
    if not isinstance(features, Mapping):
        raise TypeError(
            f"features: expected features by name, {{'standard': model}}, got "
            f"{type(features).__name__}"
        )
    generator = seeding.generator(seeding.resolve(seed))
    chosen = torch.randperm(len(dataset), generator=generator)[:samples]
    halves = [_pair(dataset, source, places.sort().values) for places in chosen.chunk(2)]
    if len(halves) < 2:
        checks.fail("dataset", len(dataset), "at least two samples are needed")
    classes = 1 + max(int(part.max()) for pair in halves for part in (pair.labels, pair.targets))
    if len(halves[0].labels.unique()) < 2:  # type: ignore[no-untyped-call]
        checks.fail("data", "samples of one class", "usefulness compares a class with the rest")
    return {
        str(name): _measure(feature, halves[0], halves[1], classes, generator)
        for name, feature in features.items()
    }


def _pair(dataset: ConstructedDataset, source: Source, places: Tensor) -> _Pair:
    part = dataset.subset(places)
    found = source.samples(part.field("index").tolist(), torch.device("cpu"))
    return _Pair(found.inputs.float(), found.labels, part.images, part.labels)


def _measure(
    feature: Feature, first: _Pair, second: _Pair, classes: int, generator: torch.Generator
) -> FeatureUsefulness:
    weight = signed_correlation(_values(feature, first.inputs), first.labels, classes)
    weight = weight.nan_to_num(0.0)
    original, constructed = (_values(feature, part) for part in (second.inputs, second.made))

    def means(places: Tensor | slice) -> Tensor:
        found = [
            signed_correlation(values[places], labels[places], classes)
            for values, labels in ((original, second.labels), (constructed, second.targets))
        ]
        total = weight.abs().sum().clamp_min(1e-12)
        return torch.stack([(weight * part.nan_to_num(0.0)).sum() / total for part in found])

    value = means(slice(None))
    count = len(second.labels)
    drawn = torch.stack(
        [means(torch.randint(count, (count,), generator=generator)) for _ in range(_RESAMPLES)]
    )
    ends = drawn.quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype), dim=0).T.tolist()
    return FeatureUsefulness(float(value[0]), tuple(ends[0]), float(value[1]), tuple(ends[1]))


def _values(feature: Feature, inputs: Tensor) -> Tensor:
    """Features of all inputs, ``(N, F)`` on the CPU."""
    model, layer = feature if isinstance(feature, tuple) else (feature, None)
    if not isinstance(model, nn.Module):
        if not callable(model):
            raise TypeError(f"features: expected a function or a model, got {type(model).__name__}")
        with torch.no_grad():
            parts = [model(part).flatten(1).cpu() for part in inputs.split(_BATCH)]  # type: ignore[no-untyped-call]
        return torch.cat(parts)
    device = device_of(model)
    with attackable(model, layer=layer) as net, torch.no_grad():
        parts = [
            net.features(net.prepare(part.to(device))).flatten(1).float().cpu()
            for part in inputs.split(_BATCH)  # type: ignore[no-untyped-call]
        ]
    return torch.cat(parts)


def distance_left(dataset: ConstructedDataset, source: Source) -> float | None:
    """Mean of abs(x_r - x) / abs(x_0 - x): how far images still are from the originals.

    None where the starts are not images of the source. A start that equals the original, as a
    duplicate does, has no distance to leave and is not counted.
    """
    if "start_index" not in dataset.fields:
        return None
    left = []
    for at in range(0, len(dataset), _BATCH):
        part = dataset.subset(slice(at, at + _BATCH))
        original, start = (
            source.samples(part.field(name).tolist(), torch.device("cpu")).inputs.double()
            for name in ("index", "start_index")
        )
        moved, whole = (
            (images.double() - original).flatten(1).norm(dim=1) for images in (part.images, start)
        )
        left.append((moved / whole)[whole > 0])
    counted = torch.cat(left)
    return float(counted.mean()) if len(counted) else None


def notes(
    method: str,
    features: Mapping[str, FeatureUsefulness],
    *,
    success: float | None,
    left: float | None,
) -> Iterator[str]:
    """What the definition asks and the numbers deny, each with what to change.

    Features named "robust", and "standard" or "nonrobust", are judged.
    """
    if success is not None and success < 0.6:
        yield f"only {success:.0%} of the samples reach their label; raise eps or steps"
    if left is not None and left > 0.15:
        yield (
            f"{left:.0%} of the distance of activations is left: the inversion is not finished; "
            "take more steps, a larger step_size, or momentum=0.6"
        )
    robust = features.get("robust")
    fragile = features.get("nonrobust", features.get("standard"))
    if method == "D_R":
        if robust is not None and robust.kept < _LEAST_KEPT:
            yield (
                f"the robust features keep {robust.kept:.0%} of their usefulness, and eq. 5 asks "
                "for all of it; take more steps, or check layer="
            )
        if fragile is not None and fragile.kept > _MOST_KEPT:
            yield (
                f"the other model's features keep {fragile.kept:.0%} of their usefulness, and "
                "eq. 5 asks for none: part of it is robust; the rest leaks, and more steps leave "
                "less of it"
            )
    if method in ("D_det", "D_rand"):
        if fragile is not None and fragile.constructed_interval[0] <= 0:
            yield (
                f"the non-robust features are not useful here ({fragile.constructed:+.3f}), and "
                "eq. 8 and 9 ask for that; raise eps or steps"
            )
        high = 0.0 if robust is None else robust.constructed_interval[1]
        low = 0.0 if robust is None else robust.constructed_interval[0]
        if robust is not None and method == "D_rand" and low > 0:
            yield (
                f"robust features still agree with the labels ({robust.constructed:+.3f}), and "
                "eq. 8 asks for 0: the perturbation changes them; lower eps"
            )
        if robust is not None and method == "D_det" and high >= 0:
            yield (
                f"robust features are not reversed ({robust.constructed:+.3f}), and eq. 9 asks for "
                "less than 0: the perturbation changes them; lower eps"
            )
