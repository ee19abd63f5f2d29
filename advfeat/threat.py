"""Norm balls and bounds as pure tensor functions of any rank, batch first.

Every function takes tensors whose first axis is the sample and treats all other axes together, so
``(N, d)``, ``(N, C, L)`` and ``(N, C, H, W)`` are alike. ``eps`` is a float or a tensor ``(N,)``.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Norm: TypeAlias = Literal["l1", "l2", "linf"]
Bounds: TypeAlias = tuple[float, float]
# Bounds of each feature: tensors that broadcast against one sample.
FeatureBounds: TypeAlias = tuple[float, float] | tuple[Tensor, Tensor]

NORMS: tuple[Norm, ...] = ("l1", "l2", "linf")
_ORDER = {"l1": 1.0, "l2": 2.0}
# Of a gradient of this l2 size the squares of all entries that matter are numbers in float32.
_SQUARES_IN_RANGE = 1e-12


def bounds_of(box: Tensor | None, bounds: FeatureBounds) -> FeatureBounds:
    """Bounds of each sample, from ``(N, 2, ...)``; where that is empty or None, those of all."""
    return bounds if box is None or not box.numel() else (box[:, 0], box[:, 1])


def free_of(box: Tensor) -> Tensor | None:
    """Features that may change, bool ``(N, ...)``; None for all."""
    return box[:, 0] != box[:, 1] if box.numel() else None


def clip(points: Tensor, bounds: FeatureBounds, inplace: bool = False) -> Tensor:
    """The points moved into the bounds, numbers or tensors that broadcast against a sample."""
    low, high = bounds
    if isinstance(low, Tensor):
        low, high = low.to(points), high.to(points)  # type: ignore[union-attr]
    return points.clamp_(low, high) if inplace else points.clamp(low, high)  # type: ignore[arg-type]


def same_bounds(first: FeatureBounds, second: FeatureBounds) -> bool:
    """Whether these are the same bounds."""
    pairs = zip(first, second, strict=True)
    return all(
        isinstance(one, Tensor) == isinstance(other, Tensor)
        and (torch.equal(one, other) if isinstance(one, Tensor) else one == other)  # type: ignore[arg-type]
        for one, other in pairs
    )


def hull(bounds: FeatureBounds) -> Bounds:
    """The smallest and the largest bound of any feature."""
    low, high = bounds
    if isinstance(low, Tensor):
        return float(low.min()), float(high.max())  # type: ignore[union-attr]
    return low, high  # type: ignore[return-value]


def feature_axes(tensor: Tensor) -> tuple[int, ...]:
    """All axes but the first."""
    return tuple(range(1, tensor.ndim))


def per_sample(value: float | Tensor, like: Tensor) -> Tensor:
    """View a float, or an ``(N,)`` tensor or mask, so that it broadcasts against ``like``."""
    if not isinstance(value, Tensor):
        # Filled in on the device: to copy the number there would wait for it.
        return like.new_full((1,) * like.ndim, value)
    dtype = torch.bool if value.dtype == torch.bool else like.dtype
    return value.to(like.device, dtype).reshape(-1, *(1,) * (like.ndim - 1))


def size(delta: Tensor, norm: Norm, keepdim: bool = False) -> Tensor:
    """Norm of each sample, shape ``(N,)``, or ``(N, 1, ...)`` with ``keepdim``.

    Examples
    --------
    >>> size(torch.tensor([[3.0, -4.0]]), "l2")
    tensor([5.])
    """
    axes = feature_axes(delta)
    if norm == "linf":  # many times faster than vector_norm on the CPU
        return delta.abs().amax(axes, keepdim=keepdim)
    found: Tensor = torch.linalg.vector_norm(delta, _ORDER[norm], dim=axes, keepdim=keepdim)
    return found


def weighted_size(delta: Tensor, norm: Norm, scale: Tensor) -> Tensor:
    """Norm of ``delta / scale`` of each sample, ``(N,)``; features of scale 0 are left out.

    ``scale`` broadcasts against one sample.

    Examples
    --------
    >>> weighted_size(torch.tensor([[3.0, -8.0]]), "l2", torch.tensor([1.0, 2.0]))
    tensor([5.])
    """
    scale = scale.to(delta)
    fixed = scale == 0
    return size((delta / scale.masked_fill(fixed, 1.0)).masked_fill(fixed, 0.0), norm)


def known_none(values: Tensor) -> bool:
    """Whether all values are False or zero, if that is known without waiting for a device.

    On the CPU a loop can then leave work out. On an accelerator it is never known: there the work
    costs less than to wait.
    """
    return values.is_cpu and not np.count_nonzero(values.numpy())


def choose(samples: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    """Samples of ``chosen`` where the mask ``(N,)`` holds, and of ``other`` elsewhere.

    For finite tensors. The result may be ``chosen`` or ``other`` itself.
    """
    if not other.is_cpu:
        return torch.where(per_sample(samples, other), chosen, other)
    count = np.count_nonzero(samples.numpy())
    if count == 0:
        return other
    if count == len(samples):
        return chosen
    # With weights of 0 and 1 exact, and more than twice as fast as torch.where.
    return torch.lerp(other, chosen, per_sample(samples, other).to(other.dtype))


def scaled(gradient: Tensor) -> Tensor:
    """Each sample's gradient times a factor that keeps the squares of its entries in range.

    An entry that is NaN counts as zero, one that is infinite as the largest number. Where all is in
    range already the result is the gradient itself.
    """
    if gradient.is_cpu and _known_in_range(size(gradient, "l2")):
        return gradient
    return _over_peak(gradient)


def _known_in_range(length: Tensor) -> bool:
    """Whether the squares of all entries that matter are numbers, if known without waiting."""
    return known_none(length != length.clamp(_SQUARES_IN_RANGE, 1 / _SQUARES_IN_RANGE))


def _over_peak(gradient: Tensor) -> Tensor:
    """Each sample's gradient over its largest entry; zero where that is zero."""
    axes, finite = feature_axes(gradient), gradient.nan_to_num(nan=0.0)
    peak = torch.maximum(finite.amax(axes, keepdim=True), finite.amin(axes, keepdim=True).neg_())
    return finite.div_(peak.masked_fill_(peak == 0, 1.0))


