"""The one loop behind all four sets: numbered rows, an attack, a store."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from advfeat import checks, seeding, threat
from advfeat._version import __version__
from advfeat.attacks import Attack, Batch, Inversion, checked_batch
from advfeat.loading import Data, Source, with_progress
from advfeat.model import Layer, Network, Precision, attackable, device_of
from advfeat.store import Array, ConstructedDataset
from advfeat.threat import Bounds

Start: TypeAlias = Literal["images", "noise"] | Tensor
Begin: TypeAlias = Callable[[Network, Batch], Batch]
Describe: TypeAlias = Callable[[Network, Batch, Batch, Tensor], dict[str, Tensor]]


def indexed(data: Data, batch_size: int | None) -> Source:
    """Rows that can be fetched by number, which every construction needs."""
    source = Source(data, batch_size)
    if source.is_stream:
        checks.fail(
            "data",
            type(data).__name__,
            "construction fetches rows by number; pass a map-style dataset or a loader of one",
        )
    return source


def construct(
    model: nn.Module,
    source: Source,
    attack: Attack,
    begin: Begin,
    describe: Describe,
    *,
    method: str,
    settings: dict[str, Any],
    layer: Layer = None,
    precision: Precision = "float32",
    progress: bool | None = None,
) -> ConstructedDataset:
    """Run an attack over all rows and keep what it returns.

    Parameters
    ----------
    begin
        Gives the batch to attack: another start, or targets for labels.
    describe
        Of the model, the rows as they came, the batch as attacked and the images: the fields to
        keep beside the images, ``labels`` among them. Measured in float32 from those very images.
    settings
        What goes into the manifest beside the attack's own settings.
    """
    fields: dict[str, Array] = {}
    done = 0
    with attackable(model, precision=precision, layer=layer) as net:
        batches = with_progress(
            source.batches(device_of(model)),
            total=source.batch_count,
            label=method,
            progress=progress,
        )
        for rows in batches:
            batch = checked_batch(net, rows.inputs, rows.labels, rows.ids, attack.bounds)
            attacked = begin(net, batch)
            images = attack.result(attack.run(net, attack.init(net, attacked)))
            found = {"images": images, "index": rows.ids}
            found |= describe(net, batch, attacked, images)
            for name, value in found.items():
                values = value.cpu().numpy()
                if name not in fields:
                    fields[name] = np.empty((len(source), *values.shape[1:]), values.dtype)
                fields[name][done : done + len(values)] = values
            done += len(rows.ids)
    return ConstructedDataset(fields, _manifest(method, model, attack, settings))


def invert_all(
    model: nn.Module,
    data: Data,
    *,
    method: str,
    layer: Layer,
    start: Start,
    steps: int,
    step_size: float,
    bounds: Bounds,
    seed: int | torch.Generator | None,
    batch_size: int | None,
    precision: Precision,
    progress: bool | None,
) -> ConstructedDataset:
    """Invert the activations of every row: D_R or D_NR, as the model is robust or standard."""
    checks.model(model)
    attack = Inversion(steps=steps, step_size=step_size, bounds=bounds)
    checks.seed(seed)
    source = indexed(data, batch_size)
    _check_start(start, len(source), bounds)
    seed = seeding.resolve(seed)
    places = {row: place for place, row in enumerate(source.indices)}

    def others(batch: Batch) -> list[int]:
        """Another row for each row of the batch, uniform over all the others."""
        own = [places[row] for row in batch.ids.tolist()]
        steps_on = seeding.integers(seeding.keys(seed, batch.ids), 0, len(source) - 1)
        return [
            source.indices[(place + 1 + on) % len(source)]
            for place, on in zip(own, steps_on.tolist(), strict=True)
        ]

    def begin(net: Network, batch: Batch) -> Batch:
        if isinstance(start, Tensor):
            chosen = start[[places[row] for row in batch.ids.tolist()]].to(batch.inputs.device)
        elif start == "noise":
            chosen = _noise(batch, seed, bounds)
        else:
            chosen = source.rows(others(batch), batch.inputs.device).inputs
        checks.inputs(chosen, bounds)
        if chosen.shape != batch.inputs.shape:
            checks.fail("start.shape", tuple(chosen.shape), "must be that of the images")
        return batch._replace(start=net.prepare(chosen).clamp_(*bounds))

    def describe(net: Network, batch: Batch, attacked: Batch, images: Tensor) -> dict[str, Tensor]:
        assert attacked.start is not None
        goal = net.features(batch.inputs)
        found = {
            "labels": batch.labels,
            "distance": threat.size(net.features(images) - goal, "l2"),
            "distance_before": threat.size(net.features(attacked.start) - goal, "l2"),
            "size": threat.size(images - attacked.start, "l2"),
        }
        if isinstance(start, str) and start == "images":
            found["start_index"] = torch.tensor(others(batch))
        return found

    settings = {
        "seed": seed,
        "start": start if isinstance(start, str) else "given",
        "layer": _layer_name(model, layer),
    }
    return construct(
        model,
        source,
        attack,
        begin,
        describe,
        method=method,
        settings=settings,
        layer=layer,
        precision=precision,
        progress=progress,
    )


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
    return torch.clamp(noise, low, high)


def _layer_name(model: nn.Module, layer: Layer) -> str:
    if isinstance(layer, nn.Module):
        names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
        return names.get(layer, "")  # a module of another model is refused by `attackable`
    return "input of the last Linear" if layer is None else str(layer)


def _manifest(
    method: str, model: nn.Module, attack: Attack, settings: dict[str, Any]
) -> dict[str, Any]:
    own = {f.name: getattr(attack, f.name) for f in dataclasses.fields(attack)}  # type: ignore[arg-type]
    own = {k: v for k, v in own.items() if k != "seed"}
    return {
        "method": method,
        "attack": type(attack).__name__,
        "settings": _plain({**own, **settings}),
        "model": type(model).__name__,
        "versions": {
            "advfeat": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _plain(value: Any) -> Any:
    """What JSON can hold: NumPy's numbers become Python's, anything strange its description."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
