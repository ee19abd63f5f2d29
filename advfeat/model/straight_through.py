"""Straight-through gradients of rounding, thresholding and index layers, without a changed model.

Inside `StraightThroughMode`, operations whose derivative is zero almost everywhere keep their
values and get the derivative of a smooth neighbour (Bengio et al. 2013; BPDA, Athalye et al. 2018).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def _methods(*names: str) -> set[Any]:
    """Each name as a function of torch, in place and not, and as a method of a tensor."""
    spelled = [name + suffix for name in names for suffix in ("", "_")]
    places = (torch, Tensor)
    return {getattr(place, name) for place in places for name in spelled if hasattr(place, name)}


_ROUND = _methods("round", "floor", "ceil", "trunc", "fix", "sign", "sgn", "heaviside")
_INTEGER_PART = {*_methods("floor_divide"), Tensor.__floordiv__}
_SAWTOOTH = {*_methods("remainder", "fmod"), Tensor.__mod__}
_GREATER = {*_methods("gt", "ge", "greater", "greater_equal"), Tensor.__gt__, Tensor.__ge__}
_LESS = {*_methods("lt", "le", "less", "less_equal"), Tensor.__lt__, Tensor.__le__}
_CONVERT = {
    *(Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.to, Tensor.type),
    *(Tensor.type_as, Tensor.long, Tensor.int, Tensor.short, Tensor.byte, Tensor.char, Tensor.bool),
}
_ARITHMETIC = {
    *_methods("add", "sub", "mul", "div", "true_divide", "rsub"),
    *(Tensor.__add__, Tensor.__radd__, Tensor.__sub__, Tensor.__rsub__, Tensor.__mul__),
    *(Tensor.__rmul__, Tensor.__truediv__, Tensor.__rtruediv__),
}
_SHIFT = {Tensor.__rshift__: 0.5, torch.bitwise_right_shift: 0.5}
_SHIFT |= {Tensor.__lshift__: 2.0, torch.bitwise_left_shift: 2.0}
_ARGMAX, _ARGMIN = _methods("argmax"), _methods("argmin")
_DETACH = _methods("detach")
_TO_NUMPY: set[Any] = {Tensor.numpy, Tensor.__array__}
_SHAPE_ONLY = _methods(
    "reshape", "flatten", "unsqueeze", "squeeze", "permute", "transpose", "movedim", "expand_as"
) | {Tensor.view, Tensor.expand, Tensor.contiguous}


class StraightThroughMode(TorchFunctionMode):
    """Context in which gradients pass through layers that have none.

    ``round``, ``floor``, ``ceil``, ``trunc``, ``sign``, ``heaviside``, conversions to integers and
    ``detach`` get the derivative 1; ``a // b`` that of ``a / b``, and ``a % b`` the derivative 0;
    comparisons that of the difference of their arguments; ``argmax`` that of the softmax, where it
    is turned into a one-hot vector or picks from a table.

    Examples
    --------
    >>> import torch
    >>> x = torch.tensor([0.3, 0.7], requires_grad=True)
    >>> with StraightThroughMode():
    ...     y = torch.round(x) + (x > 0.5).float()
    >>> y.tolist(), torch.autograd.grad(y.sum(), x)[0].tolist()
    ([0.0, 2.0], [2.0, 2.0])
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call ``func``, and give its result a gradient if it is one of the operations above."""
        kwargs = kwargs or {}
        if not args or not isinstance(args[0], Tensor):
            return func(*args, **kwargs)
        if func in _DETACH:
            return args[0]
        if func in _TO_NUMPY:  # which takes detached tensors alone, and `detach` has left this one
            with torch._C.DisableTorchFunction():
                return func(args[0].detach(), *args[1:], **kwargs)
        if func in _SAWTOOTH:
            return func(args[0].detach(), *args[1:], **kwargs)
        if func in _ROUND:
            return _rounded(func, args, kwargs)
        if func in _ARITHMETIC and not kwargs.get("rounding_mode"):
            return _arithmetic(func, args, kwargs)
        if func in _WHERE:
            return _where(func, args, kwargs)
        return _attach(func(*args, **kwargs), *_stand_in(func, args, kwargs))


def _rounded(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    in_place = func.__name__.endswith("_") and not func.__name__.endswith("__")
    soft = _soft(args[0])
    if in_place and soft is not None:
        soft = soft.clone()
    output = _attach(func(*args, **kwargs), soft)
    return args[0].copy_(output) if in_place and soft is not None else output


def _arithmetic(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Arithmetic on integers or truth values that stand in for something continues with it."""
    if not any(isinstance(value, Tensor) and _marked(value) for value in args):
        return func(*args, **kwargs)
    output = func(*args, **kwargs)
    softs = [_soft(value) for value in args]
    if output.is_floating_point():
        values = [
            _attach(value.to(output.dtype), soft) if soft is not None and _marked(value) else value
            for value, soft in zip(args, softs, strict=True)
        ]
        return func(*values, **kwargs)
    values = [v if soft is None else soft for v, soft in zip(args, softs, strict=True)]
    return _attach(output, func(*values, **kwargs))


