"""What a network learns from sets that were made with momentum or patience, beside the paper's way.

OMP_NUM_THREADS=1 python tests/benchmarks/bench_shortcuts.py [--seeds 0 1 2]

On scikit-learn's digits, with the networks and settings of examples/quickstart.py: D_R at equal
distances with and without momentum, D_det with and without patience. A fresh network is trained on
each set and measured on the 360 test images.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from side_by_side import machine
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import advfeat as af

EPS, TOLD = 1.0, 0.5  # of robust training and D_det, and of the accuracies that are told
D_R: dict[str, dict[str, Any]] = {
    "D_R, 50 steps": {"steps": 50},
    "D_R, momentum=0.9, 33 steps": {"steps": 33, "momentum": 0.9},
    "D_R, 150 steps": {"steps": 150},
    "D_R, momentum=0.9, 50 steps": {"steps": 50, "momentum": 0.9},
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    train, test = digits()
    print("| set | seed | distance or success | accuracy | robust, l2 0.5 |\n|---|---|---|---|---|")
    for seed in parser.parse_args().seeds:
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
