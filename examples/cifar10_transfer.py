"""Figure 3 of the paper on CIFAR-10: learning from D_det against being fooled by transfer.

    python examples/cifar10_transfer.py --data DIR --out runs/cifar10 [--trainings 2] [--bugs]

The architecture of examples/cifar10.py and nine small ones of other kinds. Each is trained on the
original images and on D_det with the settings that the study has for D_det, but for fewer epochs on
the original images. The standard model, D_det and the model trained on it come from the study's
folder, and are made there if they are missing; options as in examples/cifar10.py. After an
interruption the same command resumes. What it printed is in docs/results.md.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cifar10 import BUDGETS, Block, parser, recipe, run
from torch import Tensor, nn
from torch.utils.data import Subset

import advfeat as af
from advfeat import analysis, datasets
from advfeat.metrics import Accuracy

EPOCHS = 10  # on the original images; on D_det as many as in the study
SOURCE = "as the source"  # the architecture of the study
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Residual(nn.Sequential):
    """Layers with a connection past them."""

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = input + super().forward(input)  # type: ignore[no-untyped-call]
        return out


class Branches(nn.Module):
    """Layers on the same input, with their outputs concatenated."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class TokenMixing(nn.Module):
    """Two linear layers over the positions of each channel."""

    def __init__(self, side: int) -> None:
        super().__init__()
        count = side * side
        self.layers = nn.Sequential(nn.Linear(count, count), nn.ReLU(), nn.Linear(count, count))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x.flatten(2))
        return out.view_as(x)


def conv(entering: int, leaving: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Module:
    filters = nn.Conv2d(entering, leaving, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(filters, nn.BatchNorm2d(leaving), nn.ReLU())


def patches(width: int) -> nn.Module:
    """Patches of 4 x 4 pixels: 8 x 8 positions."""
    filters = nn.Conv2d(3, width, 4, 4, bias=False)
    return nn.Sequential(filters, nn.BatchNorm2d(width), nn.ReLU())


def classifier(*parts: nn.Module, width: int) -> nn.Module:
    layers = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
    return af.Normalize(layers, MEAN, STD)


def resnet() -> nn.Module:
    blocks = Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2)
    return classifier(conv(3, 16, stride=2), *blocks, width=64)


def vgg() -> nn.Module:
    return classifier(
        conv(3, 16, stride=2), conv(16, 32), nn.MaxPool2d(2), conv(32, 64), conv(64, 64),
        nn.MaxPool2d(2), conv(64, 128), conv(128, 128), width=128,
    )  # fmt: skip


def lenet() -> nn.Module:
    layers = nn.Sequential(
        conv(3, 24, 5, 2), nn.MaxPool2d(2), conv(24, 64, 5), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip
    return af.Normalize(layers, MEAN, STD)


def large_kernels() -> nn.Module:
    return classifier(conv(3, 48, 11, 4), conv(48, 96, 7, 2), width=96)


def inception() -> nn.Module:
    def module(entering: int, width: int) -> nn.Module:  # returns 4 times the width
        return Branches(
            conv(entering, width, 1),
            nn.Sequential(conv(entering, width, 1), conv(width, width)),
            nn.Sequential(conv(entering, width, 1), conv(width, width, 5)),
            nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(entering, width, 1)),
        )

    return classifier(
        conv(3, 32, stride=2), nn.MaxPool2d(2), module(32, 16), module(64, 24), nn.MaxPool2d(2),
        module(96, 32), width=128,
    )  # fmt: skip


def mobilenet() -> nn.Module:
    def module(entering: int, leaving: int, stride: int) -> nn.Module:
        wide = 3 * entering
        parts = conv(entering, wide, 1), conv(wide, wide, 3, stride, wide)
        narrow = nn.Conv2d(wide, leaving, 1, bias=False), nn.BatchNorm2d(leaving)
        kind = Residual if entering == leaving else nn.Sequential
        return kind(*parts, *narrow)

    return classifier(
        conv(3, 16, stride=2), module(16, 32, 2), module(32, 32, 1), module(32, 64, 2),
        module(64, 64, 1), conv(64, 128, 1), width=128,
    )  # fmt: skip


def conv_mixer(width: int = 64, depth: int = 3) -> nn.Module:
    parts = [
        nn.Sequential(Residual(conv(width, width, 5, groups=width)), conv(width, width, 1))
        for _ in range(depth)
    ]
    return classifier(patches(width), *parts, width=width)


def mlp_mixer(width: int = 64, depth: int = 2) -> nn.Module:
    parts = [
        nn.Sequential(
            Residual(nn.BatchNorm2d(width), TokenMixing(8)),
            Residual(nn.BatchNorm2d(width), conv(width, width, 1), nn.Conv2d(width, width, 1)),
        )
        for _ in range(depth)
    ]
    return classifier(patches(width), *parts, width=width)


def bag_of_patches() -> nn.Module:
    """Each position sees 8 x 8 pixels at most."""
    return classifier(patches(96), nn.Conv2d(96, 96, 2), conv(96, 192, 1), width=192)


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "ResNet": resnet,
    "VGG": vgg,
    "LeNet": lenet,
    "large kernels": large_kernels,
    "ConvMixer": conv_mixer,
    "MLP-Mixer": mlp_mixer,
    "MobileNet": mobilenet,
    "bag of patches": bag_of_patches,
    "Inception": inception,
}

