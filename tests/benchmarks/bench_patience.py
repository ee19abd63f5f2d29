"""Inversion that stops rows whose distance no longer falls: time and distance against all steps.

OMP_NUM_THREADS=1 python tests/benchmarks/bench_patience.py
"""

from __future__ import annotations

import time
import warnings

import torch
from bench_construct import features
from resnet import SmallResNet
from side_by_side import machine
from torch.utils.data import TensorDataset

import advfeat as af

SAMPLES, BATCH, STEPS = 48, 24, 200


def main() -> None:
    warnings.simplefilter("ignore")  # where the processor has no bfloat16, precision says so
    torch.manual_seed(0)
    model = SmallResNet()
    x, y = torch.rand(SAMPLES, 3, 32, 32), torch.randint(0, 10, (SAMPLES,))
    af.fit(model, TensorDataset(x, y), epochs=5, batch_size=32, seed=0)  # off its random start
    model.eval().requires_grad_(False)
    print(f"D_R, {SAMPLES} images, batches of {BATCH}, {STEPS} steps of 0.1\n")
    print("| precision | patience | CPU seconds | mean distance | median |\n|---|---|---|---|---|")
    for precision, patience in (
        ("float32", None),
        ("bfloat16", None),
        ("bfloat16", 50),
        ("bfloat16", 20),
        ("bfloat16", 10),
    ):
        began = time.process_time()
        made = af.construct_robust_dataset(
            model,
            TensorDataset(x, y),
            steps=STEPS,
            seed=0,
            batch_size=BATCH,
            precision=precision,
            patience=patience,
        )
        seconds = time.process_time() - began
        with torch.no_grad():
            away = (features(model, made.images) - features(model, x)).norm(dim=1)
        print(
            f"| {precision} | {patience} | {seconds:.1f} | {away.mean():.4f} | "
            f"{away.median():.4f} |",
            flush=True,
        )
    print("\n" + machine())


if __name__ == "__main__":
    main()
