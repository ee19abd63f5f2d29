"""The paper on CIFAR-10: models, D_R, D_NR, D_rand, D_det, a fresh model on each, and a report.

    python examples/cifar10.py --data data --download --budget cpu --out runs/cifar10
    python examples/cifar10.py --data data --budget cpu --estimate
    torchrun --nproc-per-node=8 examples/cifar10.py --budget paper --data data --out runs/paper

``--data`` is ``cifar-10-batches-py`` or a folder that holds it (``--download`` gets it), or an .npz
with x_train, y_train, x_test, y_test (uint8, images N x 32 x 32 x 3). After an interruption the
same command resumes. What it measured is in docs/results.md. The budgets:

small   a CNN of 0.3 M weights, half of the images, 8,000 for the sets: two hours of any CPU core
cpu     a CNN of 1.2 M weights, 20,000 images for the sets: four to five hours of one core with AMX
gpu     a ResNet-18 and short trainings, for one GPU of the H100's kind (not run yet)
paper   a ResNet-18 and the paper's own settings, for a GPU (not run yet)
"""

from __future__ import annotations

import argparse
import hashlib
import pickle
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import advfeat as af
from advfeat import study
from advfeat.training import Options, crop_flip

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
FOLDER = "cifar-10-batches-py"

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--data", type=Path, required=True, help="the folder, or an .npz")
parser.add_argument("--out", type=Path, default=Path("runs/cifar10"), help="default runs/cifar10")
parser.add_argument(
    "--budget", choices=("small", "cpu", "gpu", "paper"), default="small", help="default small"
)
parser.add_argument(
    "--download", action="store_true", help="get the images (170 MB) into --data first"
)
parser.add_argument("--url", default=URL, help="where --download finds them")
parser.add_argument("--sha256", default=SHA256, help="of the file at --url")
parser.add_argument(
    "--estimate",
    action="store_true",
    help="measure this machine for half a minute, print hours and PFLOP of each stage, and stop",
)
parser.add_argument(
    "--device",
    default="cuda" if torch.cuda.is_available() else "cpu",
    help="default cuda where there is one, else cpu",
)
parser.add_argument(
    "--precision",
    choices=("float32", "bfloat16"),
    default="bfloat16",
    help="of training and gradients, default bfloat16; verdicts are float32",
)
parser.add_argument("--stages", nargs="*", help="only these, and what they need")
parser.add_argument(
    "--pgd", action="store_true", help="print PGD-20 accuracies of the models too, at the end"
)
parser.add_argument("--seed", type=int, default=0, help="of everything random, default 0")
parser.add_argument("--samples", type=int, help="use so many training and test images only")
parser.add_argument("--epochs", type=int, help="in place of every training's own")


def download(folder: Path, url: str, sha256: str) -> None:
    """Get the original archive, check it, and unpack it into ``folder``, unless it is there."""
    if folder.name == FOLDER:
        folder = folder.parent
    if (folder / FOLDER).is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        archive = Path(scratch) / "cifar-10.tar.gz"
        urllib.request.urlretrieve(url, archive)
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != sha256:
            raise SystemExit(f"{url}: SHA-256 is {found}, expected {sha256}: nothing was unpacked")
        with tarfile.open(archive) as file:
            file.extractall(scratch, filter="data")
        (Path(scratch) / FOLDER).rename(folder / FOLDER)


def read(path: Path) -> dict[str, np.ndarray]:
    """Images N x 3 x 32 x 32 and labels, uint8 and int64, from the folder or the .npz."""
    if path.is_file():
        with np.load(path) as file:
            found = {name: file[name] for name in ("x_train", "y_train", "x_test", "y_test")}
        return {k: v.transpose(0, 3, 1, 2) if k[0] == "x" else v for k, v in found.items()}
    path = path / FOLDER if (path / FOLDER).is_dir() else path
    parts = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
    found = {}
    for part, names in parts.items():
        # The original files are pickles: read only what you downloaded from its authors.
        batches = [pickle.loads((path / name).read_bytes(), encoding="bytes") for name in names]
        found[f"x_{part}"] = np.concatenate([b[b"data"] for b in batches]).reshape(-1, 3, 32, 32)
        found[f"y_{part}"] = np.concatenate([b[b"labels"] for b in batches])
    return found


