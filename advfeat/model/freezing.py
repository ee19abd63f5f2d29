"""Freeze a module while it is attacked, and leave it as it was found."""

from __future__ import annotations

import copy
import itertools
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import register_module_forward_pre_hook

from advfeat import checks
from advfeat.model.access import device_of

T = TypeVar("T")

_COPY_ATTEMPTS = 100


@contextmanager
def frozen(module: nn.Module, *, train: bool) -> Iterator[None]:
    """Freeze flags and parameters; put back flags, ``requires_grad`` and every buffer's value."""
    # A module of torch.jit.freeze has no flag.
    modules = list(module.modules())
    flags = [(m, m.training) for m in modules if hasattr(m, "training")]
    wanted = [(p, p.requires_grad) for p in module.parameters()]
    owned = [(m, dict(m._buffers.items())) for m in modules]
    recurrent = [(m, m.dropout) for m in modules if isinstance(m, nn.RNNBase)]
    try:
        for m, _ in flags:
            m.training = m.training and train
        for m, _ in recurrent:
            # cuDNN goes backward in training mode alone, which is the same without dropout.
            if not train and device_of(m).type == "cuda":
                m.training, m.dropout = True, 0.0
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        with buffers_kept(module):
            yield
    finally:
        for m, flag in flags:
            m.training = flag
        for m, dropout in recurrent:
            m.dropout = dropout
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
        for owner, own in owned:
            if isinstance(owner, torch.jit.ScriptModule):  # shows a view of its buffers
                for name, buffer in own.items():
                    setattr(owner, name, buffer)
                continue
            owner._buffers.clear()
            owner._buffers.update(own)


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Put back the values of all buffers: a pass that is not to count in BatchNorm statistics."""
    # An expanded buffer (stride 0) cannot be written to, by anyone.
    values = [(b, b.clone()) for b in module.buffers() if 0 not in b.stride()]
    try:
        yield
    finally:
        for buffer, value in values:
            # Through .data: a counted write would break a graph the user holds. Always, for
            # BatchNorm does not count its own.
            buffer.data.copy_(value)


def copy_for_thread(module: nn.Module, layer: T) -> tuple[nn.Module, T]:
    """Copy a module, and the layer in it, for work beside another thread that may train it.

    To freeze the module itself would stop the training, and the training would change the weights
    under the attack.
    """
    names = {id(part): name for name, part in module.named_modules()}
    try:
        copied = _deepcopy(module)
    except Exception as error:
        raise RuntimeError(
            "model: called in a thread, where it is copied so that another thread can train it "
            f"meanwhile, and the copy failed: {error}. Pass a module made for this thread"
        ) from error
    if isinstance(layer, nn.Module):
        layer = copied.get_submodule(names[id(layer)])  # type: ignore[assignment]
    return copied, layer


def _deepcopy(module: nn.Module) -> nn.Module:
    for _ in range(_COPY_ATTEMPTS):
        try:
            return copy.deepcopy(module)
        except RuntimeError as error:
            # Another thread registered a hook, or removed one, while its dictionary was copied.
            if "during iteration" not in str(error):
                raise
    return copy.deepcopy(module)


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile(module)`` made it, or ``module.compile()`` was called."""
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


@contextmanager
def warn_about_training_submodules(module: nn.Module) -> Iterator[None]:
    """Warn of what is random, or depends on other samples, and was not put in evaluation mode.

    A module that ``forward`` reaches as a global, or through a closure, is no part of the model.
    """
    own, found, thread = set(module.modules()), set(), threading.get_ident()

    def check(called: nn.Module, _: object) -> None:
        if (
            threading.get_ident() == thread  # the hook is one of all modules of the process
            and getattr(called, "training", False)
            and called not in own
            and isinstance(called, (_BatchNorm, _DropoutNd))
        ):
            found.add(type(called).__name__)

    handle = register_module_forward_pre_hook(check)
    try:
        yield
    finally:
        handle.remove()
    if found:
        warnings.warn(
            f"the model calls {' and '.join(sorted(found))} in training mode, in a module that is "
            "no part of it (a global?): results depend on the batch or on chance, and statistics "
            "move; make that module an attribute of the model, or call its .eval()",
            stacklevel=2,
        )


def check_tensors(module: nn.Module) -> None:
    """Raise an error for parameters and buffers that hold no values, or can enter no gradient."""
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            checks.fail("model", name, "not initialised yet; call the model once on some inputs")
        if tensor.is_meta:
            checks.fail("model", name, "on the meta device, without values; load the weights first")
        if tensor.is_inference():
            checks.fail(
                "model",
                name,
                "made in torch.inference_mode, so it can enter no gradient; make the model, or "
                "copy.deepcopy it, outside of that mode",
            )
