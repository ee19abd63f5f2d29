"""A model and a dataset in the style of Hugging Face: dictionaries in, an object with .logits out.

    python examples/huggingface_style.py [--epochs 8]

No transformers needed: the classes below have the shape of theirs. A model of theirs whose forward
takes ``pixel_values`` first, such as ViTForImageClassification, is used in the same way.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import Dataset

import advfeat as af

parser = argparse.ArgumentParser(description="Outputs with .logits, rows that are dictionaries")
parser.add_argument("--epochs", type=int, default=8)
options = parser.parse_args()


@dataclass
class ImageClassifierOutput:
    logits: Tensor
    hidden_states: Tensor


class DigitTransformer(nn.Module):
    """Four patches of 4x4 pixels, attended to by one layer of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 32, 4, stride=4)
        self.positions = nn.Parameter(torch.zeros(4, 32))
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.classifier = nn.Linear(32, 10)

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        tokens = self.patches(pixel_values).flatten(2).mT + self.positions
        hidden = self.layer(tokens).mean(1)
        return ImageClassifierOutput(self.classifier(hidden), hidden)


class Digits(Dataset[dict[str, Tensor]]):
    """Samples as the `datasets` library gives them."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[row], "labels": self.labels[row]}


digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
images, labels = images[order], torch.tensor(digits.target)[order]
train, test = Digits(images[:1437], labels[:1437]), Digits(images[1437:], labels[1437:])

torch.manual_seed(0)
model = DigitTransformer()
af.fit(
    model, train, epochs=options.epochs, batch_size=64,
    optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3), seed=0,
)  # fmt: skip
result = af.robust_accuracy(model, test, eps=0.5, norm="l2", steps=20)
print(f"accuracy {result.standard:.3f}, robust accuracy in l2 0.5 {result:.3f}")

# Any module can be the layer: here the input of the classifier, which is also the default.
made = af.construct_nonrobust_dataset(
    model, train, steps=5, layer=lambda x: model(x).hidden_states, seed=0
)
print(made)
