"""Progress bars, where tqdm is installed and somebody looks on."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def wants_progress(progress: bool | None) -> bool:
    """Whether to draw a bar: as told, or by default where stderr is a terminal and tqdm is there.

    Raises
    ------
    ImportError
        A bar was asked for and tqdm is missing.
    """
    if progress is False:
        return False
    try:
        import tqdm  # noqa: F401
    except ImportError as error:
        if progress:
            raise ImportError(
                "progress=True needs tqdm: pip install 'advfeat[progress]'"
            ) from error
        return False
    return bool(progress) or sys.stderr.isatty()


def with_progress(
    items: Iterable[T], *, total: int | None, label: str, progress: bool | None
) -> Iterable[T]:
    """Wrap an iterable in a progress bar where one is wanted."""
    if not wants_progress(progress):
        return items
    from tqdm.auto import tqdm

    bar: Iterable[T] = tqdm(items, total=total, desc=label, leave=False)
    return bar