def steepest(gradient: Tensor, norm: Norm) -> Tensor:
    """Direction of unit ``norm`` along which a linear function with this gradient grows fastest.

    l2: the normalised gradient; linf: its sign; l1: its largest entry alone, or all that are as
    large. A sample whose gradient is exactly zero gets the zero direction; however tiny, any other
    gradient is a direction. An entry that is NaN counts as zero, one that is infinite as the
    largest number.

    Examples
    --------
    >>> steepest(torch.tensor([[3.0, -4.0]]), "l2")
    tensor([[ 0.6000, -0.8000]])
    >>> steepest(torch.tensor([[3.0, -4.0]]), "l1")
    tensor([[ 0., -1.]])
    """
    if norm == "linf":
        return gradient.sign()  # of NaN zero
    direction = _over_peak(gradient)
    if norm == "l1":
        direction *= direction.abs() == 1.0
    return direction.div_(_nonzero(size(direction, norm, keepdim=True)))


def ascend_l2(
    points: Tensor, gradient: Tensor, length: Tensor, gradient_size: Tensor | None = None
) -> Tensor:
    """Points moved by a length ``(N, 1, ...)`` along a gradient of any size, in l2.

    ``gradient_size`` is the gradient's l2 norm ``(N,)``, where that is known already.
    """
    if gradient.is_cpu:
        own = size(gradient, "l2") if gradient_size is None else gradient_size
        if _known_in_range(own):
            return torch.addcmul(points, gradient, length / per_sample(own, length))
    return ascend_scaled_l2(points, _over_peak(gradient), length)


def ascend_scaled_l2(points: Tensor, gradient: Tensor, length: Tensor) -> Tensor:
    """Points moved by a length ``(N, 1, ...)`` along a `scaled` gradient, in l2."""
    return torch.addcmul(points, gradient, length / _nonzero(size(gradient, "l2", keepdim=True)))


