"""Adversarial training in PyTorch Lightning (pip install lightning): `pgd` in the training step.

    python examples/lightning_module.py [--epochs 8]

`pgd` leaves flags, gradients and BatchNorm's statistics alone, so nothing else of the module
changes. Lightning takes gradients off for validation; an attack puts them on for itself.
"""

from __future__ import annotations

import argparse

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import advfeat as af

parser = argparse.ArgumentParser(description="pgd in a LightningModule")
parser.add_argument("--epochs", type=int, default=8)
options = parser.parse_args()


class RobustClassifier(lightning.LightningModule):
    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        attacked = af.pgd(self.net, x, y, eps=self.eps, norm="l2", steps=5)
        loss = nn.functional.cross_entropy(self(attacked), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        attacked = af.pgd(self.net, x, y, eps=self.eps, norm="l2", steps=10)
        self.log("val_accuracy", (self(x).argmax(1) == y).float().mean())
        self.log("val_robust_accuracy", (self(attacked).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
images, labels = images[order], torch.tensor(digits.target)[order]
train = DataLoader(TensorDataset(images[:1197], labels[:1197]), batch_size=64, shuffle=True)
validation = DataLoader(TensorDataset(images[1197:1437], labels[1197:1437]), batch_size=240)
test = TensorDataset(images[1437:], labels[1437:])

lightning.seed_everything(0, verbose=False)
module = RobustClassifier(eps=0.5)
trainer = lightning.Trainer(
    max_epochs=options.epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
)  # fmt: skip
trainer.fit(module, train, validation)
print({name: round(float(value), 3) for name, value in trainer.callback_metrics.items()})

result = af.robust_accuracy(module.net, test, eps=0.5, norm="l2", seed=0)
print(f"accuracy {result.standard:.3f}, robust accuracy in l2 0.5 {result:.3f}")
