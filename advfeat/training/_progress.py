"""Progress of a training run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from advfeat.progress import Meter

# Seconds between two readings of the figures: each waits for the device.
_SECONDS = 1.0


class TrainingBar:
    """Images so far and a second, time left, and figures that are looked up now and then."""

    def __init__(self, meter: Meter | None) -> None:
        self._meter = meter
        self._next = 0.0

    def advance(self, images: int, figures: Callable[[], dict[str, float]]) -> None:
        """Count the images of a step."""
        if self._meter is None:
            return
        found = None
        if self._meter.is_due and time.monotonic() >= self._next:
            found = {name: f"{value:.3f}" for name, value in figures().items()}
            self._next = time.monotonic() + _SECONDS
        self._meter.update(images, found)

    def skip(self, images: int) -> None:
        """Count the images of a step that an earlier process took."""
        if self._meter is not None:
            self._meter.skip(images)


@contextmanager
def progress_bar(
    progress: bool | None, *, total: int | None, done: int, first: bool
) -> Iterator[TrainingBar]:
    """All images of all epochs, shown by the first rank."""
    if not first or progress is False:
        yield TrainingBar(None)
        return
    with Meter(progress, "training", total, unit="img", done=done) as meter:
        yield TrainingBar(meter)
