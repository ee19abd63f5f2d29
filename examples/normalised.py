"""A residual network in torchvision's style, trained on normalised images: where to normalise.

    python examples/normalised.py [--epochs 4]

Published weights expect (x - mean) / std. Attacks know pixels: the ball and the box are those of
[0, 1]. So the normalisation moves from the loader into the model, and `eps` keeps its meaning. With
torchvision it is `Normalised(torchvision.models.resnet50(weights=...))`.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import advfeat as af

parser = argparse.ArgumentParser(description="Normalisation inside the model")
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--samples", type=int, default=1437, help="training images")
options = parser.parse_args()

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Normalised(nn.Module):
    """A model of normalised images as a model of images in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner((x - self.mean) / self.std)
        return logits


class Block(nn.Module):
    """Two convolutions around a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        inside = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(x + inside)


class SmallResNet(nn.Module):
    """As in torchvision: a stem, layers, an average pool, and `fc`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.layer1, self.layer2 = Block(16), Block(16)
        self.avgpool = nn.AdaptiveAvgPool2d(2)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.avgpool(self.layer2(self.layer1(self.conv1(x))))
        logits: Tensor = self.fc(pooled.flatten(1))
        return logits


digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None].repeat(1, 3, 1, 1) / 16
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
images, labels = images[order], torch.tensor(digits.target)[order]
train = TensorDataset(images[: options.samples], labels[: options.samples])
test = TensorDataset(images[1437:], labels[1437:])

torch.manual_seed(0)
model = Normalised(SmallResNet())
af.fit(model, train, epochs=options.epochs, batch_size=64, lr=0.05, seed=0)
result = af.robust_accuracy(model, test, eps=0.5, norm="l2", steps=20)
print(f"accuracy {result.standard:.3f}, robust accuracy in l2 0.5 {result:.3f}")

try:  # the same images normalised outside are refused, with the usual cause
    af.pgd(model, (images[:4] - model.mean) / model.std, labels[:4], eps=0.5, norm="l2")
except ValueError as error:
    print(error)

# A layer by its name, counted from the outermost module.
subset = TensorDataset(*train[:64])
print(af.construct_nonrobust_dataset(model, subset, layer="inner.layer2", steps=20, seed=0))
