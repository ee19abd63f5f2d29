"""Work in growing parts until it is done or its time is over."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

T = TypeVar("T")
# A part is planned to need at most this fraction of the time that is left.
_PLANNED = 0.8
_GROWTH = 1.4
_UNLIMITED = 1e9
_LEAST = 1e-6  # seconds of a step of one sample


class Work(NamedTuple):
    """What a stage does: calls of the model, and gradients of each sample."""

    calls: int
    gradients: int


class Cost(NamedTuple):
    """Seconds of one step of an attack: of the call, and of each sample in it."""

    call: float
    sample: float

    @classmethod
    def of(cls, small: tuple[int, float], large: tuple[int, float] | None = None) -> Cost:
        """By samples and seconds of one batch, or of a small and a large one."""
        if large is None or large[0] == small[0]:
            return cls(0.0, max(small[1], _LEAST) / small[0])
        slope = (large[1] - small[1]) / (large[0] - small[0])
        # Noise could make it anything.
        sample = max(slope, 0.1 * large[1] / large[0], _LEAST)
        return cls(max(0.0, small[1] - sample * small[0]), sample)

    def seconds(self, work: Work, samples: int) -> float:
        """Of a stage."""
        return work.calls * self.call + work.gradients * self.sample * samples

    def affordable(self, seconds: float, work: Work) -> int:
        """How many samples a stage may have."""
        left = seconds - work.calls * self.call
        return max(0, int(left / (work.gradients * self.sample)))

    def times(self, factor: float) -> Cost:
        """Where all takes longer."""
        return Cost(factor * self.call, factor * self.sample)


class Budget:
    """Seconds for all stages together, and what was left out for want of them.

    Parameters
    ----------
    seconds
        None is no limit.
    """

    def __init__(self, seconds: float | None) -> None:
        self._began = time.monotonic()
        self.seconds = seconds
        self.left_out: list[str] = []
        self.spent: dict[str, float] = {}

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began

    @property
    def left(self) -> float:
        """Seconds that are left; very many without a limit."""
        return _UNLIMITED if self.seconds is None else self.seconds - self.elapsed

    def parts(
        self,
        name: str,
        count: int,
        run: Callable[[int, int], T],
        *,
        fraction: float = 1.0,
        first: int = 16,
        required: bool = False,
    ) -> tuple[list[T], int]:
        """Call ``run(start, stop)`` on one part of ``count`` samples after another.

        Parameters
        ----------
        name
            Of the stage, for what is left out.
        count
            Samples.
        run
            Does a part.
        fraction
            Of the time that is left, how much the stage may take.
        first
            Samples of the first part, which shows how long a sample takes.
        required
            Do the first part even when the time is over.

        Returns
        -------
        parts, done
            What ``run`` returned, and how many samples were done.
        """
        began, limit = time.monotonic(), fraction * self.left
        parts: list[T] = []
        at, size = 0, max(1, min(first, count))
        while at < count and (limit > 0 or (required and not parts)):
            started = time.monotonic()
            parts.append(run(at, at + size))
            took = max(1e-6, time.monotonic() - started)
            left = _PLANNED * (limit - (time.monotonic() - began))
            at += size
            if left <= 0:
                break
            # A part of twice the size takes less than twice the time, and a small one is wasteful.
            affordable = int(size * (left / took) ** _GROWTH)
            if affordable < min(size, count - at) / 2:
                break
            size = min(4 * size, count - at, affordable)
        self.spent[name] = time.monotonic() - began
        if at < count:
            self.left_out.append(f"{name}: {at} of {count} samples" if at else f"{name}: all of it")
        return parts, at
