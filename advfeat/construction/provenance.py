"""What a dataset was made from: digests of model and data, and the manifest."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import platform
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from advfeat._version import __version__
from advfeat.construction.recipe import BuildOptions, DatasetRecipe
from advfeat.loading import Source
from advfeat.model import Layer, unwrapped

# Samples that the digest of the source data is computed from, evenly spread: reading all of
# ImageNet would take hours.
_LOOKED_AT = 256


def layer_name(model: nn.Module, layer: Layer) -> str:
    if layer is None or isinstance(layer, str):
        return layer or "input of the last Linear"
    if isinstance(layer, nn.Module):
        names: dict[nn.Module, str] = {
            module: name for name, module in unwrapped(model).named_modules()
        }
        return names.get(layer, "")  # a module of another model is refused by `attackable`
    return f"function {getattr(layer, '__qualname__', type(layer).__qualname__)}"


def build_manifest(
    model: nn.Module, source: Source, recipe: DatasetRecipe, options: BuildOptions
) -> dict[str, Any]:
    attack = recipe.attack
    own = {f.name: getattr(attack, f.name) for f in dataclasses.fields(attack)}  # type: ignore[arg-type]
    own = {name: value for name, value in own.items() if name != "seed"}
    chosen = {"precision": options.precision, "dtype": options.dtype}
    return {
        "method": recipe.method,
        "attack": type(attack).__name__,
        "settings": to_json({**own, **chosen, **recipe.settings(model)}),
        "rows": len(source) * recipe.starts,
        "model": {"class": type(unwrapped(model)).__name__, "sha256": model_fingerprint(model)},
        "data": {"sha256": data_fingerprint(source)},
        "versions": {
            "advfeat": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def model_fingerprint(model: nn.Module) -> str:
    """Digest of the modules' kinds and settings and of all parameters and buffers."""
    module = unwrapped(model)
    kinds = [
        f"{name} {type(part).__qualname__} {part.extra_repr()}"
        for name, part in module.named_modules()
    ]
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return digest([*kinds, *tensors, *tensors.values()])


def data_fingerprint(source: Source) -> str:
    """Digest of the row numbers and of rows spread evenly over all of them."""
    rows = source.indices
    spread = rows[:: -(-len(rows) // _LOOKED_AT)]
    looked_at = (
        item
        for start in range(0, len(spread), 32)
        for item in source.rows(spread[start : start + 32], torch.device("cpu"))
    )
    return digest(itertools.chain([torch.tensor(rows)], looked_at))


def digest(items: Iterable[str | Tensor]) -> str:
    found = hashlib.sha256()
    for item in items:
        if isinstance(item, Tensor):
            found.update(f"{item.dtype} {tuple(item.shape)}".encode())
            plain = item.detach().cpu().contiguous().reshape(-1)
            found.update(plain.view(torch.uint8).numpy().data)
        else:
            found.update(item.encode() + b"\0")
    return found.hexdigest()


def to_json(value: Any) -> Any:
    """What JSON can hold: NumPy's numbers become Python's, anything strange its description."""
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
