"""Numbers and tensors in attributes of the user's objects: counters of steps and epochs, say."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

State: TypeAlias = Mapping[str, Mapping[str, Any]]
# Larger tensors are data, and are not copied.
_LARGEST = 1 << 20
_NOT_KEPT = (type, types.ModuleType, types.FunctionType, types.MethodType, DataLoader, Tensor)


class Counters:
    """What a run changes of objects, as far as they change in numbers and tensors alone.

    Where another attribute changes too, the numbers may say what it holds (which file is open), and
    mean nothing in a new object.

    Parameters
    ----------
    objects
        The objects by name.
    """

    def __init__(self, objects: Mapping[str, Any]) -> None:
        self._objects = {
            name: value
            for name, value in objects.items()
            if hasattr(value, "__dict__") and not isinstance(value, _NOT_KEPT)
        }
        self._first = {name: _attributes(value) for name, value in self._objects.items()}

    def state_dict(self) -> State:
        """Return the attributes that have changed, by object."""
        found = {}
        for name, value in self._objects.items():
            first, now = self._first[name], _attributes(value)
            changed = [key for key in now if key not in first or not _same(first[key], now[key])]
            counts = all(_counts(form.get(key)) for form in (first, now) for key in changed)
            if changed and counts and first.keys() == now.keys():
                found[name] = {key: _copied(getattr(value, key)) for key in changed}
        return found

    def load_state_dict(self, state: State) -> None:
        """Set the attributes of the objects that are still there."""
        for name, values in state.items():
            for key, value in values.items():
                current = getattr(self._objects.get(name), key, None)
                if isinstance(current, Tensor) and current.shape == value.shape:
                    if not torch.equal(current, value.to(current.device)):
                        with torch.no_grad():
                            current.copy_(value)
                elif current is not None and (isinstance(value, Tensor) or current != value):
                    fits = isinstance(current, Tensor) and isinstance(value, Tensor)
                    setattr(self._objects[name], key, value.to(current.device) if fits else value)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Undo what happens to them inside."""
        before = {
            name: {k: _copied(getattr(value, k)) for k, form in own.items() if _counts(form)}
            for name, value in self._objects.items()
            for own in [_attributes(value)]
        }
        try:
            yield
        finally:
            self.load_state_dict(before)


def _attributes(value: Any) -> dict[str, Any]:
    """The attributes of an object, in a form that tells whether one has changed."""
    own: dict[str, Any] = dict(vars(value))
    if isinstance(value, nn.Module):
        own = {key: item for key, item in own.items() if key not in _OF_MODULES}
        own |= {key: item for key, item in value._buffers.items() if item is not None}
    return {key: _form(item) for key, item in own.items()}


_OF_MODULES = vars(nn.Module()).keys()


def _form(value: Any) -> Any:
    if isinstance(value, Tensor) and not value.is_inference():
        return "tensor", value.numel() <= _LARGEST, id(value), value._version
    if isinstance(value, (np.integer, np.floating)):
        return value.item()
    if type(value) in (bool, int, float, str, bytes, type(None)):
        return value
    return type(value), id(value), len(value) if isinstance(value, (list, dict, set)) else 0


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and bool(one == other)


def _counts(form: Any) -> bool:
    """Whether an attribute of this form is a number or a tensor."""
    if isinstance(form, tuple):
        return form[:2] == ("tensor", True)
    return isinstance(form, (int, float)) and not isinstance(form, bool)


def _copied(value: Any) -> Any:
    # A number of NumPy becomes one of Python, which a checkpoint may hold.
    return value.detach().clone() if isinstance(value, Tensor) else _form(value)
