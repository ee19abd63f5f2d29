"""The paper in miniature, on scikit-learn's digits: real 8x8 images, no download.

    python examples/quickstart.py [--seed 0] [--out quickstart.png]

A scaled-down version of "Adversarial Examples Are Not Bugs, They Are Features" (Ilyas et al. 2019):
digits in place of CIFAR-10, a small CNN in place of ResNet-50. Measured results over several seeds,
and which of the paper's statements hold here, are in docs/results.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from torch.utils.data import Dataset, TensorDataset

import advfeat as af

parser = argparse.ArgumentParser(description="The paper in miniature, on digits")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", default="quickstart.png", help="where the figure goes")
parser.add_argument("--validate", action="store_true", help="test on 240 held out of 1437")
options = parser.parse_args()
seed, began = options.seed, time.perf_counter()

# Pixels in [0, 1]. Every choice below was made on held-out training images: two splits of 1197 and
# 240, one of them that of --validate. The test images are looked at once, at the end.
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(digits.target)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
images, labels = images[order], labels[order]
learn, judge = (
    (slice(1197), slice(1197, 1437)) if options.validate else (slice(1437), slice(1437, None))
)
train = TensorDataset(images[learn], labels[learn])
test = TensorDataset(images[judge], labels[judge])

EPS = 0.5  # robust accuracy is measured in this l2 ball
TRAINING_EPS = 1.0  # the robust model learns in this one
TARGETED_EPS = 1.0  # D_det and D_rand move within this one
BATCH = 64


def network(number: int) -> nn.Module:
    """A small CNN with weights of its own."""
    torch.manual_seed(1000 * seed + number)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 16, 128, bias=False),
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


def one_cycle(lr: float, epochs: int) -> Callable[[Optimizer], LRScheduler]:
    return lambda optimizer: OneCycleLR(optimizer, lr, total_steps=epochs * -(-len(train) // BATCH))


# 1. A standard model, and one trained on adversarial examples.
standard = network(1)
af.fit(
    standard, train, epochs=15, batch_size=BATCH, schedule=one_cycle(0.1, 15),
    augment=shift_batch, seed=seed,
)  # fmt: skip
robust = network(2)
af.adversarial_fit(
    robust, train, eps=TRAINING_EPS, norm="l2", steps=3, step_size=TRAINING_EPS / 2, epochs=25,
    batch_size=BATCH, schedule=one_cycle(0.1, 25), augment=shift_each, seed=seed,
)  # fmt: skip

# 2. Five sets, made from these models and the training images. In the last four every image is
# within TARGETED_EPS of the original and labelled as the class it was moved towards.
d_r = af.construct_robust_dataset(robust, train, steps=50, step_size=0.1, seed=seed)
d_nr = af.construct_nonrobust_dataset(standard, train, steps=50, step_size=0.1, seed=seed)
d_det = af.construct_det_dataset(standard, train, eps=TARGETED_EPS, steps=20)
d_rand = af.construct_rand_dataset(standard, train, eps=TARGETED_EPS, steps=20, seed=seed)
control = af.construct_det_dataset(robust, train, eps=TARGETED_EPS, steps=20)

# 3. A fresh model on each set, trained in the standard way, and the table: on real test images
# with their true labels.
sets = {
    "D_R": (d_r, 0.1, shift_each, "robust features suffice for robustness"),
    "D_NR": (d_nr, 0.1, shift_each, "accurate without robust features"),
    "D_rand": (d_rand, 0.02, shift_batch, "non-robust features generalise"),
    "D_det": (d_det, 0.1, shift_batch, "... even against the robust ones"),
    "D_det control": (control, 0.1, shift_batch, "from the robust model: they do not"),
}
models = {"standard": standard, "robust": robust}
meaning = {"standard": "accurate, not robust", "robust": "adversarial training"}
for name, (dataset, lr, shift, says) in sets.items():
    models[name], meaning[name] = network(3), says
    af.fit(
        models[name], dataset, epochs=20, batch_size=BATCH, schedule=one_cycle(lr, 20),
        augment=shift, seed=seed,
    )  # fmt: skip

measured = {
    name: af.robust_accuracy(model, test, eps=EPS, norm="l2", steps=20)
    for name, model in models.items()
}
print(f"| trained on | accuracy | robust accuracy, l2 {EPS} | what it shows |")
print("|---|---|---|---|")
for name, result in measured.items():
    clean = f"{100 * result.standard:.1f}"
    print(f"| {name} | {clean} | {100 * result:.1f} | {meaning[name]} |")
print(f"\nseed {seed}, {len(test)} test images, {time.perf_counter() - began:.0f} s")

# 4. The figure: what was measured, and what the sets look like.
figure = plt.figure(figsize=(9.5, 7), layout="constrained")
panels = figure.subfigures(2, 1, squeeze=False, height_ratios=[1.1, 1])
axes = panels[0, 0].subplots()
places = torch.arange(len(measured)).numpy()
heights = [[100 * r.standard for r in measured.values()], [100 * r for r in measured.values()]]
axes.bar(places - 0.2, heights[0], 0.38, label="accuracy", color="#56B4E9", edgecolor="black")
axes.bar(
    places + 0.2, heights[1], 0.38, label=f"robust accuracy, l2 {EPS}", color="#D55E00",
    edgecolor="black", hatch="//",
)  # fmt: skip
for height, offset in zip(heights, (-0.2, 0.2), strict=True):
    for place, value in zip(places, height, strict=True):
        axes.text(place + offset, value + 1.5, f"{value:.0f}", ha="center", fontsize=9)
axes.axhline(10, color="black", linewidth=0.8, linestyle=":", label="chance")
axes.set_xticks(places, list(measured))
axes.set(ylim=(0, 118), ylabel="% of test images", xlabel="trained on")
axes.legend(ncols=3, loc="upper center", frameon=False)

columns: dict[str, Dataset[Any]] = {"original": train}
columns |= {name: entry[0] for name, entry in sets.items()}
grid = panels[1, 0].subplots(2, len(columns))
for column, (name, shown) in enumerate(columns.items()):
    for axis, row in zip(grid[:, column], (3, 4), strict=True):  # two training images
        picture, label = shown[row]
        axis.imshow(picture[0], cmap="gray", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[], xlabel=f"label {int(label)}")
    grid[0, column].set_title(name, fontsize=10)
figure.savefig(options.out, dpi=110)
print(f"figure: {options.out}")
