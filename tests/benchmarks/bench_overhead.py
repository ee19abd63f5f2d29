"""What an attack costs beside the model: on a linear model, beside adv-lib's same attack.

python tests/benchmarks/bench_overhead.py

Needs adv-lib (docs/contributing.md). A linear model costs next to nothing, so that the ratio is
that of the attacks' own work. Ours projects onto ball and bounds together exactly; adv-lib's l2
does not.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from side_by_side import machine, side_by_side, without_torchvision
from torch import nn

import advfeat as af
from advfeat.attacks import apgd, fab, fmn

EPS = {"l1": 12.0, "l2": 0.5, "linf": 8 / 255}
ORDER = {"l1": 1, "l2": 2, "linf": float("inf")}
SHAPES = [(16, 1, 28, 28), (128, 3, 32, 32)]


def pairs(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor
) -> dict[str, tuple[Callable, Callable]]:
    """Ours and adv-lib's of each attack, of the same number of steps."""
    without_torchvision()
    from adv_lib.attacks import fab as peer_fab
    from adv_lib.attacks import fmn as peer_fmn
    from adv_lib.attacks import pgd_linf
    from adv_lib.attacks.auto_pgd import apgd as peer_apgd

    found = {
        "pgd linf": (
            lambda: af.pgd(model, x, y, eps=EPS["linf"], norm="linf", steps=40, random_start=True,
                           returns="best", seed=0),
            lambda: pgd_linf(model, x, y, EPS["linf"], steps=40),
        )
    }  # fmt: skip
    for norm, eps in EPS.items():
        found[f"apgd {norm}"] = (
            lambda norm=norm, eps=eps: apgd(model, x, y, eps=eps, norm=norm, steps=100, seed=0),
            lambda norm=norm, eps=eps: peer_apgd(
                model, x, y, eps, ORDER[norm], loss_function="ce", use_large_reps=norm == "l1"
            ),
        )
    for norm in EPS:
        found[f"fab {norm}"] = (
            lambda norm=norm: fab(model, x, y, norm=norm, steps=20, targets=1),
            lambda norm=norm: peer_fab(
                model, x, y, ORDER[norm], 20, restarts=1, targeted_restarts=True
            ),
        )
        found[f"fmn {norm}"] = (
            lambda norm=norm: fmn(model, x, y, norm=norm, steps=40),
            lambda norm=norm: peer_fmn(model, x, y, ORDER[norm], steps=40),
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--attacks", nargs="*", help="only these, such as 'apgd l2'")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    for shape in SHAPES:
        torch.manual_seed(0)
        x = torch.rand(shape)
        model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 10)).eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        y = model(x).argmax(1)
        print(f"\n{'x'.join(map(str, shape))}\n| attack | seconds / adv-lib's |\n|---|---|")
        for name, (ours, theirs) in pairs(model, x, y).items():
            if options.attacks and name not in options.attacks:
                continue
            cases = {"ours": ours, "theirs": theirs}
            seconds = side_by_side(cases, options.rounds, clock=time.process_time)
            print(f"| {name} | {seconds['ours'] / seconds['theirs']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
