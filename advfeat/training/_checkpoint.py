"""The folder of a run's checkpoints: written whole or not at all, and locked while a run writes."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from advfeat import checks
from advfeat.durable import lock_file, write_whole

State = dict[str, Any]


class CheckpointFolder:
    """A folder with ``last.pt`` and ``best.pt``."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"checkpoint={path!r}: expected the name of a folder")
        if not os.fspath(path):
            checks.fail("checkpoint", path, "expected the name of a folder; '.' is this one")
        self.path = Path(path).expanduser()
        if self.path.exists() and not self.path.is_dir():
            checks.fail("checkpoint", str(path), "expected a folder, and this is a file")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder, and keep other runs out of it."""
        self.path.mkdir(parents=True, exist_ok=True)
        with lock_file(self.path / ".lock", "checkpoint"):
            yield

    def read(self, name: str = "last.pt") -> State | None:
        """Return a checkpoint on the CPU, None where there is none.

        Raises
        ------
        OSError
            Naming the file, where it is cut off or no checkpoint.
        """
        file = self.path / name
        if not file.exists():
            return None
        try:
            state: State = torch.load(file, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
            raise OSError(
                f"checkpoint={str(file)!r}: cannot be read ({type(error).__name__}); cut off, or "
                "written by something else? Remove the file to start the run anew"
            ) from error
        if not (isinstance(state, dict) and "identity" in state):
            raise OSError(
                f"checkpoint={str(file)!r}: written by something else than this library; give "
                "another folder"
            )
        return state

    def write(self, state: State, name: str = "last.pt") -> None:
        """Replace a checkpoint; killed at any moment, this leaves the old one or the new one."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.path / name, lambda file: torch.save(state, file))

    def check_readable(self) -> None:
        """Raise an error where what was written holds objects that are not read back.

        A schedule or an optimiser of the user's own may keep some.
        """
        file = self.path / "last.pt"
        try:
            torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            state = torch.load(file, map_location="cpu", weights_only=False)
            file.unlink()
            parts = [name for name, value in state.items() if not _is_readable(value)]
            raise TypeError(
                f"checkpoint: the state of {' and '.join(parts)} holds objects that are no "
                "tensors, numbers, strings or containers of them, and cannot be saved safely"
            ) from error


def _is_readable(value: Any) -> bool:
    import io

    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    try:
        torch.load(file, weights_only=True)
    except pickle.UnpicklingError:
        return False
    return True
