"""The published schedule of APGD: checkpoints, momentum, and in l1 the phases.

Croce and Hein (2020), section 3.3; in l1, Croce and Hein (2021).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from advfeat.threat import Norm

_MOMENTUM = 0.75  # weight of the gradient step against the last move
_RISES = 0.75  # fraction of steps that must have risen for the step size to stay
# In l1 a run goes through larger balls first: radius and fraction of the steps.
_L1_PHASES = ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4))


class Schedule(NamedTuple):
    """What is due at each place of a round: tensors to index by the place."""

    due: Tensor  # (R,) bool, whether it is a checkpoint
    rises: Tensor  # (R,) as few rises since the checkpoint before are too few
    alpha: Tensor  # (R,) weight of the gradient step against the last move
    start: Tensor  # (R + 1,) bool, whether a phase but the first starts there
    radius: Tensor  # (R + 1,) multiple of the radius


@lru_cache(maxsize=64)
def schedule_of(norm: Norm, steps: int, device: torch.device) -> Schedule:
    """Made once for a device: to copy it there in every step would wait."""
    due: list[bool] = []
    rises: list[float] = []
    radius: list[float] = []
    starts = []
    for multiple, count in phases(norm, steps):
        starts.append(len(due))
        windows = dict(checkpoints(norm, count))
        due += [place in windows for place in range(count + 1)]
        rises += [_RISES * windows.get(place, 0) for place in range(count + 1)]
        radius += [multiple] * (count + 1)
    places = range(len(due) + 1)
    return Schedule(
        torch.tensor(due, device=device),
        torch.tensor(rises, dtype=torch.float32, device=device),
        torch.tensor([1.0] + [_MOMENTUM] * (len(due) - 1), dtype=torch.float32, device=device),
        torch.tensor([place in starts[1:] for place in places], device=device),
        torch.tensor([*radius, radius[0]], dtype=torch.float32, device=device),
    )


def phases(norm: Norm, steps: int) -> tuple[tuple[float, int], ...]:
    """Multiple of the radius and steps of each phase of a round; a phase evaluates its start."""
    if norm != "l1":
        return ((1.0, steps),)
    return tuple((radius, max(1, round(fraction * steps))) for radius, fraction in _L1_PHASES)


def checkpoints(norm: Norm, steps: int) -> Iterator[tuple[int, int]]:
    """Places of a phase where the step size is adapted, and the steps since the one before.

    Croce and Hein (2020), section 3.3; in l1 every so many steps.
    """
    if norm == "l1":
        every = max(1, int(0.04 * steps))
        yield from ((place, every) for place in range(every, steps + 1, every))
        return
    window, smallest = max(1, int(0.22 * steps)), max(1, int(0.06 * steps))
    decrease, place = max(1, int(0.03 * steps)), 0
    while place + window <= steps:
        place += window
        yield place, window
        window = max(window - decrease, smallest)
