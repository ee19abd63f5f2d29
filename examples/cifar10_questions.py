"""The questions of `advfeat.analysis` on the models of examples/cifar10.py.

    python examples/cifar10_questions.py --data DIR --out runs/cifar10 [--figures runs/figures]

Takes the standard and the robust model from that study's folder, and trains them there if they are
not; options as in examples/cifar10.py. Figure 3 and "just bugs" train six small networks four times
each. What it printed is in docs/results.md.
"""

from __future__ import annotations

import functools
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cifar10 import ResNet, parser, recipe, run
from torch import nn
from torch.utils.data import Dataset, Subset

import advfeat as af
from advfeat import analysis, study

EPS, IMAGES, FEW = 0.5, 1000, 128
ROWS, EPOCHS = 8000, 10  # of each training for figure 3


def conv(entering: int, leaving: int, size: int = 3, stride: int = 1) -> list[nn.Module]:
    filters = nn.Conv2d(entering, leaving, size, stride, size // 2, bias=False)
    return [filters, nn.BatchNorm2d(leaving), nn.ReLU()]


def plain(*parts: nn.Module, width: int) -> nn.Module:
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "ResNet": lambda: ResNet(24, (1, 1, 1)),
    "narrow ResNet": lambda: ResNet(8, (1, 1, 1)),
    "deep ResNet": lambda: ResNet(12, (2, 2, 2)),
    "VGG": lambda: plain(
        *conv(3, 24), nn.MaxPool2d(2), *conv(24, 48), *conv(48, 48), nn.MaxPool2d(2),
        *conv(48, 96), *conv(96, 96), width=96,
    ),
    "5x5 CNN": lambda: plain(*conv(3, 24, 5), nn.MaxPool2d(2), *conv(24, 64, 5, 2), width=64),
    "patches": lambda: plain(
        nn.Conv2d(3, 96, 4, 4), nn.ReLU(), *conv(96, 96), *conv(96, 96), width=96
    ),
}  # fmt: skip

parser.add_argument("--figures", type=Path, default=Path("runs/figures"))


def show_transfer(
    options: Namespace, found: study.Study, train: Dataset[Any], test: Dataset[Any], show: Any
) -> None:
    """Figure 3 over the architectures, with "just bugs" beside D_det."""
    few, judged = Subset(train, range(ROWS)), Subset(test, range(IMAGES))
    chosen = recipe(options)

    def fitted(name: str, data: Any, number: int, like: str) -> nn.Module:
        torch.manual_seed(1000 * options.seed + number)
        model = ARCHITECTURES[name]().to(options.device)
        settings = {**chosen.training(like), "epochs": EPOCHS, "precision": options.precision}
        af.fit(model, data, **settings, seed=options.seed, progress=False)
        return model

    trained, fresh = (
        {n: fitted(n, few, at + i, "standard") for i, n in enumerate(ARCHITECTURES)}
        for at in (10, 20)
    )
    ball = {"eps": 2 * EPS, "steps": 20, "precision": options.precision}
    makers = {
        "D_det": functools.partial(af.construct_det_dataset, **ball),
        "just bugs": functools.partial(analysis.just_bugs, others=list(fresh.values()), **ball),
    }
    points = {}
    for name, construct in makers.items():
        points[name] = analysis.transfer(
            found.model("standard"), trained, few, judged, construct=construct,
            learn=lambda architecture, made: fitted(architecture, made, 3, "D_det"),
        )  # fmt: skip
        print(f"\n{name}\n{points[name]}", flush=True)
    show("transfer", "", points["D_det"].plot(others={"just bugs": points["just bugs"]}))


def main() -> None:
    options = parser.parse_args()
    options.figures.mkdir(parents=True, exist_ok=True)
    found, train, test = run(options, ["train standard", "train robust"])
    both = {name: found.model(name) for name in ("standard", "robust")}
    images, few = Subset(test, range(IMAGES)), Subset(test, range(FEW))
    seed, began = options.seed, time.perf_counter()

    def show(name: str, result: object, drawn: Any) -> None:
        axes = drawn[0] if isinstance(drawn, tuple) else drawn
        axes.figure.savefig(options.figures / f"{name}.png", dpi=100)
        print(f"\n== {name} ({time.perf_counter() - began:.0f} s)\n{result}", flush=True)

    aligned = analysis.alignment(both, images, eps=EPS, seed=seed)
    show("alignment", aligned, aligned.pictures())
    filtered = analysis.filtered_accuracy(both, images, cutoffs=[0.0, 0.125, 0.25, 0.375, 0.5])
    show("filtered_accuracy", filtered, filtered.plot())
    where = analysis.spectrum(both, Subset(test, range(512)), eps=EPS, norm="l2")
    show("spectrum", where, where.plot())
    for name, model in both.items():
        useful = analysis.usefulness(
            model, few, units=range(32), eps=EPS, norm="l2", seed=seed
        )  # of the last layer but one
        show(f"usefulness_{name}", useful, useful.plot())
        layers = analysis.layer_robustness(
            model, few, layers=["stem", "blocks.0", "blocks.1", "blocks.2"], eps=EPS, norm="l2",
            seed=seed,
        )  # fmt: skip
        show(f"layers_{name}", layers, layers.plot())
        waves = analysis.fourier_sensitivity(model, few, size=4.0, seed=seed)
        show(f"fourier_{name}", waves, waves.plot())
    show_transfer(options, found, train, test, show)


if __name__ == "__main__":
    main()
