"""The questions of `advfeat.analysis` on the models of examples/cifar10.py.

    python examples/cifar10_questions.py --data DIR --out runs/cifar10 [--figures runs/figures]

Takes the standard and the robust model from that study's folder, and trains them there if they are
not; options as in examples/cifar10.py. What it printed is in docs/results.md. Figure 3 and "just
bugs" are in examples/cifar10_transfer.py.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from cifar10 import parser, run
from torch.utils.data import Subset

from advfeat import analysis

EPS, IMAGES, FEW = 0.5, 1000, 128

parser.add_argument("--figures", type=Path, default=Path("runs/figures"))


def main() -> None:
    options = parser.parse_args()
    options.figures.mkdir(parents=True, exist_ok=True)
    found, _, test = run(options, ["train standard", "train robust"])
    both = {name: found.model(name) for name in ("standard", "robust")}
    images, few = Subset(test, range(IMAGES)), Subset(test, range(FEW))
    seed, began = options.seed, time.perf_counter()

    def show(name: str, result: object, drawn: Any) -> None:
        axes = drawn[0] if isinstance(drawn, tuple) else drawn
        axes.figure.savefig(options.figures / f"{name}.png", dpi=100)
        print(f"\n== {name} ({time.perf_counter() - began:.0f} s)\n{result}", flush=True)

    aligned = analysis.alignment(both, images, eps=EPS, seed=seed)
    show("alignment", aligned, aligned.pictures())
    filtered = analysis.filtered_accuracy(both, images, cutoffs=[0.0, 0.125, 0.25, 0.375, 0.5])
    show("filtered_accuracy", filtered, filtered.plot())
    where = analysis.spectrum(both, Subset(test, range(512)), eps=EPS, norm="l2")
    show("spectrum", where, where.plot())
    for name, model in both.items():
        useful = analysis.usefulness(
            model, few, units=range(32), eps=EPS, norm="l2", seed=seed
        )  # of the last layer but one
        show(f"usefulness_{name}", useful, useful.plot())
        layers = analysis.layer_robustness(
            model, few, layers=["stem", "blocks.0", "blocks.1", "blocks.2"], eps=EPS, norm="l2",
            seed=seed,
        )  # fmt: skip
        show(f"layers_{name}", layers, layers.plot())
        waves = analysis.fourier_sensitivity(model, few, size=4.0, seed=seed)
        show(f"fourier_{name}", waves, waves.plot())


if __name__ == "__main__":
    main()
