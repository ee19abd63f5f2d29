"""Give a module its inputs as the module's user would."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from advfeat.model.extras import Extras
from advfeat.model.formats import contiguous_only, in_channels_last, set_memory_format

# What torch says where an operation meets two types of numbers.
_TYPES_DIFFER = re.compile(r"dtype|scalar type|should be the same|data type|Input type", re.I)


# What torch says, and its compiler, of a view of activations in channels_last.
_CANNOT_VIEW = ("view size is not compatible", "Cannot view a tensor")


class InputAdapter:
    """Call functions of a module on inputs of the type, copied and laid out as they need it.

    A function gets the inputs as they are. If it fails on their type, they are cast to a type of
    the module's parameters. If it writes to its inputs, it gets a copy each time. If it fails on
    channels_last inputs, the module gets contiguous ones from then on.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        tensors = itertools.chain(module.parameters(), module.buffers())
        self._types = list(dict.fromkeys(t.dtype for t in tensors if t.is_floating_point()))
        self._casts: dict[object, torch.dtype | None] = {}  # by function
        self._copies: dict[object, bool] = {}  # by function

    def call(
        self,
        function: Callable[..., object],
        inputs: Tensor,
        extras: Extras,
        *,
        cast: bool = True,
    ) -> object:
        """Return what the function gives; without ``cast`` (in autocast) types are left alone.

        ``extras`` are passed on by name, and cast with the inputs where they are floating.
        """
        if not cast:
            return self._call(function, inputs, extras)
        if function not in self._casts:
            return self._find_cast(function, inputs, extras)
        return self._call(function, *_cast(inputs, extras, self._casts[function]))

    def _find_cast(self, function: Callable[..., object], inputs: Tensor, extras: Extras) -> object:
        first: Exception | None = None
        for wanted in (None, *(t for t in self._types if t != inputs.dtype)):
            try:
                output = self._call(function, *_cast(inputs, extras, wanted))
            except (RuntimeError, TypeError, ValueError) as error:
                if first is None and not _TYPES_DIFFER.search(str(error)):
                    raise
                first = first or error
                continue
            self._casts[function] = wanted
            return output
        assert first is not None
        raise first

    def _call(self, function: Callable[..., object], inputs: Tensor, extras: Extras) -> object:
        copies = self._copies.get(function)
        if copies is False:
            return self._laid_out(function, inputs, extras)
        given = inputs.clone()
        version = given._version
        output = self._laid_out(function, given, extras)
        if copies is None:
            written = given._version != version
            # Through NumPy a tensor is written to without being counted.
            if not written and given.device.type == "cpu":
                written = not bool(((given == inputs) | inputs.isnan()).all())
            self._copies[function] = written
        return output

    def _laid_out(self, function: Callable[..., object], inputs: Tensor, extras: Extras) -> object:
        # Images of one channel are contiguous in either format: then the weights decide.
        if inputs.is_contiguous() and self._module not in in_channels_last:
            return function(inputs, **extras)
        try:
            return function(inputs, **extras)
        except RuntimeError as error:
            if not any(message in str(error) for message in _CANNOT_VIEW):
                raise
            contiguous_only.add(self._module)
            weights = in_channels_last.pop(self._module, [])
            set_memory_format(weights, torch.contiguous_format)
            return function(inputs.contiguous(), **extras)


def _cast(inputs: Tensor, extras: Extras, dtype: torch.dtype | None) -> tuple[Tensor, Extras]:
    if dtype is None:
        return inputs, extras
    floating = {name: value.is_floating_point() for name, value in extras.items()}
    return inputs.to(dtype), {
        name: value.to(dtype) if floating[name] else value for name, value in extras.items()
    }