def finite(gradient: Tensor) -> Tensor:
    """Replace the entries of a gradient that are not finite: NaN by 0, infinity by the largest.

    The largest is that of the sample's finite entries in magnitude, or 1 where all of those are 0.

    Examples
    --------
    >>> finite(torch.tensor([[3.0, torch.nan, -torch.inf, 0.5]]))
    tensor([[ 3.0000,  0.0000, -3.0000,  0.5000]])
    """
    # To check is free on the CPU; elsewhere it would wait for the device. The sum less itself is
    # zero if it is finite, and NaN otherwise.
    total = gradient.sum()
    if known_none(total.sub_(total)):
        return gradient
    is_finite = torch.isfinite(gradient)
    largest = torch.where(is_finite, gradient, 0.0).abs().amax(feature_axes(gradient), keepdim=True)
    largest = torch.where(largest > 0, largest, 1.0)
    replaced = torch.where(gradient.isnan(), 0.0, torch.copysign(largest, gradient))
    return torch.where(is_finite, gradient, replaced)


def project(
    points: Tensor,
    center: Tensor,
    eps: float | Tensor | None,
    norm: Norm,
    bounds: FeatureBounds = (0.0, 1.0),
    limits: tuple[Tensor, Tensor] | None = None,
    inplace: bool = False,
) -> Tensor:
    """Nearest points, in Euclidean distance, of the ball around ``center`` and the bounds together.

    Parameters
    ----------
    points, center
        Shape ``(N, ...)``; ``center`` lies in the bounds.
    eps
        Radius, a float or ``(N,)``; ``None`` leaves the bounds alone.
    norm, bounds
        The ball's norm and the bounds ``(low, high)``, numbers or tensors that broadcast.
    limits
        `limits_of` the same center, radius and bounds, for a loop that has them.
    inplace
        Whether ``points`` may be overwritten.

    Examples
    --------
    >>> project(torch.tensor([[2.0, 1.4]]), torch.tensor([[0.9, 0.5]]), 0.5, "l2")
    tensor([[1.0000, 0.9899]])
    """
    if eps is None:
        return clip(points, bounds)
    limits = limits_of(center, eps, norm, bounds) if limits is None else limits
    if norm == "linf":
        return points.clamp_(*limits) if inplace else points.clamp(*limits)
    radius = per_sample(eps, center)
    delta = points.sub_(center) if inplace else points - center
    if norm == "l2":
        length = size(delta, "l2", keepdim=True)
        if not inplace and known_none(length > radius):
            return clip(points, bounds)
        kept, factor = _scale_into_ball(delta, length, radius, limits)
        return clip(torch.addcmul(center, kept, factor, out=kept), bounds, inplace=True)
    # The end of the bounds that each entry moves towards; torch.where takes several times as long.
    limit = torch.copysign(delta.new_full((), torch.inf), delta).clamp_(*limits).abs_()
    kept = _shrink_l1(delta.abs(), limit, radius)
    nearest = center + torch.copysign(kept, delta)
    # Rounded towards the center: roundings of one sign in many entries would leave the ball.
    outside = (nearest - center).abs_().gt_(kept)  # as numbers 0 and 1, with which lerp is exact
    nearest = torch.lerp(nearest, torch.nextafter(nearest, center), outside)
    return clip(nearest, bounds, inplace=True)


def limits_of(
    center: Tensor, eps: float | Tensor, norm: Norm, bounds: FeatureBounds
) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each entry: in linf of the point, in ball and bounds together.

    In l1 and l2 of the perturbation, in the bounds alone.
    """
    low, high = bounds
    if norm != "linf":
        return torch.rsub(center, low), torch.rsub(center, high)
    radius = per_sample(eps, center)
    return (center - radius).clamp_min_(low), (center + radius).clamp_max_(high)


def _scale_into_ball(
    delta: Tensor, length: Tensor, radius: Tensor, limits: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Find clip(s * delta, *limits) with the largest s <= 1 whose l2 size is in the radius.

    Returned with a factor ``(N, 1, ...)``, 1 but for rounding, that is to be multiplied by.

    The squared size is concave and piecewise linear in s squared: secants, the first from 0 and
    the s of the ball alone, stay within the radius but for rounding, and are exact once both points
    of one have the same entries stopped.
    """
    scale = (radius / _nonzero(length)).clamp_max_(1.0)
    inverse = radius.reciprocal().nan_to_num_(posinf=0.0)  # with a radius of 0 the end is 0 too
    kept = (delta * scale).clamp_(*limits)
    length = size(kept, "l2", keepdim=True)
    square, value = scale.square_(), (length * inverse).square_()
    slope, excess = value / _nonzero(square), value - 1.0
    last = square, excess
    # Where the end cannot be seen, as many rounds as all but constructed cases need.
    for turn in range(64 if delta.is_cpu else 16):
        missing = F.hardshrink(excess, 4 * torch.finfo(delta.dtype).eps)
        if known_none(missing):
            break
        if turn > 0:
            slope = (excess - last[1]).div_(_nonzero(square - last[0]))
        grown = torch.addcdiv(square, missing, _nonzero(slope), value=-1).clamp_(0.0, 1.0)
        if known_none(grown != square):
            break
        kept = torch.mul(delta, grown.sqrt(), out=kept).clamp_(*limits)
        length = size(kept, "l2", keepdim=True)
        last = square, excess
        square, excess = grown, (length * inverse).square_().sub_(1.0)
    return kept, (radius / _nonzero(length)).clamp_max_(1.0)


