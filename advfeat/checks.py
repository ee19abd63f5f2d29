"""Errors for bad input, before any work is done: each names the argument, the value, the cause."""

from __future__ import annotations

import difflib
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Integral, Real
from typing import NoReturn, TypeVar

import torch
from torch import Tensor, nn

from advfeat.losses import LOSS_NAMES
from advfeat.threat import NORMS, Bounds, FeatureBounds, Norm

T = TypeVar("T")
# Inputs this far outside the bounds are rounding (of a resize, of float16) and are clipped.
CLIPPED = 1e-3
PRECISIONS = ("float32", "bfloat16")


def fail(argument: str, value: object, cause: str) -> NoReturn:
    """Raise the ValueError of this library: argument, value, usual cause."""
    raise ValueError(f"{argument}={value!r}: {cause}")


class ResultWarning(UserWarning):
    """A result may not mean what it seems to; the message says why, and what to do."""


_count = 0
# Topics that were warned of in the call that is under way; None outside of `warns_once`.
_topics: ContextVar[set[str] | None] = ContextVar("topics", default=None)


@contextmanager
def warns_once() -> Iterator[None]:
    """Within one call of the user, give a warning of each topic once. Also a decorator."""
    token = None if _topics.get() is not None else _topics.set(set())
    try:
        yield
    finally:
        if token is not None:
            _topics.reset(token)


@contextmanager
def warnings_counted() -> Iterator[Callable[[], int]]:
    """Yield a function that says how many doubts were found since, given to the user or not."""
    global _count
    start = _count
    yield lambda: _count - start


def warn(message: str, topic: str) -> None:
    """Give a `ResultWarning` at the user's own line, once for each topic of a call."""
    global _count
    _count += 1
    topics = _topics.get()
    if topics is not None:
        if topic in topics:
            return
        topics.add(topic)
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _is_internal(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, ResultWarning, stacklevel=level)


def _is_internal(name: str) -> bool:
    return name.partition(".")[0] in ("advfeat", "contextlib", "torch")


_NO_MODEL = {
    "ExportedProgram": "; pass its .module()",
    **dict.fromkeys(("OrderedDict", "dict"), "; for weights, model.load_state_dict(...)"),
}


def model(value: object) -> None:
    """Check that a model is a module."""
    if not isinstance(value, nn.Module):
        kind = type(value).__name__
        hint = "; pass an object of the class" if isinstance(value, type) else _NO_MODEL.get(kind)
        raise TypeError(f"model: expected a torch.nn.Module, got {kind}{hint or ''}")


_SPELLINGS: dict[object, Norm] = {
    **dict.fromkeys(("l1", "1", 1), "l1"),
    **dict.fromkeys(("l2", "2", 2, "euclidean"), "l2"),
    **dict.fromkeys(("linf", "inf", math.inf, "infinity", "max"), "linf"),
}


def norm(value: object) -> Norm:
    """Return the norm in this library's spelling; raise an error for an unknown one.

    Examples
    --------
    >>> norm("L_2"), norm(float("inf"))
    ('l2', 'linf')
    """
    spelled = value
    if isinstance(value, str):
        spelled = re.sub(r"[\s_-]|norm", "", value.lower())
        spelled = {"linfinity": "linf", "l∞": "linf", "∞": "linf"}.get(spelled, spelled)
    try:
        found = None if isinstance(value, bool) else _SPELLINGS.get(spelled)
    except TypeError:  # not hashable
        found = None
    if found is None:
        fail("norm", value, f"unknown norm; use one of {', '.join(map(repr, NORMS))}")
    return found


def scalar(argument: str, value: T) -> T | float:
    """Return a tensor or array of no axes as a float, anything else as it is."""
    if isinstance(value, Tensor) and value.ndim == 0 and not value.is_complex():
        return float(value)
    return value


def one_of(argument: str, value: object, choices: tuple[str, ...]) -> None:
    """Check that a name is among the choices."""
    if value not in choices:
        near = difflib.get_close_matches(str(value).lower(), choices, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        fail(argument, value, f"unknown; {hint}use one of {', '.join(map(repr, choices))}")


def loss(value: object) -> None:
    """Check that a loss is a known name or a callable."""
    if not callable(value):
        if not isinstance(value, str):
            raise TypeError(f"loss={value!r}: expected a name or a callable (logits, labels)")
        one_of("loss", value, LOSS_NAMES)


def function(argument: str, value: object) -> None:
    """Check that a value is a callable or None."""
    if not (value is None or callable(value)):
        raise TypeError(f"{argument}={value!r}: expected a callable, got {type(value).__name__}")


def objective(value: object, logits: Tensor) -> Tensor:
    """Check that a user's loss returned one value for each sample."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"loss: returned {type(value).__name__}; expected a tensor, one value for each sample"
        )
    if value.shape != logits.shape[:1]:
        fail(
            "loss",
            tuple(value.shape),
            f"expected one value for each sample, ({logits.shape[0]},); reduction='none'?",
        )
    return value


def number(argument: str, value: object, *, low: float, strict: bool = False) -> None:
    """Check that a value is a finite real number of at least (or above) ``low``."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{argument}={value!r}: expected a number, got {type(value).__name__}")
    if not math.isfinite(value):
        fail(argument, value, "must be finite; a division by zero or an overflow made it so")
    if value < low or (strict and value == low):
        fail(argument, value, f"must be {'above' if strict else 'at least'} {low:g}")


