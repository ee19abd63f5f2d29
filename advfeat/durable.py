"""Files and folders written whole or not at all, locks, SIGTERM and Ctrl-C."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

Folder: TypeAlias = str | os.PathLike[str]


def as_path(folder: Folder) -> Path:
    """The path of a user's name for a file or folder, in which ``~`` is the home folder."""
    if not os.fspath(folder):
        raise ValueError(f"{folder!r}: expected the name of a file or folder; '.' is this folder")
    return Path(folder).expanduser()


def write_whole(path: Path, content: str | Callable[[BinaryIO], object]) -> None:
    """Write a file whole or not at all, in the place of what was there.

    Parameters
    ----------
    path
        The file.
    content
        Text, or a function that writes to a binary file.

    Raises
    ------
    OSError
        Naming the file, where the disk is full, say; what was there stays, and no partial file.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            if isinstance(content, str):
                file.write(content.encode())
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        # torch.save turns what the file raised into a RuntimeError.
        cause = _os_error(error)
        if cause is None:
            raise
        reason = os.strerror(cause.errno) if cause.errno else str(cause)
        raise OSError(
            cause.errno, f"{reason}, while {path.name!r} was written", str(path)
        ) from error
    finally:
        # Gone where all went well.
        partial.unlink(missing_ok=True)


def _os_error(error: BaseException | None) -> OSError | None:
    """Find the OSError that an error is, or that it came from."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


# A disk with fewer bytes is full.
_LITTLE = 1 << 16


@contextmanager
def whole_folder(folder: Folder) -> Iterator[Path]:
    """Give a folder to write to, which takes its name when all of it is written, or never."""
    folder = as_path(folder)
    if folder.exists():
        raise FileExistsError(f"folder={str(folder)!r}: exists; save under another name")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield partial
        partial.chmod(0o755)
        partial.rename(folder)
    except BaseException as error:
        # What NumPy raises of a full disk has no number: the disk itself tells.
        full = shutil.disk_usage(folder.parent).free < _LITTLE
        shutil.rmtree(partial, ignore_errors=True)
        cause = _os_error(error) if isinstance(error, (OSError, RuntimeError)) else None
        if cause is None:
            raise
        number = cause.errno or (errno.ENOSPC if full else None)
        reason = os.strerror(number) if number else str(cause)
        raise OSError(number, f"{reason}, while the folder was written", str(folder)) from error


# Locks of this process, by file: locks of POSIX do not hold between threads, and are lost when any
# of them closes the file. The process is kept, for a child that was forked holds none of them.
_held: dict[str, int] = {}
_held_guard = threading.Lock()


@contextmanager
def lock_file(path: Path, argument: str = "out") -> Iterator[None]:
    """Keep other processes, and other threads of this one, out; over with this process.

    Parameters
    ----------
    path
        The file, which is there while the lock is held. Its folder must exist.
    argument
        The user's argument that named the folder, for the message.

    Raises
    ------
    BlockingIOError
        Naming who is at work in the folder.
    """
    name = f"{argument}={str(path.parent)!r}"
    key = os.path.realpath(path)
    with _held_guard:
        if _held.get(key) == os.getpid():
            raise BlockingIOError(errno.EWOULDBLOCK, f"{name}: in use by a thread of this process")
        _held[key] = os.getpid()
    try:
        file = _locked_file(path, name)
        try:
            os.ftruncate(file, 0)
            os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(file)
    finally:
        with _held_guard:
            _held.pop(key, None)


def _locked_file(path: Path, name: str) -> int:
    """Open and lock a file."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(file)
        except OSError as error:
            holder = os.read(file, 200).decode(errors="replace").strip() or "another process"
            os.close(file)
            raise BlockingIOError(error.errno, f"{name}: in use by {holder}") from error
        # Whoever held it may have removed it meanwhile: then this is no file any more.
        try:
            if os.path.samestat(os.fstat(file), path.stat()):
                return file
        except FileNotFoundError:
            pass
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
    """Notices SIGTERM and Ctrl-C, so that a run can be saved before the process ends.

    Parameters
    ----------
    at_once
        Raise SystemExit at SIGTERM, for work that has nothing to save and may take long between
        two checks of ``noticed``. Ctrl-C raises KeyboardInterrupt as ever, and a handler of the
        user's own stays in place. By default the signal is noticed, and `pass_on` does what it
        would have done; a second Ctrl-C is not waited with.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self.noticed: int | None = None
        self._at_once = at_once
        self._previous: dict[int, Any] = {}

    @contextmanager
    def watched(self, wanted: bool = True) -> Iterator[None]:
        """Notice signals inside; only the main thread can."""
        if not wanted or threading.current_thread() is not threading.main_thread():
            yield
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            before = signal.getsignal(number)
            # What is ignored (of a job in the background, say) stays so.
            watches = before is signal.SIG_DFL if self._at_once else before is not signal.SIG_IGN
            if watches:
                self._previous[number] = signal.signal(number, self._notice)
        try:
            yield
        finally:
            for watched in self._previous:
                self._restore(watched)

    def pass_on(self) -> None:
        """Do what the signal would have done: by default, end the process."""
        number, self.noticed = self.noticed, None
        assert number is not None
        self._restore(number)
        signal.raise_signal(number)
        signal.signal(number, self._notice)

    def _restore(self, number: int) -> None:
        signal.signal(number, self._previous[number] or signal.SIG_DFL)

    def _notice(self, number: int, _: object) -> None:
        if self._at_once:
            raise SystemExit(128 + number)
        if self.noticed == number == signal.SIGINT:
            self.pass_on()
        self.noticed = number
