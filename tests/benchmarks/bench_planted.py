"""Verdicts on networks with planted masks, beside AutoAttack: is each low enough, or warned of?

python tests/benchmarks/bench_planted.py DIR [--images 40] [--eps 1.5] [--norm l2] [--seed 0]
    [--masks quantised ...] [--reference DIR]

DIR holds the third-party MNIST network of bench_masked.py, which each mask is put in front of,
behind or into; --reference is a checkout of github.com/fra31/auto-attack.
"""

from __future__ import annotations

import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from bench_masked import mnist, reference
from side_by_side import machine
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import advfeat as af
from advfeat.attacks import APGD, AutoAttack

Change: TypeAlias = Callable[[Tensor], Tensor]


class Around(nn.Module):
    """A network with a function before and one behind it."""

    def __init__(self, net: nn.Module, front: Change, back: Change) -> None:
        super().__init__()
        self.net, self.front, self.back = net, front, back

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.net(self.front(x)))


class Misleading(torch.autograd.Function):
    """The identity, with a backward pass that has nothing to do with it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        places = torch.arange(gradient.numel(), dtype=gradient.dtype)
        return torch.sin(12.9898 * places).view_as(gradient) * gradient.abs().mean()


class WinnersTakeAll(nn.Module):
    """The largest tenth of a layer's activations."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        least = flat.topk(max(1, flat.shape[1] // 10), 1).values[:, -1:]
        return torch.where(flat >= least, flat, 0.0).view_as(x)


class SideWay(nn.Module):
    """The network on detached inputs, and a thousandth of a linear layer with a gradient."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.linear = net, nn.Linear(784, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.detach()) + 1e-3 * self.linear(x.flatten(1))


def round_blocks(x: Tensor, step: float = 0.25, side: int = 4) -> Tensor:
    """Rounded cosine coefficients of small blocks, as in JPEG."""
    k = torch.arange(side).float()
    basis = torch.cos(torch.pi * (2 * k[None] + 1) * k[:, None] / (2 * side)) * (2 / side) ** 0.5
    basis[0] /= 2**0.5
    count, channels, height, width = x.shape
    blocks = x.view(count, channels, height // side, side, width // side, side)
    coefficients = basis @ blocks.permute(0, 1, 2, 4, 3, 5) @ basis.T
    blocks = basis.T @ (torch.round(coefficients / step) * step) @ basis
    return blocks.permute(0, 1, 2, 4, 3, 5).reshape(x.shape)


def open_corner(x: Tensor) -> Tensor:
    """Rounded but for one pixel, which has the only gradient."""
    is_open = torch.zeros_like(x)
    is_open[..., 0, 0] = 1
    return torch.round(8 * x) / 8 * (1 - is_open) + x * is_open


def medians(x: Tensor) -> Tensor:
    """The median of each 3 x 3 window."""
    windows = F.unfold(F.pad(x, (1, 1, 1, 1)), 3)
    return windows.view(len(x), 9, *x.shape[2:]).median(1, keepdim=True).values


FRONTS: dict[str, Change] = {
    "none": lambda x: x,
    "quantised": lambda x: torch.round(16 * x) / 16,
    "threshold": lambda x: (x > 0.5).float(),
    "JPEG blocks": round_blocks,
    "steep sigmoid": lambda x: torch.sigmoid(20 * (x - 0.5)),
    "medians": medians,
    "rounded but for a corner": open_corner,
    "high frequency": lambda x: x + 0.02 * torch.sin(500 * x),
    "misleading backward": Misleading.apply,
    "dropout": partial(F.dropout, p=0.1, training=True),
    "noise": lambda x: x + 0.1 * torch.randn_like(x),
}
BACKS: dict[str, Change] = {
    "saturated logits": lambda z: 1e4 * z,
    "distilled": lambda z: 40 * z,
    "softmax": lambda z: z.softmax(1),
}
MASKS = [*FRONTS, *BACKS, "winners-take-all", "side way"]


def masked(net: nn.Sequential, name: str) -> nn.Module:
    if name == "winners-take-all":
        layers = (WinnersTakeAll() if isinstance(layer, nn.ReLU) else layer for layer in net)
        return nn.Sequential(*layers).eval()
    if name == "side way":
        return SideWay(net).eval()
    front, back = FRONTS.get(name, FRONTS["none"]), BACKS.get(name, FRONTS["none"])
    return Around(net, front, back).eval()


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--eps", type=float, default=1.5)
    parser.add_argument("--norm", default="l2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=MASKS)
    parser.add_argument("--reference", type=Path)
    options = parser.parse_args()
    if options.reference:
        sys.path.append(str(options.reference))
    print(machine())
    net, whole = mnist(options.folder)
    data = TensorDataset(*(tensor[: options.images] for tensor in whole.tensors))
    ball = {"eps": options.eps, "norm": options.norm, "seed": options.seed}
    stages = AutoAttack(eps=options.eps, norm=options.norm, version="fast").attacks
    first_late = sum(isinstance(stage, APGD) for stage in stages)
    for name in options.masks:
        model = masked(net, name)
        expectation = 8 if name in ("dropout", "noise") else 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = af.robust_accuracy(model, data, expectation=expectation, **ball)
            late = found.correct | (found.broken_by >= first_late)
            last = found.broken_by[late]
            cells = [f"{100 * len(last) / found.total:.1f}", f"{100 * float(found):.1f}"]
            cells.append("; ".join(text.split(":")[0] for text in found.warnings) or "no")
            if options.reference:
                by_reference = reference(model, data, options.norm, options.eps, options.seed)
                cells.append(by_reference)
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
