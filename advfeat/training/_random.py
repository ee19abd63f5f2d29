"""Random states that a run must resume: the global ones, and those that data own."""

from __future__ import annotations

import inspect
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from advfeat.training._counters import Counters

State = dict[str, Any]
_Generator = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
# Objects inside of objects are searched to this depth, and lists up to this length.
_DEPTH, _LENGTH = 7, 64


# --- Global states ---


def global_state(device: torch.device) -> State:
    """States of the generators that data and models draw from, as what weights_only loads."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - what users draw from
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_global_state(state: State, device: torch.device, *, with_torch: bool) -> None:
    """Continue from `global_state`; with torch's own generators only where asked for."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    if with_torch:
        torch.set_rng_state(state["torch"])
        if device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], device)


def same_state(one: State, other: State) -> bool:
    """Whether nothing was drawn between two states."""
    return (
        torch.equal(one["torch"], other["torch"])
        and one["python"] == other["python"]
        and torch.equal(one["numpy"][1], other["numpy"][1])
        and one["numpy"][2:] == other["numpy"][2:]
    )


# --- State of the user's objects ---


class OwnState:
    """Generators, samplers with a ``state_dict`` and counters that a user's objects hold.

    They are found in attributes, containers, closures and partial arguments, and in the globals
    that ``__getitem__`` and ``__iter__`` use.
    """

    def __init__(self, data: Any) -> None:
        found = dict(_search(data, "data", set(), _DEPTH))
        self._generators = {k: v for k, v in found.items() if isinstance(v, _Generator)}
        self._counters = Counters({k: v for k, v in found.items() if k not in self._generators})
        samplers: list[Any] = [
            getattr(data, name, None) for name in ("sampler", "batch_sampler", "dataset")
        ]
        self._stateful = {
            f"{place}": part
            for place, part in enumerate(
                [*samplers, None if isinstance(data, DataLoader) else data]
            )
            if callable(getattr(part, "state_dict", None))
            and callable(getattr(part, "load_state_dict", None))
            and not isinstance(part, nn.Module)
        }

    def __len__(self) -> int:
        return len(self._generators)

    def state_dict(self) -> State:
        """Return all states, as what weights_only loads."""
        return {
            "generators": {name: _get_state(g) for name, g in self._generators.items()},
            "stateful": {name: part.state_dict() for name, part in self._stateful.items()},
            "counters": self._counters.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Set the states of what is still there."""
        for name, generator in self._generators.items():
            if name in state.get("generators", {}):
                _set_state(generator, state["generators"][name])
        for name, part in self._stateful.items():
            if name in state.get("stateful", {}):
                part.load_state_dict(state["stateful"][name])
        self._counters.load_state_dict(state.get("counters", {}))

    @contextmanager
    def fixed(self) -> Iterator[None]:
        """Have all random numbers inside, global ones too, follow from fixed seeds; undo it after.

        So a dataset that augments at random gives the same samples in every process.
        """
        cpu = torch.device("cpu")
        before, own = global_state(cpu), self.state_dict()
        try:
            torch.set_rng_state(torch.Generator().manual_seed(0).get_state())
            random.setstate(random.Random(0).getstate())
            np.random.set_state(np.random.RandomState(0).get_state())  # noqa: NPY002
            for generator in self._generators.values():
                _set_state(generator, _first_state(generator))
            with self._counters.unchanged():
                yield
        finally:
            set_global_state(before, cpu, with_torch=True)
            self.load_state_dict(own)


def _search(value: Any, name: str, seen: set[int], depth: int) -> Iterator[tuple[str, Any]]:
    if id(value) in seen or depth < 0:
        return
    seen.add(id(value))
    if not isinstance(value, _Generator) or _get_state(value) is not None:
        yield name, value
    for key, part in _parts(value):
        yield from _search(part, f"{name}.{key}", seen, depth - 1)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (Tensor, np.ndarray, _Generator, type, str, bytes, int, float)):
        return
    if isinstance(value, nn.Module):
        yield from list(value.named_modules())[1:]
        yield from ((k, v) for k, v in vars(value).items() if not k.startswith("_"))
    elif isinstance(value, dict):
        yield from list(value.items())[:_LENGTH] if len(value) <= _LENGTH else ()
    elif isinstance(value, (list, tuple)):
        yield from ((str(k), item) for k, item in enumerate(value) if len(value) <= _LENGTH)
    elif isinstance(value, partial):
        yield from (("func", value.func), ("args", value.args), ("keywords", value.keywords))
    elif inspect.ismethod(value):
        yield from (("self", value.__self__), ("function", value.__func__))
    elif inspect.isfunction(value):
        try:
            used = inspect.getclosurevars(value)
        except ValueError:
            return
        yield from used.nonlocals.items()
        yield from ((k, v) for k, v in used.globals.items() if isinstance(v, _Generator))
    else:
        own = getattr(value, "__dict__", {})
        yield from ((k, v) for k, v in list(own.items()) if k not in ("_iterator",))
        for method in ("__getitem__", "__getitems__", "__iter__", "__call__"):
            function = getattr(type(value), method, None)
            if inspect.isfunction(function):
                yield method, function


def _get_state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state() if generator.device.type == "cpu" else None
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return json.dumps(generator.bit_generator.state, default=_as_list)
    return json.dumps(generator.get_state(legacy=False), default=_as_list)


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = _as_arrays(json.loads(state))
    else:
        generator.set_state(_as_arrays(json.loads(state)))


def _first_state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return torch.Generator().manual_seed(0).get_state()
    if isinstance(generator, random.Random):
        return random.Random(0).getstate()
    if isinstance(generator, np.random.Generator):
        state = type(generator.bit_generator)(0).state
    else:
        state = np.random.RandomState(0).get_state(legacy=False)
    return json.dumps(state, default=_as_list)


def _as_list(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value.item()


def _as_arrays(state: Any) -> Any:
    """NumPy takes lists for arrays in some bit generators only."""
    if isinstance(state, dict):
        return {name: _as_arrays(item) for name, item in state.items()}
    return np.asarray(state, dtype=np.uint64) if isinstance(state, list) else state
