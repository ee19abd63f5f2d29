"""Cost of a PGD step against a bare forward pass plus input gradient of the same model.

python tests/benchmarks/bench_step.py
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from resnet import SmallResNet
from side_by_side import machine, side_by_side, table

import advfeat as af

STEPS = 4


def main() -> None:
    torch.manual_seed(0)
    model = SmallResNet().eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    x, y = torch.rand(128, 3, 32, 32), torch.randint(0, 10, (128,))

    def bare() -> None:
        for _ in range(STEPS):
            leaf = x.detach().requires_grad_()
            loss = F.cross_entropy(model(leaf), y, reduction="sum")
            torch.autograd.grad(loss, leaf)

    def ours(norm: str, eps: float, precision: str = "float32") -> None:
        af.pgd(model, x, y, eps=eps, norm=norm, steps=STEPS, precision=precision)

    warnings.simplefilter("ignore")  # where the processor has no bfloat16, precision says so
    seconds = side_by_side(
        {
            "bare float32 forward + input gradient": bare,
            "pgd linf, float32": lambda: ours("linf", 8 / 255),
            "pgd l2, float32": lambda: ours("l2", 0.5),
            "pgd l1, float32": lambda: ours("l1", 12.0),
            "pgd linf, precision='bfloat16'": lambda: ours("linf", 8 / 255, "bfloat16"),
        },
        rounds=9,
    )
    print(machine())
    print(table(seconds, "bare float32 forward + input gradient"))


if __name__ == "__main__":
    main()
