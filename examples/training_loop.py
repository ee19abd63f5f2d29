"""Adversarial examples in a training loop of one's own: half of each batch, with a rising radius.

    python examples/training_loop.py [--epochs 8]

What the library adds to the loop is one line; what to learn from, and when, is yours.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import advfeat as af

parser = argparse.ArgumentParser(description="PGD inside a loop of one's own")
parser.add_argument("--epochs", type=int, default=8)
options = parser.parse_args()

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16  # (1797, 64) in [0, 1]
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
images, labels = images[order], torch.tensor(digits.target)[order]
loader = DataLoader(TensorDataset(images[:1437], labels[:1437]), batch_size=64, shuffle=True)
test = TensorDataset(images[1437:], labels[1437:])

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

for epoch in range(options.epochs):
    eps = 0.5 * (epoch + 1) / options.epochs
    for x, y in loader:
        half = len(x) // 2
        attacked = af.pgd(model, x[:half], y[:half], eps=eps, norm="l2", steps=5)
        loss = nn.functional.cross_entropy(model(torch.cat([attacked, x[half:]])), y)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    print(f"epoch {epoch + 1}: eps {eps:.2f}, loss of the last batch {loss.item():.3f}")

result = af.robust_accuracy(model, test, eps=0.5, norm="l2", steps=20)
print(f"accuracy {result.standard:.3f}, robust accuracy in l2 0.5 {result:.3f}")