def count(argument: str, value: object, *, low: int) -> None:
    """Check that a value is an integer of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{argument}={value!r}: expected an integer, got {type(value).__name__}")
    if value < low:
        fail(argument, value, f"must be at least {low}")


def fraction(argument: str, value: object) -> None:
    """Check that a value is a number from 0 to 1."""
    number(argument, value, low=0.0)
    if value > 1:  # type: ignore[operator]
        fail(argument, value, "must be at most 1; it is a fraction, not a percentage")


def bounds(value: object) -> Bounds:
    """Return bounds as a tuple, if they are two finite numbers in rising order."""
    if isinstance(value, Tensor) and value.shape == (2,):
        value = tuple(value.tolist())
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"bounds={value!r}: expected a tuple (low, high)")
    if any(isinstance(end, Tensor) and end.ndim for end in value):
        raise TypeError(
            f"bounds: tensors of shape {tuple(value[0].shape)}; expected two numbers. For inputs "
            "that are normalised by channel, pass them in [0, 1] and put the normalisation inside "
            "the model: advfeat.Normalize(model, mean, std)"
        )
    value = tuple(scalar("bounds", end) for end in value)
    low, high = value
    for end in (low, high):
        if isinstance(end, Real) and math.isinf(end):
            fail("bounds", value, "must be finite; wide ones, (-1e3, 1e3), are as good as none")
        number("bounds", end, low=-math.inf)
    if not low < high:
        fail("bounds", value, "low must be below high; are they reversed?")
    return low, high


def linf_in_bounds(eps: object, norm: str, bounds: Bounds) -> None:
    """Raise an error for an l_inf radius wider than the bounds: 8 was meant to be 8/255."""
    width = bounds[1] - bounds[0]
    largest = eps.amax() if isinstance(eps, Tensor) else eps
    if norm == "linf" and largest > width:  # type: ignore[operator]
        fail("eps", eps, f"wider than bounds={bounds}; for pixels in [0, 1] write 8/255, not 8")


def seed(value: object) -> None:
    """Check that a seed is an integer, a generator or None."""
    if value is None or isinstance(value, torch.Generator):
        return
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(
            f"seed={value!r}: expected an integer, a torch.Generator or None, "
            f"got {type(value).__name__}"
        )


def inputs(value: object, bounds: FeatureBounds, name: str = "inputs") -> None:
    """Check that inputs are a batch of finite floating-point numbers within the bounds."""
    if not isinstance(value, Tensor):
        hint = "; use torch.from_numpy(...)" if type(value).__name__ == "ndarray" else ""
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}{hint}")
    if not value.is_floating_point():
        raise TypeError(
            f"{name}: expected floating-point values, got {value.dtype}; {_float_advice(value)}"
        )
    if value.layout != torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else value.layout
        fail(f"{name}.layout", kind, "expected one dense tensor; use x.to_dense(), or pad")
    if value.ndim < 2:
        fail(f"{name}.shape", tuple(value.shape), "the first axis is the sample; add one: x[None]")
    if value.numel() == 0:
        fail(f"{name}.shape", tuple(value.shape), "empty batch")
    if value.is_meta:
        fail(f"{name}.device", str(value.device), "meta tensors hold no values")
    smallest, largest = torch.stack(value.detach().aminmax()).tolist()
    if not (math.isfinite(smallest) and math.isfinite(largest)):
        fail(name, "NaN or infinity", "every value must be finite; check the loader")
    low, high = bounds
    if isinstance(low, Tensor) and isinstance(high, Tensor):
        _inputs_by_feature(value.detach(), low, high, name)
    elif smallest < low - CLIPPED or largest > high + CLIPPED:
        cause = "the normalisation is outside the model: move it inside, as its first layer"
        if smallest >= 0 and largest > 2 and high == 1:
            pixel = 255 if largest <= 255 else 65535
            cause = f"the images are in [0, {pixel}]: divide by {pixel}"
        fail(
            name,
            f"[{smallest:.4g}, {largest:.4g}]",
            f"outside bounds={bounds}; usually {cause}. Otherwise pass bounds=(low, high)",
        )


def _inputs_by_feature(value: Tensor, low: Tensor, high: Tensor, name: str) -> None:
    """Raise an error for inputs outside bounds that broadcast against one sample."""
    try:
        low, high = (end.to(value).broadcast_to(value.shape[1:]) for end in (low, high))
    except RuntimeError:
        shape = tuple(value.shape[1:])
        fail("bounds.shape", tuple(low.shape), f"expected tensors that broadcast against {shape}")
    slack = CLIPPED * (high - low)
    outside = ((value < low - slack) | (value > high + slack)).nonzero()
    if len(outside):
        sample, *feature = outside[0].tolist()
        place = tuple(feature) if len(feature) > 1 else feature[0]
        ends = float(low[tuple(feature)]), float(high[tuple(feature)])
        cause = f"outside its bounds {ends}; are inputs and bounds in the same units?"
        fail(f"{name}[{sample}], feature {place}", float(value[(sample, *feature)]), cause)


def index(value: object, inputs: Tensor) -> None:
    """Check that sample numbers are one integer for each input, on its device."""
    if not isinstance(value, Tensor) or value.is_floating_point() or value.dtype == torch.bool:
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"index: expected a tensor of integers, got {kind}")
    if value.shape != inputs.shape[:1]:
        fail("index.shape", tuple(value.shape), f"expected ({inputs.shape[0]},)")
    if value.device != inputs.device:
        fail("index.device", str(value.device), f"the inputs are on {inputs.device}; move one")


def labels(value: object, inputs: Tensor, name: str = "labels") -> None:
    """Check that labels are one class index for each input."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.ndim == 2 and value.shape[0] == inputs.shape[0] and value.shape[1] > 1:
        fail(
            f"{name}.shape",
            tuple(value.shape),
            "expected (N,) class indices; one-hot labels? use labels.argmax(1)",
        )
    if value.ndim == 0 or value.shape == (1,) != inputs.shape[:1]:
        fail(
            f"{name}.shape",
            tuple(value.shape),
            f"one label for inputs of shape {tuple(inputs.shape)}; for a single input add the "
            "batch axis to both: inputs[None], labels.reshape(1)",
        )
    if value.ndim != 1 or value.shape[0] != inputs.shape[0]:
        fail(
            f"{name}.shape",
            tuple(value.shape),
            f"expected ({inputs.shape[0]},), one class index for each input",
        )
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name}: expected integer class indices, got {value.dtype}; use .long()")
    if value.dtype in (torch.uint16, torch.uint32, torch.uint64):  # which torch cannot compare
        raise TypeError(f"{name}: {value.dtype} is not supported by torch; use .long()")
    if value.device != inputs.device:
        fail(f"{name}.device", str(value.device), f"the inputs are on {inputs.device}; move one")
    smallest = int(value.min())
    if smallest < 0:
        fail(name, smallest, negative_label_advice(value))


