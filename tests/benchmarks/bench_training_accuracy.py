"""Accuracy and robust accuracy after PGD training: advfeat beside a plain float32 loop.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_training_accuracy.py CIFAR.npz [--seeds 0 1 2]

Small ResNets on the first 10,000 training images of CIFAR-10, PGD-7 in linf 8/255 from random
starts, one cycle of learning rate; measured on the first 2,000 test images by the fast ensemble.
Both start from the same weights for each seed; batches, crops and starts are each one's own.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from cifar import BATCH, EPS, read, test_images
from resnet import SmallResNet
from side_by_side import machine
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

import advfeat as af
from advfeat.model import Precision
from advfeat.training import crop_flip

STEP, STEPS, LR = 2 / 255, 7, 0.1

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("cifar", type=Path)
parser.add_argument("--images", type=int, default=10_000)
parser.add_argument("--tested", type=int, default=2_000)
parser.add_argument("--epochs", type=int, default=6)
parser.add_argument("--width", type=int, default=16)
parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
parser.add_argument("--cases", nargs="+", default=["plain", "float32", "bfloat16"])


def attacked(model: SmallResNet, x: Tensor, y: Tensor) -> Tensor:
    """PGD as it is written in papers' scripts."""
    model.eval()
    made = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
    for _ in range(STEPS):
        made.requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(made), y), made)
        made = made.detach() + STEP * gradient.sign()
        made = torch.min(torch.max(made, x - EPS), x + EPS).clamp(0, 1)
    model.train()
    return made


def plain(model: SmallResNet, data: TensorDataset, epochs: int, seed: int) -> None:
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4)
    loader = DataLoader(data, batch_size=BATCH, shuffle=True)
    schedule = OneCycleLR(optimizer, LR, total_steps=epochs * len(loader))
    for _ in range(epochs):
        for x, y in loader:
            made = attacked(model, crop_flip(x), y)
            optimizer.zero_grad()
            F.cross_entropy(model(made), y).backward()
            optimizer.step()
            schedule.step()


def ours(
    model: SmallResNet, data: TensorDataset, epochs: int, seed: int, precision: Precision
) -> None:
    af.adversarial_fit(
        model, data, eps=EPS, norm="linf", steps=STEPS, step_size=STEP, random_start=True,
        epochs=epochs, lr=LR, schedule="one_cycle", batch_size=BATCH, augment=crop_flip,
        precision=precision, seed=seed, progress=False,
    )  # fmt: skip


CASES: dict[str, Callable[[SmallResNet, TensorDataset, int, int], None]] = {
    "plain": plain,
    "float32": partial(ours, precision="float32"),
    "bfloat16": partial(ours, precision="bfloat16"),
}


def main() -> None:
    warnings.simplefilter("ignore")  # where the processor has no bfloat16, precision says so
    options = parser.parse_args()
    data = TensorDataset(*read(options.cifar, "train", options.images))
    test = TensorDataset(*test_images(options.cifar, options.tested))
    print(
        f"{machine()}\n\n| | seed | accuracy | robust accuracy | seconds |\n|---|---|---|---|---|"
    )
    means: dict[str, list[tuple[float, float]]] = {name: [] for name in options.cases}
    for seed in options.seeds:
        for name in options.cases:
            torch.manual_seed(seed)
            model = SmallResNet(options.width)
            began = time.process_time()
            CASES[name](model, data, options.epochs, seed)
            took = time.process_time() - began
            found = af.robust_accuracy(
                model, test, eps=EPS, norm="linf", precision="bfloat16", seed=0, progress=False
            )
            clean, robust = 100 * found.standard, 100 * found
            means[name].append((clean, robust))
            print(f"| {name} | {seed} | {clean:.2f} | {robust:.2f} | {took:.0f} |", flush=True)
    for name, rows in means.items():
        clean, robust = torch.tensor(rows).mean(0).tolist()
        print(f"| {name} | mean | {clean:.2f} | {robust:.2f} | |")


if __name__ == "__main__":
    main()