def _shrink_l1(magnitude: Tensor, limit: Tensor, radius: Tensor, rounds: int = 40) -> Tensor:
    """The magnitudes clip(|d| - t, 0, limit) with the smallest t >= 0 whose sum is in the radius.

    The sum falls piecewise linearly in t: Newton steps, halving the bracket where one leaves it.
    """
    axes, rounding = feature_axes(magnitude), torch.finfo(radius.dtype).eps
    zero, high = magnitude.new_zeros(()), magnitude.amax(axes, keepdim=True)
    low = threshold = torch.zeros_like(high)
    enough = 8 * rounding * radius  # by which the sum is rounded
    goal = radius
    for turn in range(rounds):
        rest = magnitude - threshold
        kept = rest.clamp(zero, limit)
        total = kept.sum(axes, keepdim=True)
        if turn == 0:
            goal = torch.minimum(radius, total)  # what is inside stays
        excess = total - goal
        missing = excess.abs() > enough
        if known_none(missing):
            break
        outside = excess > zero
        low = torch.where(outside, threshold, low)
        high = torch.where(outside, high, threshold)
        # The entries between 0 and their limit, as numbers 0 and 1.
        slope = rest.lt_(limit).mul_(kept.sign()).sum(axes, keepdim=True)
        newton = torch.addcdiv(threshold, excess, slope)  # not finite where the slope is 0
        inside = ((newton > low) & (newton < high)) | (newton == threshold)
        following = torch.where(inside, newton, (low + high) / 2)
        following = torch.where(missing, following, threshold)  # whatever others in the batch need
        # Rounding alone is seldom what is left, so that it is not asked for at first.
        if turn > 8 and known_none(following != threshold):
            break
        threshold = following
    # The sum of many entries is itself rounded.
    safe = radius * (1 - 2 * rounding)
    return kept * (safe / _nonzero(total)).clamp_max(1.0)


def point_in_ball(
    uniform: Tensor, eps: float | Tensor, norm: Norm, free: Tensor | None = None
) -> Tensor:
    """Map uniform numbers to points uniform in the ball of radius ``eps``.

    Parameters
    ----------
    uniform
        Shape ``(N, d + 1)``, entries strictly between 0 and 1: one for each of the ``d``
        coordinates and one for the radius.
    eps, norm
        Radius (a float or ``(N,)``) and norm.
    free
        Features that may change, bool ``(N, d)``: the ball is that of these alone. None for all.

    Returns
    -------
    Tensor
        Shape ``(N, d)``, zero where a feature is not free.
    """
    coordinates, last = uniform[:, :-1], uniform[:, -1:]
    radius = per_sample(eps, uniform)
    count: float | Tensor = coordinates.shape[1]
    if free is not None:
        # Of the middle of its range each coordinate is zero.
        coordinates = torch.where(free, coordinates, 0.5)
        count = free.sum(1, keepdim=True).clamp_min(1)
    if norm == "linf":
        return radius * (2 * coordinates - 1)
    if norm == "l2":
        normal: Tensor = torch.special.ndtri(coordinates)
        return radius * last.pow(1 / count) * steepest(normal, "l2")
    # d exponentials with signs, divided by the sum of d + 1: uniform in the l1 ball.
    centred = 2 * coordinates - 1
    laplace = -torch.copysign(torch.log1p(-centred.abs()), centred)
    total = laplace.abs().sum(1, keepdim=True) - torch.log(last)
    return radius * laplace / total


def _nonzero(lengths: Tensor) -> Tensor:
    """Lengths that can be divided by: zero divided by them is zero."""
    return lengths.clamp_min(torch.finfo(lengths.dtype).tiny)
