"""Robust accuracy beside foolbox, torchattacks and ART: time and verdict on the same work.

python tests/benchmarks/bench_evaluation.py CIFAR.npz --cache DIR [--art DIR] [--autoattack N]

CIFAR.npz holds x_train, y_train, x_test, y_test (uint8, N x 32 x 32 x 3). Two small ResNets, a
standard and an linf-robust one, are trained once and kept in DIR. ART pins old packages: install
it elsewhere with `pip install --no-deps --target DIR` and name that folder. Cases take turns in
one process; robust accuracies are of the same images.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import foolbox
import torch
import torchattacks
from bench_strength import THIRD, third_party
from cifar import robust_model, standard_model, test_images
from side_by_side import machine, side_by_side, table
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import advfeat as af
from advfeat.attacks import AutoAttack

EPS, STEP, STEPS = 8 / 255, 2 / 255, 20
BATCH = 128


def batches(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(BATCH), y.split(BATCH), strict=True))


def resisting(model: nn.Module, x: Tensor, y: Tensor, attack: Callable[..., Tensor]) -> float:
    """Robust accuracy by a library that attacks one batch."""
    right = 0
    for images, labels in batches(x, y):
        adversarial = attack(images, labels)
        with torch.no_grad():
            right += int((model(adversarial).argmax(1) == labels).sum())
    return right / len(x)


def by_foolbox(model: nn.Module, x: Tensor, y: Tensor) -> float:
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))
    attack = foolbox.attacks.LinfPGD(abs_stepsize=STEP, steps=STEPS, random_start=False)
    return resisting(model, x, y, lambda a, b: attack(wrapped, a, b, epsilons=EPS)[1])


def by_torchattacks(model: nn.Module, x: Tensor, y: Tensor) -> float:
    attack = torchattacks.PGD(model, eps=EPS, alpha=STEP, steps=STEPS, random_start=False)
    return resisting(model, x, y, attack)


def by_art(model: nn.Module, x: Tensor, y: Tensor) -> float:
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), x.shape[1:], 10, clip_values=(0, 1), device_type="cpu"
    )
    attack = ProjectedGradientDescentPyTorch(
        classifier, eps=EPS, eps_step=STEP, max_iter=STEPS, batch_size=BATCH, verbose=False
    )

    def made(images: Tensor, labels: Tensor) -> Tensor:
        return torch.from_numpy(attack.generate(images.numpy(), labels.numpy()))

    return resisting(model, x, y, made)


def by_plain_loop(model: nn.Module, x: Tensor, y: Tensor) -> float:
    def pgd(images: Tensor, labels: Tensor) -> Tensor:
        found = images
        for _ in range(STEPS):
            leaf = found.clone().requires_grad_()
            loss = nn.functional.cross_entropy(model(leaf), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, leaf)
            moved = found + STEP * gradient.sign()
            found = (images + (moved - images).clamp(-EPS, EPS)).clamp(0, 1)
        return found

    return resisting(model, x, y, pgd)


def by_us(model: nn.Module, x: Tensor, y: Tensor, precision: str) -> float:
    attack = af.PGD(eps=EPS, norm="linf", steps=STEPS, step_size=STEP)
    data = TensorDataset(x, y)
    return af.robust_accuracy(
        model, data, attack=attack, precision=precision, batch_size=BATCH, progress=False
    )


def compare(title: str, cases: dict[str, Callable[[], float]], reference: str, rounds: int) -> None:
    verdicts: dict[str, float] = {}

    def recorded(name: str, run: Callable[[], float]) -> Callable[[], None]:
        def go() -> None:
            verdicts[name] = float(run())

        return go

    # One thread: its own seconds, which a busy machine disturbs less.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds = side_by_side({n: recorded(n, run) for n, run in cases.items()}, rounds, clock)
    notes = {n: f"{100 * v:.1f}% robust, {seconds[n]:.1f} s" for n, v in verdicts.items()}
    print(f"\n{title}\n\n{table(seconds, reference, notes)}", flush=True)


def compare_pgd(name: str, model: nn.Module, x: Tensor, y: Tensor, rounds: int) -> None:
    cases = {"plain loop": lambda: by_plain_loop(model, x, y)}
    cases["torchattacks PGD"] = lambda: by_torchattacks(model, x, y)
    cases["foolbox LinfPGD"] = lambda: by_foolbox(model, x, y)
    if "art" in sys.modules:
        cases["ART PGD"] = lambda: by_art(model, x, y)
    cases["advfeat, float32"] = lambda: by_us(model, x, y, "float32")
    cases["advfeat, bfloat16"] = lambda: by_us(model, x, y, "bfloat16")
    compare(f"PGD-20, linf 8/255, {name}, {len(x)} images", cases, "torchattacks PGD", rounds)


def torchattacks_at_100(model: nn.Module, eps: float) -> Callable[..., Tensor]:
    """torchattacks' AutoAttack, its four attacks with the published number of steps."""
    ball = {"norm": "Linf", "eps": eps, "seed": 0}
    return torchattacks.MultiAttack(
        [
            torchattacks.APGD(model, **ball, steps=100, loss="ce"),
            torchattacks.APGDT(model, **ball, steps=100, n_classes=10),
            torchattacks.FAB(model, **ball, steps=100, multi_targeted=True, n_classes=10),
            torchattacks.Square(model, **ball, n_queries=5000),
        ]
    )


