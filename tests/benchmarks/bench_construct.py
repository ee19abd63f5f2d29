"""Constructing D_R and D_det against the bare limit, a plain float32 loop and torchattacks.

OMP_NUM_THREADS=1 python tests/benchmarks/bench_construct.py CIFAR.npz [--cache DIR] [--compile]

D_R is made from the robust and D_det from the standard model of bench_evaluation.py, which are
trained once and kept in DIR; the images are CIFAR-10's test images. The fastest settings leave the
paper's recipe: D_R with momentum takes fewer steps for the same distance, D_det with patience lets
a row go whose loss no longer falls.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchattacks
from cifar import robust_model, standard_model, test_images
from resnet import SmallResNet
from side_by_side import machine, side_by_side, table
from torch import Tensor
from torch.utils.data import TensorDataset

import advfeat as af
from advfeat.attacks import Attack, Batch
from advfeat.attacks.inversion import Inversion
from advfeat.model import Precision, attackable

EPS, STEP_SIZE = 0.5, 0.1
MOMENTUM, PATIENCE = 0.9, 10
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("cifar", type=Path)
parser.add_argument("--cache", type=Path, default=Path("."))
parser.add_argument("--images", type=int, default=64)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--rounds", type=int, default=2)
parser.add_argument(
    "--momentum-steps", type=int, default=27, help="that come as near as all steps without"
)
parser.add_argument("--sets", nargs="+", choices=["D_R", "D_det"], default=["D_R", "D_det"])
parser.add_argument("--compile", action="store_true", help="D_det of torch.compile(model) as well")


def bare(model: SmallResNet, x: Tensor, steps: int, precision: str, inversion: bool) -> None:
    """The limit: nothing but a forward pass and the input's gradient, step after step."""
    low = precision == "bfloat16"
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
        for _ in range(steps):
            leaf = x.detach().requires_grad_()
            out = features(model, leaf) if inversion else model(leaf)
            torch.autograd.grad(out.float().square().sum(), leaf)


def features(model: SmallResNet, x: Tensor) -> Tensor:
    """Input of the last Linear."""
    return model.blocks(model.stem((x - model.mean) / model.std)).mean((2, 3))


def share_of_limit(model: SmallResNet, x: Tensor, precision: Precision, inversion: bool) -> float:
    """Time of a bare step over that of a step of the loop: 1 is the limit."""
    attack: Attack = (
        Inversion(steps=1000, step_size=STEP_SIZE)
        if inversion
        else af.PGD(eps=EPS, norm="l2", steps=100, step_size=STEP_SIZE, targeted=True)
    )
    fast, labels = x.contiguous(memory_format=torch.channels_last), torch.arange(len(x)) % 10
    with attackable(model, precision=precision) as net:
        batch = Batch(net.prepare(x), labels, torch.arange(len(x)), net.prepare(x.flip(0)))
        if not inversion:
            batch = batch._replace(start=None)
        state = attack.init(net, batch)
        for _ in range(6):  # as far as the ball's border
            state = attack.step(net, state)
        seconds = side_by_side(
            {
                "bare": lambda: bare(model, fast, 1, precision, inversion),
                "loop": lambda: attack.step(net, state),
            },
            15,
            time.process_time,
        )
    return seconds["bare"] / seconds["loop"]


def gradient_of(loss: Tensor, x: Tensor, backward: bool) -> Tensor:
    """By autograd.grad, or by loss.backward(), which takes the weights' gradients too."""
    if not backward:
        return torch.autograd.grad(loss, x)[0]
    loss.backward()
    assert x.grad is not None
    return x.grad


def plain_inversion(
    model: SmallResNet, x: Tensor, start: Tensor, steps: int, backward: bool
) -> Tensor:
    """As a user would write it."""
    with torch.no_grad():
        goal = features(model, x)
    made = start.clone()
    for _ in range(steps):
        made = made.detach().requires_grad_()
        distance = (features(model, made) - goal).norm(dim=1).sum()
        gradient = gradient_of(distance, made, backward)
        length = gradient.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
        made = (made.detach() - STEP_SIZE * gradient / length).clamp(0, 1)
    return made


def plain_pgd(model: SmallResNet, x: Tensor, targets: Tensor, steps: int, backward: bool) -> Tensor:
    """As a user would write it."""
    made = x.clone()
    for _ in range(steps):
        made = made.detach().requires_grad_()
        loss = F.cross_entropy(model(made), targets, reduction="sum")
        gradient = gradient_of(loss, made, backward)
        length = gradient.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
        delta = made.detach() - STEP_SIZE * gradient / length - x
        size = delta.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
        made = (x + delta * (EPS / size).clamp_max(1)).clamp(0, 1)
    return made


