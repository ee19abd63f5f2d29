"""Images a second of training, attack and inversion against what the device's arithmetic allows.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_roofline.py [--device cuda] [--compile]

The ceiling is a matrix product and a copy of large tensors, timed here, in turn with the work. The
floating-point operations of a pass are counted by torch; a gradient of the inputs counts as two
forward passes, of inputs and weights as three. ``FLOP`` is the fraction of the product's rate that
the work reaches, ``bytes`` the time that reading and writing each activation once would take, as a
fraction of the time taken: near 1, memory is the limit. ``conv`` is the share of the time that the
profiler finds in convolutions and products. A second table has the rate of each 3 x 3 convolution
of the network alone, as a fraction of the product's. On a CPU the clock is the process's.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from side_by_side import machine, side_by_side
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import advfeat as af
from advfeat.attacks import invert
from advfeat.training import Options

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from cifar10 import fast_net, resnet18, small_net

NETWORKS = {"small": small_net, "fast": fast_net, "resnet18": resnet18}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--device", default="cpu")
parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["small", "fast"])
parser.add_argument("--precisions", nargs="+", choices=DTYPES, default=list(DTYPES))
parser.add_argument("--batch", type=int, default=256)
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--size", type=int, default=2048, help="of the matrices")
parser.add_argument("--compile", action="store_true", help="compile the network for training")


def ceiling(options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """A product for each precision, and a copy."""
    size, device = options.size, options.device
    cases: dict[str, Callable[[], object]] = {}
    for name in options.precisions:
        a = torch.randn(size, size, device=device, dtype=DTYPES[name])
        cases[f"product {name}"] = lambda a=a: a @ a  # type: ignore[misc]
    source = torch.randn(16 * size * size, device=device)
    target = torch.empty_like(source)
    cases["copy"] = lambda: target.copy_(source)
    return cases


def counted(model: nn.Module, x: Tensor) -> tuple[float, float]:
    """Floating-point operations of a forward pass, and float32 bytes of all activations."""
    sizes: list[int] = []

    def add(module: nn.Module, inputs: object, out: Tensor) -> None:
        sizes.append(out.numel())

    hooks = [m.register_forward_hook(add) for m in model.modules() if not list(m.children())]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return counter.get_total_flops() / len(x), 4 * 2 * sum(sizes) / len(x)


def work(
    model: nn.Module, x: Tensor, y: Tensor, precision: str, options: argparse.Namespace
) -> dict[str, tuple[Callable[[], object], float, int]]:
    """Name, call, forward passes that it is worth, and images that it passes."""
    steps, images = options.steps, len(x) * options.steps
    data = TensorDataset(x.repeat(steps, *[1] * (x.dim() - 1)), y.repeat(steps))
    start = x.flip(0)
    return {
        "training": (
            lambda: af.fit(
                model, data, epochs=1, lr=1e-4, batch_size=len(x), precision=precision,
                progress=False, options=Options(compile=options.compile),
            ), 3.0, images,
        ),
        "attack": (
            lambda: af.pgd(model, x, y, eps=0.5, norm="l2", steps=steps, precision=precision),
            2.0, images,
        ),
        "inversion": (
            lambda: invert(model, x, start, steps=steps, precision=precision), 2.0, images
        ),
        "evaluation": (
            lambda: af.accuracy(model, data, batch_size=len(x), progress=False), 1.0, images
        ),
    }  # fmt: skip


def convolution_share(job: Callable[[], object]) -> float:
    """Share of the time of a call that is in convolutions and products, not around them."""
    with torch.profiler.profile() as profile:
        job()
    times = {
        e.key: e.self_cpu_time_total + e.self_device_time_total for e in profile.key_averages()
    }
    own = ("convolution", "addmm", "::mm", "linear")
    return sum(t for key, t in times.items() if any(o in key for o in own)) / sum(times.values())


def convolutions(model: nn.Module, x: Tensor, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Each kind of 3 x 3 convolution of a model: its passes as calls, and operations of one."""
    found: dict[str, dict[str, Any]] = {}

    def add(module: nn.Module, inputs: tuple[Tensor], out: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        if module.kernel_size != (3, 3) or module.in_channels == 3:
            return
        name = f"{module.in_channels} to {module.out_channels}, {out.shape[-1]} x {out.shape[-1]}"
        given = inputs[0].detach().to(dtype, memory_format=torch.channels_last).requires_grad_()
        weight = module.weight.detach().to(dtype).requires_grad_()
        done = F.conv2d(given, weight, stride=module.stride, padding=module.padding)
        back = torch.randn_like(done)
        found[name] = {
            "forward": lambda: F.conv2d(given, weight, None, module.stride, module.padding),
            "of inputs": lambda: torch.autograd.grad(done, given, back, retain_graph=True),
            "of weights": lambda: torch.autograd.grad(done, weight, back, retain_graph=True),
            "flop": 2 * 9 * module.in_channels * out.numel(),
        }

    hooks = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, nn.Conv2d)]
    model(x)
    for hook in hooks:
        hook.remove()
    return found