def reference(model: nn.Module, eps: float) -> Callable[..., Tensor]:
    from autoattack import AutoAttack as Reference

    attack = Reference(model, norm="Linf", eps=eps, seed=0, verbose=False, device="cpu")
    return lambda x, y: attack.run_standard_evaluation(x, y, bs=BATCH)


def art_autoattack(model: nn.Module, eps: float) -> Callable[..., Tensor]:
    """ART's own choice of attacks: APGD and DLR-APGD of 5 restarts, DeepFool, Square of 5."""
    sys.modules.setdefault("multiprocess", multiprocessing)  # imported for several processes only
    from art.attacks.evasion import AutoAttack as Theirs
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), (3, 32, 32), 10, clip_values=(0, 1), device_type="cpu"
    )
    attack = Theirs(classifier, eps=eps, eps_step=2 * eps, batch_size=BATCH)
    return lambda x, y: torch.from_numpy(attack.generate(x.numpy(), y.numpy()))


PEERS: dict[str, Callable[[nn.Module, float], Callable[..., Tensor]]] = {
    "torchattacks AutoAttack": lambda model, eps: torchattacks.AutoAttack(model, eps=eps, seed=0),
    "torchattacks, 100 steps": torchattacks_at_100,
    "reference AutoAttack": reference,
    "ART AutoAttack": art_autoattack,
}


def compare_autoattack(
    name: str,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    versions: list[str],
    peers: list[str],
    eps: float = EPS,
) -> None:
    def theirs(peer: str) -> float:
        return resisting(model, x, y, PEERS[peer](model, eps))

    def ours(version: str, precision: str) -> float:
        attack = AutoAttack(eps=eps, norm="linf", version=version, seed=0)
        data = TensorDataset(x, y)
        return af.robust_accuracy(
            model, data, attack=attack, precision=precision, batch_size=BATCH, progress=False
        )

    cases: dict[str, Callable[[], float]] = {peer: partial(theirs, peer) for peer in peers}
    for version in versions:
        for precision in ("float32", "bfloat16"):
            cases[f"advfeat {version}, {precision}"] = partial(ours, version, precision)
    compare(f"AutoAttack, linf {eps:.4f}, {name}, {len(x)} images", cases, peers[0], rounds=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cifar", type=Path)
    parser.add_argument("--cache", type=Path, default=Path("."))
    parser.add_argument("--art", type=Path)
    parser.add_argument("--reference", type=Path, help="a clone of github.com/fra31/auto-attack")
    parser.add_argument("--images", type=int, default=512, help="images for PGD-20; 0: leave it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--autoattack", type=int, default=0, help="images for it; slow")
    parser.add_argument("--versions", nargs="*", default=["fast", "standard"])
    parser.add_argument("--models", nargs="*", default=["standard", "robust"])
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=["torchattacks AutoAttack"])
    parser.add_argument("--thirdparty", type=Path, help="bench_strength.py's, for AutoAttack")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.art:
        sys.path.append(str(options.art))
        import art  # noqa: F401
    sys.path.append(str(options.reference))
    torch.manual_seed(0)
    x, y = test_images(options.cifar, max(options.images, options.autoattack))
    trained = {"standard": standard_model, "robust": robust_model}
    models = {name: trained[name](options.cifar, options.cache) for name in options.models}
    print(machine())
    for name, model in models.items():
        model.requires_grad_(False)  # the peers would take weight gradients too
        print(f"clean: {name} {af.accuracy(model, [(x, y)])}")
    if count := options.images:
        for name, model in models.items():
            compare_pgd(f"{name} model", model, x[:count], y[:count], options.rounds)
    if count := options.autoattack:
        for name, model in models.items():
            rows = x[:count], y[:count]
            compare_autoattack(f"{name} model", model, *rows, options.versions, options.peers)
    if options.thirdparty:
        model, data = third_party(options.thirdparty)
        model.requires_grad_(False)
        rows = (tensor[: options.autoattack or None] for tensor in data.tensors)
        case = ("third-party CNN", model, *rows, options.versions, options.peers)
        compare_autoattack(*case, eps=THIRD["linf"])


if __name__ == "__main__":
    main()
