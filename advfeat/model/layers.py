"""Find a layer of a module, and read the activations there."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from advfeat import checks
from advfeat.model.compiled import CompiledModule

Layer: TypeAlias = str | nn.Module | Callable[[Tensor], Tensor] | None


def find_layer(module: nn.Module, layer: Layer) -> Layer:
    """Resolve a layer's name to the module, and refuse a layer that the module does not have."""
    if not isinstance(layer, (str, nn.Module)):
        if not (layer is None or callable(layer)):
            raise TypeError(f"layer={layer!r}: expected a name, a module, a callable or None")
        return layer
    named = dict(module.named_modules())
    if isinstance(layer, nn.Module):
        if not any(layer is m for m in named.values()):
            checks.fail("layer", type(layer).__name__, "this module is not part of the model")
        return layer
    if layer not in named or layer == "":
        names = [name for name in named if name]
        close = difflib.get_close_matches(layer, names, n=3, cutoff=0.3) or names[:5]
        checks.fail("layer", layer, f"the model has no layer of this name; near: {close}")
    found: nn.Module = named[layer]
    return found


class _LayerReached(Exception):  # noqa: N818 - not an error
    """Ends a forward pass at the layer that was asked for."""


class LayerHook:
    """Activations at a layer: its output in its first call, or its input in its last.

    The forward pass ends there, unless it is compiled: a compiler leaves out by itself what
    nobody looks at.
    """

    def __init__(
        self,
        module: nn.Module,
        layer: nn.Module,
        *,
        compile: bool,
        calls: int = 1,
        before: bool = False,
    ) -> None:
        self._module, self._layer, self._calls, self._before = module, layer, calls, before
        self._call = CompiledModule(module) if compile else module

    def __call__(self, inputs: Tensor) -> Tensor:
        found: list[Tensor] = []
        to_the_end = self._call is not self._module

        def keep(value: Tensor) -> None:
            found.append(value)
            if len(found) == self._calls and not to_the_end:
                raise _LayerReached

        if self._before:
            handle = self._layer.register_forward_pre_hook(lambda _, given: keep(given[0]))
        else:
            handle = self._layer.register_forward_hook(lambda _, __, output: keep(output))
        try:
            self._call(inputs)
        except _LayerReached:
            pass
        finally:
            handle.remove()
        if len(found) < self._calls and to_the_end:
            # Code that the user had compiled before, perhaps, and that calls no hook.
            warnings.warn("compile=True: goes on without, for the layer was lost", stacklevel=2)
            self._call = self._module
            return self(inputs)
        if len(found) < self._calls:
            checks.fail("layer", None, "a forward pass of the model did not reach this layer")
        value = found[self._calls - 1]
        # A compiled module is given more rows than these.
        return value[: len(inputs)] if to_the_end else value


def last_linear(module: nn.Module, example: Tensor) -> tuple[nn.Module, int]:
    """Find the Linear that a forward pass calls last, and how often it is called."""
    called: list[nn.Module] = []
    handles = [
        m.register_forward_pre_hook(lambda m, _: called.append(m))
        for m in module.modules()
        if isinstance(m, nn.Linear)
    ]
    try:
        with torch.no_grad():
            module(example)
    finally:
        for handle in handles:
            handle.remove()
    if not called:
        checks.fail(
            "layer",
            None,
            "the model calls no nn.Linear, so its penultimate layer cannot be found; "
            "name one: layer='features'",
        )
    return called[-1], sum(m is called[-1] for m in called)
