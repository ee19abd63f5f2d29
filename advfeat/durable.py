"""Files and folders written whole or not at all, locks, and SIGTERM."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

Folder: TypeAlias = str | os.PathLike[str]


def write_whole(path: Path, text: str) -> None:
    """Write a file of text whole or not at all, in the place of what was there."""
    partial = path.with_name(f".{path.name}")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


@contextmanager
def whole_folder(folder: Folder) -> Iterator[Path]:
    """Give a folder to write to, which takes its name when all of it is written, or never."""
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"folder={str(folder)!r}: exists; save under another name")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield partial
        partial.chmod(0o755)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Keep other processes out; over with this process, however that ends."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            _lock(file)
        except OSError as error:
            holder = os.read(file, 200).decode(errors="replace").strip() or "another process"
            raise BlockingIOError(
                error.errno, f"out={str(path.parent)!r}: in use by {holder}"
            ) from error
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(file)


def _lock(file: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        # Not flock: workers of a loader would inherit it, and outlive a killed process.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class Termination:
    """Notices SIGTERM, so that a run can be saved before the process ends."""

    def __init__(self) -> None:
        self.noticed = False
        self._previous: Any = None

    @contextmanager
    def watched(self, wanted: bool) -> Iterator[None]:
        """Notice the signal inside; only the main thread can."""
        if not wanted or threading.current_thread() is not threading.main_thread():
            yield
            return
        self._previous = signal.signal(signal.SIGTERM, self._notice)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, self._previous or signal.SIG_DFL)

    def pass_on(self) -> None:
        """Do what the signal would have done: by default, end the process."""
        self.noticed = False
        signal.signal(signal.SIGTERM, self._previous or signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, self._notice)

    def _notice(self, *_: object) -> None:
        self.noticed = True
