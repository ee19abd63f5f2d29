"""The paper on CIFAR-10: models, D_R, D_NR, D_rand, D_det, a fresh model on each, and a report.

    python examples/cifar10.py --data cifar-10-batches-py --out runs/cifar10
    torchrun --nproc-per-node=8 examples/cifar10.py --budget paper --data DIR --out DIR

``--data`` is the folder ``cifar-10-batches-py``, or an .npz with x_train, y_train, x_test, y_test
(uint8, images N x 32 x 32 x 3). ``--budget small`` is scaled down to an hour or two of two CPU
cores: a small ResNet, half of the images, a tenth of the epochs; ``paper`` is a ResNet-18 and the
paper's own settings, for a GPU. Killed at any moment, the same command goes on. What it measured is
in docs/results.md.
"""

from __future__ import annotations

import argparse
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from advfeat import study
from advfeat.training import Options

parser = argparse.ArgumentParser(description="The paper on CIFAR-10")
parser.add_argument("--data", type=Path, required=True)
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--budget", choices=("small", "paper"), default="small")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
parser.add_argument("--stages", nargs="*", help="only these, and what they need")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--rows", type=int, help="use so many training and test images only")
parser.add_argument("--epochs", type=int, help="in place of every training's own")


def read(path: Path) -> dict[str, np.ndarray]:
    """Images N x 3 x 32 x 32 and labels, uint8 and int64, from the folder or the .npz."""
    if path.is_file():
        with np.load(path) as file:
            found = {name: file[name] for name in ("x_train", "y_train", "x_test", "y_test")}
        return {k: v.transpose(0, 3, 1, 2) if k[0] == "x" else v for k, v in found.items()}
    parts = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
    found = {}
    for part, names in parts.items():
        # The original files are pickles: read only what you downloaded from its authors.
        batches = [pickle.loads((path / name).read_bytes(), encoding="bytes") for name in names]
        found[f"x_{part}"] = np.concatenate([b[b"data"] for b in batches]).reshape(-1, 3, 32, 32)
        found[f"y_{part}"] = np.concatenate([b[b"labels"] for b in batches])
    return found


class Block(nn.Module):
    """Two convolutions and a way around them (He et al. 2016)."""

    def __init__(self, entering: int, leaving: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(entering, leaving, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(leaving)
        self.conv2 = nn.Conv2d(leaving, leaving, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(leaving)
        self.around = nn.Sequential()
        if stride != 1 or entering != leaving:
            self.around.append(nn.Conv2d(entering, leaving, 1, stride, bias=False))
            self.around.append(nn.BatchNorm2d(leaving))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(out)) + self.around(x))


class ResNet(nn.Module):
    """A ResNet for images in [0, 1]: the normalisation is inside, as advfeat wants it."""

    mean: Tensor
    std: Tensor

    def __init__(self, width: int, blocks: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4914, 0.4822, 0.4465]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.2470, 0.2435, 0.2616]).view(1, 3, 1, 1))
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        parts: list[nn.Module] = []
        entering = width
        for group, count in enumerate(blocks):
            for number in range(count):
                stride = 2 if group and not number else 1
                parts.append(Block(entering, width * 2**group, stride))
                entering = width * 2**group
        self.blocks = nn.Sequential(*parts)
        self.head = nn.Linear(entering, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.stem((x - self.mean) / self.std)).mean((2, 3)))
        return out


def small_resnet() -> nn.Module:
    return ResNet(32, (1, 1, 1))  # 0.3 M weights


def resnet18() -> nn.Module:
    return ResNet(64, (2, 2, 2, 2))  # 11 M weights


def recipe(options: argparse.Namespace) -> study.Recipe:
    chosen = study.Recipe.paper()
    if options.budget == "small":
        chosen = study.Recipe.short(eps=0.5, rows=16_000)
    if options.device.startswith("cuda"):
        chosen = replace(
            chosen,
            standard={**chosen.standard, "options": Options(compile=True)},
            sets={name: {**given, "compile": True} for name, given in chosen.sets.items()},
            measured={"compile": True},
        )
    return chosen if options.epochs is None else chosen.with_epochs(options.epochs)


def run(
    options: argparse.Namespace, stages: list[str] | None
) -> tuple[study.Study, TensorDataset, TensorDataset]:
    """The study, and training and test images, on the device from the beginning."""
    small, arrays = options.budget == "small", read(options.data)

    def part(name: str, count: int) -> TensorDataset:
        count = options.rows or count
        images = torch.tensor(arrays[f"x_{name}"][:count]).to(options.device).float() / 255
        labels = torch.tensor(arrays[f"y_{name}"][:count], dtype=torch.int64)
        return TensorDataset(images, labels.to(options.device))

    train = part("train", 25_000 if small else 50_000)
    test = part("test", 2_000 if small else 10_000)
    found = study.run(
        small_resnet if small else resnet18,
        train,
        test,
        eps=0.5,
        norm="l2",
        recipe=recipe(options),
        out=options.out,
        stages=stages,
        seed=options.seed,
        precision=options.precision,
        device=options.device,
        on_stage=lambda name, seconds: print(f"{name}: {seconds:.0f} s", flush=True),
    )
    return found, train, test


def main() -> None:
    options = parser.parse_args()
    if dist.is_torchelastic_launched():
        dist.init_process_group("nccl" if options.device.startswith("cuda") else "gloo")
        if options.device == "cuda":
            torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    found, _, _ = run(options, options.stages)
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"\n{found.table('markdown')}\n\nreport: {options.out / 'report.html'}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
