"""What a dataset was made from: digests of model and data, and the manifest."""

from __future__ import annotations

import dataclasses
import platform
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from advfeat._version import __version__
from advfeat.construction.recipe import BuildOptions, DatasetRecipe
from advfeat.datasets.source import describe_source, digest
from advfeat.loading import Source
from advfeat.model import Layer, unwrapped
from advfeat.threat import hull


def layer_name(model: nn.Module, layer: Layer) -> str:
    if layer is None or isinstance(layer, str):
        return layer or "input of the last Linear"
    if isinstance(layer, nn.Module):
        names: dict[nn.Module, str] = {
            module: name for name, module in unwrapped(model).named_modules()
        }
        return names.get(layer, "")  # a module of another model raises an error by `attackable`
    return f"function {getattr(layer, '__qualname__', type(layer).__qualname__)}"


def build_manifest(
    model: nn.Module, source: Source, recipe: DatasetRecipe, options: BuildOptions
) -> dict[str, Any]:
    attack = recipe.attack
    own = {f.name: getattr(attack, f.name) for f in dataclasses.fields(attack)}  # type: ignore[arg-type]
    own = {name: value for name, value in own.items() if name != "seed"}
    if own.get("mask", ...) is None:
        del own["mask"]
    if isinstance(attack.bounds[0], Tensor):
        own |= {"bounds": hull(attack.bounds), "bounds_by_feature": list(attack.bounds)}
    chosen: dict[str, Any] = {"precision": options.precision, "dtype": options.dtype}
    if options.expectation > 1:
        chosen["expectation"] = options.expectation
    return {
        "method": recipe.method,
        "attack": type(attack).__name__,
        "settings": to_json({**own, **chosen, **recipe.settings(model)}),
        "samples": len(source) * recipe.starts,
        "model": {"class": type(unwrapped(model)).__name__, "sha256": model_fingerprint(model)},
        "data": describe_source(source),
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
    """Digest of the indices and of samples spread evenly over all of them."""
    return str(describe_source(source)["sha256"])


def to_json(value: Any) -> Any:
    """What JSON can hold: NumPy's numbers become Python's, anything strange its description."""
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)}, sha256 {digest([value])}"
    if isinstance(value, np.generic):
        return value.item()
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
