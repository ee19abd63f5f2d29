"""Further arguments of a module's forward: entries of a batch that go with its samples."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from advfeat import checks
from advfeat.model.access import innermost

Extras: TypeAlias = Mapping[str, Tensor]

# Of the functions that are the forward of some module: training asks at every step.
_known_parameters: WeakKeyDictionary[FunctionType, Sequence[inspect.Parameter]] = (
    WeakKeyDictionary()
)


class ExtraArguments:
    """The further arguments that a module's forward takes, for the samples of a batch.

    Every call of the module gets those of its own samples: `given` says which samples these are,
    and `selected` narrows them down.
    """

    def __init__(self, module: nn.Module) -> None:
        self._names, self._takes_any = forward_names(innermost(module))
        if input_name(module, None) == "inputs_embeds":
            self._names.discard("input_ids")  # what the inputs stand for
        self._current: dict[str, Tensor] = {}

    def expect(self, extras: Mapping[str, Any] | None) -> None:
        """Raise an error for arguments that the user gives and forward does not take."""
        if not (extras is None or isinstance(extras, Mapping)):
            raise TypeError(
                f"extras: expected a mapping, such as {{'mask': mask}}, got {type(extras).__name__}"
            )
        for name, value in (extras or {}).items():
            if value is None:
                raise TypeError(f"extras[{name!r}]: expected a tensor, got None; leave it out")
            if self._takes_any:
                self._names.add(name)
            elif name not in self._names:
                near = difflib.get_close_matches(name, self._names, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                checks.fail("extras", name, f"forward takes no argument of this name{hint}")

    def choose(self, entries: Mapping[str, Any] | None, inputs: Tensor) -> dict[str, Tensor] | None:
        """Those of the entries of a batch that forward takes, ``(N, ...)`` each, on the device."""
        chosen = {}
        for name, value in (entries or {}).items():
            if value is None or name not in self._names:
                continue
            tensor = _as_tensor(value, len(inputs))
            if tensor is None or tensor.shape[:1] != inputs.shape[:1]:
                shape = type(value).__name__ if tensor is None else tuple(tensor.shape)
                checks.fail(
                    f"{name} of a batch",
                    shape,
                    "the model's forward takes an argument of this name, so it is passed on with "
                    f"the samples; expected a tensor ({len(inputs)}, ...). Rename the entry, or "
                    "leave it out, if it is none of the model's",
                )
            chosen[name] = tensor.to(inputs.device)
        return chosen or None

    @contextmanager
    def given(self, extras: Extras | None) -> Iterator[None]:
        """Arguments of the samples that are passed to the model inside."""
        before, self._current = self._current, dict(extras or {})
        try:
            yield
        finally:
            self._current = before

    @contextmanager
    def selected(self, chosen: Tensor | slice) -> Iterator[None]:
        """Those of these samples, which alone are passed to the model inside."""
        with self.given({name: value[chosen] for name, value in self._current.items()}):
            yield

    def of(self, inputs: Tensor) -> dict[str, Tensor]:
        """The arguments to pass beside these inputs."""
        for name, value in self._current.items():
            assert len(value) == len(inputs), (name, len(value), len(inputs))
        return self._current

    @property
    def names(self) -> tuple[str, ...]:
        """What is passed now."""
        return tuple(self._current)


class ByName(nn.Module):
    """A module that takes its inputs by name: ``inputs_embeds`` in place of ``input_ids``."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self.module, self.name = module, name

    def forward(self, inputs: Tensor, **extras: Tensor) -> Any:
        """Call the module."""
        return self.module(**{self.name: inputs}, **extras)


def input_name(module: nn.Module, entries: Mapping[str, Any] | None) -> str | None:
    """The name by which a module must get its inputs; None where it takes them first.

    A floating-point input of a language model is its ``inputs_embeds``. In a batch that is a
    mapping, the entry that is None stands for the inputs.
    """
    parameters = _parameters(innermost(module))
    positional = [
        p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if positional[:1] == ["input_ids"] and "inputs_embeds" in names:
        return "inputs_embeds"
    own = next((name for name, value in (entries or {}).items() if value is None), None)
    if own in names and positional[:1] != [own]:
        return own
    if positional or any(p.kind == p.VAR_POSITIONAL for p in parameters):
        return None
    if own is not None and any(p.kind == p.VAR_KEYWORD for p in parameters):
        return own
    return names[0] if len(names) == 1 else None


def forward_names(module: nn.Module) -> tuple[set[str], bool]:
    """Names of the arguments of forward but the first, and whether it takes any name.

    Where it takes ``**kwargs``, the strings in its code count, and those of the modules inside.
    """
    parameters = _parameters(module)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names = {p.name for p in named}
    takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters)
    if takes_any:
        code = getattr(getattr(module.forward, "__func__", None), "__code__", None)
        # Such as "mask" in kwargs.get("mask").
        names |= {each for each in getattr(code, "co_consts", ()) if isinstance(each, str)}
        for child in module.children():
            names |= forward_names(child)[0] - _first(child)
    return names, takes_any


def argument_names(function: Any) -> set[str]:
    """Names of the arguments of a function but the first."""
    try:
        return set(list(inspect.signature(function).parameters)[1:])
    except (TypeError, ValueError):
        return set()


def _first(module: nn.Module) -> set[str]:
    return {p.name for p in _parameters(module)[:1]}


def _parameters(module: nn.Module) -> Sequence[inspect.Parameter]:
    """The parameters of a module's forward, without ``self``."""
    forward: Any = module.forward
    if isinstance(module, torch.jit.ScriptModule):
        try:
            arguments = forward.schema.arguments[1:]
        except (AttributeError, RuntimeError):
            return ()
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        return [inspect.Parameter(a.name, kind) for a in arguments]
    function = getattr(forward, "__func__", None)
    found = _known_parameters.get(function) if isinstance(function, FunctionType) else None
    if found is None:
        try:
            found = list(inspect.signature(forward).parameters.values())
        except (TypeError, ValueError):
            return ()
        if isinstance(function, FunctionType):
            _known_parameters[function] = found
    return found


def _as_tensor(value: Any, count: int) -> Tensor | None:
    """An array, a list of numbers, or a list of tensors of so many samples, as a tensor."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (list, tuple)) and any(isinstance(one, Tensor) for one in value):
        return _stacked(value, count)
    try:
        numeric = np.asarray(value).dtype.kind in "fiub" and np.ndim(value) > 0
    except ValueError:
        return None
    return torch.as_tensor(value, device="cpu") if numeric else None


def _stacked(values: Sequence[Any], count: int) -> Tensor | None:
    shape = getattr(values[0], "shape", None)
    tensors = [one for one in values if isinstance(one, Tensor) and one.shape == shape]
    if len(tensors) < len(values):
        return None
    # Of lists of numbers, torch's default_collate makes a list of tensors, one for each place.
    return torch.stack(tensors, dim=int(tensors[0].shape[:1] == (count,)))
