"""Memory of building 50,000 CIFAR-10-sized images in a folder, and of opening them (Linux).

python tests/benchmarks/bench_memory.py [FOLDER]
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

import advfeat as af

ROWS = 50_000
METHODS = ("D_R", "D_det")


def megabytes(name: str) -> float:
    """Of this process: VmRSS, what is resident now, or VmHWM, the most there ever was."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def build(method: str, out: str) -> None:
    torch.manual_seed(0)
    data = TensorDataset(torch.rand(ROWS, 3, 32, 32), torch.randint(0, 10, (ROWS,)))
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16 * 16, 10)
    )
    # Once on few rows, so that what torch itself takes for its first pass is not counted.
    few = TensorDataset(*(part[:256] for part in data.tensors))
    construct = {"D_R": af.construct_robust_dataset, "D_det": af.construct_det_dataset}[method]
    construct(model, few, steps=2)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before, began = megabytes("VmRSS"), time.perf_counter()
    construct(model, data, steps=3, out=out)
    print(
        f"{method}: {ROWS} images in {time.perf_counter() - began:.0f} s; resident memory rose by "
        f"at most {megabytes('VmHWM') - before:.0f} MB over {before:.0f} MB with the source loaded"
    )


def open_again(out: str) -> None:
    before, began = megabytes("VmRSS"), time.perf_counter()
    made = af.ConstructedDataset.open(out)
    image, _ = made[len(made) // 2]
    seconds = time.perf_counter() - began
    print(
        f"opening {len(made)} images and reading one, {tuple(image.shape)}: "
        f"{1000 * seconds:.1f} ms, {megabytes('VmRSS') - before:.1f} MB"
    )


def main(place: str) -> None:
    for method in METHODS:
        for act in ("build", "open"):
            command = [sys.executable, __file__, act, method, f"{place}/{method}"]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["build"]:
        build(*sys.argv[2:])
    elif sys.argv[1:2] == ["open"]:
        open_again(sys.argv[3])
    else:
        with tempfile.TemporaryDirectory(dir=sys.argv[1] if sys.argv[1:] else None) as folder:
            main(folder)
