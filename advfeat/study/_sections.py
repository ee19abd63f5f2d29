"""The sections of a study's report."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from advfeat import pages
from advfeat._version import __version__
from advfeat.metrics import Accuracy
from advfeat.study._claims import claims_table
from advfeat.study._data import plain
from advfeat.study._explorer import explorer
from advfeat.study._findings import Findings, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Ilyas et al. 2019, figure 2, the tables of its appendix and its control: CIFAR-10, ResNet-50.
PAPER = {
    "standard": "95.3 / 4.5 / 0.0",
    "robust": "90.8 / 82.5 / 70.9",
    "D_R": "85.4 / 48.2 / 21.9",
    "D_R from noise": "84.1 / 48.3 / 29.4",
    "D_NR": "87.7 / 0.8 / 0.0",
    "D_NR from noise": "45.6 / 1.5 / 0.0",
    "D_rand": "63.3 / 0.0 / 0.0",
    "D_rand control": "25.2",
    "D_det": "43.7 / 0.0 / 0.0",
    "D_det control": "5.8",
}
DEFINITIONS = {
    "D_R": "other images, changed until a robust model's features are those of the original",
    "D_NR": "the same with a standard model's features, which are mostly not robust",
    "D_rand": "a small perturbation makes a standard model see a random class: the new label",
    "D_det": "the same with the class after the true one as the new label",
    "D_R control": "the original images, with the settings of D_R's training",
    "D_NR control": "the original images, with the settings of D_NR's training",
    "D_rand control": "D_rand from the robust model, which has few non-robust features to give",
    "D_det control": "D_det from the robust model, which has few non-robust features to give",
}


def sections(found: Findings, draw: Callable[[str], Figure]) -> Iterator[str]:
    """All of them, in order; ``draw`` makes a figure by its kind."""
    yield from _verdicts(found)
    yield from _accuracies(found, draw)
    yield from _claims(found)
    yield from _datasets(found, draw)
    yield from explorer(found.runs[0], found.work.bounds)
    yield from _transfer(found)
    yield from _leakage(found)
    if found.runs[0].histories:
        yield pages.heading("Trainings")
        yield pages.picture("loss and accuracy", lambda: draw("curves"))
    yield from _provenance(found)


def _verdicts(found: Findings) -> Iterator[str]:
    if found.claims:
        verdicts = [claim.verdict for claim in found.claims]
        counts = (f"{verdicts.count(v)} {v}" for v in ("confirmed", "not confirmed", "undecided"))
        yield pages.paragraph(
            f"The {len(verdicts)} claims of the paper on these data: {', '.join(counts)}."
        )


def _accuracies(found: Findings, draw: Callable[[str], Figure]) -> Iterator[str]:
    fractions = found.fractions()
    if not fractions:
        return
    cell = _with_interval if len(found.runs) == 1 else percent
    body = [
        [name, *(cell(v) for v in columns.values()), PAPER.get(name, "")]
        for name, columns in fractions.items()
    ]
    shown = "95% intervals" if len(found.runs) == 1 else "lowest and highest of all seeds"
    yield pages.heading("Accuracy")
    yield pages.rows(["trained on", *found.columns(), "the paper"], body)
    yield pages.note(
        f"Percent, with {shown}. “Shifted labels” is the fraction of test samples classified as "
        "the class after their own: what robust features teach a model of D_det. “The paper” has "
        "accuracy, and robust accuracy at l2 0.25 and 0.5, of a ResNet-50 on CIFAR-10."
    )
    yield pages.picture("accuracy of every model", lambda: draw("accuracy"))


def _claims(found: Findings) -> Iterator[str]:
    if found.claims:
        yield pages.heading("Claims of the paper")
        yield claims_table(found.claims, "html")
        yield pages.note(found.about_intervals())
    for text in found.notes:
        yield pages.paragraph(text)


def _datasets(found: Findings, draw: Callable[[str], Figure]) -> Iterator[str]:
    if found.means():
        yield pages.heading("Datasets")
        lines = ((name, text, DEFINITIONS.get(name)) for name, text in found.made_lines())
        yield pages.bullets(
            [(n, f"{what}. Here: {text}." if what else text) for n, text, what in lines]
        )
        alternative = "images of every dataset, with their labels"
        yield pages.picture(alternative, lambda: draw("samples"))


def _transfer(found: Findings) -> Iterator[str]:
    matrices = [run.transfer for run in found.runs if run.transfer is not None]
    if not matrices:
        return
    fooled = torch.stack([matrix.fooled for matrix in matrices]).nanmean(0)
    errors = torch.stack([matrix.clean_error for matrix in matrices]).mean(0)
    names = (*matrices[0].sources, "clean error")
    body = [
        # NaN where the two models have no sample right.
        [source, *("none" if math.isnan(value) else f"{100 * value:.1f}" for value in row)]
        for source, row in zip(names, (*fooled.tolist(), errors.tolist()), strict=True)
    ]
    yield pages.heading("Transfer")
    yield pages.rows(["made on", *matrices[0].targets], body)
    yield pages.note(
        "Percent of the test samples that both models classify correctly, and that the second one "
        "gets wrong when they are attacked on the first; means over seeds."
    )


def _leakage(found: Findings) -> Iterator[str]:
    names = found.runs[0].leakage
    if not names:
        return
    heads = ["accuracy"] if len(found.runs) == 1 else [f"seed {s}" for s in found.seeds]
    body = [
        [
            name,
            *(
                "no linear feature is robust" if each is None else _with_interval([each])
                for each in (run.leakage.get(name) for run in found.runs)
            ),
        ]
        for name in names
    ]
    yield pages.heading("Leakage")
    yield pages.rows(["dataset", *heads], body)
    yield pages.note(
        "Accuracy on original data of provably robust linear features alone that learned from a "
        f"dataset; chance is {found.chance:.1%}."
    )


def _provenance(found: Findings) -> Iterator[str]:
    seconds = found.seconds
    times = [[name, f"{value:.1f}"] for name, value in seconds.items()]
    times.append(["all", f"{sum(seconds.values()):.1f}"])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    settings = {**found.settings, "recipe": vars(found.work.recipe)}
    yield pages.heading("Time and settings")
    yield pages.paragraph(
        f"advfeat {__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.system()} {device or platform.machine()}, {torch.get_num_threads()} threads; "
        f"{sum(seconds.values()):.0f} seconds altogether"
    )
    of_call = pages.note("Of the call that finished the stage.")
    yield pages.folded("Seconds of each stage", pages.rows(["stage", "seconds"], times), of_call)
    yield pages.folded("All settings", pages.preformatted(json.dumps(plain(settings), indent=1)))


def _with_interval(values: Sequence[Accuracy]) -> str:
    low, high = values[0].interval
    return f"{100 * values[0]:.1f} ({100 * low:.1f} to {100 * high:.1f})"