parser.add_argument("--figures", type=Path, default=Path("runs/figures"))
parser.add_argument(
    "--trainings", type=int, default=1, help="on D_det, for each architecture, default 1"
)
parser.add_argument("--bugs", action="store_true", help='"just bugs" too: twice as many trainings')


def percent(found: Accuracy) -> str:
    low, high = found.interval
    return f"{100 * found:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def table(results: list[analysis.Transfer], models: dict[str, nn.Module]) -> str:
    """All architectures, with 95% intervals over the test images."""
    seeds = "".join(f" learned, training {number + 1} |" for number in range(len(results)))
    lines = [f"| architecture | weights | accuracy |{seeds} transfer | of images |"]
    lines.append("|---" * (5 + len(results)) + "|")
    for points in zip(*(result.points for result in results), strict=True):
        first = points[0]
        weights = sum(p.numel() for p in models[first.name].parameters())
        learned = " | ".join(percent(point.learned) for point in points)
        lines.append(
            f"| {first.name} | {weights:,} | {100 * (1 - first.clean_error):.1f} | {learned} "
            f"| {percent(first.fooled)} | {first.fooled.total} |"
        )
    return "\n".join(lines)


def averaged(results: list[analysis.Transfer]) -> analysis.Transfer:
    """The mean over the trainings on D_det, as one point for each architecture."""
    points = []
    for alike in zip(*(result.points for result in results), strict=True):
        outcomes = torch.cat([point.learned.correct for point in alike])
        points.append(replace(alike[0], learned=Accuracy.of(outcomes)))
    return analysis.Transfer(tuple(points))


def main() -> None:
    options = parser.parse_args()
    options.figures.mkdir(parents=True, exist_ok=True)
    found, train, test = run(options, ["train standard", "train on D_det"])
    source, d_det = found.model("standard"), found.dataset("D_det")
    original = Subset(train, range(len(d_det)))
    architectures = {SOURCE: BUDGETS[options.budget].network, **ARCHITECTURES}
    chosen, precision = recipe(options), options.precision
    on_d_det = {**chosen.training("D_det"), "precision": precision}
    on_original = {**on_d_det, "epochs": min(EPOCHS, on_d_det["epochs"])}
    ball: dict[str, Any] = {"norm": "l2", "precision": precision, **chosen.construction("D_det")}

    def fitted(name: str, data: Any, kind: str, number: int) -> nn.Module:
        torch.manual_seed(1000 * options.seed + number)
        model = architectures[name]().to(options.device)
        folder = options.out / "transfer" / f"{name}, {kind}, {number}"
        settings = on_original if data is original else on_d_det
        began = time.perf_counter()
        history = af.fit(
            model, data, **settings, seed=number, checkpoint=folder, progress=False
        )  # fmt: skip
        accuracy, seconds = history.rows[-1]["accuracy"], time.perf_counter() - began
        print(f"{name}, {kind}: training accuracy {accuracy:.1%}, {seconds:.0f} s", flush=True)
        return model

    def compared(construct: Any, kind: str, number: int) -> analysis.Transfer:
        def learn(name: str, data: Any) -> nn.Module:
            if name == SOURCE and data is d_det and number == 10:
                return found.model("D_det")
            return fitted(name, data, kind, number)

        return analysis.transfer(
            source, trained, original, test, construct=construct, learn=learn, progress=False
        )

    trained = {name: fitted(name, original, "original", 0) for name in architectures}
    attacked = af.construct_det_dataset(source, test, **ball)

    def det(_: nn.Module, data: Any) -> datasets.ConstructedDataset:
        return d_det if data is original else attacked

    results = [compared(det, "D_det", 10 + number) for number in range(options.trainings)]
    figure, others = averaged(results), {}
    print(f"\n{table(results, trained)}\n\n{figure}")
    print(
        f"without the architecture of the source: {analysis.Transfer(figure.points[1:])!r}",
        flush=True,
    )
    if options.bugs:
        fresh = [fitted(name, original, "original", 1) for name in architectures]
        bugs = functools.partial(analysis.just_bugs, others=fresh, **ball)
        others = {"just bugs": compared(bugs, "just bugs", 10)}
        print(f"\njust bugs\n{others['just bugs']}", flush=True)
    drawn: Any = figure.plot(others=others).figure
    drawn.savefig(options.figures / "transfer_cifar10.png", dpi=100, bbox_inches="tight")


if __name__ == "__main__":
    main()
