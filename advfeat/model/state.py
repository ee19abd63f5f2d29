"""What calls of a module may change: random states, and what the module keeps."""

from __future__ import annotations

import collections
import itertools
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


def settings_of(module: nn.Module) -> tuple[Any, ...]:
    """What can change how a module computes, its weights and training flags aside."""
    plain = (bool, int, float, str, type(None))
    return tuple(
        (type(m), *(item for item in vars(m).items() if isinstance(item[1], plain)))
        for m in module.modules()
    )


def own_state(module: nn.Module) -> tuple[Any, ...]:
    """What a module keeps beside its weights, to be compared: counters, generators, buffers."""
    kept = tuple(_comparable(value) for m in module.modules() for value in vars(m).values())
    return kept, tuple(buffer._version for buffer in module.buffers())


def _comparable(value: object) -> object:
    if isinstance(value, (bool, int, float, str, itertools.count)):
        return repr(value)
    if isinstance(value, torch.Generator):
        return bytes(value.get_state().numpy())
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return repr(value.get_state(legacy=False))
    if isinstance(value, torch.Tensor) and not value.is_inference():
        # A number may be replaced by another; of larger tensors a write is counted.
        single = value.numel() == 1 and value.device.type == "cpu"
        return value.tolist() if single else value._version
    return len(value) if isinstance(value, (list, dict, set, collections.deque)) else None


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Leave all global random states as they are; in another thread they may be in use."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    own, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002 - the user's
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(own)
            np.random.set_state(numpys)  # noqa: NPY002


def random_states(device: torch.device) -> tuple[Any, ...]:
    """The global random states, to be compared."""
    numpys: Any = np.random.get_state(legacy=False)  # noqa: NPY002
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return (
        tuple(bytes(state.numpy()) for state in states),
        random.getstate(),
        (numpys["state"]["pos"], numpys["state"]["key"].tobytes()),
    )
