"""Progress of long work: the stage by its name, how much of it is done, and the time left.

``progress`` means the same everywhere. False shows nothing. True, and by default None, draw one
line that is overwritten in a terminal or a notebook. Where stderr is neither, as in a log, whole
lines are printed at intervals: with None from ten seconds on, so that short calls stay silent.
Nothing has to be installed for it.
"""

from __future__ import annotations

import itertools
import math
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TextIO, TypeVar

from typing_extensions import Self

T = TypeVar("T")

_REDRAW = 0.1  # seconds between two drawings in a terminal
_FIRST, _ASKED, _EVERY = 10.0, 2.0, 30.0  # in a log: the first line, the same with True, the others
_open = threading.local()


class Meter:
    """One line about work in progress; within another meter's stage it continues that one's line.

    Parameters
    ----------
    progress
        As above.
    label
        What is done.
    total
        How many units; None where nobody knows.
    unit
        Name of a unit, for its rate; nothing for batches.
    done
        Units of earlier calls.

    Examples
    --------
    >>> with Meter(False, "attack", total=10) as meter:
    ...     meter.update(10)
    """

    def __init__(
        self,
        progress: bool | None,
        label: str,
        total: int | None = None,
        *,
        unit: str = "",
        done: int = 0,
    ) -> None:
        self._shown = progress is not False
        self._asked, self._label, self._unit = bool(progress), label, unit
        self._figures: Mapping[str, str] = {}
        self._width = 0
        self._is_drawn = self._shown and _overwrites()
        self._begin("", total, done)
        self._next = self._began + (0.0 if self._is_drawn else _ASKED if self._asked else _FIRST)

    def __enter__(self) -> Self:
        """Show the line."""
        if self._shown:
            _stack().append(self)
            self._show()
        return self

    def __exit__(self, *error: object) -> None:
        """Clear the line; in a log, say that it is done if anything was said."""
        if not self._shown:
            return
        if self in _stack():
            _stack().remove(self)
        if self._is_drawn and self._width:
            _write("\r" + " " * self._width + "\r")
        elif self._width and error[0] is None:
            _write(f"{self._name()}: done in {_clock(time.monotonic() - self._opened)}\n")

    def stage(self, name: str, total: int | None = None, seconds: float = math.inf) -> None:
        """Begin a named part of the work, which ends after so many seconds even if not done."""
        self._begin(name, total, 0)
        self._end = self._began + seconds
        if self._asked or self._is_drawn:
            self._next = min(self._next, self._began)
        self._show()

    @property
    def is_due(self) -> bool:
        """Whether the next `update` will be shown: figures that cost something can wait for it."""
        return self._shown and time.monotonic() >= self._next

    def update(self, count: int = 1, figures: Mapping[str, str] | None = None) -> None:
        """Count units that are done; ``figures`` are shown behind them."""
        self._done += count
        self._figures = self._figures if figures is None else figures
        self._show()

    def skip(self, count: int) -> None:
        """Count units of an earlier process, which say nothing of how fast this one works."""
        self._done += count
        if self._done - count == self._first:
            # Nothing was done yet: reading on to where the work begins is no work.
            self._began = time.monotonic()
        self._first += count
        self._show()

    def _begin(self, stage: str, total: int | None, done: int) -> None:
        self._stage, self._total, self._done, self._first = stage, total, done, done
        self._began, self._end = time.monotonic(), math.inf
        self._opened = getattr(self, "_opened", self._began)

    def _show(self) -> None:
        now = time.monotonic()
        if not self._shown or now < self._next:
            return
        line = " | ".join([*(m._name() + m._counted() for m in _stack() if m is not self), ""])
        line += self._line(now)
        if self._is_drawn:
            self._next = now + _REDRAW
            line = line[: shutil.get_terminal_size().columns - 1]
            _write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self._next = now + _EVERY
            self._width = 1
            _write(line + "\n")

    def _name(self) -> str:
        return f"{self._label}: {self._stage}" if self._stage else self._label

    def _counted(self) -> str:
        if self._total is None:
            return f" {self._done}" if self._done else ""
        return f" {self._done}/{self._total}"

    def _line(self, now: float) -> str:
        took, made = now - self._began, self._done - self._first
        parts = [self._name() + self._counted() + (f" {self._unit}" if self._unit else "")]
        parts.append(_clock(took))
        if made and took and self._total is not None:
            left = (self._total - self._done) * took / made
            parts.append(f"{_clock(max(0.0, min(left, self._end - now)))} left")
        if made and took and self._unit:
            parts.append(f"{made / took:.3g} {self._unit}/s")
        parts += [f"{name}={value}" for name, value in self._figures.items()]
        return ", ".join(parts)


def shows_evaluations(
    meter: Meter, figures: dict[str, str], unit: str = "evaluations"
) -> Callable[[], None]:
    """Return what counts a model's evaluations, and shows them while no unit is finished."""
    counter = itertools.count(1)

    def count() -> None:
        figures[unit] = str(next(counter))
        meter.update(0, figures)

    return count


def with_progress(
    items: Iterable[T], *, total: int | None, label: str, progress: bool | None
) -> Iterable[T]:
    """Show how many of the items were taken, and when the rest will be."""
    return items if progress is False else _counted(items, total, label, progress)


def _counted(
    items: Iterable[T], total: int | None, label: str, progress: bool | None
) -> Iterator[T]:
    with Meter(progress, label, total) as meter:
        for item in items:
            yield item
            meter.update()


def _stack() -> list[Meter]:
    """Meters that are open in this thread, the outermost first."""
    found: list[Meter] | None = getattr(_open, "meters", None)
    if found is None:
        found = _open.meters = []
    return found


def _stream() -> TextIO:
    return sys.stdout if "ipykernel" in sys.modules else sys.stderr


def _overwrites() -> bool:
    """Whether a line can be drawn over: in a terminal or a notebook."""
    return "ipykernel" in sys.modules or sys.stderr.isatty()


def _write(text: str) -> None:
    stream = _stream()
    try:
        stream.write(text)
        stream.flush()
    except (OSError, ValueError):  # a closed stream stops no work
        pass


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
