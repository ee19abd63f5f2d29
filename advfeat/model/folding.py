"""BatchNorm folded into the convolution before it, while a module in evaluation mode is called.

A normalisation with fixed statistics is a scale and a shift for each channel, and a convolution
can hold both in its weight and its bias: one pass over the activations less, forward and back.
"""

from __future__ import annotations

import copy
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, fx, nn

# What modules answer in place of their own forward.
Forwards: TypeAlias = Mapping[nn.Module, Callable[[Tensor], Tensor]]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
Names: TypeAlias = list[tuple[str, str]]
Kinds: TypeAlias = list[tuple[str, type[nn.Module]]]
# Names of each module's pairs, found when its parts were of these kinds: to trace a module takes
# as long as some forward passes.
_found: weakref.WeakKeyDictionary[nn.Module, tuple[Kinds, Names]] = weakref.WeakKeyDictionary()

# Kinds of each module's parts when its folding was last compared with its own forward pass, and
# how often that may be relied on, inside of `rare_comparisons`.
_rare: ContextVar[bool] = ContextVar("rare comparisons", default=False)
_checked: weakref.WeakKeyDictionary[nn.Module, tuple[Kinds, int]] = weakref.WeakKeyDictionary()
_RELIED_ON = 100


def fold_batchnorm(module: nn.Module) -> Forwards:
    """Forwards that fold each BatchNorm of a module in evaluation mode into its convolution.

    Empty where nothing can be folded, or where a hook is registered, which is to see what it
    always sees.
    """
    if any(_has_hooks(part) for part in module.modules()):
        return {}
    kinds = _kinds(module)
    if module not in _found or _found[module][0] != kinds:
        _found[module] = kinds, _find_pairs(module)
    forwards: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
    for names in _found[module][1]:
        convolution, norm = (module.get_submodule(name) for name in names)
        if _is_plain(convolution, _CONVOLUTIONS) and _is_plain(norm, _NORMS):
            forwards |= _fold(convolution, norm)
    return forwards


@contextmanager
def rare_comparisons() -> Iterator[None]:
    """Compare the folding of a module once in a hundred calls of an attack inside, not in each.

    For training, where the same model is attacked at every step: a comparison waits for the device.
    """
    token = _rare.set(True)
    _checked.clear()
    try:
        yield
    finally:
        _rare.reset(token)


def is_checked(module: nn.Module) -> bool:
    """Whether the folding of a module was compared lately, when its parts were of these kinds."""
    kinds, left = _checked.get(module, ([], 0)) if _rare.get() else ([], 0)
    if left == 0 or kinds != _kinds(module):
        return False
    _checked[module] = kinds, left - 1
    return True


def set_checked(module: nn.Module) -> None:
    """Note that the folding of a module was compared, and gave the same."""
    _checked[module] = _kinds(module), _RELIED_ON


def _kinds(module: nn.Module) -> Kinds:
    return [(name, type(part)) for name, part in module.named_modules()]


@contextmanager
def forwards_replaced(forwards: Forwards) -> Iterator[None]:
    """Let modules answer by other forwards, and by their own again afterwards."""
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module in forwards:
            vars(module).pop("forward", None)


def _find_pairs(module: nn.Module) -> Names:
    """Names of convolutions, each called once, whose output one BatchNorm takes and nothing else.

    None where the forward pass cannot be traced, for it may then differ from call to call.
    """
    if not any(type(part) in _NORMS for part in module.modules()):
        return []
    try:
        # A copy is traced: a module that keeps what it computes would keep the tracer's proxies.
        shared = {id(t): t for t in itertools.chain(module.parameters(), module.buffers())}
        devices = {t.device for t in shared.values() if t.is_cuda}
        with warnings.catch_warnings(), torch.random.fork_rng(list(devices)):
            warnings.simplefilter("ignore")
            nodes = fx.Tracer().trace(copy.deepcopy(module, shared)).nodes
    except Exception:  # whatever the module does on a proxy
        return []
    calls = [node for node in nodes if node.op == "call_module"]
    once = {node for node in calls if sum(other.target == node.target for other in calls) == 1}
    return [
        (str(node.args[0].target), str(node.target))
        for node in calls
        if node in once
        and len(node.args) == 1
        and node.args[0] in once
        and list(node.args[0].users) == [node]
    ]


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _is_plain(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Of these very classes, as torch made them, in float32."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return (
        type(module) in kinds
        and "forward" not in vars(module)
        and all(t.dtype == torch.float32 for t in tensors if t.is_floating_point())
    )


def _fold(convolution: nn.Module, norm: nn.Module) -> Forwards:
    assert isinstance(convolution, nn.modules.conv._ConvNd)
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    if norm.training or norm.running_mean is None or norm.running_var is None:
        return {}
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = norm.running_mean if convolution.bias is None else norm.running_mean - convolution.bias
    shift = -shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias
    weight = convolution.weight * scale.view(-1, *[1] * (convolution.weight.ndim - 1))
    forward = partial(convolution._conv_forward, weight=weight, bias=shift)
    return {convolution: forward, norm: _unchanged}


def _unchanged(inputs: Tensor) -> Tensor:
    return inputs
