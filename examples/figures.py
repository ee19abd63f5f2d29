"""Every question of `advfeat.analysis` on scikit-learn's digits, with a figure of each kind.

    python examples/figures.py [--seed 0] [--out docs/figures]

Digits and small networks stand for CIFAR-10 and ResNet-50. What it printed is in docs/results.md.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

import advfeat as af
from advfeat import analysis, plots
from advfeat.attacks import fmn

parser = argparse.ArgumentParser(description="The questions of the paper, on digits")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", default="docs/figures", help="folder for the figures")
parser.add_argument("--validate", action="store_true", help="test on 240 held out of 1437")
options = parser.parse_args()
seed, out, began = options.seed, Path(options.out), time.perf_counter()
out.mkdir(parents=True, exist_ok=True)

# Split and radii of examples/quickstart.py; its network ("CNN") as it was before 2026-11-28.
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
MOVED = 1.0  # robust training, D_det and D_rand move within this one
attack = af.PGD(eps=EPS, norm="l2", steps=20)


def conv(inputs: int, outputs: int, stride: int = 1, size: int = 3) -> list[nn.Module]:
    filters = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return [filters, nn.BatchNorm2d(outputs), nn.ReLU()]


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*conv(width, width), *conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.body(x)
        return x + added


def head(inputs: int, hidden: int) -> list[nn.Module]:
    return [nn.Flatten(), nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 10)]


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "CNN": lambda: nn.Sequential(
        *conv(1, 32), *conv(32, 64), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(1024, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10),
    ),
    "narrow CNN": lambda: nn.Sequential(*conv(1, 8), *conv(8, 16, 2), *head(256, 32)),
    "5x5 CNN": lambda: nn.Sequential(*conv(1, 32, 1, 5), *conv(32, 48, 2, 5), *head(768, 64)),
    "residual": lambda: nn.Sequential(
        *conv(1, 32), Residual(32), *conv(32, 64, 2), Residual(64),
        nn.AvgPool2d(4), nn.Flatten(), nn.Linear(64, 10),
    ),
    "pooling CNN": lambda: nn.Sequential(
        *conv(1, 32), nn.MaxPool2d(2), *conv(32, 64), nn.MaxPool2d(2), *head(256, 64)
    ),
    "MLP": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(),
        nn.Linear(256, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 10),
    ),
}  # fmt: skip


def network(name: str, number: int) -> nn.Module:
    """A network with weights of its own."""
    torch.manual_seed(1000 * seed + number)
    return ARCHITECTURES[name]()


def shifted(x: Tensor) -> Tensor:
    """Move every image by at most a pixel, each its own way."""
    padded, eight = nn.functional.pad(x, (1, 1, 1, 1)), torch.arange(8)
    dy, dx = torch.randint(0, 3, (2, len(x), 1))
    rows = torch.arange(len(x))[:, None, None]
    return padded[rows, 0, (dy + eight)[:, :, None], (dx + eight)[:, None, :]][:, None]


def recipe(epochs: int) -> dict[str, Any]:
    """The options of every training here: one cycle of the rate, batches of 64, small shifts."""
    return {
        "epochs": epochs, "batch_size": 64, "lr": 0.1, "schedule": "one_cycle",
        "augment": shifted, "seed": seed, "progress": False,
    }  # fmt: skip


def fitted(name: str, data: Any, number: int, epochs: int = 20) -> nn.Module:
    model = network(name, number)
    af.fit(model, data, **recipe(epochs))
    return model


def robustly_fitted(data: Any, eps: float, number: int, epochs: int = 25) -> nn.Module:
    if eps == 0:
        return fitted("CNN", data, number)
    model = network("CNN", number)
    af.adversarial_fit(
        model, data, eps=eps, norm="l2", steps=3, step_size=eps / 2, **recipe(epochs)
    )
    return model


def pair(file: str, quantity: str, results: dict[str, Any]) -> None:
    """Results of the standard and of the robust model, on shared axes and colours."""
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    ends = []
    for axes, (name, result) in zip(panels, results.items(), strict=True):
        result.plot(axes)
        ends.append(axes.get_ylim())
        axes.set_title(f"{name} model: {quantity}", fontsize=11)
        axes.label_outer()
    if not panels[0].images:
        panels[0].set_ylim(min(low for low, _ in ends), max(high for _, high in ends))
    maps = [image for axes in panels for image in axes.images]
    for image in maps:
        image.set_clim(0, max(each.get_clim()[1] for each in maps))
    print("\n".join(f"{name}\n{result}" for name, result in results.items()))
    figure.savefig(out / file, dpi=200)


def show(name: str, result: object, drawn: Any) -> None:
    """Print a result and keep its figure, whose axes or whole were drawn."""
    axes = drawn[0] if isinstance(drawn, tuple) else drawn
    axes.figure.savefig(out / f"{name}.png", dpi=100)
    print(f"\n== {name} ({time.perf_counter() - began:.0f} s)\n{result}", flush=True)


# Section 4: the Gaussian model; figure 4 of the paper.
found = analysis.gaussian([1.0, 0.6], [[2.0, 0.9], [0.9, 0.6]])
show("gaussian", found, found.plot())

# The models. Curves of a training, on images held out of the training set.
held_out = Subset(train, range(200))
standard, robust = network("CNN", 1), network("CNN", 2)
history = af.adversarial_fit(
    robust, Subset(train, range(200, len(train))), eps=MOVED, norm="l2", steps=3,
    step_size=MOVED / 2, validation=held_out, **recipe(25),
)  # fmt: skip
show("curves", history.rows[-1], plots.curves(history))
standard, robust = fitted("CNN", train, 1), robustly_fitted(train, MOVED, 2)
both = {"standard": standard, "robust": robust}

# Sections 2 and 3: what is robust, and what a model learns from the constructed sets.
few = Subset(test, range(200))
# Before the last ReLU: behind it a unit that is 0 has no gradient, and looks robust.
useful = {
    name: analysis.usefulness(model, few, layer="9", units=range(64), eps=EPS, norm="l2", seed=seed)
    for name, model in both.items()
}
pair("usefulness.png", f"useful and robustly useful units, l2 {EPS}", useful)

d_r = af.construct_robust_dataset(robust, train, steps=100, seed=seed, progress=False)
det = functools.partial(af.construct_det_dataset, eps=MOVED, steps=20, progress=False)
d_det = det(standard, train)
d_rand = af.construct_rand_dataset(standard, train, eps=MOVED, steps=20, seed=seed, progress=False)
learners = {
    "D": standard, "D, adversarial": robust, "D_R": fitted("CNN", d_r, 3),
    "D_rand": fitted("CNN", d_rand, 3), "D_det": fitted("CNN", d_det, 3),
}  # fmt: skip
accuracies = {
    name: af.robust_accuracy(model, test, attack=attack) for name, model in learners.items()
}
figure = plots.bars(
    {n: {"accuracy": a.standard, f"robust accuracy, l2 {EPS}": a} for n, a in accuracies.items()},
    chance=0.1, ylabel="% of test images",
)  # fmt: skip
lines = [f"{name}: {a.standard:.1%}, {a:.1%} robust" for name, a in accuracies.items()]
show("bars", "\n".join(lines), figure)

rows = torch.arange(8)
figure = plots.differences(
    images[learn][rows], d_det.images[rows],
    labels={"source": labels[learn][rows].tolist(), "result": d_det.labels[rows].tolist()},
)  # fmt: skip
show("samples", "D_det", figure)

x, y = test.tensors
distances = {}
for name in ("D", "D, adversarial", "D_R"):
    nearest = fmn(learners[name], x, y, norm="l2")
    size = (nearest - x).flatten(1).norm(dim=1)
    resists = af.accuracy(learners[name], TensorDataset(nearest, y)).correct
    distances[name] = torch.where(resists, torch.inf, size)
lines = [f"{name}: median {float(d.median()):.3f}" for name, d in distances.items()]
figure = plots.robustness_curves(distances, norm="l2", largest=1.6)
show("robustness_curves", "\n".join(lines), figure)

# The discussion. Leakage (Goh).
# In the smaller ball, where digits have linear features that are robust for certain.
for name, made in (
    ("D_rand", af.construct_rand_dataset(standard, train, eps=EPS, steps=20, seed=seed)),
    ("D_det", det(standard, train, eps=EPS)),
):
    leaked = analysis.leakage(made, train, test, eps=EPS, seed=seed)
    show(f"leakage_{name}", leaked, leaked.plot())

# Transfer (figure 3) and "just bugs" (Nakkiran): fresh networks of all kinds keep them from moving.
trained = {name: fitted(name, train, 10 + i) for i, name in enumerate(ARCHITECTURES)}
fresh = [fitted(name, train, 20 + i) for i, name in enumerate(ARCHITECTURES)]
source, others = standard, {}
bugs = functools.partial(analysis.just_bugs, others=fresh, eps=MOVED, steps=20, progress=False)
for name, construct in (("D_det", det), ("just bugs", bugs)):
    others[name] = analysis.transfer(
        source, trained, train, test, construct=construct,
        learn=lambda name, data: fitted(name, data, 3),
    )  # fmt: skip
    print(f"\n{name}\n{others[name]}")
show("transfer", "", others["D_det"].plot(others={"just bugs": others["just bugs"]}))

# The trade-off, and what D_R costs.
traded = analysis.tradeoff(
    lambda eps: robustly_fitted(train, eps, 4), test, eps=[0.0, 0.25, 0.5, 1.0, 1.5], attack=attack
)
show("tradeoff", traded, traded.plot())
cost = analysis.robust_dataset_cost(
    train, test, fit_standard=lambda data: fitted("CNN", data, 5),
    fit_adversarial=lambda data: robustly_fitted(data, MOVED, 5), attack=attack,
    construct=functools.partial(
        af.construct_robust_dataset, steps=100, seed=seed, progress=False
    ),
)  # fmt: skip
show("robust_dataset_cost", cost, cost.plot())

# Where perturbations live.
spectrum = analysis.spectrum(both, test, eps=EPS, norm="l2")
show("spectrum", spectrum, spectrum.plot())
filtered = analysis.filtered_accuracy(both, test, cutoffs=[0.0, 0.125, 0.25, 0.375, 0.5, 0.625])
show("filtered_accuracy", filtered, filtered.plot())
waves = {n: analysis.fourier_sensitivity(m, test, size=2.0, seed=seed) for n, m in both.items()}
pair("fourier.png", "error (%) under each wave", waves)

# Gradients that mean something, and where layers give way.
aligned = analysis.alignment(both, test, eps=EPS, seed=seed)
show("alignment", aligned, aligned.pictures())
layers = {
    name: analysis.layer_robustness(
        model, few, layers=["2", "5", "10", "11"], eps=EPS, norm="l2", seed=seed
    )
    for name, model in both.items()
}
pair("layers.png", f"R(g) by layer, l2 {EPS}", layers)

# Learning from mistakes alone (Wallace): a network that was stopped early, and its errors.
hasty = network("CNN", 6)
af.fit(hasty, train, epochs=1, lr=0.01, batch_size=64, seed=seed, progress=False)
lesson = analysis.mislabelled(hasty, train, test, learn=lambda data: fitted("CNN", data, 7))
show("mislabelled", lesson, lesson.plot())