class Block(nn.Module):
    """Two convolutions and a way around them (He et al. 2016)."""

    def __init__(self, entering: int, leaving: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(entering, leaving, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(leaving)
        self.conv2 = nn.Conv2d(leaving, leaving, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(leaving)
        self.around = nn.Sequential()
        if stride != 1 or entering != leaving:
            self.around.append(nn.Conv2d(entering, leaving, 1, stride, bias=False))
            self.around.append(nn.BatchNorm2d(leaving))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(out)) + self.around(x))


class ResNet(nn.Module):
    """A ResNet for images in [0, 1]: the normalisation is inside, as advfeat wants it."""

    mean: Tensor
    std: Tensor

    def __init__(self, width: int, blocks: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4914, 0.4822, 0.4465]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.2470, 0.2435, 0.2616]).view(1, 3, 1, 1))
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        parts: list[nn.Module] = []
        entering = width
        for group, count in enumerate(blocks):
            for number in range(count):
                stride = 2 if group and not number else 1
                parts.append(Block(entering, width * 2**group, stride))
                entering = width * 2**group
        self.blocks = nn.Sequential(*parts)
        self.head = nn.Linear(entering, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.stem((x - self.mean) / self.std)).mean((2, 3)))
        return out


class Group(nn.Module):
    """Two convolutions, pooling after the first, and a connection past the second."""

    def __init__(self, entering: int, leaving: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(entering, leaving, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(leaving)
        self.conv2 = nn.Conv2d(leaving, leaving, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(leaving)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        return x + F.relu(self.norm2(self.conv2(x)))


def decorrelating_filters() -> Tensor:
    """Means and differences of 2 x 2 pixels in brightness and two colours, each with both signs.

    They are close to the principal components of small patches of photographs. With BatchNorm
    after them their outputs are nearly white, from which a network learns in fewer epochs.
    """
    colors = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 2.0, -1.0]])
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5
    filters = torch.einsum("kc,iy,jx->kijcyx", F.normalize(colors), pair, pair)
    filters = filters.reshape(12, 3, 2, 2)
    return torch.cat([filters, -filters])


