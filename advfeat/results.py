"""What all results have: a short repr, tables as text and HTML, plain JSON values and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from advfeat.tables import Table, render

__all__ = ["Result", "from_plain", "register", "to_plain"]

_TAGS = {"type", "tensor", "float", "items", "object"}


class Result:
    """Base of every result; a subclass is usually a dataclass with ``repr=False``.

    A subclass writes `_summary`, a few words without tensors, and `_content`, its sentences and
    tables. Printing, `repr`, notebooks and JSON follow from these two and from its fields. Where
    it can be drawn it has ``plot(ax=None)``, which draws into ``ax`` or a new figure and returns
    the axes, or the tuple of them where there are several panels.

    Examples
    --------
    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True, repr=False)
    ... class Distance(Result):
    ...     values: torch.Tensor
    ...     def _summary(self):
    ...         return f"{len(self.values)} samples"
    ...     def _content(self):
    ...         return [Table(("sample", "distance"), list(enumerate(self.values.tolist())))]
    >>> found = Distance(torch.tensor([0.5]))
    >>> found
    Distance(1 samples)
    >>> found.to_dict()
    {'type': 'Distance', 'values': {'tensor': [0.5], 'dtype': 'float32', 'shape': [1]}}
    >>> print(Distance.from_dict(found.to_dict()))
    sample  distance
    0         0.5000
    """

    # Fields that JSON leaves out: inputs of the user's, networks.
    _left_out: ClassVar[tuple[str, ...]] = ()

    def _summary(self) -> str:
        """One short line for `repr`."""
        return ""

    def _content(self) -> Sequence[str | Table]:
        """Sentences and tables, in order."""
        return [self._summary()]

    def __repr__(self) -> str:
        """The class and a few words."""
        return f"{type(self).__name__}({self._summary()})"

    def __str__(self) -> str:
        """Sentences and tables as text."""
        return render(self._content(), "text")

    def _repr_html_(self) -> str:
        """Sentences and tables, for notebooks."""
        return render(self._content(), "html")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``json.dumps``: lists, dictionaries, strings, finite numbers."""
        return {"type": type(self).__name__} | {
            name: to_plain(value)
            for name, value in self._fields().items()
            if name not in self._left_out
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make the result again from what `to_dict` gave, also after ``json.loads``.

        Raises
        ------
        ValueError
            If the values are not those of this class.
        """
        if not isinstance(values, Mapping) or values.get("type") != cls.__name__:
            kind = values.get("type") if isinstance(values, Mapping) else type(values).__name__
            raise ValueError(
                f"values: expected what {cls.__name__}.to_dict() returns, got type {kind!r}"
            )
        found = {name: from_plain(value) for name, value in values.items() if name != "type"}
        return cls._from_fields(found)

    def _fields(self) -> dict[str, Any]:
        """What makes the result, by name."""
        return _fields(self)

    @classmethod
    def _from_fields(cls, values: dict[str, Any]) -> Self:
        return cls(**dict.fromkeys(cls._left_out), **values)


_BASES: list[type] = [Result]


def register(base: type) -> None:
    """Let JSON name dataclasses that are no `Result`, such as attacks: all below ``base``."""
    _BASES.append(base)


def _kind(name: str) -> type:
    """The class of this name."""
    waiting = list(_BASES)
    while waiting:
        kind = waiting.pop()
        if kind.__name__ == name:
            return kind
        waiting += kind.__subclasses__()
    raise ValueError(
        f"type {name!r} is unknown; import the module that defines it, or name its base class by "
        "advfeat.results.register"
    )


def to_plain(value: Any) -> Any:
    """Anything that a result holds, as JSON has it; what JSON has no word for gets a tag."""
    if isinstance(value, Result):
        return value.to_dict()
    if isinstance(value, (Tensor, np.ndarray)):
        return _plain_tensor(torch.as_tensor(value))
    if isinstance(value, (np.bool_, np.integer, np.floating)):
        return to_plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(float(value))}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value) and not _TAGS & value.keys():
            return {key: to_plain(each) for key, each in value.items()}
        return {"items": [[to_plain(key), to_plain(each)] for key, each in value.items()]}
    if isinstance(value, (list, tuple, set, frozenset, range)):
        return [to_plain(each) for each in value]
    if is_dataclass(value) and not isinstance(value, type):
        named = {name: to_plain(each) for name, each in _fields(value).items()}
        return {"type": type(value).__name__, **named}
    # A user's loss, a generator, a dataset: named, and not made again.
    return {"object": getattr(value, "__qualname__", None) or _short(value)}


def from_plain(value: Any) -> Any:
    """Undo `to_plain`; a list becomes a tuple."""
    if isinstance(value, list):
        return tuple(from_plain(each) for each in value)
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        dtype = getattr(torch, value["dtype"])
        numbers = _floats(value["tensor"])
        return torch.tensor(numbers, dtype=dtype, device="cpu").reshape(value["shape"])
    if value.keys() == {"float"}:
        return float(value["float"])
    if value.keys() == {"items"}:
        return {from_plain(key): from_plain(each) for key, each in value["items"]}
    if value.keys() == {"object"}:
        return value["object"]
    if "type" not in value:
        return {key: from_plain(each) for key, each in value.items()}
    kind = _kind(value["type"])
    if issubclass(kind, Result):
        return kind.from_dict(value)
    return kind(**{name: from_plain(each) for name, each in value.items() if name != "type"})


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in fields(value) if field.init}


def _plain_tensor(values: Tensor) -> dict[str, Any]:
    values = values.detach().cpu()
    numbers = values.tolist()
    if values.is_floating_point() and not bool(values.isfinite().all()):
        numbers = _each(numbers, lambda one: one if math.isfinite(one) else str(one))
    dtype = str(values.dtype).removeprefix("torch.")
    return {"tensor": numbers, "dtype": dtype, "shape": list(values.shape)}


def _floats(numbers: Any) -> Any:
    """Numbers in nested lists, those that are not finite no longer as strings."""
    return _each(numbers, lambda one: float(one) if isinstance(one, str) else one)


def _each(numbers: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(numbers, list):
        return [_each(one, change) for one in numbers]
    return change(numbers)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{type(value).__module__}.{type(value).__qualname__}"
