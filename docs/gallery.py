"""Draw docs/figures/gallery.png and docs/figures/cifar10_study.png.

    pip install -e ".[examples]" && python docs/gallery.py --data cifar10.npz

The gallery shows CIFAR-10 images and their D_R, D_NR, D_rand and D_det images. The first run trains
a standard and a robust CNN, in two minutes on one core with bfloat16, and keeps them in
--cache; later runs take seconds. --data is CIFAR-10 as examples/cifar10.py reads it: the folder
cifar-10-batches-py or an .npz. Without --data only the bar chart is drawn, from the table in
docs/results.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

import advfeat as af
from advfeat.training import crop_flip

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from cifar10 import read  # noqa: E402

CLASSES = [
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
]  # fmt: skip
SHOWN = ("automobile", "cat", "frog", "horse", "ship")
SHARED: dict[str, Any] = {
    "batch_size": 128, "augment": crop_flip, "schedule": "one_cycle", "lr": 0.05, "seed": 0,
    "precision": "bfloat16",
}  # fmt: skip
EPS = 1.0  # of D_rand and D_det, l2, as in the study of docs/results.md


def network() -> nn.Module:
    """A small CNN, so that a first run takes minutes on one core."""
    layers: list[nn.Module] = []
    for inputs, outputs, size in ((3, 32, 5), (32, 64, 3), (64, 128, 3)):
        layers += [nn.Conv2d(inputs, outputs, size, 2, size // 2, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(128 * 16, 128), nn.ReLU(), nn.Linear(128, 10)]
    return af.Normalize(nn.Sequential(*layers), mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26))


def trained(kind: str, data: TensorDataset, cache: Path, epochs: int) -> nn.Module:
    """A standard or a robust network; read from the cache if it is there."""
    torch.manual_seed(0)
    model = network()
    file = cache / f"{kind}.pt"
    if not file.exists():
        print(f"training the {kind} network for {epochs} epochs", flush=True)
        began = time.perf_counter()
        if kind == "robust":
            # Training from the standard weights takes fewer epochs than from random ones.
            model.load_state_dict(torch.load(cache / "standard.pt", weights_only=True))
            ball: dict[str, Any] = {"eps": 0.5, "norm": "l2", "steps": 2, "step_size": 0.35}
            print(af.adversarial_fit(model, data, epochs=epochs, **ball, **SHARED), flush=True)
        else:
            print(af.fit(model, data, epochs=epochs, **SHARED), flush=True)
        cache.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
        print(f"{time.perf_counter() - began:.0f} s", flush=True)
    model.load_state_dict(torch.load(file, weights_only=True))
    return model.eval()


def constructed(
    standard: nn.Module, robust: nn.Module, data: TensorDataset
) -> tuple[Tensor, Tensor, dict[str, af.ConstructedDataset]]:
    """Images, labels and the four datasets, with the paper's numbers of steps.

    Of each class that is shown: its first image for which both attacks reach their target.
    """
    labels = data.tensors[1]
    candidates = torch.cat([(labels == CLASSES.index(name)).nonzero()[:8, 0] for name in SHOWN])
    few = Subset(data, candidates.tolist())
    made = {
        "D_rand": af.construct_rand_dataset(standard, few, eps=EPS, exclude_label=True, seed=0),
        "D_det": af.construct_det_dataset(standard, few, eps=EPS),
    }
    reached = made["D_rand"].field("success") & made["D_det"].field("success")
    keep = [next(i for i in range(8 * k, 8 * k + 8) if reached[i]) for k in range(len(SHOWN))]
    shown = Subset(data, candidates[keep].tolist())
    start = data.tensors[0][: len(keep)]  # the first images of the data, whatever they show
    inverted = {
        "D_R": af.construct_robust_dataset(robust, shown, start=start),
        "D_NR": af.construct_nonrobust_dataset(standard, shown, start=start),
    }
    images = torch.stack([shown[i][0] for i in range(len(keep))])
    kept = {name: dataset.subset(keep) for name, dataset in made.items()}
    return images, labels[candidates[keep]], {**inverted, **kept}


HEADERS = {
    "original": "a CIFAR-10 image",
    "D_R": "robust model's\nfeatures of it",
    "D_NR": "standard model's\nfeatures of it",
    "D_rand": "attacked towards\na random class",
    "D_det": "attacked towards\nthe next class",
}


def gallery(images: Tensor, labels: Tensor, made: dict[str, af.ConstructedDataset]) -> Figure:
    """One line for each image; a column for each dataset, and for perturbations."""
    magnify = 0.5 / float((made["D_det"].images - images).abs().max())
    columns: list[tuple[str, str, Tensor, Tensor | None]] = [
        ("original", HEADERS["original"], images, labels)
    ]
    for name, dataset in made.items():
        columns.append((name, HEADERS[name], dataset.images, dataset.labels))
        if name in ("D_rand", "D_det"):
            change = 0.5 + magnify * (dataset.images - images)
            columns.append((f"change x {magnify:.0f}", f"{name} minus\noriginal", change, None))
    figure = Figure(figsize=(1.28 * len(columns), 1.44 * len(images) + 0.75), dpi=200)
    grid = figure.subplots(len(images), len(columns))
    figure.subplots_adjust(0.005, 0.035, 0.995, 0.885, wspace=0.06, hspace=0.26)
    for column, (name, text, stack, classes) in enumerate(columns):
        top: Axes = grid[0, column]
        top.text(0.5, 1.42, name, transform=top.transAxes, ha="center", va="bottom", size=12,
                 weight="bold")  # fmt: skip
        top.text(0.5, 1.37, text, transform=top.transAxes, ha="center", va="top", size=8.5)
        for line in range(len(images)):
            axes: Axes = grid[line, column]
            axes.imshow(stack[line].clamp(0, 1).movedim(0, -1).numpy(), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            if classes is not None:
                other = bool(classes[line] != labels[line])
                axes.set_xlabel(
                    CLASSES[int(classes[line])], fontsize=10, labelpad=3,
                    color="#B34700" if other else "black", weight="bold" if other else "normal",
                )  # fmt: skip
    return figure


# Ilyas et al. 2019: figure 2, the tables of its appendix, and its controls (ResNet-50).
PAPER: dict[str, tuple[float | None, ...]] = {
    "standard": (95.25, 4.49, 0.0), "robust": (90.83, 82.48, 70.90), "D_R": (85.40, 48.20, 21.85),
    "D_R control": (None, None, None), "D_NR": (87.68, 0.82, 0.0), "D_rand": (63.3, 0.0, 0.0),
    "D_rand control": (25.2, None, None), "D_det": (43.7, 0.0, 0.0),
    "D_det control": (5.8, None, None),
}  # fmt: skip
MEASURES = ("accuracy", "l2 0.25", "l2 0.5")


def study_numbers() -> dict[str, tuple[float, ...]]:
    """The table of the CIFAR-10 study in docs/results.md: three percentages for each model."""
    text = (ROOT / "docs/results.md").read_text()
    table = text.split("| trained on | accuracy | l2 0.25 | l2 0.5 |", 1)[1].split("\n\n", 1)[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    return {line[0]: tuple(float(cell.split(" ")[0]) for cell in line[1:4]) for line in cells}


def chart(ours: dict[str, tuple[float, ...]]) -> Figure:
    """Accuracy and robust accuracy of the study, in front of the paper's."""
    figure = Figure(figsize=(9.0, 4.3), dpi=200, layout="constrained")
    axes = figure.add_subplot()
    looks = (("#56B4E9", ""), ("#E69F00", "///"), ("#009E73", "..."))
    names = [name for name in PAPER if name in ours]
    for column, name in enumerate(names):
        for place, (color, hatch) in enumerate(looks):
            at = column + 0.27 * (place - 1)
            theirs, mine = PAPER[name][place], ours[name][place]
            if theirs is not None:
                axes.bar(at, theirs, 0.26, color="0.87", edgecolor="0.45", linewidth=0.8,
                         label="paper, ResNet-50" if not column + place else None)  # fmt: skip
            label = f"advfeat, {MEASURES[place]}" if not column else None
            axes.bar(at, mine, 0.17, color=color, hatch=hatch, edgecolor="black", linewidth=0.8,
                     label=label)  # fmt: skip
            note = {"ha": "center", "va": "bottom", "zorder": 5}
            own = axes.text(at, mine + 0.7, f"{mine:.0f}", fontsize=8.5, weight="bold", **note)
            own.set_path_effects([withStroke(linewidth=2, foreground="white")])
            if theirs is not None and theirs > mine + 6:
                axes.text(at, theirs + 0.7, f"{theirs:.0f}", fontsize=8.5, color="0.35", **note)
    axes.axhline(10, color="black", linewidth=0.8, linestyle=":", label="chance", zorder=0)
    # Two lines each, so that the first ones are at one height.
    axes.set_xticks(range(len(names)), [f"{n} ".replace(" ", "\n", 1) for n in names], fontsize=10)
    axes.set(ylim=(0, 105), ylabel="% of original test images")
    title = "Test accuracy and robust accuracy (l2) after training on each dataset, CIFAR-10"
    axes.set_title(title, fontsize=11, pad=24)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 0.995), ncols=5, frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", type=Path, help="CIFAR-10: folder or .npz")
    parser.add_argument("--cache", type=Path, default=Path("runs/gallery"), help="trained networks")
    parser.add_argument("--images", type=int, default=10_000, help="training images to use")
    parser.add_argument("--epochs", type=int, default=6, help="of each training")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/figures", help="folder")
    options = parser.parse_args()
    chart(study_numbers()).savefig(options.out / "cifar10_study.png")
    if options.data is None:
        return
    arrays = read(options.data)
    images = torch.tensor(arrays["x_train"][: options.images]).float() / 255
    data = TensorDataset(images, torch.tensor(arrays["y_train"][: options.images]).long())
    standard, robust = (
        trained(kind, data, options.cache, options.epochs) for kind in ("standard", "robust")
    )
    gallery(*constructed(standard, robust, data)).savefig(options.out / "gallery.png")


if __name__ == "__main__":
    main()
