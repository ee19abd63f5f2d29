"""What makes a run the same run: digests of data and model, and settings down to their closures."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import platform
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, IterableDataset, Subset

from advfeat import checks
from advfeat.loading import Data, is_stream

# Samples that the digest of a dataset is computed from, evenly spread.
SAMPLES = 256
# Objects inside of objects are described to this depth.
_DEPTH = 6
# Longer containers are described by their length alone.
_LONGEST = 1000
# What a schedule or an optimiser counts, which differs between the start of a run and its middle.
_COUNTERS = {
    "last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial", "best",
    "num_bad_epochs", "cooldown_counter", "T_cur", "T_i", "verbose", "optimizer", "_schedulers",
    "lr_lambdas", "step_num", "_scale_fn_ref",
}  # fmt: skip
# What schedules change in a group of parameters, or write there.
_SCHEDULED = {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"}


def describe(value: Any, depth: int = _DEPTH) -> Any:
    """Return plain values that are the same in every process: of objects the class and fields."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{type(value).__name__} {digest(value)}"
    if depth == 0:
        return type(value).__qualname__
    if isinstance(value, Mapping):
        return {str(key): describe(item, depth - 1) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)) and len(value) > _LONGEST:
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [describe(item, depth - 1) for item in value]
        return sorted(items, key=repr) if isinstance(value, (set, frozenset)) else items
    if isinstance(value, (torch.Generator, np.random.Generator, np.random.RandomState)):
        return type(value).__qualname__
    return _describe_object(value, depth - 1)


def _describe_object(value: Any, depth: int) -> Any:
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, partial):
        return {
            "function": describe(value.func, depth),
            "args": describe(value.args, depth),
            "keywords": describe(value.keywords, depth),
        }
    if inspect.ismethod(value):
        return {"method": value.__func__.__qualname__, "of": describe(value.__self__, depth)}
    if inspect.isfunction(value):
        return _describe_function(value, depth)
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name, None) for f in dataclasses.fields(value)}
        return {"class": type(value).__qualname__, **_described_items(fields, depth)}
    if isinstance(value, nn.Module):
        return {"class": type(value).__qualname__, "structure": structure(value), **{
            name: describe(tensor, depth) for name, tensor in value.state_dict().items()
        }}  # fmt: skip
    found = {"class": getattr(value, "__qualname__", type(value).__qualname__)}
    return found | _described_items(getattr(value, "__dict__", {}), depth)


def _describe_function(function: Any, depth: int) -> dict[str, Any]:
    code = function.__code__
    bound = inspect.getclosurevars(function) if depth else None
    simple = (bool, int, float, str)
    found = {
        "function": f"{function.__module__}.{function.__qualname__}",
        "code": _code(code),
        "defaults": describe([function.__defaults__, function.__kwdefaults__], depth),
    }
    if bound is not None:
        found["closure"] = _described_items(bound.nonlocals, depth)
        found["globals"] = {k: v for k, v in bound.globals.items() if isinstance(v, simple)}
    return {name: item for name, item in found.items() if item not in ({}, [None, None])}


def _code(code: Any) -> str:
    """Digest of what a function does; of its own, for a lambda's name says nothing."""
    constants = [_code(c) if hasattr(c, "co_code") else repr(c) for c in code.co_consts]
    text = repr([code.co_code, constants, code.co_names])
    version = ".".join(platform.python_version_tuple()[:2])
    return f"{version} {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _described_items(items: Mapping[str, Any], depth: int) -> dict[str, Any]:
    return {name: describe(item, depth) for name, item in items.items()}


# --- Model, optimiser, schedule ---


def structure(model: nn.Module) -> dict[str, str]:
    """Describe each module: class, settings, and the shapes of its parameters and buffers."""
    found = {}
    for name, module in model.named_modules():
        own = [
            f"{n}{tuple(t.shape)}{'' if t.requires_grad else ' fixed'}"
            for n, t in [*module.named_parameters(recurse=False), *module.named_buffers("", False)]
        ]
        text = f"{type(module).__qualname__}({module.extra_repr()}) {' '.join(own)}"
        found[name or "(model)"] = text.strip()
    return found


def describe_optimizer(optimizer: Optimizer) -> dict[str, Any]:
    """Describe class and groups of an optimiser, without what a schedule changes."""
    groups = []
    for group in optimizer.param_groups:
        cycled = {"momentum", "betas"} if "max_momentum" in group else set()
        own = {k: v for k, v in group.items() if k not in {"params"} | _SCHEDULED | cycled}
        own["lr"] = group.get("initial_lr", group["lr"])
        groups.append({"parameters": len(group["params"])} | {k: _plain(v) for k, v in own.items()})
    own_fields = {
        name: value
        for name, value in vars(optimizer).items()
        if not name.startswith("_") and isinstance(value, (bool, int, float, str))
    }
    defaults = _described_items({k: v for k, v in own_fields.items() if k != "steps"}, 2)
    return {"class": type(optimizer).__qualname__, "groups": groups, "fields": defaults}


