"""How often each statistic reports an effect in data that have none.

OMP_NUM_THREADS=1 python tests/benchmarks/bench_null.py [--draws 200]

Labels are independent of inputs, so nothing is useful, above chance or different from a control. A
rate of 5% is expected at the most; of 200 draws, 8% is what chance allows. The tests have the same
cases with that limit (tests/analysis, tests/study/test_claims.py).
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import advfeat as af
from advfeat import analysis, study
from advfeat.analysis._transfer import TransferPoint
from advfeat.analysis._usefulness import USELESS
from advfeat.attacks import PGD
from advfeat.metrics import Accuracy, transfer_matrix
from advfeat.statistics import paired_difference

FEW = {"steps": 3}
RECIPE = study.Recipe(
    standard={"epochs": 3, "batch_size": 30, "lr": 0.3},
    robust={"steps": 1},
    sets={
        "D_R": FEW, "D_R control": {}, "D_NR": FEW,
        **{f"{name}{control}": {} if control else FEW
           for name in ("D_rand", "D_det")
           for control in ("", " control", " noise control", " moved control")},
    },
    measured={"steps": 2},
)  # fmt: skip


class Constant(nn.Module):
    """Always the first of two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([1.0, 0.0]).repeat(len(x), 1) + 0 * self.zero


def normal(
    generator: torch.Generator, count: int, features: int, classes: int, commonest: float = 0.0
) -> TensorDataset:
    """Normal inputs; classes in turn, or the first of them as often as asked for."""
    y = torch.arange(count) % classes
    if commonest:
        others = torch.randint(1, classes, (count,), generator=generator)
        y = others.where(torch.rand(count, generator=generator) >= commonest, 0)
    return TensorDataset(torch.randn(count, features, generator=generator), y)


def uniform(
    generator: torch.Generator, count: int, features: int, classes: int, first: float = 0.0
) -> TensorDataset:
    """Inputs in [0, 1], labels drawn; of two classes, the first as often as asked for."""
    x = torch.rand(count, features, generator=generator)
    if first:
        return TensorDataset(x, (torch.rand(count, generator=generator) >= first).long())
    return TensorDataset(x, torch.randint(classes, (count,), generator=generator))


def units(seed: int, g: torch.Generator, count: int, classes: int) -> Iterator[tuple[str, bool]]:
    found = analysis.linear_usefulness(
        torch.eye(16), normal(g, count, 16, classes), eps=0.1, norm="l2", seed=seed, resamples=99
    )
    what = f"linear_usefulness, {count} samples, {classes} classes, any of 16 units:"
    yield f"{what} useful", bool((found.unit_kind != USELESS).any())
    yield f"{what} interval of rho above 0", bool((found.rho_interval[0] > 0).any())
    yield f"{what} interval of gamma above 0", bool((found.gamma_interval[0] > 0).any())


def attacked(seed: int, g: torch.Generator) -> Iterator[tuple[str, bool]]:
    found = analysis.usefulness(
        nn.Linear(4, 3), normal(g, 40, 4, 3), layer=lambda x: x, eps=0.5, norm="l2",
        bounds=(-10.0, 10.0), steps=1, resamples=39, seed=seed, progress=False,
    )  # fmt: skip
    yield "usefulness, any of 4 units useful", bool((found.unit_kind != USELESS).any())


def leaks(
    seed: int, g: torch.Generator, classes: int, commonest: float
) -> Iterator[tuple[str, bool]]:
    train, test = (normal(g, 120, 10, classes, commonest) for _ in range(2))
    found = analysis.leakage(train, train, test, eps=0.001, seed=seed)
    what = f"leakage, {classes} classes, the commonest {commonest or 1 / classes:.0%}:"
    yield f"{what} above chance", found.above_chance
    yield f"{what} any robust feature", found.features > 0


def transfers(seed: int, g: torch.Generator) -> Iterator[tuple[str, bool]]:
    def share() -> Accuracy:
        return Accuracy.of(torch.rand(100, generator=g) < 0.3)

    points = tuple(TransferPoint("a", *(share() for _ in range(5))) for _ in range(6))
    low, high = analysis.Transfer(points).correlation_interval
    yield "transfer, correlation of 6 architectures, an interval without 0", low > 0 or high < 0
    source, train, test = nn.Linear(5, 2), uniform(g, 60, 5, 2), uniform(g, 60, 5, 2)
    af.fit(source, train, epochs=2, seed=seed, progress=False)
    attack = PGD(eps=0.5, norm="l2", steps=5)
    found = transfer_matrix({"s": source}, {"c": Constant()}, test, attack, progress=False)
    yield "transfer to a constant model, any fooled", bool(found.fooled.nan_to_num().any())


def mistakes(seed: int, g: torch.Generator) -> Iterator[tuple[str, bool]]:
    train, test = (uniform(g, 60, 4, 2, 0.7) for _ in range(2))

    def student(wrong: TensorDataset) -> nn.Module:
        fresh = nn.Linear(4, 2)
        af.fit(fresh, wrong, epochs=2, lr=0.5, batch_size=30, seed=seed, progress=False)
        return fresh

    found = analysis.mislabelled(nn.Linear(4, 2), train, test, learn=student)
    yield "mislabelled, labels 70:30, above chance", found.above_chance
    train, test = normal(g, 40, 5, 2), normal(g, 100, 5, 2)
    probe = analysis.linear_probe(nn.Identity(), train, test, layer=lambda x: x)
    yield "linear_probe, above chance", probe.above_chance


def studies(seed: int, g: torch.Generator) -> Iterator[tuple[str, bool]]:
    """Verdicts on accuracies. Robust accuracies differ between models of noise too."""
    train, test = uniform(g, 90, 6, 3), uniform(g, 150, 6, 3)
    found = study.run(
        lambda: nn.Linear(6, 3), train, test, eps=0.2, norm="l2", at=[0.2], recipe=RECIPE,
        seed=seed, progress=False,
        stages=[f"measure {n}" for n in ("standard", "robust", *RECIPE.sets)],
    )  # fmt: skip
    for claim in found.claims:
        for each in claim.evidence:
            if "accuracy" in each.text or "labels" in each.text:
                what = "study, " + re.sub(r" \(\d.*?%\)", "", each.text)
                yield f"{what}: confirmed", each.verdict == "confirmed"
                yield f"{what}: not confirmed", each.verdict == "not confirmed"
    for name in ("D_rand", "D_det"):
        for control in ("noise control", "moved control"):
            pair = (found.measured[n].standard.correct for n in (name, f"{name} {control}"))
            sign = paired_difference(*pair).sign
            yield f"study, {name} - {name} {control}, accuracy: an interval without 0", sign != 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=200)
    draws = parser.parse_args().draws
    cases: list[Callable[[int, torch.Generator], Iterator[tuple[str, bool]]]] = [
        lambda s, g: units(s, g, 128, 10), lambda s, g: units(s, g, 60, 2), attacked,
        lambda s, g: leaks(s, g, 2, 0.7), lambda s, g: leaks(s, g, 4, 0.0),
        lambda s, g: leaks(s, g, 2, 0.85), transfers, mistakes, studies,
    ]  # fmt: skip
    for case in cases:
        generator, found = torch.Generator().manual_seed(0), Counter[str]()
        for seed in range(draws):
            torch.manual_seed(seed)
            for what, reported in case(seed, generator):
                found[what] += int(reported)
        for what, count in found.items():
            print(f"{what}: {count} of {draws} = {count / draws:.1%}", flush=True)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
