"""Work in growing parts until it is done or its time is over."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
# A part is planned to need at most this fraction of the time that is left.
_PLANNED = 0.8
_GROWTH = 1.4
_UNLIMITED = 1e9


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
