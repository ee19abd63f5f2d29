"""Adversarial training in a loop of Hugging Face accelerate (pip install accelerate): `pgd` in it.

    accelerate launch examples/accelerate_loop.py [--epochs 8]

The attack gets the unwrapped model, so that it waits for no other process; the wrapped one is
trained. `pgd` leaves flags, gradients and BatchNorm's statistics alone.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import advfeat as af

parser = argparse.ArgumentParser(description="pgd in a loop of accelerate")
parser.add_argument("--epochs", type=int, default=8)
options = parser.parse_args()

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
labels = torch.tensor(digits.target)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train = TensorDataset(images[order[:1300]], labels[order[:1300]])
test = TensorDataset(images[order[1300:]], labels[order[1300:]])

accelerator = Accelerator()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
loader = DataLoader(train, batch_size=64, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
plain = accelerator.unwrap_model(model)

for _ in range(options.epochs):
    for x, y in loader:
        attacked = af.pgd(plain, x, y, eps=0.5, norm="l2", steps=5)
        loss = nn.functional.cross_entropy(model(attacked), y)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()

if accelerator.is_main_process:
    result = af.robust_accuracy(plain, test, eps=0.5, norm="l2", steps=20)
    print(f"accuracy {result.standard:.3f}, robust accuracy {result:.3f}")