def _stand_in(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What the gradient of the result goes by, and its shape; None where autograd knows it."""
    first = _soft(args[0])
    if func in _CONVERT:
        # From floating point to floating point autograd knows the way.
        return (None,) if first is args[0] and _floating(func, args, kwargs) else (first,)
    if first is not None and (func in _INTEGER_PART or kwargs.get("rounding_mode")):
        return (first / args[1],)
    if first is not None and func in _SHIFT:
        return (first * _SHIFT[func] ** args[1],)
    if func in _GREATER or func in _LESS:
        return (_difference(args, 1.0 if func in _GREATER else -1.0),)
    if first is not None and func in _SHAPE_ONLY and _marked(args[0]):
        return (func(first, *args[1:], **kwargs),)
    if func in _ARGMAX or func in _ARGMIN:
        return (_Weights.of(args, kwargs, 1.0 if func in _ARGMAX else -1.0),)
    if first is not None and func is torch.bucketize:
        edges = args[1]
        return (first * (len(edges) - 1) / (edges[-1] - edges[0]),)
    if func is F.one_hot:
        count = kwargs.get("num_classes", args[1] if len(args) > 1 else -1)
        return (_weights(args[0], count),)
    if func is Tensor.__getitem__ and isinstance(args[1], Tensor):
        weights = _weights(args[1], len(args[0]))
        if weights is not None:
            picked = weights @ args[0].reshape(len(args[0]), -1).to(weights.dtype)
            return picked, args[1].shape + args[0].shape[1:]
    return (None,)


def _soft(value: Any) -> Tensor | None:
    """What the gradient of a tensor goes by: the tensor itself, or what it stands in for."""
    if not isinstance(value, Tensor):
        return None
    if value.is_floating_point():
        return value if value.requires_grad else None
    found = getattr(value, "_advfeat_soft", None)
    return found if isinstance(found, Tensor) else None


def _marked(value: Tensor) -> bool:
    return not value.is_floating_point() and hasattr(value, "_advfeat_soft")


def _floating(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    integers = {Tensor.long, Tensor.int, Tensor.short, Tensor.byte, Tensor.char, Tensor.bool}
    wanted = [v for v in (*args[1:], *kwargs.values()) if isinstance(v, torch.dtype)]
    return func not in integers and all(dtype.is_floating_point for dtype in wanted)


def _attach(output: Any, soft: Any, shape: torch.Size | None = None) -> Any:
    """The output's values with the gradient of ``soft``."""
    if soft is None or not isinstance(output, Tensor):
        return output
    with torch._C.DisableTorchFunction():
        if output.is_floating_point():
            own = output.detach()
            soft = soft if shape is None else soft.reshape(shape)
            return own + (soft - soft.detach()).to(own.dtype)
        output = output.view(output.shape)  # another object: the argument is not marked
        output._advfeat_soft = soft
    return output


def _difference(args: tuple[Any, ...], sign: float) -> Tensor | None:
    pair = [_soft(value) for value in args[:2]]
    if pair[0] is None and pair[1] is None:
        return None
    left, right = (
        value if soft is None else soft for value, soft in zip(args[:2], pair, strict=True)
    )
    found: Tensor = sign * (left - right)
    return found


class _Weights:
    """The softmax over one axis, moved to the end, whose maximum an index says."""

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    @classmethod
    def of(cls, args: Any, kwargs: Any, sign: float) -> _Weights | None:
        axis = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if axis is None or not args[0].requires_grad or kwargs.get("keepdim", len(args) > 2):
            return None
        return cls((sign * args[0]).softmax(axis).movedim(axis, -1))


def _weights(index: Tensor, count: int) -> Tensor | None:
    found = getattr(index, "_advfeat_soft", None)
    if not isinstance(found, _Weights) or count not in (-1, found.weights.shape[-1]):
        return None
    return found.weights


_WHERE = {torch.where, Tensor.where}


def _where(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``where(condition, a, b)``: its gradient by the condition is that of ``a - b``."""
    output = func(*args, **kwargs)
    if len(args) != 3:
        return output
    condition, chosen, other = args if func is torch.where else (args[1], args[0], args[2])
    soft = _soft(condition)
    if soft is None or not output.is_floating_point():
        return output
    gap = torch.as_tensor(chosen - other, dtype=output.dtype, device=output.device)
    with torch._C.DisableTorchFunction():
        return output + (soft - soft.detach()) * gap.detach()