class FastNet(ResNet):
    """A network that a CPU trains in minutes: early pooling, few layers."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__(24, ())
        first = nn.Conv2d(3, 24, 2, bias=False)
        first.weight.data.copy_(decorrelating_filters())
        # Of the finest differences of colours there is little: they are not to be magnified.
        self.stem = nn.Sequential(first, nn.BatchNorm2d(24, eps=1e-3), nn.ReLU())
        self.blocks = nn.Sequential(*map(Group, (24, *widths[:-1]), widths))
        self.head = nn.Linear(widths[-1], 10)


def small_net() -> nn.Module:
    return FastNet((32, 64, 128))  # 0.3 M weights


def fast_net() -> nn.Module:
    return FastNet((64, 128, 256))  # 1.2 M weights


def resnet18() -> nn.Module:
    return ResNet(64, (2, 2, 2, 2))  # 11 M weights


def shift_flip(images: Tensor) -> Tensor:
    """Shifts of up to 2 pixels: in few epochs a network learns less from shifts of up to 4."""
    return crop_flip(images, 2)


def cpu_recipe() -> study.Recipe:
    """Short one-cycle trainings, with the weight decay that those need; sets of 20,000 images.

    Inversion has momentum, and targeted perturbations twice the paper's radius.
    """
    inversion = {"steps": 60, "step_size": 0.12, "momentum": 0.9}
    targeted = {"eps": 1.0, "steps": 20}
    # Of 20,000 images: batches of 128 keep the number of steps near that of the standard model.
    fresh = {"epochs": 16, "batch_size": 128, "lr": 0.2}
    return study.Recipe(
        standard={
            "epochs": 14,
            "lr": 0.4,
            "batch_size": 256,
            "weight_decay": 1.3e-3,
            "schedule": "one_cycle",
            "augment": shift_flip,
            "options": Options(label_smoothing=0.2),
        },
        robust={"steps": 2, "step_size": 0.35, "epochs": 12},
        sets={
            "D_R": inversion,
            "D_R control": {},
            "D_NR": inversion,
            "D_rand": targeted,
            "D_rand control": {},
            "D_det": targeted,
            "D_det control": {},
        },
        fresh={
            "D_R": fresh,
            "D_NR": fresh,
            "D_rand": {**fresh, "lr": 0.02},
            "D_det": fresh,
        },
        samples=20_000,
    )


def small_recipe() -> study.Recipe:
    """The same with fewer epochs, steps and images."""
    large = cpu_recipe()
    steps = {"D_R": 40, "D_NR": 40, "D_rand": 12, "D_det": 12}
    return replace(
        large,
        standard={**large.standard, "epochs": 10},
        robust={**large.robust, "epochs": 8},
        sets={
            name: {**own, "steps": steps[name]} if name in steps else own
            for name, own in large.sets.items()
        },
        samples=8_000,
    )


def gpu_recipe() -> study.Recipe:
    """Longer trainings and inversions, two starts for each image of D_R and D_NR, all images."""
    inversion = {"steps": 150, "step_size": 0.1, "momentum": 0.9, "batch_size": 1000}
    targeted = {"steps": 100, "patience": 10, "batch_size": 1000}
    return study.Recipe(
        standard={
            "epochs": 30,
            "lr": 0.4,
            "batch_size": 512,
            "schedule": "one_cycle",
            "augment": crop_flip,
            "options": Options(label_smoothing=0.1),
        },
        robust={"steps": 3, "step_size": 0.25, "epochs": 40},
        sets={
            "D_R": {**inversion, "starts": 2},
            "D_R control": {},
            "D_NR": {**inversion, "starts": 2},
            "D_rand": targeted,
            "D_rand control": {},
            "D_det": targeted,
            "D_det control": {},
        },
        fresh={"D_rand": {"lr": 0.02}},
        measured={"batch_size": 1000},
    )


@dataclass(frozen=True)
class Budget:
    """A network, how many training and test images, and the settings of all stages."""

    network: Callable[[], nn.Module]
    train: int
    test: int
    recipe: Callable[[], study.Recipe]


BUDGETS = {
    "small": Budget(small_net, 25_000, 1_000, small_recipe),
    "cpu": Budget(fast_net, 50_000, 2_000, cpu_recipe),
    "gpu": Budget(resnet18, 50_000, 10_000, gpu_recipe),
    "paper": Budget(resnet18, 50_000, 10_000, study.Recipe.paper),
}  # fmt: skip


def recipe(options: argparse.Namespace) -> study.Recipe:
    chosen = BUDGETS[options.budget].recipe()
    if options.device.startswith("cuda"):
        given = chosen.standard.get("options", Options())
        chosen = replace(
            chosen,
            standard={**chosen.standard, "options": replace(given, compile=True)},
            sets={
                name: {**own, "compile": True} if "control" not in name else own
                for name, own in chosen.sets.items()
            },
            measured={**chosen.measured, "compile": True},
        )
    return chosen if options.epochs is None else chosen.with_epochs(options.epochs)


def images(options: argparse.Namespace) -> tuple[TensorDataset, TensorDataset]:
    """Training and test images, on the device from the beginning."""
    budget, arrays = BUDGETS[options.budget], read(options.data)

    def part(name: str, count: int) -> TensorDataset:
        count = options.samples or count
        x = torch.tensor(arrays[f"x_{name}"][:count]).to(options.device).float() / 255
        labels = torch.tensor(arrays[f"y_{name}"][:count], dtype=torch.int64)
        return TensorDataset(x, labels.to(options.device))

    return part("train", budget.train), part("test", budget.test)


def run(
    options: argparse.Namespace, stages: list[str] | None
) -> tuple[study.Study, TensorDataset, TensorDataset]:
    """The study, and training and test images."""
    train, test = images(options)
    found = study.run(
        BUDGETS[options.budget].network,
        train,
        test,
        eps=0.5,
        norm="l2",
        recipe=recipe(options),
        out=options.out,
        stages=stages,
        seed=options.seed,
        precision=options.precision,
        device=options.device,
        on_stage=lambda name, seconds: print(f"{name}: {seconds:.0f} s", flush=True),
    )
    return found, train, test


def by_pgd(found: study.Study, test: TensorDataset, options: argparse.Namespace) -> str:
    """Accuracy of each measured model under PGD-20 as a table: an upper bound of the ensemble's."""
    radii = (0.25, 0.5)
    lines = ["| PGD-20, l2 | " + " | ".join(map(str, radii)) + " |", "|---|---|---|"]
    ball: dict[str, Any] = {"norm": "l2", "steps": 20, "precision": options.precision}
    for name in found.measured:
        model = found.model(name)
        right = [float(af.robust_accuracy(model, test, eps=eps, **ball)) for eps in radii]
        lines.append(f"| {name} | " + " | ".join(f"{100 * each:.1f}" for each in right) + " |")
    return "\n".join(lines)


