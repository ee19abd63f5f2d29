"""How near Square and FGSM come to the optimum on linear models, in plain and restricted balls.

OMP_NUM_THREADS=1 python tests/benchmarks/bench_linear.py [--queries 5000] [--only l2]

32 samples, each with normal weights of its own; the optimum is known in closed form. Prints the
mean fraction of it, and the smallest. About 6 minutes.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser
from collections.abc import Iterator
from typing import Any

import torch
from side_by_side import machine
from torch import Tensor, nn

from advfeat.attacks import FGSM, Square

COUNT = 32
RUNS = [
    ((12,), "l2", 0.2), ((12,), "l2", 1.0), ((12,), "l1", 0.4), ((12,), "l1", 4.0),
    ((3, 8, 8), "l2", 0.5), ((3, 8, 8), "l1", 4.0),
]  # fmt: skip


def uniform(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


class Linear(nn.Module):
    """Two classes, the first by a wide margin: the search never ends early."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        rise = (x.flatten(1) * weight.flatten(1)).sum(1)
        return torch.stack([torch.full_like(rise, 1e3), rise], 1)


def optimum(pull: Tensor, eps: Tensor, room: Tensor, norm: str) -> Tensor:
    """Largest growth of ``pull . delta`` with ||delta / eps|| <= 1 and 0 <= delta <= room."""
    if norm == "l1":
        order = (pull * eps).argsort(1, descending=True)
        pull, eps, room = (part.gather(1, order) for part in (pull, eps, room))
        costs = (room / eps).nan_to_num(0.0)  # of the radius; a masked feature has no room
        before = costs.cumsum(1) - costs
        moved = torch.minimum(room, (1 - before).clamp_min(0) * eps)
        return (pull * moved).sum(1)
    low, high = torch.zeros(len(pull), 1).double(), torch.full((len(pull), 1), 1e6).double()
    for _ in range(200):  # of the multiplier
        middle = (low + high) / 2
        moved = torch.minimum(middle * pull * eps**2, room)
        inside = (moved / eps).nan_to_num(0.0).norm(dim=1, keepdim=True) <= 1
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return (pull * torch.minimum(low * pull * eps**2, room)).sum(1)


def balls(shape: tuple[int, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    features, none = math.prod(shape), torch.zeros(shape, dtype=torch.bool)
    half = [
        torch.randperm(features, generator=torch.Generator().manual_seed(n)) < features // 2
        for n in range(COUNT)
    ]
    yield "plain", {}
    yield "mask: half, random", {"mask": torch.stack(half).view(COUNT, *shape)}
    first = none.clone()
    first[..., : shape[-1] // 2] = True
    yield "mask: first half", {"mask": first}
    if len(shape) == 3:
        channel = none.clone()
        channel[0] = True
        yield "mask: one channel", {"mask": channel}
    yield "eps by feature", {"scale": 0.5 + uniform(*shape, seed=5)}


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=5000)
    parser.add_argument("--only", choices=("l1", "l2"))
    options = parser.parse_args()
    print(machine())
    for shape, norm, radius in RUNS:
        if options.only not in (None, norm):
            continue
        generator = torch.Generator().manual_seed(2)
        weight = torch.randn(COUNT, math.prod(shape), generator=generator, dtype=torch.float64)
        x = uniform(COUNT, *shape, seed=1)
        for name, own in balls(shape):
            free = own.get("mask", torch.ones(shape)).double().expand_as(x).flatten(1)
            scale = own.get("scale", torch.ones(shape).double()).expand_as(x).flatten(1)
            room = torch.where(weight > 0, 1 - x.flatten(1), x.flatten(1)) * free
            best = optimum(weight.abs(), radius * scale * free, room, norm)
            eps = radius * own["scale"] if "scale" in own else radius
            ball: dict[str, Any] = {"eps": eps, "norm": norm, "mask": own.get("mask")}
            line = f"{'x'.join(map(str, shape)):6} {norm} {radius:<4} {name:19}"
            for attack in (Square(**ball, queries=options.queries, seed=0), FGSM(**ball)):
                labels = torch.zeros(COUNT, dtype=torch.int64)
                found = attack(Linear(), x, labels, extras={"weight": weight}) - x
                reached = (found.flatten(1) * weight).sum(1) / best
                line += f"  {type(attack).__name__} {reached.mean():.3f} (from {reached.min():.3f})"
            print(line, flush=True)


if __name__ == "__main__":
    main()
