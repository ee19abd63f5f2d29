"""The paper in miniature, on scikit-learn's digits: real 8x8 images, no download.

    python examples/quickstart.py [--seed 0] [--seeds 3] [--out quickstart.png]

Writes a figure of the accuracies, and a report with samples of every dataset, settings and times.

A scaled-down version of "Adversarial Examples Are Not Bugs, They Are Features" (Ilyas et al. 2019):
digits in place of CIFAR-10, a small CNN in place of ResNet-50. Measured results over several seeds,
and which of the paper's claims are confirmed here, are in docs/results.md.
"""

from __future__ import annotations

import argparse
import time

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from advfeat import study

parser = argparse.ArgumentParser(description="The paper in miniature, on digits")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", default="quickstart.png", help="where the figure goes")
parser.add_argument("--report", default="quickstart.html", help="where the report goes")
parser.add_argument("--seeds", type=int, help="so many seeds, counted up from --seed")
parser.add_argument("--folder", help="keep models and datasets, and resume there")
parser.add_argument("--validate", action="store_true", help="test on 240 held out of 1437")
options = parser.parse_args()
began = time.perf_counter()

# Pixels in [0, 1]. Settings were chosen on folds of the training images (docs/results.md).
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(digits.target)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
images, labels = images[order], labels[order]
begin, end = (1197, 1437) if options.validate else (1437, None)
train = TensorDataset(images[:begin], labels[:begin])
test = TensorDataset(images[begin:end], labels[begin:end])


def network() -> nn.Module:
    """A small CNN."""
    return nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 48, 3, padding=1, bias=False),
        nn.BatchNorm2d(48),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(48 * 16, 128, bias=False),
        nn.BatchNorm1d(128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def shift_batch(x: Tensor) -> Tensor:
    """Move a batch by at most a pixel, all images alike."""
    dy, dx = torch.randint(0, 3, (2,)).tolist()
    return nn.functional.pad(x, (1, 1, 1, 1))[:, :, dy : dy + 8, dx : dx + 8]


def shift_each(x: Tensor) -> Tensor:
    """Move every image by at most a pixel, each its own way."""
    padded, eight = nn.functional.pad(x, (1, 1, 1, 1)), torch.arange(8)
    dy, dx = torch.randint(0, 3, (2, len(x), 1))
    rows = torch.arange(len(x))[:, None, None]
    return padded[rows, 0, (dy + eight)[:, :, None], (dx + eight)[:, None, :]][:, None]


# Five starts for each image of D_R, at equal numbers of steps. Controls share the settings of
# their dataset.
inverted = {"steps": 20, "step_size": 0.15, "momentum": 0.6}
targeted = {"eps": 1.1, "steps": 20}
longer = {"epochs": 20}
recipe = study.Recipe(
    standard={
        "epochs": 15, "batch_size": 64, "lr": 0.1, "schedule": "one_cycle", "augment": shift_batch
    },
    robust={
        "eps": 1.15, "steps": 3, "step_size": 0.575, "epochs": 18, "augment": shift_each
    },
    sets={
        "D_R": {**inverted, "starts": 5},
        "D_R control": {},  # the original images
        "D_NR": inverted,
        "D_rand": targeted,
        "D_det": targeted,
        "D_det control": {},  # from the robust model
    },
    fresh={
        "D_R": longer, "D_NR": longer,
        "D_rand": {**longer, "lr": 0.02}, "D_det": {**longer, "lr": 0.5},
    },
    measured={"steps": 20},
)  # fmt: skip

# Two models, datasets and controls made from them, a fresh model on each, all measured on the
# original test images; each claim of the paper with paired differences and a verdict.
found = study.run(
    network, train, test, eps=0.5, norm="l2", at=[0.5], recipe=recipe, seed=options.seed,
    seeds=options.seeds, out=options.folder,
)  # fmt: skip
print(found.table("markdown"))
print(f"\n{found.claims_table()}\n")
print(f"{len(test)} test images, {time.perf_counter() - began:.0f} s")
print("\n".join(f"Note: {text}" for text in found.notes))
found.plot()
plt.savefig(options.out, dpi=110)
found.save_report(options.report)
print(f"figure: {options.out}, report: {options.report}")