class Work(NamedTuple):
    """Images trained on, gradients of inputs, images evaluated: as counts, or as rates."""

    training: float = 0.0
    gradients: float = 0.0
    evaluated: float = 0.0


def work(options: argparse.Namespace) -> dict[str, Work]:
    """How much there is to do, stage by stage."""
    budget, chosen = BUDGETS[options.budget], recipe(options)
    samples = options.samples or budget.train
    found: dict[str, Work] = {}
    for name in ("standard", "robust", *chosen.sets):
        own = chosen.training(name)
        count = (
            samples if name in ("standard", "robust") else min(samples, chosen.samples or samples)
        )
        images = own["epochs"] * count
        found[f"train {name}"] = Work(images, images * own["steps"] if name == "robust" else 0)
    made = min(samples, chosen.samples or samples)
    for name in chosen.sets:
        if name not in ("D_R control", "D_NR control"):
            own = chosen.construction(name)
            found[f"make {name}"] = Work(gradients=own["steps"] * own.get("starts", 1) * made)
    # The fast ensemble takes about 200 gradients and 100 verdicts of a sample that stays robust.
    tests = (options.samples or budget.test) * 2 * (len(chosen.sets) + 2)
    found["measure all, at most"] = Work(gradients=200 * tests, evaluated=100 * tests)
    return found


def probe(options: argparse.Namespace, seconds: float = 10.0) -> Work:
    """Measure the three kinds of work, for about so many seconds each."""
    train, _ = images(options)
    count = min(len(train), 2048)
    train = TensorDataset(*(t[:count] for t in train.tensors))
    model = BUDGETS[options.budget].network().to(options.device)
    given = recipe(options).standard
    settings = {name: given[name] for name in ("batch_size", "augment") if name in given}
    x, y = (t[:256] for t in train.tensors)

    def rate(images: int, work: Callable[[], object]) -> float:
        work()  # once for what is made only once
        began, done = time.perf_counter(), 0
        while (spent := time.perf_counter() - began) < seconds:
            work()
            done += images
        return done / spent

    ball: dict[str, Any] = {"eps": 0.5, "norm": "l2", "precision": options.precision}
    return Work(
        rate(count, lambda: af.fit(
            model, train, epochs=1, lr=0.01, precision=options.precision, progress=False, **settings
        )),
        rate(5 * len(x), lambda: af.pgd(model, x, y, steps=5, **ball)),
        rate(count, lambda: af.accuracy(model, train, progress=False)),
    )  # fmt: skip


def estimate(options: argparse.Namespace, speed: Work) -> str:
    """PFLOP and hours of each stage, from the speed of this machine."""
    model = BUDGETS[options.budget].network()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(2, 3, 32, 32))
    flop = counter.get_total_flops() / 2
    counts = work(options)
    counts["all"] = Work(*map(sum, zip(*counts.values(), strict=True)))
    lines = [
        f"{options.budget} on {options.device}, {options.precision}, {torch.get_num_threads()} "
        f"threads: {speed.training:.0f} images a second in training, {speed.gradients:.0f} "
        f"gradients, {speed.evaluated:.0f} evaluated; {flop / 1e9:.2f} GFLOP a forward pass",
        f"{'stage':<24}{'PFLOP':>8}{'hours':>8}",
    ]
    for name, count in counts.items():
        passes = 3 * count.training + 2 * count.gradients + count.evaluated
        hours = sum(n / rate for n, rate in zip(count, speed, strict=True)) / 3600
        lines.append(f"{name:<24}{passes * flop / 1e15:8.2f}{hours:8.2f}")
    chosen = recipe(options)
    images = min(options.samples or 50_000, chosen.samples or 50_000)
    starts = sum(chosen.starts(n) for n in chosen.sets if f"make {n}" in counts)
    return "\n".join([*lines, f"disk: {4 * 3072 * images * starts / 1e9:.1f} GB"])


def main() -> None:
    options = parser.parse_args()
    if options.download:
        download(options.data, options.url, options.sha256)
    if options.estimate:
        print(estimate(options, probe(options)))
        return
    if dist.is_torchelastic_launched():
        dist.init_process_group("nccl" if options.device.startswith("cuda") else "gloo")
        if options.device == "cuda":
            torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    found, _, test = run(options, options.stages)
    first = not dist.is_initialized() or dist.get_rank() == 0
    if first:
        print(f"\n{found.table('markdown')}\n\nreport: {options.out / 'report.html'}")
    if options.pgd and (table := by_pgd(found, test, options)) and first:
        print(f"\n{table}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
