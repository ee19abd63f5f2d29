"""Mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019) by `augment=`: soft labels from the batch.

    python examples/mixup.py [--epochs 12] [--adversarial]

An `augment` with two arguments gets inputs and labels, and returns both. Random numbers are
torch's own, so a run that is interrupted and resumed mixes the same samples.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import advfeat as af

parser = argparse.ArgumentParser(description="soft labels")
parser.add_argument("--epochs", type=int, default=12)
parser.add_argument("--adversarial", action="store_true")
options = parser.parse_args()
CLASSES = 10


def mixup(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    weight = torch.rand(()).item()
    other = torch.randperm(len(images), device=images.device)
    soft = F.one_hot(labels, CLASSES).float()
    return (
        weight * images + (1 - weight) * images[other],
        weight * soft + (1 - weight) * soft[other],
    )


def cutmix(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    height, width = images.shape[2:]
    top, left = int(torch.randint(height, ())), int(torch.randint(width, ()))
    rows, columns = slice(top, top + height // 2), slice(left, left + width // 2)
    other = torch.randperm(len(images), device=images.device)
    mixed = images.clone()
    mixed[:, :, rows, columns] = images[other][:, :, rows, columns]
    kept = 1 - mixed[0, 0, rows, columns].numel() / (height * width)
    soft = F.one_hot(labels, CLASSES).float()
    return mixed, kept * soft + (1 - kept) * soft[other]


digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(digits.target)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train = TensorDataset(images[order[:1300]], labels[order[:1300]])
test = TensorDataset(images[order[1300:]], labels[order[1300:]])

for name, augment in {"plain": None, "mixup": mixup, "cutmix": cutmix}.items():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, CLASSES),
    )
    settings = {"epochs": options.epochs, "batch_size": 64, "lr": 0.05, "seed": 0}
    if options.adversarial:
        af.adversarial_fit(model, train, eps=0.5, norm="l2", steps=3, augment=augment, **settings)
    else:
        af.fit(model, train, augment=augment, **settings)
    print(f"{name:7} accuracy {af.accuracy(model, test):.3f}")
