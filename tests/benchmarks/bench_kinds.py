"""What `standard` and `fast` leave standing on kinds of models that nothing was chosen on.

OMP_NUM_THREADS=1 python tests/benchmarks/bench_kinds.py [--by standard fast] [--seeds 0]

MLPs and CNNs on scikit-learn's digits, 200 test images: smooth and not, distilled, with softmax
outputs, saturated, with two classes, robust, in the balls of bench_strength.py; and networks that
were trained against balls twice as large, in those.
"""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

import torch
import torch.nn.functional as F
from bench_strength import DIGITS, OURS, compare, digits, network
from side_by_side import machine
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import advfeat as af
from advfeat.training import Options

BALLS = {norm: DIGITS[norm] for norm in ("linf", "l2")}
LARGE = {norm: 2 * eps for norm, eps in DIGITS.items()}


class Scaled(nn.Module):
    def __init__(self, body: nn.Module, factor: float, softmax: bool = False) -> None:
        super().__init__()
        self.body, self.factor, self.softmax = body, factor, softmax

    def forward(self, x: Tensor) -> Tensor:
        logits = self.factor * self.body(x)
        return logits.softmax(1) if self.softmax else logits


def mlp(activation: type[nn.Module], seed: int, classes: int = 10) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 64), activation(), nn.Linear(64, 64), activation(),
        nn.Linear(64, classes),
    )  # fmt: skip


def cnn(activation: type[nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), activation(), nn.Conv2d(16, 32, 3, 2, 1), activation(),
        nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


def deep_cnn(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def distilled(teacher: nn.Module, student: nn.Module, x: Tensor, temperature: float) -> nn.Module:
    """Learn the teacher's softened answers, and answer without softening them."""
    with torch.no_grad():
        soft = (teacher(x) / temperature).softmax(1)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        F.cross_entropy(student(x) / temperature, soft).backward()
        optimizer.step()
    return student


def kinds(train: TensorDataset) -> dict[str, nn.Module]:
    quick = {"epochs": 12, "lr": 0.05, "seed": 0, "progress": False}
    x, _ = train.tensors
    models: dict[str, nn.Module] = {
        "MLP, ReLU": mlp(nn.ReLU, 0),
        "MLP, tanh": mlp(nn.Tanh, 1),
        "CNN, GELU": cnn(nn.GELU, 2),
        "CNN, SiLU": cnn(nn.SiLU, 3),
    }
    for model in models.values():
        af.fit(model, train, **quick)
    models["label-smoothed"] = cnn(nn.ReLU, 4)
    af.fit(models["label-smoothed"], train, options=Options(label_smoothing=0.2), **quick)
    models["robust, GELU"] = cnn(nn.GELU, 5)
    af.adversarial_fit(models["robust, GELU"], train, eps=0.05, norm="linf", steps=3, **quick)
    models["BatchNorm"] = network(6)
    af.fit(models["BatchNorm"], train, **quick)
    models["distilled at 20"] = distilled(models["MLP, ReLU"], mlp(nn.ReLU, 7), x, 20.0)
    models["softmax outputs"] = Scaled(models["MLP, tanh"], 1.0, softmax=True)
    models["logits times 1000"] = Scaled(models["CNN, GELU"], 1000.0)
    return {name: model.eval() for name, model in models.items()}


def lessons() -> dict[str, dict[str, Any]]:
    """Training against balls twice as large."""
    long = {"steps": 7, "epochs": 40, "lr": 0.05, "progress": False}
    linf = {"eps": LARGE["linf"], "norm": "linf", "step_size": 0.06, **long}
    return {
        "PGD, linf": linf,
        "PGD, l2": {"eps": LARGE["l2"], "norm": "l2", "step_size": 0.3, **long},
        "TRADES, linf": {**linf, "objective": "trades"},
        "MART, linf": {**linf, "objective": "mart"},
    }


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--by", nargs="+", choices=OURS, default=[*OURS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    train, test = digits()
    test = TensorDataset(*(field[:200] for field in test.tensors))
    print(f"{machine()}\n\n| model | ball | clean | {' | '.join(options.by)} |")
    print("|---" * (3 + len(options.by)) + "|")
    for name, model in kinds(train).items():
        compare(name, model, test, BALLS, options)
    halves = [TensorDataset(rows, targets % 2) for rows, targets in (train.tensors, test.tensors)]
    two = mlp(nn.ReLU, 8, classes=2)
    af.fit(two, halves[0], epochs=12, lr=0.05, seed=0, progress=False)
    compare("two classes", two.eval(), halves[1], BALLS, options)
    for name, lesson in lessons().items():
        model = deep_cnn(1)
        af.adversarial_fit(model, train, seed=0, **lesson)
        compare(f"{name}, twice the radius", model.eval(), test, LARGE, options)


if __name__ == "__main__":
    main()
