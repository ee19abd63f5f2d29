"""Callbacks of training: TensorBoard (pip install tensorboard), and a rule of one's own to stop.

python examples/callbacks.py [--logs runs] && tensorboard --logdir runs
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset
from torch.utils.tensorboard import SummaryWriter

import advfeat as af

parser = argparse.ArgumentParser(description="Callbacks of training")
parser.add_argument("--logs", default="runs")
parser.add_argument("--enough", type=float, default=0.6, help="stop at this robust accuracy")
options = parser.parse_args()

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
data = TensorDataset(images, torch.tensor(digits.target))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

writer = SummaryWriter(options.logs)


def on_step(row: dict[str, float]) -> None:
    """Write every step's figures."""
    for name in ("loss", "accuracy", "lr"):
        writer.add_scalar(f"step/{name}", row[name], row["step"])


def on_epoch(row: dict[str, float]) -> bool:
    """Write every epoch's figures; False stops training."""
    for name, value in row.items():
        writer.add_scalar(f"epoch/{name}", value, row["epoch"])
    return bool(row["val_robust_accuracy"] < options.enough)


print(
    af.adversarial_fit(
        model,
        data,
        eps=0.1,
        norm="linf",
        epochs=20,
        validation=0.2,
        on_step=on_step,
        on_epoch=on_epoch,
        seed=0,
    )
)
writer.close()
