"""Find a layer of a module, and read the activations there."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from advfeat import checks
from advfeat.model.access import logits_of
from advfeat.model.compiled import CompiledModule

Layer: TypeAlias = str | nn.Module | Callable[[Tensor], Tensor] | None


def find_layer(module: nn.Module, layer: Layer) -> Layer:
    """Resolve a layer's name to the module; a layer that the module does not have is an error."""
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
    nobody uses.
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

    def __call__(self, inputs: Tensor, **extras: Tensor) -> Tensor:
        found: list[Tensor] = []
        to_the_end = self._call is not self._module

        def keep(called: nn.Module, value: Tensor) -> None:
            if called is not self._layer:
                return  # of a copy, hooks and all, that another thread made of the module meanwhile
            # What comes after the layer may change its output in place.
            copied = to_the_end and isinstance(value, Tensor)
            found.append(value.clone() if copied else value)
            if len(found) == self._calls and not to_the_end:
                raise _LayerReached

        if self._before:
            handle = self._layer.register_forward_pre_hook(lambda m, given: keep(m, given[0]))
        else:
            handle = self._layer.register_forward_hook(lambda m, _, output: keep(m, output))
        try:
            self._call(inputs, **extras)
        except _LayerReached:
            pass
        finally:
            handle.remove()
        if len(found) < self._calls and to_the_end:
            # Code that the user had compiled before, perhaps, and that calls no hook.
            warnings.warn("compile=True: continues without, for the layer was lost", stacklevel=2)
            self._call = self._module
            return self(inputs, **extras)
        if len(found) < self._calls:
            checks.fail("layer", None, "a forward pass of the model did not reach this layer")
        value = found[self._calls - 1]
        # A compiled module is given more samples than these.
        return value[: len(inputs)] if to_the_end else value


class LogitsLayer(NamedTuple):
    """The Linear that gives a model's logits."""

    module: nn.Module
    calls: int  # which of its calls in a forward pass gives them


def logits_layer(module: nn.Module, example: Tensor, **extras: Tensor) -> LogitsLayer:
    """Find the Linear that gives the logits of a forward pass; its input is the penultimate layer.

    It is the one whose output is the logits; else, where they are scaled or normalised after it,
    the last one that has as many outputs as there are logits. Warns where that is not certain.
    """
    outputs: list[tuple[nn.Linear, Tensor]] = []
    linear = [m for m in module.modules() if isinstance(m, nn.Linear)]

    def keep(called: nn.Linear, _: object, output: Tensor) -> None:
        if called in linear:  # and no copy, see LayerHook
            outputs.append((called, output))

    handles = [m.register_forward_hook(keep) for m in linear]
    try:
        with torch.no_grad():
            logits = logits_of(module(example, **extras))
    finally:
        for handle in handles:
            handle.remove()
    if not outputs:
        checks.fail(
            "layer",
            None,
            "the model calls no nn.Linear, so its penultimate layer cannot be found; "
            "name one: layer='features'",
        )
    place = _place_of_logits(module, outputs, logits)
    found = outputs[place][0]
    return LogitsLayer(found, sum(m is found for m, _ in outputs[: place + 1]))


def _place_of_logits(
    module: nn.Module, outputs: list[tuple[nn.Linear, Tensor]], logits: object
) -> int:
    """Which of the calls of a Linear gives the logits."""
    names = {m: name for name, m in module.named_modules()}
    if not isinstance(logits, Tensor):  # of a model that gives features alone
        return len(outputs) - 1
    same = [i for i, (_, output) in enumerate(outputs) if _is_same(output, logits)]
    if same:
        return same[-1]
    fitting = [i for i, (m, _) in enumerate(outputs) if m.out_features == logits.shape[-1]]
    # Of a head and its low-rank adapter, the head is the wider one.
    place = max(fitting, key=lambda i: (outputs[i][0].in_features, i), default=len(outputs) - 1)
    found = outputs[place][0]
    if len({outputs[i][0] for i in fitting}) != 1:
        kind = f"{found.in_features} -> {found.out_features}"
        warnings.warn(
            f"layer=None: no nn.Linear gives the model's {logits.shape[-1]} logits for certain; "
            f"the input of {names[found]!r} ({kind}) is used. Name the layer: "
            "layer='...', or a function of the inputs",
            stacklevel=2,
        )
    return place


def _is_same(output: Tensor, logits: Tensor) -> bool:
    return output.numel() == logits.numel() and torch.equal(output.flatten(), logits.flatten())


class StraightThrough:
    """A function of the inputs whose last ReLU lets every gradient pass, active or not.

    The released code of the paper takes gradients so; values are those of the function.
    """

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function
        self._last: int | None = None

    def __call__(self, inputs: Tensor, **extras: Tensor) -> object:
        if self._last is None:
            with torch.no_grad(), _ReluMode(None) as counted:
                self._function(inputs, **extras)
            if not counted.calls:
                checks.fail("straight_through", True, "no ReLU is called on the way to the layer")
            self._last = counted.calls
        with _ReluMode(self._last):
            return self._function(inputs, **extras)


_RELUS = {torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu, F.relu_}


class _ReluMode(TorchFunctionMode):
    """Counts calls of ReLU, and gives one of them an identity for its gradient."""

    def __init__(self, passed: int | None) -> None:
        super().__init__()
        self._passed, self.calls = passed, 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _RELUS:
            return func(*args, **kwargs)
        self.calls += 1
        if self.calls != self._passed:
            return func(*args, **kwargs)
        inputs = args[0] if args else kwargs["input"]
        with torch.no_grad():
            # In place, this changes the values and leaves the gradient as it is.
            active = func(*args, **kwargs)
        # Exact: the difference is 0 or -inputs.
        return inputs if active is inputs else inputs + (active - inputs).detach()