def _plain(value: Any) -> Any:
    return float(value) if isinstance(value, Tensor) and value.numel() == 1 else describe(value)


def describe_scheduler(scheduler: LRScheduler) -> dict[str, Any]:
    """Describe class and settings of a schedule, and of the schedules inside, without counters."""
    own = {k: v for k, v in vars(scheduler).items() if k not in _COUNTERS and not callable(v)}
    found: dict[str, Any] = {"class": type(scheduler).__qualname__} | _described_items(own, 3)
    for name in ("lr_lambdas", "lr_lambda"):
        if hasattr(scheduler, name):
            found[name] = describe(getattr(scheduler, name))
    if hasattr(scheduler, "_schedulers"):
        found["parts"] = [describe_scheduler(part) for part in scheduler._schedulers]
    return found


# --- Data ---


def describe_data(data: Data, samples: Iterator[Any]) -> dict[str, Any]:
    """Describe data: class, number, digest of samples; of a loader how it goes through them.

    Of a stream the attributes stand for its samples.
    """
    found: dict[str, Any] = {}
    if isinstance(data, DataLoader):
        found |= {
            "batch_size": data.batch_size,
            "drop_last": data.drop_last,
            "sampler": type(data.sampler).__qualname__,
            "batch_sampler": type(data.batch_sampler).__qualname__,
            "collate_fn": describe(data.collate_fn),
        }
        dataset: Any = data.dataset
    else:
        dataset = data
    if isinstance(dataset, IterableDataset):
        # To read some would move what it reads from.
        found["dataset"] = describe(dataset, 4)
    if hasattr(dataset, "__len__"):
        found["samples"] = len(dataset)
    return found | {"digest": digest_samples(samples)}


def some_samples(data: Data) -> Iterator[Any]:
    """Give samples that are spread evenly over a dataset or a list of batches; none of a stream."""
    dataset: Any = data.dataset if isinstance(data, DataLoader) else data
    if isinstance(data, (list, tuple)):
        step = -(-len(data) // SAMPLES)
        yield from data[::step]
        return
    if is_stream(data) or not hasattr(dataset, "__getitem__"):
        return
    for index in range(0, len(dataset), -(-len(dataset) // SAMPLES)):
        if isinstance(dataset, Subset):
            yield torch.as_tensor(int(dataset.indices[index]))
        yield dataset[index]


def digest_samples(samples: Iterator[Any]) -> str:
    """Digest of samples: tensors, arrays, numbers, strings, images, in any nesting."""
    found = hashlib.sha256()
    for sample in samples:
        _update(found, sample)
    return found.hexdigest()[:32]


def digest(value: Any) -> str:
    """Digest of one tensor or array."""
    return digest_samples(iter([value]))[:16]


def _update(found: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        found.update(f"{value.dtype} {tuple(value.shape)}".encode())
        plain = value.detach().cpu().contiguous().reshape(-1)
        found.update(plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    elif isinstance(value, np.ndarray):
        found.update(f"{value.dtype} {value.shape}".encode() + value.tobytes())
    elif isinstance(value, Mapping):
        for key, item in value.items():
            found.update(str(key).encode())
            _update(found, item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _update(found, item)
    elif hasattr(value, "tobytes"):  # an image of PIL
        found.update(value.tobytes())
    else:
        found.update(repr(value).encode() if isinstance(value, (int, float, str)) else b"?")


# --- Comparison ---


def check_same_run(found: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise an error that names the difference, where a checkpoint is of another run."""
    for name, value in settings.items():
        difference = _difference(name, found.get(name), value)
        if difference is None:
            continue
        place, had, has = difference
        checks.fail(
            place,
            has,
            f"the run in this checkpoint folder had {had!r}; give the same arguments to resume it, "
            "or another folder to start anew",
        )


def _difference(name: str, had: Any, has: Any) -> tuple[str, Any, Any] | None:
    """Find the first place in nested values where they differ."""
    if isinstance(had, dict) and isinstance(has, dict):
        for key in dict.fromkeys([*had, *has]):
            inner = _difference(f"{name}.{key}", had.get(key), has.get(key))
            if inner is not None:
                return inner
        return None
    if isinstance(had, list) and isinstance(has, list) and len(had) == len(has):
        for number, (one, other) in enumerate(zip(had, has, strict=True)):
            inner = _difference(f"{name}[{number}]", one, other)
            if inner is not None:
                return inner
        return None
    if name.endswith(".code") and _python(had) != _python(has):
        return None  # bytecode of another version of Python
    if name.endswith(".function") and _is_same_name(had, has):
        return None
    return None if had == has else (name, had, has)


def _is_same_name(had: Any, has: Any) -> bool:
    """Compare names of functions: a script's module is ``__main__`` only while the script runs."""
    script = "__main__"
    return any(
        str(one).startswith(f"{script}.") and str(other).endswith(str(one).removeprefix(script))
        for one, other in ((had, has), (has, had))
    )


def _python(code: Any) -> str:
    return str(code).rpartition(" ")[0]
