"""Errors for unknown arguments that say which argument was meant."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

# What other libraries call an argument.
_ELSEWHERE = {
    "alpha": "step_size",
    "eps_iter": "step_size",
    "eps_step": "step_size",
    "lr": "step_size",
    "epsilon": "eps",
    "epsilons": "eps",
    "radius": "eps",
    "num_steps": "steps",
    "n_steps": "steps",
    "nb_iter": "steps",
    "max_iter": "steps",
    "iterations": "steps",
    "num_iter": "steps",
    "n_iter": "steps",
    "n_restarts": "restarts",
    "num_random_init": "restarts",
    "rand_init": "random_start",
    "random_init": "random_start",
    "clip_min": "bounds",
    "clip_max": "bounds",
    "p": "norm",
    "ord": "norm",
    "n_queries": "queries",
    "batch": "batch_size",
    "bs": "batch_size",
    "dataset": "data",
    "loader": "data",
    "dataloader": "data",
    "x": "inputs",
    "images": "inputs",
    "y": "labels",
    "targets": "labels",
}
C = TypeVar("C", bound="Callable[..., Any]")


def suggests(called: C) -> C:
    """Let a function or a class say which argument was meant where it gets an unknown one."""
    function: Any = called.__init__ if isinstance(called, type) else called  # type: ignore[misc]
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        _raise_for_unknown(called.__name__, signature, args, kwargs)
        return function(*args, **kwargs)

    if isinstance(called, type):
        called.__init__ = wrapper  # type: ignore[misc]
        return called
    return wrapper  # type: ignore[return-value]


def _raise_for_unknown(
    name: str, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    known = [n for n in signature.parameters if n != "self"]
    for given in kwargs:
        if given not in known:
            meant = _ELSEWHERE.get(given)
            near = [meant] if meant in known else difflib.get_close_matches(given, known, n=1)
            hint = f"; did you mean {near[0]}=?" if near else f"; it has {', '.join(known)}"
            raise TypeError(f"{name}: no argument {given!r}{hint}")
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    places = [n for n, p in signature.parameters.items() if p.kind in kinds]
    if len(args) > len(places):
        hint = "the others by name, such as eps=8/255"
        if "data" in places and len(args) == 3 and isinstance(args[2], Tensor):
            hint = f"inputs and labels as a pair: {name}(model, (inputs, labels), ...)"
        raise TypeError(
            f"{name}: {len(args)} arguments without a name, and it takes {len(places)}, "
            f"{', '.join(p for p in places if p != 'self')}; pass {hint}"
        )
