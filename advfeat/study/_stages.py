"""Results of stages, each kept once: in memory, or in a folder that survives the process."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from advfeat import checks, distributed, seeding
from advfeat.durable import as_path, write_whole

_STUDY = "study.json"


class Stages:
    """What is done, by the name of the stage, with the settings that it was done with.

    A file ``stages/NAME.json`` is written when a stage is over, whole or not at all. Models and
    datasets keep to folders of their own.
    """

    def __init__(self, out: str | os.PathLike[str] | None, process: distributed.Process) -> None:
        if not (out is None or isinstance(out, (str, os.PathLike))):
            raise TypeError(f"out={out!r}: expected the name of a folder")
        self.folder = None if out is None else as_path(out)
        if self.folder is not None and self.folder.exists() and not self.folder.is_dir():
            checks.fail("out", str(out), "expected a folder, and this is a file")
        if self.folder is None and process.world_size > 1:
            checks.fail("out", out, "several processes need a folder that all of them share")
        self._team = process
        self._records: dict[str, dict[str, Any]] = {}

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and reports."""
        return self._team.rank == 0

    @property
    def has_results(self) -> bool:
        """Whether the folder has the result of a stage."""
        return self.folder is not None and any((self.folder / "stages").glob("*.json"))

    def seed(self, seed: Any) -> int:
        """The seed to use: of a study that was begun here its own, unless another is given."""
        manifest = self._read(_STUDY) if seed is None else None
        return self._team.broadcast_int(
            seeding.resolve(seed) if manifest is None else manifest["seed"]
        )

    def begin(self, identity: dict[str, Any]) -> None:
        """Check that the folder holds no other study; write down what this one is."""
        there = self._read(_STUDY)
        self._check_same(_STUDY, there, identity)
        self._team.barrier()
        if there is None:
            self._write(_STUDY, identity)
        self._team.barrier()

    def place(self, kind: str, name: str) -> Path | None:
        """Folder of a model or a dataset."""
        return None if self.folder is None else self.folder / kind / _slug(name)

    def record(self, name: str) -> dict[str, Any] | None:
        """What is kept of a stage: settings, seconds, result."""
        if name not in self._records and (found := self._read(_file(name))) is not None:
            self._records[name] = found
        return self._records.get(name)

    def once(
        self,
        name: str,
        settings: Any,
        work: Callable[[], Any],
        *,
        alone_after: Callable[[], object] | None = None,
    ) -> Any:
        """The result of a stage, as JSON has it: the kept one, or that of doing the work now.

        ``alone_after``: what all ranks do, before the first one works and the others wait for it.
        """
        found = self.record(name)
        if found is not None:
            self._check_same(_file(name), found["settings"], settings)
            return found["result"]
        began = time.perf_counter()
        result = None
        if alone_after is None:
            result = work()
        else:
            alone_after()
            if self._team.rank == 0:
                with distributed.on_one_rank():
                    result = work()
        seconds = time.perf_counter() - began
        self._team.barrier()
        record = {"settings": settings, "seconds": seconds, "result": result}
        if self._team.rank == 0:
            # As it will be read back, so that a study in memory is no different.
            self._records[name] = json.loads(json.dumps(record))
            self._write(_file(name), record)
        self._team.barrier()
        kept = self.record(name)
        assert kept is not None
        return kept["result"]

    def _check_same(self, file: str, there: Any, here: Any) -> None:
        if there is None or there == here:
            return
        what = "; ".join(_differences(there, here))
        checks.fail(
            "out",
            str(self.folder),
            f"in it {file} was made with other settings: {what}. Use another folder, or the call "
            "that began this one",
        )

    def _read(self, file: str) -> Any:
        if self.folder is None or not (self.folder / file).exists():
            return None
        try:
            return json.loads((self.folder / file).read_text())
        except ValueError as error:
            raise ValueError(
                f"out={str(self.folder)!r}: {file} in it is no JSON ({error}); delete it, and the "
                "stage is done again"
            ) from error

    def _write(self, file: str, value: Any) -> None:
        if self.folder is None or self._team.rank:
            return
        path = self.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(value, indent=1) + "\n")


def _differences(there: Any, here: Any, path: str = "") -> Iterator[str]:
    """Where two settings differ, each by its path: ``source.epochs``."""
    if not (isinstance(there, dict) and isinstance(here, dict)):
        if there != here:
            yield f"{path}={there!r} there, {here!r} here"
        return
    for key in sorted({*there, *here}):
        yield from _differences(there.get(key), here.get(key), f"{path}.{key}".lstrip("."))


def _file(stage: str) -> str:
    return f"stages/{_slug(stage)}.json"


def _slug(name: str) -> str:
    return re.sub(r"\W+", "-", name)
