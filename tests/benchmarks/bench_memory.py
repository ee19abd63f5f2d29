"""Memory of building 50,000 CIFAR-10-sized images in a folder, of opening them, of evaluation.

python tests/benchmarks/bench_memory.py [FOLDER]
python tests/benchmarks/bench_memory.py evaluate SAMPLES

Linux only: it reads /proc.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import advfeat as af

SAMPLES = 50_000
METHODS = ("D_R", "D_det")


def megabytes(name: str) -> float:
    """Of this process: VmRSS, what is resident now, or VmHWM, the most there ever was."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def build(method: str, out: str) -> None:
    torch.manual_seed(0)
    data = TensorDataset(torch.rand(SAMPLES, 3, 32, 32), torch.randint(0, 10, (SAMPLES,)))
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
        f"{method}: {SAMPLES} images in {time.perf_counter() - began:.0f} s; resident memory rose "
        f"by at most {megabytes('VmHWM') - before:.0f} MB over {before:.0f} MB with the source "
        "loaded"
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


class Repeated(Dataset):  # type: ignore[type-arg]
    """As many samples as are asked for, of a few images: the data themselves take no memory."""

    def __init__(self, images: Tensor, labels: Tensor, count: int) -> None:
        self.images, self.labels, self.count = images, labels, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        place = index % len(self.images)
        return self.images[place], self.labels[place]


def evaluate(count: str) -> None:
    """Every sample is fooled by the first attack of the ensemble."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16 * 16, 10)
    )
    images = torch.rand(500, 3, 32, 32)
    with torch.no_grad():
        labels = model(images).argmax(1)
    af.robust_accuracy(model, Repeated(images, labels, 256), eps=0.5, norm="linf", seed=0)
    Path("/proc/self/clear_refs").write_text("5")
    before = megabytes("VmRSS")
    robust = af.robust_accuracy(
        model, Repeated(images, labels, int(count)), eps=0.5, norm="linf", seed=0
    )
    print(
        f"{count} samples, {robust.count} robust: resident memory rose by at most "
        f"{megabytes('VmHWM') - before:.1f} MB over {before:.0f} MB"
    )


def main(place: str) -> None:
    for method in METHODS:
        for act in ("build", "open"):
            command = [sys.executable, __file__, act, method, f"{place}/{method}"]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["build"]:
        build(*sys.argv[2:])
    elif sys.argv[1:2] == ["evaluate"]:
        evaluate(sys.argv[2])
    elif sys.argv[1:2] == ["open"]:
        open_again(sys.argv[3])
    else:
        with tempfile.TemporaryDirectory(dir=sys.argv[1] if sys.argv[1:] else None) as folder:
            main(folder)
