"""A dataset of Hugging Face's library in, a constructed one out, through its folder and back.

    pip install 'advfeat[hf]'
    python examples/huggingface_datasets.py [--epochs 8]

Any `datasets.Dataset` with a column of images and one of labels is used in this way; a transform
gives the tensors that the model takes.
"""

from __future__ import annotations

import argparse
from typing import Any

import datasets
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader

import advfeat as af

parser = argparse.ArgumentParser(description="Datasets of Hugging Face, in and out")
parser.add_argument("--epochs", type=int, default=8)
parser.add_argument("--folder", default="digits-d-rand")
options = parser.parse_args()


def digits() -> datasets.DatasetDict:
    """Pictures of 8 bits and labels, as `datasets.load_dataset` would give them."""
    images, labels = load_digits(return_X_y=True)
    pictures = np.round(255 / 16 * images.reshape(-1, 8, 8)).astype(np.uint8)
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=[str(n) for n in range(10)])
    )
    whole = datasets.Dataset.from_dict({"image": list(pictures), "label": labels}, features)
    return whole.train_test_split(test_size=360, seed=0)


def as_tensors(batch: dict[str, Any]) -> dict[str, Any]:
    """Images in [0, 1] with their channel in front: what `with_transform` calls on each read."""
    images = [torch.tensor(np.array(image))[None] / 255 for image in batch["image"]]
    return {"image": images, "label": batch["label"]}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def main() -> None:
    torch.manual_seed(0)
    splits = digits()
    train, test = (splits[name].with_transform(as_tensors) for name in ("train", "test"))
    standard = network()
    af.fit(standard, train, epochs=options.epochs, batch_size=64, lr=0.05, seed=0)
    print("standard model, accuracy:", af.accuracy(standard, test))

    d_rand = af.construct_rand_dataset(standard, train, eps=1.0, steps=20, seed=0)
    d_rand.to_hf().save_to_disk(options.folder)

    # Somewhere else: with advfeat, all fields and the manifest come back ...
    again = af.ConstructedDataset.from_hf(options.folder)
    assert torch.equal(again.images, d_rand.images)
    assert again.manifest["method"] == "D_rand"
    # ... and without, it is a dataset like any other.
    plain = datasets.load_from_disk(options.folder).with_format("torch")
    print("columns:", ", ".join(plain.column_names))

    fresh = network()
    columns = plain.select_columns(["image", "label"])
    loader = DataLoader(columns, batch_size=64, shuffle=True)
    af.fit(fresh, loader, epochs=options.epochs, lr=0.05, seed=0)
    print("trained on D_rand, accuracy on the original test images:", af.accuracy(fresh, test))


if __name__ == "__main__":
    main()
