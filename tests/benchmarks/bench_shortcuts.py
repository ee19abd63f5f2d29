"""What a network learns from sets that were made with momentum or patience, beside the paper's way.

OMP_NUM_THREADS=1 python tests/benchmarks/bench_shortcuts.py [--seeds 0 1 2]
    [--cifar CIFAR.npz --cache DIR [--only NAME]]

On scikit-learn's digits, with networks and settings of an earlier quickstart: D_R at equal
distances with and without momentum, D_det with and without patience. A fresh network is trained on
each set and measured on the 360 test images. With --cifar: D_R of 3,000 of CIFAR-10's training
images from the robust model of bench_evaluation.py, one seed, measured on the first 1,000 test
images.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from cifar import read, robust_model
from resnet import SmallResNet
from side_by_side import machine
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import advfeat as af
from advfeat.training import crop_flip

EPS, TOLD = 1.0, 0.5  # of robust training and D_det, and of the accuracies that are told
D_R: dict[str, dict[str, Any]] = {
    "D_R, 50 steps": {"steps": 50},
    "D_R, momentum=0.9, 33 steps": {"steps": 33, "momentum": 0.9},
    "D_R, 150 steps": {"steps": 150},
    "D_R, momentum=0.9, 50 steps": {"steps": 50, "momentum": 0.9},
}
CIFAR: dict[str, dict[str, Any]] = {
    "the images": {},
    "D_R, 100 steps": {"steps": 100},
    "D_R, momentum=0.9, 27 steps": {"steps": 27, "momentum": 0.9},
}
D_DET: dict[str, dict[str, Any]] = {
    "D_det, 100 steps": {},
    "D_det, patience=10": {"patience": 10},
}


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 16, 128, bias=False), nn.BatchNorm1d(128),
        nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def shift_each(x: Tensor) -> Tensor:
    """Move every image by at most a pixel, each its own way."""
    padded, eight = nn.functional.pad(x, (1, 1, 1, 1)), torch.arange(8)
    dy, dx = torch.randint(0, 3, (2, len(x), 1))
    rows = torch.arange(len(x))[:, None, None]
    return padded[rows, 0, (dy + eight)[:, :, None], (dx + eight)[:, None, :]][:, None]


def digits() -> tuple[TensorDataset, TensorDataset]:
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(found.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return TensorDataset(images[:1437], labels[:1437]), TensorDataset(images[1437:], labels[1437:])


def learned(made: af.ConstructedDataset, test: TensorDataset, seed: int, **how: Any) -> str:
    """Accuracies of a fresh network that was trained on the set."""
    torch.manual_seed(100 + seed)
    net = network()
    af.fit(net, made, epochs=20, seed=seed, progress=False, **how)
    robust = af.robust_accuracy(net, test, eps=TOLD, norm="l2", steps=20, progress=False)
    return f"{100 * af.accuracy(net, test):.1f} | {100 * robust:.1f}"


def on_cifar(path: Path, cache: Path, only: list[str]) -> None:
    train, test = (TensorDataset(*read(path, *part)) for part in (("train", 3000), ("test", 1000)))
    robust = robust_model(path, cache)
    fast: dict[str, Any] = {"precision": "bfloat16", "progress": False}
    print("| set | distance | accuracy | robust, linf 2/255 | robust, l2 0.25 |")
    print("|---|---|---|---|---|")
    for name in only:
        made, distance = train, ""
        if CIFAR[name]:
            made = af.construct_robust_dataset(robust, train, seed=0, **CIFAR[name], **fast)
            distance = f"{made.field('distance').mean():.3f}"
        torch.manual_seed(0)
        net = SmallResNet()
        how = {"epochs": 20, "lr": 0.1, "schedule": "one_cycle", "augment": crop_flip}
        af.fit(net, made, batch_size=64, seed=0, **how, **fast)
        cells = [af.accuracy(net, test)]
        for norm, eps in (("linf", 2 / 255), ("l2", 0.25)):
            cells.append(af.robust_accuracy(net, test, eps=eps, norm=norm, steps=20, **fast))
        told = " | ".join(f"{100 * cell:.1f}" for cell in cells)
        print(f"| {name} | {distance} | {told} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--cache", type=Path, default=Path("."))
    parser.add_argument("--only", nargs="+", choices=CIFAR, default=[*CIFAR])
    options = parser.parse_args()
    if options.cifar:
        on_cifar(options.cifar, options.cache, options.only)
        return
    train, test = digits()
    print("| set | seed | distance or success | accuracy | robust, l2 0.5 |\n|---|---|---|---|---|")
    for seed in options.seeds:
        torch.manual_seed(seed)
        standard, robust = network(), network()
        af.fit(standard, train, epochs=15, lr=0.1, schedule="one_cycle", seed=seed)
        ball = {"eps": EPS, "norm": "l2", "steps": 3, "step_size": EPS / 2}
        af.adversarial_fit(robust, train, **ball, epochs=25, augment=shift_each, seed=seed)
        for name, how in D_R.items():
            made = af.construct_robust_dataset(robust, train, seed=seed, progress=False, **how)
            distance = float(made.field("distance").mean())
            told = learned(made, test, seed, augment=shift_each)
            print(f"| {name} | {seed} | {distance:.3f} | {told} |", flush=True)
        for name, how in D_DET.items():
            made = af.construct_det_dataset(standard, train, eps=EPS, progress=False, **how)
            success = float(made.field("success").float().mean())
            print(f"| {name} | {seed} | {success:.3f} | {learned(made, test, seed)} |", flush=True)
    print("\n" + machine())


if __name__ == "__main__":
    main()
