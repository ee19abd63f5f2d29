"""D_R and D_NR: images with the activations of others."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from advfeat import checks, seeding, threat
from advfeat.attacks import Batch
from advfeat.attacks.inversion import Inversion
from advfeat.construction.builder import build_dataset, indexed_source
from advfeat.construction.provenance import digest, layer_name
from advfeat.construction.recipe import BuildOptions, DatasetRecipe
from advfeat.datasets import ConstructedDataset
from advfeat.loading import Data, Source
from advfeat.model import Layer, Network
from advfeat.threat import Bounds

Start: TypeAlias = Literal["images", "noise"] | Tensor


class InvertedDataset(DatasetRecipe):
    """Images with the activations of others: D_R or D_NR, as the model is robust or standard."""

    def __init__(
        self, method: str, attack: Inversion, layer: Layer, start: Start, seed: int, source: Source
    ) -> None:
        self.method, self.attack, self.layer = method, attack, layer
        self._start, self._seed, self._rows = start, seed, source.indices
        self._places = {row: place for place, row in enumerate(source.indices)}

    def settings(self, model: nn.Module) -> dict[str, Any]:
        """Seed, start and layer."""
        start = self._start
        if isinstance(start, Tensor):
            start = "given, sha256 " + digest([start])  # type: ignore[assignment]
        return {"seed": self._seed, "start": start, "layer": layer_name(model, self.layer)}

    def companions(self, ids: list[int]) -> list[int]:
        """Another row for each row, uniform over all the others: where it starts."""
        if isinstance(self._start, Tensor) or self._start != "images":
            return []
        count = len(self._rows)
        steps_on = seeding.integers(seeding.keys(self._seed, torch.tensor(ids)), 0, count - 1)
        return [
            self._rows[(self._places[row] + 1 + on) % count]
            for row, on in zip(ids, steps_on.tolist(), strict=True)
        ]

    def given_starts(self, ids: list[int]) -> Tensor | None:
        """The user's, by place."""
        if isinstance(self._start, Tensor):
            return self._start[[self._places[row] for row in ids]]
        return None

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
    steps: int,
    step_size: float,
    momentum: float,
    bounds: Bounds,
    seed: int | torch.Generator | None,
    patience: int | None,
    options: BuildOptions,
) -> ConstructedDataset:
    """Invert the activations of every row."""
    checks.model(model)
    attack = Inversion(
        steps=steps, step_size=step_size, momentum=momentum, bounds=bounds, patience=patience
    )
    checks.seed(seed)
    source = indexed_source(data, options)
    _check_start(start, len(source), bounds)
    recipe = InvertedDataset(method, attack, layer, start, options.seed(seed), source)
    return build_dataset(model, source, recipe, options)


def _check_start(start: Start, rows: int, bounds: Bounds) -> None:
    if not isinstance(start, str):
        checks.inputs(start, bounds, "start")
        if len(start) != rows:
            checks.fail("start.shape", tuple(start.shape), f"expected {rows} images, one a row")
        return
    checks.one_of("start", start, ("images", "noise"))
    if start == "images" and rows < 2:
        checks.fail("start", start, "there is no other image to start from; use start='noise'")


def _noise(batch: Batch, seed: int, bounds: Bounds) -> Tensor:
    """The released notebook's start, N(0, 1) / 20 + 0.5 of the box's width."""
    keys = seeding.keys(seed, batch.ids)
    normal: Tensor = torch.special.ndtri(seeding.uniform(keys, 0, batch.inputs[0].numel()))
    low, high = bounds
    noise = low + (high - low) * (normal.view(batch.inputs.shape) / 20 + 0.5)
    noise = noise.to(batch.inputs.dtype, memory_format=torch.preserve_format)
    return noise.clamp_(low, high)
