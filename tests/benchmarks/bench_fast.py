"""What `fast` is composed from: how likely runs of APGD are to miss what another run finds.

OMP_NUM_THREADS=1 python tests/benchmarks/bench_fast.py [cifar10.npz --cache DIR] [--starts 16]

On the rows near the border (they resist a short APGD and not the 1.08-fold ball) each run is
repeated from many starts. Starts are independent, so the probability that a row resists a
composition is the product over its runs; summed over the rows that some run can break, it is
the number of rows that the composition is expected to miss. The models are none of those that
bench_strength.py and bench_kinds.py report: other networks, on the same digits, and of CIFAR-10
400 training images that the robust model has not seen.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from bench_kinds import deep_cnn, lessons
from bench_strength import DIGITS, digits, own_models
from cifar import read, robust_model
from side_by_side import machine
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import advfeat as af
from advfeat.attacks import APGD, FAB, AutoAttack


class Run(NamedTuple):
    """A run of APGD, of so many steps towards each of so many classes, or away from the label."""

    loss: str
    steps: int
    targets: int = 0


def attack(run: Run, norm: str, eps: float, starts: int = 1) -> APGD:
    return APGD(eps=eps, norm=norm, **run._asdict(), restarts=starts, returns="first")


def fast(norm: str) -> dict[Run, int]:
    """What is in the library: its runs of APGD."""
    stages = AutoAttack(eps=0.1, norm=norm, version="fast").attacks
    runs = [stage for stage in stages if isinstance(stage, APGD)]
    return {Run(str(run.loss), run.steps, run.targets): run.restarts for run in runs}


CE, DLR, MARGIN = "cross_entropy", "dlr", "margin"
# Runs with the number of their starts.
COMPOSED = {
    "fast": fast("linf"),
    "4 classes": {Run(CE, 20): 1, Run(DLR, 25, 4): 1, Run(MARGIN, 25): 4, Run(DLR, 25): 2},
    "4 classes, longer": {Run(CE, 20): 1, Run(DLR, 25, 4): 1, Run(MARGIN, 50): 3},
    "9 classes": {Run(CE, 20): 1, Run(DLR, 25, 9): 1},
    "9 classes, 4 starts": {Run(CE, 20): 1, Run(DLR, 25, 9): 4},
}
IN_L1 = {
    "fast": fast("l1"),
    "until 2026-11-29": {
        Run(CE, 30): 1,
        Run(DLR, 30, 9): 3,
        Run(MARGIN, 30): 8,
        Run(DLR, 30): 4,
    },
    "shorter towards classes": {
        Run(CE, 30): 1,
        Run(DLR, 15, 9): 4,
        Run(MARGIN, 30): 8,
        Run(DLR, 30): 2,
    },
    "5 classes, 4 starts": {Run(CE, 30): 1, Run(DLR, 50, 5): 4},
    "APGD of standard": {Run(CE, 100): 5, Run(DLR, 100, 5): 1},
}
# Behind the last two there was and is FAB; here it is run once, for what it alone can break.


def digits_models(seed: int) -> Iterator[tuple[str, nn.Module, TensorDataset, str, float]]:
    """bench_strength.py's four, of another seed, and networks trained against larger balls."""
    models, test = own_models(seed)
    for model in models.values():
        for norm, eps in DIGITS.items():
            yield "digits", model, test, norm, eps
    train, _ = digits()
    for lesson in lessons().values():
        model = deep_cnn(seed)
        af.adversarial_fit(model, train, seed=seed, **lesson)
        yield "digits, twice the radius", model.eval(), test, lesson["norm"], lesson["eps"]


def near_the_border(
    model: nn.Module, data: TensorDataset, norm: str, eps: float, precision: str
) -> tuple[Tensor, Tensor]:
    """Samples that resist a short APGD and are fooled in the 1.08-fold ball."""

    def resists(radius: float, rows: TensorDataset, *runs: dict) -> Tensor:
        attacks = [APGD(eps=radius, norm=norm, returns="first", **run) for run in runs]
        return af.robust_accuracy(
            model, rows, attack=attacks, seed=99, precision=precision, progress=False
        ).correct

    kept = resists(eps, data, {"steps": 20})
    x, y = (field[kept] for field in data.tensors)
    wider = {"steps": 40, "loss": MARGIN, "restarts": 3}, {"steps": 40, "loss": DLR, "targets": 9}
    sure = resists(1.08 * eps, TensorDataset(x, y), *wider)
    return x[~sure], y[~sure]


def missed(
    model: nn.Module, data: TensorDataset, norm: str, eps: float, starts: int, precision: str
) -> dict[str, float]:
    """The number of rows that each composition is expected to miss."""
    compositions = IN_L1 if norm == "l1" else COMPOSED
    x, y = near_the_border(model, data, norm, eps, precision)
    if not len(x):
        return dict.fromkeys(compositions, 0.0)
    kept = {"seed": 0, "precision": precision, "progress": False}
    many = TensorDataset(*(field.repeat_interleave(starts, 0) for field in (x, y)))
    resists = {}
    for run in {run for composition in compositions.values() for run in composition}:
        found = af.robust_accuracy(
            model, many, attack=attack(run, norm, eps), batch_size=256, **kept
        )
        resists[run] = found.correct.view(len(x), starts).double().mean(1)
    fab = FAB(eps=eps, norm=norm, targets=9, steps=30).stop_at_success()
    by_fab = af.robust_accuracy(model, TensorDataset(x, y), attack=fab, **kept).correct
    can_be_broken = torch.stack([*resists.values(), by_fab.double()]).amin(0) < 1
    return {
        name: float(
            torch.stack([resists[run] ** count for run, count in composition.items()])
            .prod(0)[can_be_broken].sum()
        )
        for name, composition in compositions.items()
    }  # fmt: skip


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", type=Path, help="cifar10.npz")
    parser.add_argument("--cache", type=Path, help="folder for the trained robust ResNet")
    parser.add_argument("--starts", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 20], help="of the models")
    options = parser.parse_args()
    print(machine())
    sums: dict[tuple[str, bool], list[dict[str, float]]] = {}

    def add(kind: str, *case: object, precision: str = "float32") -> None:
        found = missed(*case, options.starts, precision)
        sums.setdefault((kind, case[2] == "l1"), []).append(found)
        print(kind, *case[2:], {name: round(rows, 2) for name, rows in found.items()}, flush=True)

    for seed in options.seeds:
        for kind, *case in digits_models(seed):
            add(kind, *case)
    if options.data:
        x, y = (field[20000:] for field in read(options.data, "train", 20400))
        model = robust_model(options.data, options.cache)
        for norm, eps in (("linf", 8 / 255), ("l2", 0.5), ("l2", 1.0)):
            add("CIFAR-10", model, TensorDataset(x, y), norm, eps, precision="bfloat16")
    for (kind, sparse), cases in sums.items():
        print(f"\n{kind}, {'l1' if sparse else 'linf and l2'}: mean of {len(cases)}")
        norm = "l1" if sparse else "linf"
        for name, composition in (IN_L1 if sparse else COMPOSED).items():
            cost = sum(
                attack(run, norm, 0.1, starts).max_evaluations
                for run, starts in composition.items()
            )
            mean = sum(case[name] for case in cases) / len(cases)
            print(f"| {name} | {cost} | {mean:.2f} |")


if __name__ == "__main__":
    main()
