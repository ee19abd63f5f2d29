"""Call a module through torch.compile with few batch sizes."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from advfeat.model.access import logits_of


class CompiledModule:
    """A compiled module that meets few batch sizes: samples are padded to a power of two.

    Without a compiler, or with a module that it cannot do, the module itself is called.
    """

    def __init__(self, module: Callable[..., object]) -> None:
        self._module = module
        self._compiled: Callable[..., object] | None = torch.compile(module, dynamic=False)

    def __call__(self, inputs: Tensor, **extras: Tensor) -> object:
        if self._compiled is None:
            return self._module(inputs, **extras)
        count = len(inputs)
        missing = (1 << (count - 1).bit_length()) - count
        padded, *others = (
            torch.cat([t, t[:1].expand(missing, *t.shape[1:])]) for t in (inputs, *extras.values())
        )
        others_by_name = dict(zip(extras, others, strict=True))
        try:
            # Without guards on hooks, code that was compiled for another layer would be run.
            guards = torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)
            with guards, warnings.catch_warnings():
                # The compiler reads every input's gradient, and torch warns of that.
                warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor")
                output = logits_of(self._compiled(padded, **others_by_name))
        except Exception as error:
            if not type(error).__module__.startswith("torch._"):
                raise
            warnings.warn(f"compile=True: continues without, for {error}", stacklevel=2)
            self._compiled = None
            return self._module(inputs, **extras)
        return output[:count] if isinstance(output, Tensor) else output
