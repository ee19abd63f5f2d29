"""Constructing D_R and D_det against the bare limit, a plain float32 loop and torchattacks.

OMP_NUM_THREADS=1 python tests/benchmarks/bench_construct.py [--compile]
"""

from __future__ import annotations

import copy
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
import torchattacks
from resnet import SmallResNet
from side_by_side import machine, side_by_side, table
from torch import Tensor
from torch.utils.data import TensorDataset

import advfeat as af
from advfeat.attacks import Batch, Inversion
from advfeat.model import Precision, attackable

BATCH, STEPS, ROUNDS = 32, 100, 2
EPS, STEP_SIZE = 0.5, 0.1


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
    attack = (
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


def plain_inversion(model: SmallResNet, x: Tensor, start: Tensor, backward: bool) -> Tensor:
    """As a user would write it."""
    with torch.no_grad():
        goal = features(model, x)
    made = start.clone()
    for _ in range(STEPS):
        made = made.detach().requires_grad_()
        distance = (features(model, made) - goal).norm(dim=1).sum()
        gradient = gradient_of(distance, made, backward)
        length = gradient.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
        made = (made.detach() - STEP_SIZE * gradient / length).clamp(0, 1)
    return made


def plain_pgd(model: SmallResNet, x: Tensor, targets: Tensor, backward: bool) -> Tensor:
    """As a user would write it."""
    made = x.clone()
    for _ in range(STEPS):
        made = made.detach().requires_grad_()
        loss = F.cross_entropy(model(made), targets, reduction="sum")
        gradient = gradient_of(loss, made, backward)
        length = gradient.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
        delta = made.detach() - STEP_SIZE * gradient / length - x
        size = delta.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
        made = (x + delta * (EPS / size).clamp_max(1)).clamp(0, 1)
    return made


def main() -> None:
    warnings.simplefilter("ignore")  # where the processor has no bfloat16, precision says so
    torch.manual_seed(0)
    model = SmallResNet()
    x, y = torch.rand(BATCH, 3, 32, 32), torch.randint(0, 10, (BATCH,))
    af.fit(model, TensorDataset(x, y), epochs=5, batch_size=32, seed=0)  # off its random start
    model.eval()
    trainable = copy.deepcopy(model)
    model.requires_grad_(False)
    compiled = torch.compile(model) if "--compile" in sys.argv else None
    data, targets = TensorDataset(x, y), (y + 1) % 10
    last: dict[str, Tensor] = {}

    def run(name: str, make: Callable[[], Tensor]) -> Callable[[], None]:
        def keep() -> None:
            last[name] = make()

        return keep

    def ours(inversion: bool, precision: str) -> Callable[[], Tensor]:
        options = {"steps": STEPS, "step_size": STEP_SIZE, "precision": precision}
        if inversion:
            return lambda: af.construct_robust_dataset(model, data, seed=0, **options).images
        return lambda: af.construct_det_dataset(model, data, eps=EPS, **options).images

    def torchattacks_pgd() -> Tensor:
        attack = torchattacks.PGDL2(
            model, eps=EPS, alpha=STEP_SIZE, steps=STEPS, random_start=False
        )
        attack.set_mode_targeted_by_label(quiet=True)
        return attack(x, targets)

    start = x[af.construct_robust_dataset(model, data, seed=0, steps=1).field("start_index")]
    last_format = torch.channels_last
    for title, inversion, others in (
        (
            "D_R, inversion",
            True,
            {
                "plain float32 loop": lambda: plain_inversion(model, x, start, False),
                "... with loss.backward()": lambda: plain_inversion(trainable, x, start, True),
            },
        ),
        (
            "D_det, targeted PGD",
            False,
            {
                "plain float32 loop": lambda: plain_pgd(model, x, targets, False),
                "... with loss.backward()": lambda: plain_pgd(trainable, x, targets, True),
                "torchattacks.PGDL2": torchattacks_pgd,
            },
        ),
    ):
        cases: dict[str, Callable[[], object]] = {}
        for precision in ("float32", "bfloat16"):
            fast = x.contiguous(memory_format=last_format)
            cases[f"bare {precision}"] = lambda p=precision, v=fast, i=inversion: bare(
                model, v, STEPS, p, i
            )
            cases[f"advfeat {precision}"] = run(f"advfeat {precision}", ours(inversion, precision))
        if compiled is not None and not inversion:
            whole = partial(
                af.construct_det_dataset, compiled, data, eps=EPS, steps=STEPS, step_size=STEP_SIZE
            )
            name = "advfeat bfloat16, torch.compile(model)"
            cases[name] = run(name, lambda f=whole: f(precision="bfloat16").images)
        cases |= {name: run(name, make) for name, make in others.items()}
        seconds = side_by_side(cases, ROUNDS, time.process_time)

        def note(images: Tensor, inversion: bool = inversion) -> str:
            with torch.no_grad():
                if inversion:
                    away = (features(model, images) - features(model, x)).norm(dim=1)
                    return f"mean distance {away.mean():.4f}"
                return f"success {(model(images).argmax(1) == targets).float().mean():.4f}"

        print(f"\n{title}: {BATCH} images, {STEPS} steps\n")
        print(table(seconds, "plain float32 loop", {n: note(v) for n, v in last.items()}))
        precisions: tuple[Precision, ...] = ("float32", "bfloat16")
        for precision in precisions:
            share = share_of_limit(model, x, precision, inversion)
            print(f"\n{precision}: a step of the loop at {share:.3f} of the bare limit", flush=True)
        last.clear()
    print("\n" + machine())


if __name__ == "__main__":
    main()
