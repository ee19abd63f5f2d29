"""Checkpoints: written whole or not at all, and what they hold of random numbers and signals."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from advfeat import checks, seeding

State = dict[str, Any]


class Folder:
    """A folder with ``last.pt`` and ``best.pt``."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"checkpoint={path!r}: expected the name of a folder")
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            checks.fail("checkpoint", str(path), "expected a folder, and this is a file")

    def read(self, name: str = "last.pt") -> State | None:
        """A checkpoint on the CPU, None where there is none."""
        file = self.path / name
        if not file.exists():
            return None
        state: State = torch.load(file, map_location="cpu", weights_only=True)
        return state

    def write(self, state: State, name: str = "last.pt") -> None:
        """Replace a checkpoint; killed at any moment, this leaves the old one or the new one."""
        self.path.mkdir(parents=True, exist_ok=True)
        temporary = self.path / f".{name}.partial"
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path / name)


def refuse_another_run(found: State, settings: State) -> None:
    """Refuse to go on, with other settings, from where a run had come to."""
    for name, value in settings.items():
        # What was written before a setting was kept is not known.
        if (had := found.get(name, value)) != value:
            checks.fail(
                name,
                value,
                f"the run in this checkpoint folder had {had!r}; give the same "
                "arguments to go on with it, or another folder to begin anew",
            )


def random_state(device: torch.device) -> State:
    """States of the generators that data and models draw from, as what weights_only loads."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - what users draw from
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: State, device: torch.device, *, torchs: bool) -> None:
    """Go on where `random_state` was; torch's own generators only where asked for."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    if torchs:
        torch.set_rng_state(state["torch"])
        if device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def randomness(seed: int, epoch: int, device: torch.device) -> Iterator[None]:
    """Let torch's default generators follow from (seed, epoch) inside, and put them back after.

    Dropout, augmentation and the order of a user's loader are then the same in a run that was cut
    and resumed, and the same seed gives the same weights.
    """
    number = seeding.derive(seed, epoch)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.set_rng_state(torch.Generator().manual_seed(number).get_state())
        for gpu in devices:
            torch.cuda.set_rng_state(torch.Generator(gpu).manual_seed(number).get_state(), gpu)
        yield
