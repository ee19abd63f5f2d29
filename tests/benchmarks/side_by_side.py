"""Time several ways of doing the same work, interleaved in one process, and print ratios."""

from __future__ import annotations

import importlib.machinery
import platform
import statistics
import sys
import time
import types
from collections.abc import Callable

import torch


def side_by_side(
    cases: dict[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each case; the cases take turns, so a busy machine slows all alike.

    Before the rounds every case runs once to warm up; with ``rounds=0`` that run is timed.
    ``clock=time.process_time`` counts this process's own seconds on all its threads: for one thread
    on a machine that others use too.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds + 1):
        if turn == 1:
            seconds = {name: [] for name in cases}
        for name, run in cases.items():
            began = clock()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(clock() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def table(seconds: dict[str, float], reference: str, notes: dict[str, str] | None = None) -> str:
    """Markdown: time as a multiple of the reference's, and what else is known of each case."""
    notes = notes or {}
    lines = [f"| | time / {reference} | |", "|---|---|---|"]
    for name, value in seconds.items():
        lines.append(f"| {name} | {value / seconds[reference]:.3f} | {notes.get(name, '')} |")
    return "\n".join(lines)


def machine() -> str:
    """What the numbers were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {capability}, "
        f"bfloat16 in hardware: {torch.ops.mkldnn._is_mkldnn_bf16_supported()}"
    )


def without_torchvision() -> None:
    """Give adv-lib, which imports it for what is not used here, an empty torchvision."""
    empty = types.ModuleType("torchvision")
    empty.__spec__ = importlib.machinery.ModuleSpec("torchvision", None)
    for name in ("models", "transforms"):
        module = types.ModuleType(f"torchvision.{name}")
        setattr(empty, name, module)
        sys.modules[module.__name__] = module
    sys.modules["torchvision"] = empty