def compare(
    title: str,
    model: SmallResNet,
    x: Tensor,
    inversion: bool,
    makers: dict[str, Callable[[], Tensor]],
    told: Callable[[Tensor], str],
    options: argparse.Namespace,
) -> None:
    """Time all makers and the bare limits in turns, and tell what each has made."""
    made: dict[str, Tensor] = {}

    def keep(name: str, make: Callable[[], Tensor]) -> None:
        made[name] = make()

    fast = x.contiguous(memory_format=torch.channels_last)
    cases: dict[str, Callable[[], object]] = {
        f"bare {precision}": partial(bare, model, fast, options.steps, precision, inversion)
        for precision in PRECISIONS
    }
    cases |= {name: partial(keep, name, make) for name, make in makers.items()}
    seconds = side_by_side(cases, options.rounds, time.process_time)
    print(f"\n{title}: {len(x)} images, {options.steps} steps\n")
    print(
        table(seconds, "plain float32 loop", {name: told(images) for name, images in made.items()})
    )
    for precision in PRECISIONS:
        share = share_of_limit(model, x, precision, inversion)
        print(f"\n{precision}: a step of the loop at {share:.3f} of the bare limit", flush=True)


def compare_inversion(
    model: SmallResNet, x: Tensor, y: Tensor, options: argparse.Namespace
) -> None:
    trainable, data = copy.deepcopy(model).requires_grad_(), TensorDataset(x, y)
    construct = partial(af.construct_robust_dataset, model, data, seed=0, step_size=STEP_SIZE)
    start = x[construct(steps=1).field("start_index")]
    with torch.no_grad():
        goal = features(model, x)

    def told(images: Tensor) -> str:
        with torch.no_grad():
            away, before = ((features(model, z) - goal).norm(dim=1).mean() for z in (images, start))
        return f"mean distance {away:.4f} of {before:.4f}"

    makers: dict[str, Callable[[], Tensor]] = {
        f"advfeat {precision}": lambda p=precision: (
            construct(steps=options.steps, precision=p).images
        )
        for precision in PRECISIONS
    }
    fewer = partial(construct, steps=options.momentum_steps, momentum=MOMENTUM)
    makers[f"advfeat bfloat16, momentum={MOMENTUM}, {options.momentum_steps} steps"] = lambda: (
        fewer(precision="bfloat16").images
    )
    plain = partial(plain_inversion, x=x, start=start, steps=options.steps)
    makers["plain float32 loop"] = partial(plain, model, backward=False)
    makers["... with loss.backward()"] = partial(plain, trainable, backward=True)
    compare("D_R, inversion", model, x, True, makers, told, options)


def compare_targeted(model: SmallResNet, x: Tensor, y: Tensor, options: argparse.Namespace) -> None:
    trainable, data = copy.deepcopy(model).requires_grad_(), TensorDataset(x, y)
    targets, steps = (y + 1) % 10, options.steps
    settings = {"eps": EPS, "steps": steps, "step_size": STEP_SIZE}

    def by_torchattacks() -> Tensor:
        attack = torchattacks.PGDL2(
            model, eps=EPS, alpha=STEP_SIZE, steps=steps, random_start=False
        )
        attack.set_mode_targeted_by_label(quiet=True)
        return attack(x, targets)

    def ours(model: torch.nn.Module, precision: Precision, patience: int | None = None) -> Tensor:
        return af.construct_det_dataset(
            model, data, precision=precision, patience=patience, **settings
        ).images

    def told(images: Tensor) -> str:
        with torch.no_grad():
            logits = model(images)
        share = (logits.argmax(1) == targets).float().mean()
        return f"success {100 * share:.1f}%, mean loss {F.cross_entropy(logits, targets):.4f}"

    makers: dict[str, Callable[[], Tensor]] = {
        f"advfeat {precision}": partial(ours, model, precision) for precision in PRECISIONS
    }
    makers[f"advfeat bfloat16, patience={PATIENCE}"] = partial(ours, model, "bfloat16", PATIENCE)
    if options.compile:
        compiled = torch.compile(model)
        makers["advfeat bfloat16, torch.compile(model)"] = partial(ours, compiled, "bfloat16")
    plain = partial(plain_pgd, x=x, targets=targets, steps=steps)
    makers["plain float32 loop"] = partial(plain, model, backward=False)
    makers["... with loss.backward()"] = partial(plain, trainable, backward=True)
    makers["torchattacks.PGDL2"] = by_torchattacks
    compare("D_det, targeted PGD", model, x, False, makers, told, options)


def main() -> None:
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # where the processor has no bfloat16, precision says so
    x, y = test_images(options.cifar, options.images)
    models = [make(options.cifar, options.cache) for make in (robust_model, standard_model)]
    for model in models:
        model.requires_grad_(False)  # torchattacks would take weight gradients too
    if "D_R" in options.sets:
        compare_inversion(models[0], x, y, options)
    if "D_det" in options.sets:
        compare_targeted(models[1], x, y, options)
    print("\n" + machine())


if __name__ == "__main__":
    main()
