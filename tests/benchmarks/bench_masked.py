"""Verdicts on two third-party networks, one of them masked in l2 and l1, beside AutoAttack.

python tests/benchmarks/bench_masked.py DIR [--versions fast standard strong] [--seeds 0 1 2]
    [--reference DIR] [--curve] [--images 200] [--only mnist-l2]

DIR holds cifar_cnn_a_adv.pt, mnist_cnn_a_adv.pt and their images and labels; --reference is a
checkout of github.com/fra31/auto-attack, run with the first seed, as is the curve. Gradients are
those of all samples together.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from bench_strength import third_party
from side_by_side import machine
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import advfeat as af
from advfeat.attacks import AutoAttack
from advfeat.metrics import robustness_curve

BALLS = {
    "mnist": {"linf": (0.2, 0.3, 0.35), "l2": (1.0, 1.5, 2.0), "l1": (5.0, 10.0, 15.0)},
    "cifar": {"linf": (1 / 255, 2 / 255, 4 / 255), "l2": (0.125, 0.25, 0.5), "l1": (1.0, 2.0, 4.0)},
}


def mnist(folder: Path) -> tuple[nn.Module, TensorDataset]:
    body = nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(1568, 100), nn.ReLU(), nn.Linear(100, 10),
    )  # fmt: skip
    weights = torch.load(folder / "mnist_cnn_a_adv.pt", weights_only=True)
    body.load_state_dict(weights.get("state_dict", weights))
    x = torch.from_numpy(np.load(folder / "mnist_images.npy")).permute(0, 3, 1, 2)
    y = torch.from_numpy(np.load(folder / "mnist_labels.npy")).long()
    return body.eval(), TensorDataset(x.float().div(255).contiguous(), y)


@contextlib.contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """Numbers of samples of which gradients are taken."""
    sizes: list[int] = []

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            sizes.append(len(output))

    hook = model.register_forward_hook(count)
    yield sizes
    hook.remove()


def ours(
    model: nn.Module, data: TensorDataset, version: str, norm: str, eps: float, seed: int
) -> str:
    attack = AutoAttack(eps=eps, norm=norm, version=version)
    with counted(model) as sizes:
        found = af.robust_accuracy(model, data, attack=attack, seed=seed, batch_size=200)
    return f"{100 * float(found):.1f} ({sum(sizes)})"


def by_curve(
    model: nn.Module, data: TensorDataset, norm: str, radii: tuple[float, ...], seed: int
) -> list[str]:
    with counted(model) as sizes:
        curve = robustness_curve(model, data, norm=norm, seed=seed)
    return [f"{100 * float(curve.at(eps)):.1f} ({sum(sizes)})" for eps in radii]


def reference(model: nn.Module, data: TensorDataset, norm: str, eps: float, seed: int) -> str:
    from autoattack import AutoAttack as Reference

    name = {"linf": "Linf", "l2": "L2", "l1": "L1"}[norm]
    attack = Reference(model, norm=name, eps=eps, seed=seed, device="cpu", verbose=False)
    x, y = data.tensors
    x_adv = attack.run_standard_evaluation(x, y, bs=200)
    return f"{100 * (model(x_adv).argmax(1) == y).float().mean():.1f}"


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--versions", nargs="+", default=["fast"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--curve", action="store_true", help="robustness_curve too")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--only", nargs="*", help="such as mnist-l2")
    options = parser.parse_args()
    if options.reference:
        sys.path.append(str(options.reference))
    warnings.simplefilter("ignore")
    print(machine())
    networks = {"mnist": mnist(options.folder), "cifar": third_party(options.folder)}
    for name, (model, whole) in networks.items():
        data = TensorDataset(*(tensor[: options.images] for tensor in whole.tensors))
        for norm, radii in BALLS[name].items():
            if options.only and f"{name}-{norm}" not in options.only:
                continue
            curve = []
            if options.curve:
                curve = by_curve(model, data, norm, radii, options.seeds[0])
            for place, eps in enumerate(radii):
                cells = [
                    " ".join(ours(model, data, version, norm, eps, seed) for seed in options.seeds)
                    for version in options.versions
                ]
                cells += curve[place : place + 1]
                if options.reference:
                    cells.append(reference(model, data, norm, eps, options.seeds[0]))
                print(f"| {name} | {norm} {eps:.4g} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
