"""D_R and D_NR: images with the activations of others."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from advfeat import checks, seeding, threat
from advfeat.attacks import Batch
from advfeat.attacks.inversion import Inversion
from advfeat.construction.builder import build_dataset, indexed_source
from advfeat.construction.provenance import layer_name
from advfeat.construction.recipe import (
    BuildOptions,
    DatasetRecipe,
    sample_id,
    source_index,
    start_number,
)
from advfeat.datasets import ConstructedDataset
from advfeat.datasets.source import digest
from advfeat.loading import Data, Source
from advfeat.model import Layer, Network
from advfeat.threat import FeatureBounds

Start: TypeAlias = Literal["images", "noise"] | Tensor


class InvertedDataset(DatasetRecipe):
    """Images with the activations of others: D_R or D_NR, as the model is robust or standard."""

    purpose = "features"

    def __init__(
        self,
        method: str,
        attack: Inversion,
        layer: Layer,
        start: Start,
        starts: int,
        seed: int,
        source: Source,
        straight_through: bool,
    ) -> None:
        self.straight_through = straight_through
        self.method, self.attack, self.layer, self.starts = method, attack, layer, starts
        self._start, self._seed, self._indices = start, seed, source.indices
        self._places = {index: place for place, index in enumerate(source.indices)}

    def settings(self, model: nn.Module) -> dict[str, Any]:
        """Seed, start and layer."""
        start = self._start
        if isinstance(start, Tensor):
            start = "given, sha256 " + digest([start])  # type: ignore[assignment]
        # Without it, as in manifests from before there were several.
        several = {"starts": self.starts} if self.starts > 1 else {}
        straight = {"straight_through": True} if self.straight_through else {}
        own = {"seed": self._seed, "start": start, "layer": layer_name(model, self.layer)}
        return own | several | straight

    def provenance(self, net: Network, batch: Batch) -> dict[str, Any]:
        """Name and width of the layer."""
        return {"layer": net.describe_layer(batch.inputs)}

    def companions(self, ids: list[int]) -> list[int]:
        """Another image for each sample, uniform over all the others: where it starts.

        The starts of one sample are different images.
        """
        if isinstance(self._start, Tensor) or self._start != "images":
            return []
        count, own = len(self._indices), torch.tensor(ids, device="cpu")
        places = [self._places[index] for index in source_index(own).tolist()]
        chosen = self._offsets(own)
        return [
            self._indices[(place + 1 + offset) % count]
            for place, offset in zip(places, chosen.tolist(), strict=True)
        ]

    def _offsets(self, ids: Tensor) -> Tensor:
        """Uniform integers below the number of other images; distinct over a sample's starts."""
        others, numbers, indices = len(self._indices) - 1, start_number(ids), source_index(ids)
        drawn = torch.empty(int(numbers.max()) + 1, len(ids), dtype=torch.int64, device="cpu")
        for number in range(len(drawn)):
            keys = seeding.keys(self._seed, sample_id(indices, number))
            drawn[number] = seeding.integers(keys, 0, others)
            draw = 1
            while (used := (drawn[:number] == drawn[number]).any(0)).any():
                drawn[number, used] = seeding.integers(keys[used], draw, others)
                draw += 1
        return drawn[numbers, torch.arange(len(ids), device="cpu")]

    def given_starts(self, ids: list[int]) -> Tensor | None:
        """The user's, by place."""
        if not isinstance(self._start, Tensor):
            return None
        own = torch.tensor(ids, device="cpu")
        places = [self._places[index] for index in source_index(own).tolist()]
        if self.starts == 1:
            return self._start[places]
        return self._start[start_number(own), places]

    def begin(self, net: Network, batch: Batch) -> Batch:
        """Start elsewhere."""
        if batch.start is None:
            return batch._replace(start=_noise(batch, self._seed, self.attack.bounds))
        if batch.start.shape != batch.inputs.shape:
            checks.fail("start.shape", tuple(batch.start.shape), "must be that of the images")
        return batch

    def describe(
        self, net: Network, batch: Batch, attacked: Batch, images: Tensor
    ) -> dict[str, Tensor]:
        """How near the activations have come, and how far the image has moved."""
        assert attacked.start is not None
        goal = net.features(batch.inputs)
        return {
            "labels": batch.labels,
            "distance": threat.size(net.features(images) - goal, "l2"),
            "distance_before": threat.size(net.features(attacked.start) - goal, "l2"),
            "size": threat.size(images - attacked.start, "l2"),
        }


def build_inverted(
    model: nn.Module,
    data: Data,
    *,
    method: str,
    layer: Layer,
    start: Start,
    starts: int,
    steps: int,
    step_size: float,
    momentum: float,
    bounds: FeatureBounds,
    seed: int | torch.Generator | None,
    patience: int | None,
    straight_through: bool,
    options: BuildOptions,
) -> ConstructedDataset:
    """Invert the activations of every sample."""
    checks.model(model)
    attack = Inversion(
        steps=steps, step_size=step_size, momentum=momentum, bounds=bounds, patience=patience
    )
    checks.seed(seed)
    source = indexed_source(model, data, options)
    _check_start(start, starts, len(source), attack.bounds)
    drawn = options.seed(seed)
    recipe = InvertedDataset(method, attack, layer, start, starts, drawn, source, straight_through)
    return build_dataset(model, source, recipe, options)


def _check_start(start: Start, starts: int, count: int, bounds: FeatureBounds) -> None:
    """Check where inversions start, and how many of them there are for each sample."""
    checks.count("starts", starts, low=1)
    if not isinstance(start, str):
        checks.inputs(start, bounds, "start")
        expected = (count,) if starts == 1 else (starts, count)
        if tuple(start.shape[: len(expected)]) != expected:
            cause = f"expected {expected} images: one for each sample"
            checks.fail("start.shape", tuple(start.shape), cause + " and start" * (starts > 1))
        return
    checks.one_of("start", start, ("images", "noise"))
    if start == "images" and count < 2:
        checks.fail("start", start, "there is no other image to start from; use start='noise'")
    if start == "images" and starts > count - 1:
        checks.fail("starts", starts, f"there are {count - 1} other images to start from")


def _noise(batch: Batch, seed: int, bounds: FeatureBounds) -> Tensor:
    """The released notebook's start, N(0, 1) / 20 + 0.5 of the bounds's width."""
    keys = seeding.keys(seed, batch.ids)
    normal: Tensor = torch.special.ndtri(seeding.uniform(keys, 0, batch.inputs[0].numel()))
    low, high = (end.to(normal) if isinstance(end, Tensor) else end for end in bounds)
    noise = low + (high - low) * (normal.view(batch.inputs.shape) / 20 + 0.5)
    noise = noise.to(batch.inputs.dtype, memory_format=torch.preserve_format)
    return threat.clip(noise, bounds, inplace=True)
