"""AttackBench's protocol on given networks: how close minimum-norm attacks come, at equal budgets.

python tests/benchmarks/bench_attackbench.py --thirdparty DIR [--gradients 100 1000] [--images 100]
    [--networks mnist cifar] [--norms l2 linf l1] [--half odd|even|both] [--only NAME ...]

DIR holds bench_strength.py's third-party networks. Every attack sees the model through a counter:
a sample may take part in 2 x gradients propagations, forward or backward, and after that gets
constant logits; its distance is the smallest of all queries within that budget that the model gets
wrong, whatever the attack returns. As in AttackBench (Cina et al. 2024, equation 5), local
optimality is (clean eps_0 - A(attack)) / (clean eps_0 - A(best)), with A the area under robust
accuracy against eps up to eps_0, the largest distance of the best-known attack, which takes the
closest point of all attacks and budgets here for every sample. Peers run with AttackBench's
settings; APGD_MN with the best of three divisions of its budget. advfeat's settings were chosen
on the odd samples: --half even measures on the others.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from argparse import ArgumentParser
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from bench_strength import third_party
from side_by_side import machine, without_torchvision
from torch import Tensor, nn

from advfeat.attacks import FAB, FMN, MinimumPGD
from advfeat.threat import NORMS, Norm

ORDER = {"l1": 1.0, "l2": 2.0, "linf": math.inf}
# Where the binary search of APGD_MN begins.
LARGEST = {"l1": 50.0, "l2": 5.0, "linf": 0.5}
Run: TypeAlias = Callable[[nn.Module, Tensor, Tensor, Norm, int], object]


class BudgetSpentError(Exception):
    """No sample may ask the model again."""


class Counted(nn.Module):
    """Counts the propagations of every sample, and keeps the closest query that it gets wrong."""

    def __init__(
        self, model: nn.Module, inputs: Tensor, labels: Tensor, norm: Norm, gradients: int
    ) -> None:
        super().__init__()
        self.model, self.norm, self.limit = model, norm, 2 * gradients
        self.inputs, self.labels = inputs, labels
        self.used = torch.zeros_like(labels)
        with torch.no_grad():
            self.wrong = model(inputs).argmax(1) != labels
        self.distance = torch.full((len(inputs),), math.inf).masked_fill(self.wrong, 0.0)

    def forward(self, queries: Tensor) -> Tensor:
        queries = queries.clamp(0, 1)
        place = self._places(queries.detach())
        may = self.used[place] < self.limit
        self.used.index_add_(0, place, may.long())
        logits = self.model(queries)
        constant = torch.zeros_like(logits).scatter(1, self.labels[place][:, None], 1.0)
        logits = torch.where(may[:, None], logits, constant)
        self._keep(queries.detach(), logits.detach(), place, may)
        if logits.requires_grad:
            logits.register_hook(partial(self._count_backward, place))
        if not ((self.used < self.limit) & ~self.wrong).any():
            raise BudgetSpentError
        return logits

    def _places(self, queries: Tensor) -> Tensor:
        """Which sample each query is of: by its place, or the nearest where some are left out."""
        if len(queries) == len(self.inputs):
            return torch.arange(len(queries))
        return torch.cdist(queries.flatten(1), self.inputs.flatten(1)).argmin(1)

    def _keep(self, queries: Tensor, logits: Tensor, place: Tensor, may: Tensor) -> None:
        hits = may & (logits.argmax(1) != self.labels[place])
        delta = (queries - self.inputs[place]).flatten(1)
        distance = torch.linalg.vector_norm(delta, ORDER[self.norm], dim=1)
        self.distance.scatter_reduce_(0, place, distance.masked_fill(~hits, math.inf), "amin")

    def _count_backward(self, place: Tensor, gradient: Tensor) -> Tensor:
        may = self.used[place] < self.limit
        self.used.index_add_(0, place, may.long())
        return gradient * may[:, None]


# --- The attacks ---


def advfeat_minimum_pgd(model: nn.Module, x: Tensor, y: Tensor, norm: Norm, budget: int) -> None:
    targets = 4 if budget < 500 else 9
    restarts = max(1, budget // 100)
    steps = (budget - targets - 1) // restarts - 1
    attack = MinimumPGD(norm=norm, steps=steps, restarts=restarts, targets=targets, seed=0)
    attack(model, x, y)


def advfeat_fmn(model: nn.Module, x: Tensor, y: Tensor, norm: Norm, budget: int) -> None:
    FMN(norm=norm, steps=budget - 10)(model, x, y)


def advfeat_fab(model: nn.Module, x: Tensor, y: Tensor, norm: Norm, budget: int) -> None:
    targets = 4 if budget < 500 else 9
    FAB(norm=norm, steps=int(budget / 1.5) // targets, targets=targets)(model, x, y)


def adv_lib_fmn(model: nn.Module, x: Tensor, y: Tensor, norm: Norm, budget: int) -> None:
    from adv_lib.attacks import fmn

    fmn(model, x, y, norm=ORDER[norm], steps=budget, α_init=10.0 if norm == "linf" else 1.0)


def adv_lib_ddn(model: nn.Module, x: Tensor, y: Tensor, norm: Norm, budget: int) -> None:
    from adv_lib.attacks import ddn

    if norm == "l2":
        ddn(model, x, y, steps=budget, levels=None)


def adv_lib_apgd_mn(
    steps: int, model: nn.Module, x: Tensor, y: Tensor, norm: Norm, budget: int
) -> None:
    from adv_lib.attacks.auto_pgd import minimal_apgd

    rounds = budget // (steps + 1) + 1
    minimal_apgd(model, x, y, ORDER[norm], LARGEST[norm], binary_search_steps=rounds, n_iter=steps)


def foolbox_attack(
    name: str, model: nn.Module, x: Tensor, y: Tensor, norm: Norm, budget: int
) -> None:
    import foolbox

    prefix = {"l1": "L1", "l2": "L2", "linf": "LInf"}[norm]
    found = getattr(foolbox.attacks, "DDNAttack" if name == "DDN" else f"{prefix}FMNAttack")
    if name == "DDN" and norm != "l2":
        return
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    found(steps=budget)(wrapped, x, y, epsilons=None)


def secml_attack(
    name: str, model: nn.Module, x: Tensor, y: Tensor, norm: Norm, budget: int
) -> None:
    from secmlt.adv.evasion.ddn import DDN
    from secmlt.adv.evasion.fmn import FMN as SECML_FMN
    from secmlt.models.pytorch.base_pytorch_nn import BasePyTorchClassifier
    from torch.utils.data import DataLoader, TensorDataset

    if name == "DDN" and norm != "l2":
        return
    if name == "DDN":  # its default first norm, 8/255, never reaches the boundary in 100 steps
        attack = DDN(num_steps=budget, eps_init=1.0)
    else:
        attack = SECML_FMN(norm, budget, step_size=10.0 if norm == "linf" else 1.0)
    attack(BasePyTorchClassifier(model), DataLoader(TensorDataset(x, y), batch_size=len(x)))


ATTACKS: dict[str, Run] = {
    "advfeat MinimumPGD": advfeat_minimum_pgd,
    "advfeat FMN": advfeat_fmn,
    "advfeat FAB": advfeat_fab,
    "adv-lib FMN": adv_lib_fmn,
    "adv-lib DDN": adv_lib_ddn,
    "adv-lib APGD_MN 10": partial(adv_lib_apgd_mn, 10),
    "adv-lib APGD_MN 20": partial(adv_lib_apgd_mn, 20),
    "adv-lib APGD_MN 50": partial(adv_lib_apgd_mn, 50),
    "foolbox DDN": partial(foolbox_attack, "DDN"),
    "foolbox FMN": partial(foolbox_attack, "FMN"),
    "secml-torch DDN": partial(secml_attack, "DDN"),
    "secml-torch FMN": partial(secml_attack, "FMN"),
}

# --- The measurement ---


def measure(
    run: Run, model: nn.Module, x: Tensor, y: Tensor, norm: Norm, gradients: int
) -> tuple[Tensor, float]:
    """Distances, and the most propagations of any sample."""
    counted = Counted(model, x, y, norm, gradients).eval()
    torch.manual_seed(0)
    with contextlib.suppress(BudgetSpentError):
        run(counted, x.clone(), y.clone(), norm, gradients)
    return counted.distance, float(counted.used.max())


def optimality(distance: Tensor, best: Tensor, clean: float) -> float:
    largest = float(best[best.isfinite()].max())
    area, least = (float(d.clamp_max(largest).mean()) for d in (distance, best))
    return (clean * largest - area) / (clean * largest - least)


def networks(folder: Path) -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    cifar, data = third_party(folder)
    mnist = nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(1568, 100), nn.ReLU(), nn.Linear(100, 10),
    )  # fmt: skip
    weights = torch.load(folder / "mnist_cnn_a_adv.pt", weights_only=True)
    mnist.load_state_dict(weights.get("state_dict", weights))
    x = torch.from_numpy(np.load(folder / "mnist_images.npy")).permute(0, 3, 1, 2).float() / 255
    y = torch.from_numpy(np.load(folder / "mnist_labels.npy")).long()
    return {
        "mnist": (mnist.eval().requires_grad_(False), x.contiguous(), y),
        "cifar": (cifar.eval().requires_grad_(False), *data.tensors),
    }


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--thirdparty", type=Path, required=True)
    parser.add_argument("--gradients", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--networks", nargs="+", default=["mnist", "cifar"])
    parser.add_argument("--norms", nargs="+", default=list(NORMS))
    parser.add_argument("--half", choices=["odd", "even", "both"], default="even")
    parser.add_argument("--only", nargs="+", default=list(ATTACKS))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    without_torchvision()
    torch.set_num_threads(1)
    print(machine(), flush=True)
    chosen = {"odd": slice(1, None, 2), "even": slice(0, None, 2), "both": slice(None)}
    given = networks(options.thirdparty)
    for network in options.networks:
        model, x, y = given[network]
        x, y = (tensor[chosen[options.half]][: options.images] for tensor in (x, y))
        with torch.no_grad():
            clean = float((model(x).argmax(1) == y).float().mean())
        for norm in options.norms:
            found: dict[tuple[str, int], tuple[Tensor, float]] = {}
            for gradients in options.gradients:
                for name in options.only:
                    start = time.perf_counter()
                    distance, used = measure(ATTACKS[name], model, x, y, norm, gradients)
                    if used:  # some attacks have one norm
                        found[name, gradients] = distance, time.perf_counter() - start
            best = torch.stack([distance for distance, _ in found.values()]).amin(0)
            for gradients in options.gradients:
                print(f"\n{network} {norm}, {gradients} gradients, {len(x)} {options.half} images")
                rows = [
                    (optimality(distance, best, clean), name, distance, seconds)
                    for (name, budget), (distance, seconds) in found.items()
                    if budget == gradients
                ]
                for value, name, distance, seconds in sorted(rows, key=lambda row: -row[0]):
                    median = float(distance[distance > 0].median())
                    failed = int(distance.isinf().sum())
                    print(
                        f"{value:.4f}  {name:20} median {median:.4f}  failed {failed:3d}  "
                        f"{seconds:.1f} s",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
