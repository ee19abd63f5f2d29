"""Kill a construction at 20 random moments, go on each time, and compare with one never killed.

python tests/benchmarks/bench_kills.py [KILLS]
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from resnet import SmallResNet
from torch.utils.data import TensorDataset

import advfeat as af

METHODS, SAMPLES = ("D_R", "D_rand"), 800


def build(method: str, out: str) -> None:
    torch.manual_seed(0)
    data = TensorDataset(torch.rand(SAMPLES, 3, 32, 32), torch.randint(0, 10, (SAMPLES,)))
    model = SmallResNet(width=8)
    construct = {"D_R": af.construct_robust_dataset, "D_rand": af.construct_rand_dataset}[method]
    construct(model, data, steps=20, seed=0, batch_size=16, out=out)


def finished(folder: str) -> int:
    path = Path(folder) / "done.npy"
    return int(np.load(path).sum()) if path.is_file() else 0


def main(kills: int, place: str) -> None:
    generator = random.Random(0)
    for method in METHODS:
        whole, folder = f"{place}/{method}-whole", f"{place}/{method}-killed"
        command = [sys.executable, __file__, "build", method]
        began = time.perf_counter()
        subprocess.run([*command, whole], check=True)
        took = time.perf_counter() - began
        began = time.perf_counter()
        subprocess.run([*command, whole], check=True)  # finished: nothing but the start
        start, seen = time.perf_counter() - began, []
        while len(seen) < kills:
            process = subprocess.Popen([*command, folder])
            time.sleep(generator.uniform(0, start + 2 * (took - start) / kills))
            process.kill()
            if process.wait() == -signal.SIGKILL:
                seen.append(finished(folder))
        subprocess.run([*command, folder], check=True)
        names = sorted(path.name for path in Path(whole).iterdir())
        same = all(
            (Path(whole) / name).read_bytes() == (Path(folder) / name).read_bytes()
            for name in names
        )
        print(f"{method}: {len(seen)} kills, with {seen} rows finished; {took:.0f} s undisturbed")
        print(f"{method}: {', '.join(names)}: {'byte for byte the same' if same else 'DIFFERENT'}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["build"]:
        build(*sys.argv[2:])
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(int(sys.argv[1]) if sys.argv[1:] else 20, folder)
