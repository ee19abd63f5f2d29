"""Checks of what an attack may change: eps, bounds and mask, numbers or tensors by feature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from advfeat import checks, threat
from advfeat.threat import FeatureBounds


def canonical(attack: Any, needs_eps: bool = True) -> None:
    """Check norm, bounds, eps and mask of a frozen attack, and put them in the library's form."""
    object.__setattr__(attack, "norm", checks.norm(attack.norm))
    object.__setattr__(attack, "bounds", bounds(attack.bounds))
    object.__setattr__(attack, "eps", checks.scalar("eps", attack.eps))
    object.__setattr__(attack, "mask", mask(attack.mask))
    if needs_eps or attack.eps is not None:
        eps(attack.eps)
        linf_in_bounds(attack.eps, attack.norm, attack.bounds)


def eps(value: object, argument: str = "eps") -> None:
    """Raise an error for a radius that is negative, not finite or no number; or a tensor of such.

    A tensor ``(N,)`` has a radius for each sample, one that broadcasts against a sample a radius
    for each feature.
    """
    if not isinstance(value, Tensor):
        checks.number(argument, value, low=0.0)
        return
    has_values(argument, value)
    if not value.is_floating_point():
        raise TypeError(f"{argument}: expected a float or a floating tensor, got {value.dtype}")
    # NaN fails this comparison too.
    wrong = value[~((value >= 0) & torch.isfinite(value))]
    if len(wrong):
        checks.fail(argument, float(wrong[0]), "every radius must be finite and at least 0")
    if value.numel() == 0:
        checks.fail(f"{argument}.shape", tuple(value.shape), "an empty tensor")


def has_values(argument: str, value: Tensor) -> None:
    """Raise an error for a tensor on the meta device."""
    if value.is_meta:
        checks.fail(argument, "a meta tensor", "it has no values; make it on a real device")


def positive_eps(value: object) -> None:
    """Raise an error for a radius that is not above 0, or a tensor with none that is."""
    eps(value)
    if not (value > 0 if not isinstance(value, Tensor) else bool((value > 0).any())):  # type: ignore[operator]
        checks.fail("eps", 0.0, "must be above 0; for clean inputs use advfeat.accuracy")


def bounds(value: object) -> FeatureBounds:
    """Return bounds as a tuple of numbers, or of tensors by feature; raise an error for others."""
    ends = value if isinstance(value, (tuple, list)) and len(value) == 2 else ()
    if not any(isinstance(end, Tensor) and end.ndim for end in ends):
        return checks.bounds(value)
    low, high = (
        end.detach() if isinstance(end, Tensor) else torch.tensor(float(end), device="cpu")
        for end in ends
    )
    for name, end in (("low", low), ("high", high)):
        if end.is_complex() or end.dtype == torch.bool or not bool(torch.isfinite(end).all()):
            checks.fail(f"bounds ({name})", end, "every bound must be a finite real number")
    try:
        low, high = torch.broadcast_tensors(low.to(high.device).double(), high.double())  # type: ignore[no-untyped-call]
    except RuntimeError:
        shapes = tuple(low.shape), tuple(high.shape)
        checks.fail("bounds.shape", shapes, "low and high must broadcast against each other")
    if bool((low > high).any()):
        place = tuple((low > high).nonzero()[0].tolist())
        checks.fail(
            f"bounds[{place}]",
            (float(low[place]), float(high[place])),
            "low must not be above high; are they reversed?",
        )
    if bool((low == high).all()):
        cause = "low equals high everywhere: no feature may change"
        checks.fail("bounds.shape", tuple(low.shape), cause)
    return low, high


def linf_in_bounds(eps: object, norm: str, bounds: FeatureBounds) -> None:
    """Raise an error for a linf radius wider than the bounds: 8 was meant to be 8/255."""
    low, high = bounds
    difference = high - low
    width = float(difference.max()) if isinstance(difference, Tensor) else difference
    # A radius for each feature may be above the width of some, as a number may.
    by_feature = isinstance(eps, Tensor) and eps.ndim > 1
    radius = eps if not isinstance(eps, Tensor) else eps.amin() if by_feature else eps.amax()
    if norm == "linf" and float(radius) > width:  # type: ignore[arg-type]
        ends = threat.hull(bounds)
        cause = f"wider than bounds={ends}; for pixels in [0, 1] write 8/255, not 8"
        checks.fail("eps", float(radius), cause)  # type: ignore[arg-type]


def mask(value: object) -> Tensor | None:
    """Return the mask as a bool tensor; raise an error unless its values are 0 and 1."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise TypeError(
            f"mask: expected a bool tensor that is True where a feature may change, "
            f"got {type(value).__name__}"
        )
    has_values("mask", value)
    chosen = value.detach() != 0
    wrong = value[value != chosen]
    if len(wrong):
        cause = "every entry must be 0 or 1; for radii by feature use eps"
        checks.fail("mask", float(wrong[0]), cause)
    if not bool(chosen.any()):
        checks.fail(
            "mask", "all False", "no feature may change; True marks features that may, invert it?"
        )
    return chosen


def scale_of_features(value: object) -> None:
    """Raise an error unless this is a tensor of the change that counts as 1 in each feature."""
    if not isinstance(value, Tensor):
        raise TypeError(f"scale={value!r}: expected a tensor, got {type(value).__name__}")
    eps(value, "scale")
    if not bool((value > 0).any()):
        checks.fail("scale", "zeros", "0 fixes a feature, and no feature may change")


def own_mask(given: object) -> None:
    """Raise an error for a mask beside an attack object, which has its own."""
    if given is not None:
        checks.fail("mask", "a tensor", "the attack has its own; pass the mask to the attack")


def own_bounds(given: object, own: FeatureBounds) -> None:
    """Raise an error for bounds beside an attack object that has others; the default is none."""
    found = bounds(given)
    if not (threat.same_bounds(found, (0.0, 1.0)) or threat.same_bounds(found, own)):
        cause = f"the attack has its own, {threat.hull(own)}; pass them to the attack"
        checks.fail("bounds", threat.hull(found), cause)


def like_sample(argument: str, value: Tensor, inputs: Tensor) -> Tensor:
    """View a tensor so that it broadcasts against the inputs; raise an error where it does not."""
    shape = inputs.shape[1:]
    own = value.shape[1:] if value.ndim == inputs.ndim and value.shape[0] == 1 else value.shape
    aligned = zip(reversed(own), reversed(shape), strict=False)
    if len(own) > len(shape) or any(one not in (1, other) for one, other in aligned):
        hint = ""
        if len(shape) > 1 and value.ndim == 1 and len(value) == shape[0]:
            hint = f"; for each channel: {argument}.view(-1{', 1' * (len(shape) - 1)})"
        checks.fail(
            f"{argument}.shape",
            tuple(value.shape),
            f"expected a tensor that broadcasts against one sample, {tuple(shape)}{hint}",
        )
    return value.reshape(1, *(1,) * (len(shape) - len(own)), *own).to(inputs.device)
