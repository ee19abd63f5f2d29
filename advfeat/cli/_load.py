"""Models and data by what the command line says of them."""

from __future__ import annotations

import importlib
import importlib.util
import json
import pickle
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from advfeat.datasets import ConstructedDataset, import_images
from advfeat.model import Normalize

_INPUTS = ("images", "inputs", "x", "X", "x_test", "data", "arr_0")
_LABELS = ("labels", "y", "Y", "y_test", "targets", "arr_1")
_PREFIXES = ("module.", "_orig_mod.")
_NESTED = ("state_dict", "model_state_dict", "model", "net")


def named(spec: str) -> Any:
    """What ``module:name`` or ``file.py:name`` names; the working folder is searched first."""
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise ValueError(f"{spec!r}: expected MODULE:NAME, such as mymodels:make_model")
    if place.endswith(".py"):
        path = Path(place).expanduser()
        if not path.is_file():
            raise ValueError(f"{spec!r}: there is no file {place}")
        found = importlib.util.spec_from_file_location(path.stem, path)
        assert found is not None
        assert found.loader is not None
        module = importlib.util.module_from_spec(found)
        sys.modules[path.stem] = module  # classes of the file are pickled by this name
        sys.path.insert(0, str(path.parent.resolve()))
        found.loader.exec_module(module)
    else:
        if "" not in sys.path:
            sys.path.insert(0, "")
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise ValueError(f"{spec!r}: {error}; run the command in its folder") from error
    if not hasattr(module, name):
        raise ValueError(f"{spec!r}: {place} has no {name}")
    return getattr(module, name)


def model_maker(options: Any) -> Callable[[], nn.Module]:
    """A function that makes the untrained model, with its normalisation if one was given."""
    made = named(options.model)
    try:
        keywords = json.loads(options.model_args)
    except json.JSONDecodeError as error:
        raise ValueError(f"--model-args {options.model_args!r}: no JSON, {error}") from error
    if (options.mean is None) != (options.std is None):
        raise ValueError("--mean, --std: give both or neither")

    def make() -> nn.Module:
        try:
            model: Any = made if isinstance(made, nn.Module) else made(**keywords)
        except Exception as error:  # the user's own code
            kind = type(error).__name__
            cause = f"{options.model!r} raised {kind}: {error}; --traceback shows where"
            raise ValueError(cause) from error
        if not isinstance(model, nn.Module):
            raise TypeError(f"{options.model!r}: it made no model, but a {type(model).__name__}")
        if options.mean is None:
            return model
        return Normalize(model, options.mean, options.std)

    return make


def model(options: Any) -> nn.Module:
    """The model with its weights, on its device."""
    made = model_maker(options)()
    if options.weights is not None:
        target = made.model if isinstance(made, Normalize) else made
        assert isinstance(target, nn.Module)
        load_weights(target, options.weights)
    return made.to(options.device)


def load_weights(target: nn.Module, path: str) -> None:
    """Load a state dict, or one inside a checkpoint; a file that holds code raises an error."""
    try:
        found = torch.load(Path(path).expanduser(), map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"--weights {path}: there is no such file") from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"--weights {path}: it holds more than tensors, and loading it could run code; save "
            "model.state_dict() instead"
        ) from error
    for name in _NESTED:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
    if not isinstance(found, Mapping) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ValueError(f"--weights {path}: no state dict; save model.state_dict()")
    weights = {_plain(name): value for name, value in found.items()}
    try:
        target.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"--weights {path}: they are not of this model: {reason}") from error


def _plain(name: str) -> str:
    """A parameter's name without what wrappers put before it."""
    while prefix := next((p for p in _PREFIXES if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    return name


def data(spec: str, option: str = "--data") -> Any:
    """A dataset: an .npz, a folder of images or of a constructed dataset, or MODULE:NAME."""
    path = Path(spec).expanduser()
    if path.is_dir():
        if (path / "manifest.json").is_file():
            return ConstructedDataset.open(path)
        return import_images(path)
    if path.suffix == ".npz":
        if not path.is_file():
            raise ValueError(f"{option} {spec}: there is no such file")
        return _arrays(path, option)
    if ":" in spec:
        found = named(spec)
        return found() if callable(found) and not hasattr(found, "__getitem__") else found
    raise ValueError(
        f"{option} {spec}: expected an .npz file, a folder FOLDER/CLASS/IMAGE.png or of a "
        "constructed dataset, or MODULE:NAME of a function that returns a dataset"
    )


def _arrays(path: Path, option: str) -> TensorDataset:
    """Inputs float32 in [0, 1] and labels; images with channels last are turned."""
    with np.load(path, allow_pickle=False) as file:
        inputs, labels = (
            next((file[name] for name in names if name in file.files), None)
            for names in (_INPUTS, _LABELS)
        )
        has = file.files
    if inputs is None or labels is None:
        raise ValueError(f"{option} {path}: it has {has}; expected inputs and labels")
    is_levels = inputs.dtype == np.uint8
    inputs = inputs.astype(np.float32)
    if is_levels:
        inputs /= 255
    if inputs.ndim == 4 and inputs.shape[-1] in (1, 3) and inputs.shape[1] not in (1, 3):
        inputs = np.ascontiguousarray(inputs.transpose(0, 3, 1, 2))
    numbers = labels.reshape(len(labels), -1)[:, 0] if labels.ndim > 1 else labels
    return TensorDataset(torch.from_numpy(inputs), torch.from_numpy(numbers.astype(np.int64)))
