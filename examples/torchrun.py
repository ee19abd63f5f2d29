"""Adversarial training on several processes: the same call, under torchrun.

    torchrun --nproc-per-node=2 examples/torchrun.py [--checkpoint runs/digits]

Each process makes the same call with the plain model and the whole dataset. Batches are shared
out, so the result is that of one process; ``batch_size`` is of all of them together. Killed at any
moment, the same command goes on from the folder's last.pt.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import advfeat as af

parser = argparse.ArgumentParser(description="Adversarial training under torchrun")
parser.add_argument("--checkpoint", help="folder for last.pt and best.pt")
parser.add_argument("--epochs", type=int, default=10)
options = parser.parse_args()

dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
if torch.cuda.is_available():
    torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
device = "cuda" if torch.cuda.is_available() else "cpu"

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
data = TensorDataset(images, torch.tensor(digits.target))

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)

history = af.adversarial_fit(
    model,
    data,
    eps=0.1,
    norm="linf",
    epochs=options.epochs,
    validation=0.2,  # split off by the seed; a test set is never used for choices
    checkpoint=options.checkpoint,
    seed=0,
)
if dist.get_rank() == 0:
    print(history)
dist.destroy_process_group()
