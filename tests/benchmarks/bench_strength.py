"""What the ensembles leave standing, beside torchattacks' and ART's, on models of several kinds.

python tests/benchmarks/bench_strength.py [--thirdparty DIR] [--images 400] [--seeds 0 1]
    [--by standard fast torchattacks ART] [--art DIR]

Four models are trained on scikit-learn's digits: a standard, an l2-robust, an linf-robust and one
by TRADES. DIR holds cifar_cnn_a_adv.pt, images.npy and labels.npy, a classifier from the
verification literature whose robust accuracy at linf 2/255 is between 44.0 (certified) and
50.5 (the reference AutoAttack). Peers are run with the first seed, in linf and l2, the norms that
they have. ART is looked for in --art, where it was installed by
`pip install --no-deps --target DIR adversarial-robustness-toolbox six`.
"""

from __future__ import annotations

import multiprocessing
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
import torchattacks
from side_by_side import machine
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import advfeat as af
from advfeat.attacks import AutoAttack

DIGITS = {"linf": 0.1, "l2": 0.5, "l1": 2.0}
THIRD = {"linf": 2 / 255, "l2": 0.25, "l1": 2.0}


class Normalise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        mean = torch.tensor([125.3, 123.0, 113.9]).view(3, 1, 1) / 255
        std = torch.tensor([63.0, 62.1, 66.7]).view(3, 1, 1) / 255
        return (x - mean) / std


def third_party(folder: Path) -> tuple[nn.Module, TensorDataset]:
    body = nn.Sequential(
        nn.Conv2d(3, 16, 4, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(2048, 100), nn.ReLU(), nn.Linear(100, 10),
    )  # fmt: skip
    weights = torch.load(folder / "cifar_cnn_a_adv.pt", weights_only=True)
    body.load_state_dict(weights.get("state_dict", weights))
    x = torch.from_numpy(np.load(folder / "images.npy")).permute(0, 3, 1, 2).contiguous()
    y = torch.from_numpy(np.load(folder / "labels.npy")).long()
    return nn.Sequential(Normalise(), body).eval(), TensorDataset(x, y)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1300 images to learn from, 497 to test on."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)
    return TensorDataset(x[:1300], y[:1300]), TensorDataset(x[1300:], y[1300:])


def own_models(seed: int = 0) -> tuple[dict[str, nn.Module], TensorDataset]:
    data, test = digits()
    standard, l2, linf, trades = (network(seed + number) for number in range(4))
    af.fit(standard, data, epochs=8, lr=0.05, seed=0)
    af.adversarial_fit(
        l2, data, eps=0.5, norm="l2", steps=4, step_size=0.2, epochs=15, lr=0.05, seed=0
    )
    af.adversarial_fit(
        linf, data, eps=0.1, norm="linf", steps=4, step_size=0.04, epochs=15, lr=0.05, seed=0
    )
    af.adversarial_fit(
        trades, data, eps=0.1, norm="linf", objective="trades", steps=5, step_size=0.1 / 3,
        epochs=15, lr=0.05, seed=0,
    )  # fmt: skip
    models = {"standard": standard, "l2-robust": l2, "linf-robust": linf, "TRADES": trades}
    # The peers look at a module in the mode that they find it in, and BatchNorm would learn.
    return {name: model.eval() for name, model in models.items()}, test


def by_us(
    version: str, model: nn.Module, data: TensorDataset, norm: str, eps: float, seed: int
) -> float:
    attack = AutoAttack(eps=eps, norm=norm, version=version)
    return float(af.robust_accuracy(model, data, attack=attack, seed=seed))


Peer: TypeAlias = Callable[[nn.Module, Tensor, Tensor, str, float, int], Tensor]


def by_torchattacks(
    model: nn.Module, x: Tensor, y: Tensor, norm: str, eps: float, seed: int
) -> Tensor:
    names = {"linf": "Linf", "l2": "L2"}
    attack = torchattacks.AutoAttack(model, norm=names[norm], eps=eps, n_classes=10, seed=seed)
    return attack(x, y)


def by_art(model: nn.Module, x: Tensor, y: Tensor, norm: str, eps: float, seed: int) -> Tensor:
    """ART's own choice: APGD and DLR-APGD of 5 restarts, DeepFool, Square of 5 restarts."""
    sys.modules.setdefault("multiprocess", multiprocessing)  # imported for several processes only
    from art.attacks.evasion import AutoAttack as Theirs
    from art.estimators.classification import PyTorchClassifier

    np.random.seed(seed)  # noqa: NPY002 - what ART draws from
    classifier = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), x.shape[1:], 10, clip_values=(0, 1), device_type="cpu"
    )
    order = {"linf": np.inf, "l2": 2}[norm]
    attack = Theirs(classifier, norm=order, eps=eps, eps_step=2 * eps, batch_size=len(x))
    return torch.from_numpy(attack.generate(x.numpy(), y.numpy()))


def left_by(
    peer: Peer, model: nn.Module, data: TensorDataset, norm: str, eps: float, seed: int
) -> float:
    x, y = data.tensors
    adversarial = peer(model, x, y, norm, eps, seed)
    with torch.no_grad():
        right = (model(x).argmax(1) == y) & (model(adversarial).argmax(1) == y)
    return float(right.float().mean())


OURS = {version: partial(by_us, version) for version in ("standard", "fast")}
PEERS = {"torchattacks": partial(left_by, by_torchattacks), "ART": partial(left_by, by_art)}


def compare(
    name: str, model: nn.Module, data: TensorDataset, balls: dict[str, float], options: Namespace
) -> None:
    for norm, eps in balls.items():
        cells = [f"{100 * af.accuracy(model, data):.1f}"]
        for by in options.by:
            if by in OURS:
                found = [OURS[by](model, data, norm, eps, seed) for seed in options.seeds]
                cells.append(" ".join(f"{100 * value:.2f}" for value in found))
            elif norm == "l1":
                cells.append("has none")
            else:
                cells.append(f"{100 * PEERS[by](model, data, norm, eps, options.seeds[0]):.2f}")
        print(f"| {name} | {norm} {eps:.4g} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--thirdparty", type=Path)
    parser.add_argument(
        "--images", type=int, default=400, help="of digits; the third party has 200"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--by", nargs="+", choices=[*OURS, *PEERS], default=[*OURS])
    parser.add_argument("--only", nargs="*", help="of the four own models")
    parser.add_argument("--norms", nargs="+", default=["linf", "l2", "l1"])
    parser.add_argument("--art", type=Path, help="where ART is")
    options = parser.parse_args()
    if options.art:
        sys.path.append(str(options.art))
    models, test = own_models()
    rows = TensorDataset(*(tensor[: options.images] for tensor in test.tensors))
    print(f"{machine()}\n\nfirst {len(rows)} test images of digits; seeds {options.seeds}\n")
    print(f"| model | ball | clean | {' | '.join(options.by)} |\n{'|---' * (3 + len(options.by))}|")
    digits, third = ({n: balls[n] for n in options.norms} for balls in (DIGITS, THIRD))
    if options.thirdparty:
        compare("third-party CNN", *third_party(options.thirdparty), third, options)
    for name in models if options.only is None else options.only:
        compare(name, models[name], rows, digits, options)


if __name__ == "__main__":
    main()
