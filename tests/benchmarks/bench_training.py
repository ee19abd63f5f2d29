"""Images a second of PGD-7 training: advfeat, a plain loop around torchattacks' PGD, ART's trainer.

    python tests/benchmarks/bench_training.py [--batches 2] [--rounds 3] [--batch-size 64]

The same ResNet, batches and steps; the cases take turns. On a CPU the clock is that of the process,
which a busy machine disturbs less. ART is measured where it is installed
(``pip install adversarial-robustness-toolbox``).
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchattacks
from resnet import SmallResNet
from side_by_side import machine, side_by_side, table
from torch.utils.data import DataLoader, TensorDataset

import advfeat as af
from advfeat.model import Precision
from advfeat.training import Options

EPS, STEP, STEPS = 8 / 255, 2 / 255, 7
PLAIN = "plain float32 loop, torchattacks"

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--batches", type=int, default=2)
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--width", type=int, default=32)
parser.add_argument("--compile", action="store_true", help="measure compile=True as well")
options = parser.parse_args()

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
count = options.batches * options.batch_size
x = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
y = torch.arange(count) % 10
data = TensorDataset(x, y)


def network() -> SmallResNet:
    torch.manual_seed(0)
    return SmallResNet(options.width).to(device)


def sgd(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=5e-4)  # type: ignore


def plain() -> Callable[[], None]:
    model = network().train()
    optimizer = sgd(model.parameters())
    attack = torchattacks.PGD(model, eps=EPS, alpha=STEP, steps=STEPS, random_start=True)
    loader = DataLoader(data, batch_size=options.batch_size, shuffle=True)

    def epoch() -> None:
        for inputs, labels in loader:
            inputs, labels = inputs.to(device), labels.to(device)
            adversarial = attack(inputs, labels)
            optimizer.zero_grad()
            F.cross_entropy(model(adversarial), labels).backward()
            optimizer.step()

    return epoch


def ours(precision: Precision, compiled: bool = False) -> Callable[[], None]:
    model = network()
    optimizer = sgd(model.parameters())

    def epoch() -> None:
        af.adversarial_fit(
            model,
            data,
            eps=EPS,
            norm="linf",
            steps=STEPS,
            step_size=STEP,
            random_start=True,
            epochs=1,
            batch_size=options.batch_size,
            optimizer=optimizer,
            precision=precision,
            options=Options(compile=compiled),
            seed=0,
            progress=False,
        )

    return epoch


def art() -> Callable[[], None]:
    from art.defences.trainer import AdversarialTrainerMadryPGD
    from art.estimators.classification import PyTorchClassifier

    model = network()
    classifier = PyTorchClassifier(
        model=model,
        loss=torch.nn.CrossEntropyLoss(),
        optimizer=sgd(model.parameters()),
        input_shape=(3, 32, 32),
        nb_classes=10,
        clip_values=(0.0, 1.0),
    )
    trainer = AdversarialTrainerMadryPGD(
        classifier,
        nb_epochs=1,
        batch_size=options.batch_size,
        eps=EPS,
        eps_step=STEP,
        max_iter=STEPS,
        num_random_init=1,
    )
    images, labels = x.numpy(), y.numpy()
    return lambda: trainer.fit(images, labels, nb_epochs=1)


def main() -> None:
    warnings.simplefilter("ignore")  # where the processor has no bfloat16, precision says so
    cases = {
        PLAIN: plain(),
        "advfeat, float32": ours("float32"),
        "advfeat, precision='bfloat16'": ours("bfloat16"),
    }
    if options.compile:
        cases["advfeat, precision='bfloat16', compile=True"] = ours("bfloat16", compiled=True)
    try:
        cases["ART AdversarialTrainerMadryPGD"] = art()
    except ImportError as error:
        print(f"without ART: {error}")
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    seconds = side_by_side(cases, rounds=options.rounds, clock=clock)
    notes = {name: f"{count / value:.1f} images/s" for name, value in seconds.items()}
    print(machine())
    print(table(seconds, PLAIN, notes))


if __name__ == "__main__":
    main()
