"""A step in l1, along the largest entries of a gradient that the bounds let move."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from advfeat import threat

# Entries that are looked for before all are sorted.
_FEW = 64


def ascend_l1(
    points: Tensor,
    gradient: Tensor,
    length: Tensor,
    bounds: threat.FeatureBounds,
    entries: int | Tensor = 1,
) -> Tensor:
    """Points moved by an l1 length ``(N,)`` along the largest entries of a gradient.

    ``entries``, one number or ``(N,)``, share the length. An entry that a face of the bounds stops
    takes its part, beyond the face, but of the length only what it can move: the next entries take
    the rest. `threat.project` then brings the point back. At the best point of a linear function
    it leaves the point as it is: entries at a face that took no part would be drawn away from it.
    An entry of the gradient that is NaN counts as zero.

    Examples
    --------
    >>> points, gradient = torch.tensor([[0.9, 0.5]]), torch.tensor([[2.0, 1.0]])
    >>> ascend_l1(points, gradient, torch.tensor([0.3]), (0.0, 1.0))
    tensor([[1.2000, 0.7000]])
    """
    flat = gradient.nan_to_num(nan=0.0).flatten(1)
    length = length.to(points.dtype)[:, None]
    each = length / (entries[:, None] if isinstance(entries, Tensor) else entries)
    ends = [
        end.to(points).expand_as(points).flatten(1) if isinstance(end, Tensor) else end
        for end in bounds
    ]
    sorted_all = flat.device.type != "cpu" or flat.shape[1] <= 4 * _FEW
    moved, rest = _l1_step(points.flatten(1), flat, length, each, ends, sorted_all)
    if not sorted_all and not threat.known_none(rest):
        # Each sample by itself, whatever the others need.
        ends = [end[rest] if isinstance(end, Tensor) else end for end in ends]
        some = points.flatten(1)[rest], flat[rest], length[rest], each[rest]
        moved[rest] = _l1_step(*some, ends, True)[0]
    return moved.view(points.shape)


def _l1_step(
    points: Tensor,
    gradient: Tensor,
    length: Tensor,
    each: Tensor,
    ends: list[Any],
    sorted_all: bool,
) -> tuple[Tensor, Tensor]:
    """The step of `ascend_l1` along all entries or `_FEW`, and for which samples these are few."""
    if sorted_all:
        order = gradient.abs().argsort(dim=1, descending=True, stable=True)
    else:  # many times faster
        order = gradient.abs().topk(_FEW, dim=1).indices
    low, high = (e.gather(1, order) if isinstance(e, Tensor) else e for e in ends)
    sign, found = gradient.gather(1, order).sign_(), points.gather(1, order)
    limit = torch.where(sign > 0, high - found, found - low).clamp_min_(0.0)
    stopped = torch.minimum(limit, each)
    end = stopped.cumsum(1)
    left = length - (end - stopped)
    # What is left by rounding moves no further entry.
    left = torch.minimum(left, each).masked_fill_(left < 1e-4 * each, 0.0)
    moved = points.scatter_add(1, order, left.mul_(sign))
    return moved, (length - end[:, -1:] >= 1e-4 * each).squeeze(1)