def soft_or_hard_labels(value: object, inputs: Tensor, name: str = "labels") -> None:
    """Check that labels are class indices or class probabilities ``(N, C)``."""
    soft = isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 2
    if not soft:
        labels(value, inputs, name)
    elif value.shape[0] != inputs.shape[0]:  # type: ignore[attr-defined]
        fail(f"{name}.shape", tuple(value.shape), f"expected ({inputs.shape[0]}, C)")  # type: ignore[attr-defined]


def negative_label_advice(values: Tensor) -> str:
    """What to do about class indices below 0, by what else there is."""
    found = set(values.tolist())
    if found == {-1, 1}:
        return "class indices start at 0; labels in {-1, +1} become (y + 1) // 2"
    if min(found) == -1:
        return "class indices start at 0; -1 usually marks samples without a label: leave those out"
    return "class indices start at 0"


def _float_advice(values: Tensor) -> str:
    """What to do about inputs of another type than floating point, by what they may be."""
    if values.is_complex():
        return "pass its real and imaginary parts: torch.view_as_real(x)"
    if values.ndim == 1:
        return "are these labels or indices? A batch is (inputs, labels, ...), in this order"
    if values.dtype in (torch.uint8, torch.int8, torch.bool):
        return "convert images with x.float() / 255"
    return "convert images with x.float() / 65535; of tokens, pass the embeddings"


def logits(value: object, inputs: Tensor) -> Tensor:
    """Check that a model returned at least two logits for each input."""
    if not isinstance(value, Tensor):
        keys = f" with keys {sorted(map(str, value))}" if isinstance(value, Mapping) else ""
        raise TypeError(
            f"model: returned {type(value).__name__}{keys}; expected logits (N, C) as a tensor, "
            "the first item of a tuple, an entry 'logits' of a dict, or an attribute .logits"
        )
    if value.ndim != 2 or value.shape[0] != inputs.shape[0]:
        fail(
            "model output shape",
            tuple(value.shape),
            f"expected ({inputs.shape[0]}, C): one row of class logits for each input",
        )
    if value.shape[1] < 2:
        fail(
            "model output shape",
            tuple(value.shape),
            "one logit cannot be compared; return two classes: torch.cat([zeros, z], 1)",
        )
    if not value.is_floating_point():
        raise TypeError(f"model: returned {value.dtype}; expected floating-point logits")
    return value


def class_range(largest: int, classes: int, name: str = "labels") -> None:
    """Raise an error for a class index that the model has no logit for."""
    if largest >= classes:
        fail(name, largest, f"the model has {classes} classes, indices 0 to {classes - 1}")


def same_device(inputs: Tensor, device: torch.device | None) -> None:
    """Check that inputs and model are on the same device."""
    if device is not None and inputs.device != device:
        fail(
            "inputs.device",
            str(inputs.device),
            f"the model is on {device}; move them: inputs.to({str(device)!r})",
        )