def measure_convolutions(name: str, options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    model = NETWORKS[name]().to(options.device).eval()
    x = torch.rand(options.batch, 3, 32, 32, device=options.device)
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    kinds = ("forward", "of inputs", "of weights")
    print("\n| convolution | precision | forward | gradient of inputs | of weights |")
    print("|---|---|---|---|---|")
    for precision in options.precisions:
        found = convolutions(model, x, DTYPES[precision])
        product = f"product {precision}"
        cases = {product: ceiling(options)[product]}
        cases |= {f"{n} {k}": one[k] for n, one in found.items() for k in kinds}
        seconds = side_by_side(cases, options.rounds, clock)
        rate = 2 * options.size**3 / seconds[product]
        for each, one in found.items():
            reached = (f"{one['flop'] / seconds[f'{each} {k}'] / rate:.2f}" for k in kinds)
            print(f"| {each} | {precision} | " + " | ".join(reached) + " |")


def measure(name: str, options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    model = NETWORKS[name]().to(options.device).eval()
    x = torch.rand(options.batch, 3, 32, 32, device=options.device)
    y = torch.randint(0, 10, (options.batch,), device=options.device)
    flop, moved = counted(model, x)
    jobs = {
        (kind, precision): job
        for precision in options.precisions
        for kind, job in work(model, x, y, precision, options).items()
        if kind != "evaluation" or precision == "float32"  # verdicts are float32
    }
    cases = ceiling(options) | {f"{k} {p}": call for (k, p), (call, _, _) in jobs.items()}
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    seconds = side_by_side(cases, options.rounds, clock)
    rate = {p: 2 * options.size**3 / seconds[f"product {p}"] for p in options.precisions}
    bandwidth = 2 * 4 * 16 * options.size**2 / seconds["copy"]
    peaks = ", ".join(f"{p} {value / 1e9:.0f} GFLOP/s" for p, value in rate.items())
    print(f"\n{name}: {flop / 1e9:.3f} GFLOP, {moved / 1e6:.2f} MB an image; product {peaks}, copy "
          f"{bandwidth / 1e9:.1f} GB/s\n")  # fmt: skip
    print("| work | precision | images/s | FLOP | bytes | conv |\n|---|---|---|---|---|---|")
    for (kind, precision), (job, passes, images) in jobs.items():
        each = seconds[f"{kind} {precision}"] / images
        size = 1.0 if precision == "float32" else 0.5
        arithmetic = passes * flop / each / rate[precision]
        memory = passes * size * moved / each / bandwidth
        print(f"| {kind} | {precision} | {1 / each:.0f} | {arithmetic:.2f} | {memory:.2f} | "
              f"{convolution_share(job):.2f} |")  # fmt: skip


def main() -> None:
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # where the processor has no bfloat16, precision says so
    print(machine())
    for name in options.networks:
        measure(name, options)
        measure_convolutions(name, options)


if __name__ == "__main__":
    main()
