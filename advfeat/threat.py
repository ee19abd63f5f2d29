"""Norm balls and boxes as pure tensor functions of any rank, batch first.

Every function takes tensors whose first axis is the sample and treats all other axes together, so
``(N, d)``, ``(N, C, L)`` and ``(N, C, H, W)`` are alike. ``eps`` is a float or a tensor ``(N,)``.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

Norm: TypeAlias = Literal["l1", "l2", "linf"]
Bounds: TypeAlias = tuple[float, float]

NORMS: tuple[Norm, ...] = ("l1", "l2", "linf")
_ORDER = {"l1": 1.0, "l2": 2.0}


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


def steepest(gradient: Tensor, norm: Norm) -> Tensor:
    """Direction of unit ``norm`` along which a linear function with this gradient grows fastest.

    l2: the normalised gradient; linf: its sign; l1: its largest entry alone (ties share). A sample
    whose gradient is exactly zero, or not finite, gets the zero direction; however tiny, any other
    gradient is a direction.

    Examples
    --------
    >>> steepest(torch.tensor([[3.0, -4.0]]), "l2")
    tensor([[ 0.6000, -0.8000]])
    >>> steepest(torch.tensor([[3.0, -4.0]]), "l1")
    tensor([[ 0., -1.]])
    """
    axes = feature_axes(gradient)
    peak = gradient.abs().amax(axes, keepdim=True)
    usable = torch.isfinite(peak) & (peak > 0)
    if norm == "linf":
        return torch.where(usable, gradient.sign(), 0.0)
    # Dividing by the largest entry first keeps the squares of tiny and huge gradients in range.
    scaled = torch.where(usable, gradient / torch.where(usable, peak, 1.0), 0.0)
    if norm == "l1":
        scaled = torch.where(scaled.abs() == 1.0, scaled, 0.0)
    return scaled / _nonzero(size(scaled, norm, keepdim=True))


def unblocked(gradient: Tensor, points: Tensor, bounds: Bounds) -> Tensor:
    """The gradient without the entries that push a point on the box's wall against it.

    What is left is the gradient by which a step can still climb. In l1 that matters: a step goes
    along one entry alone, and would go against the wall for ever.
    """
    low, high = bounds
    touching = 1e-6 * (high - low)
    room = torch.where(gradient > 0, high - points, points - low)
    return torch.where(room > touching, gradient, 0.0)


def project(
    points: Tensor,
    center: Tensor,
    eps: float | Tensor | None,
    norm: Norm,
    bounds: Bounds = (0.0, 1.0),
) -> Tensor:
    """Nearest points, in Euclidean distance, of the ball around ``center`` and the box together.

    Parameters
    ----------
    points, center
        Shape ``(N, ...)``; ``center`` lies in the box.
    eps
        Radius, a float or ``(N,)``; ``None`` leaves the box alone.
    norm, bounds
        The ball's norm and the box ``(low, high)``.

    Examples
    --------
    >>> project(torch.tensor([[2.0, 1.4]]), torch.tensor([[0.9, 0.5]]), 0.5, "l2")
    tensor([[1.0000, 0.9899]])
    """
    low, high = bounds
    if eps is None:
        return points.clamp(low, high)
    radius = per_sample(eps, center)
    if norm == "linf":
        nearest = torch.minimum(torch.maximum(points, center - radius), center + radius)
        return nearest.clamp(low, high)
    delta = points - center
    magnitude = delta.abs()
    room = torch.where(delta > 0, high - center, center - low)
    shrink = _shrink_l2 if norm == "l2" else _shrink_l1
    kept = shrink(magnitude, room, radius)
    nearest = center + torch.copysign(kept, delta)
    if norm == "l1":
        # Rounded towards the center: roundings of one sign in many entries would leave the ball.
        outside = (nearest - center).abs() > kept
        nearest = torch.where(outside, torch.nextafter(nearest, center), nearest)
    return nearest.clamp(low, high)


def _shrink_l2(magnitude: Tensor, room: Tensor, radius: Tensor, rounds: int = 16) -> Tensor:
    """The magnitudes min(s |d|, room) with the largest s <= 1 whose l2 size is at most the radius.

    Starting from the s of the ball alone, each round fixes the entries that the box stops and
    gives what they leave of the radius to the others; s only grows, so every round is feasible.
    """
    axes = feature_axes(magnitude)
    scale = (radius / _nonzero(size(magnitude, "l2", keepdim=True))).clamp_max(1.0)
    squares, room_squares = magnitude.square(), room.square()
    for _ in range(rounds):
        # As numbers 0 and 1: to multiply is many times faster than torch.where on the CPU.
        stopped = (magnitude * scale).gt_(room)
        free = ((1 - stopped) * squares).sum(axes, keepdim=True)
        spent = (stopped * room_squares).sum(axes, keepdim=True)
        left = (radius.square() - spent).clamp_min(0.0)
        grown = torch.where(free > 0, (left / free).sqrt(), 1.0).clamp_max(1.0)
        grown = torch.maximum(scale, grown)
        # Reading the result back is free on the CPU; elsewhere it would wait for the device.
        if grown.device.type == "cpu" and torch.equal(grown, scale):
            break
        scale = grown
    kept = torch.minimum(magnitude * scale, room)
    return kept * (radius / _nonzero(size(kept, "l2", keepdim=True))).clamp_max(1.0)


def _shrink_l1(magnitude: Tensor, room: Tensor, radius: Tensor, rounds: int = 40) -> Tensor:
    """The magnitudes clip(|d| - t, 0, room) with the smallest t >= 0 whose sum is in the radius.

    The sum falls piecewise linearly in t: Newton steps, halving the bracket where one leaves it.
    """
    axes = feature_axes(magnitude)
    low = torch.zeros_like(radius.expand(magnitude.shape[0], *radius.shape[1:]))
    high = magnitude.amax(axes, keepdim=True)
    threshold = low
    for _ in range(rounds):
        rest = magnitude - threshold
        kept = torch.minimum(rest.clamp_min(0.0), room)
        excess = kept.sum(axes, keepdim=True) - radius
        low = torch.where(excess > 0, threshold, low)
        high = torch.where(excess > 0, high, threshold)
        slope = ((rest > 0) & (rest < room)).sum(axes, keepdim=True)
        newton = threshold + excess / slope.clamp_min(1)
        inside = ((newton > low) & (newton < high)) | (newton == threshold)
        following = torch.where(inside & (slope > 0), newton, (low + high) / 2)
        if following.device.type == "cpu" and torch.equal(following, threshold):
            break
        threshold = following
    kept = torch.minimum((magnitude - threshold).clamp_min(0.0), room)
    # The sum of many entries is itself rounded.
    safe = radius * (1 - 2 * torch.finfo(radius.dtype).eps)
    return kept * (safe / _nonzero(kept.sum(axes, keepdim=True))).clamp_max(1.0)


def point_in_ball(uniform: Tensor, eps: float | Tensor, norm: Norm) -> Tensor:
    """Map uniform numbers to points uniform in the ball of radius ``eps``.

    Parameters
    ----------
    uniform
        Shape ``(N, d + 1)``, entries strictly between 0 and 1: one for each of the ``d``
        coordinates and one for the radius.
    eps, norm
        Radius (a float or ``(N,)``) and norm.

    Returns
    -------
    Tensor
        Shape ``(N, d)``.
    """
    coordinates, last = uniform[:, :-1], uniform[:, -1:]
    radius = per_sample(eps, uniform)
    if norm == "linf":
        return radius * (2 * coordinates - 1)
    if norm == "l2":
        normal: Tensor = torch.special.ndtri(coordinates)
        return radius * last.pow(1 / coordinates.shape[1]) * steepest(normal, "l2")
    # d exponentials with signs, divided by the sum of d + 1: uniform in the l1 ball.
    centred = 2 * coordinates - 1
    laplace = -torch.copysign(torch.log1p(-centred.abs()), centred)
    total = laplace.abs().sum(1, keepdim=True) - torch.log(last)
    return radius * laplace / total


def _nonzero(lengths: Tensor) -> Tensor:
    """Lengths that can be divided by: zero divided by them is zero."""
    return lengths.clamp_min(torch.finfo(lengths.dtype).tiny)
