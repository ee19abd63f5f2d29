"""The progress bar of a training run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from advfeat.progress import wants_progress

# Seconds between two readings of the figures: each waits for the device.
_SECONDS = 1.0


class TrainingBar:
    """Images so far and a second, time left, and figures that are looked up now and then."""

    def __init__(self, bar: Any | None) -> None:
        self._bar = bar
        self._next = 0.0

    def advance(self, images: int, figures: Callable[[], dict[str, float]]) -> None:
        """Count the images of a step."""
        if self._bar is None:
            return
        if time.monotonic() >= self._next:
            found = {name: f"{value:.3f}" for name, value in figures().items()}
            self._bar.set_postfix(found)
            self._next = time.monotonic() + _SECONDS
        self._bar.update(images)


@contextmanager
def progress_bar(
    progress: bool | None, *, total: int | None, done: int, first: bool
) -> Iterator[TrainingBar]:
    """A bar over all images of all epochs, on the first rank, where one is wanted."""
    if not first or not wants_progress(progress):
        yield TrainingBar(None)
        return
    from tqdm.auto import tqdm

    with tqdm(
        total=total, initial=done, unit="img", unit_scale=True, desc="training", leave=False
    ) as bar:
        yield TrainingBar(bar)
