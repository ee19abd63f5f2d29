"""What a study found: a table, pictures, a report."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from advfeat import checks, plots
from advfeat.datasets import ConstructedDataset
from advfeat.loading import Source
from advfeat.metrics import Accuracy, TransferMatrix
from advfeat.study import _report
from advfeat.study._data import share
from advfeat.study._recipe import SOURCES, TARGETED
from advfeat.tables import table as aligned
from advfeat.training import History

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from advfeat.study._run import Work

Format = Literal["text", "markdown", "csv", "json"]


@dataclass(frozen=True, eq=False)
class Measured:
    """How a model does on true test data.

    Attributes
    ----------
    standard
        Accuracy on clean inputs.
    robust
        Robust accuracy at each radius.
    moved
        Share of rows that the model takes for the class after their own. For a model that learned
        from D_det, what robust features have taught it.
    """

    standard: Accuracy
    robust: dict[float, Accuracy]
    moved: Accuracy


class Study:
    """What `run` found, of the stages that are done.

    Attributes
    ----------
    measured
        Each model on true test data: ``"standard"``, ``"robust"``, and those that learned from a
        set by its name. ``standard`` is the accuracy, ``robust`` the robust accuracy at each
        radius, ``moved`` the share of rows taken for the class after their own: for a model that
        learned from D_det, what robust features have taught it.
    histories
        `advfeat.training.History` of each model's training.
    made
        For each set, means over its rows: ``success`` of the targeted ones, ``distance`` and
        ``distance_before`` of the inverted ones, ``size``.
    transfer
        `advfeat.metrics.TransferMatrix` from the standard and the robust model to all; None before
        that stage.
    leakage
        For D_rand and D_det, accuracy on true data that provably robust linear features alone
        learn from the set (see `advfeat.analysis.leakage`); None where there is no such feature.
    seconds
        Of each stage, in the call that finished it.
    settings
        What the stages share: eps, norm, bounds, precision, seed, and digests of model and data.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self.settings = work.identity
        records = {name: work.stages.record(name) for name in work.order()}
        done = {name: record for name, record in records.items() if record is not None}
        self.seconds: dict[str, float] = {name: each["seconds"] for name, each in done.items()}
        found = {name: each["result"] for name, each in done.items()}
        self.measured = {
            name: self._measured(found[f"measure {name}"])
            for name in work.names
            if f"measure {name}" in found
        }
        self.histories = {
            name.removeprefix("train ").removeprefix("on "): History(rows)
            for name, rows in found.items()
            if name.startswith("train ")
        }
        self.made: dict[str, dict[str, float]] = {
            name: found[f"make {name}"] for name in work.recipe.sets if f"make {name}" in found
        }
        self.transfer: TransferMatrix | None = None
        if "transfer" in found:
            tensors = {name: torch.tensor(rows) for name, rows in found["transfer"].items()}
            self.transfer = TransferMatrix(("standard", "robust"), tuple(work.names), **tensors)
        self.leakage: dict[str, Accuracy | None] = {
            name: share(each["learned"]) if "learned" in each else None
            for name, each in found.get("leakage", {}).items()
        }

    def model(self, name: str) -> nn.Module:
        """A trained model; read from the folder, or trained now where it is not there."""
        checks.one_of("name", name, tuple(self._work.names))
        return self._work.model(name)

    def dataset(self, name: str) -> ConstructedDataset:
        """A set; opened in the folder, or made now where it is not there."""
        checks.one_of("name", name, tuple(self._work.recipe.sets))
        return self._work.dataset(name)

    def __str__(self) -> str:
        """The table as text."""
        return self.table()

    def table(self, format: Format = "text") -> str:
        """Accuracies of all models, in percent; in JSON from 0 to 1, with counts and intervals.

        Parameters
        ----------
        format
            ``"text"``, ``"markdown"``, ``"csv"`` or ``"json"``.
        """
        checks.one_of("format", format, ("text", "markdown", "csv", "json"))
        if format == "json":
            rows = {name: _as_json(shares) for name, shares in self.shares().items()}
            return json.dumps(rows, indent=1)
        head = ["trained on", *self.columns()]
        body = [
            [name, *(f"{100 * share:.1f}" for share in shares.values())]
            for name, shares in self.shares().items()
        ]
        if format == "csv":
            file = io.StringIO()
            csv.writer(file, lineterminator="\n").writerows([head, *body])
            return file.getvalue()
        if format == "markdown":
            rule = ["---", *("---:" for _ in head[1:])]
            return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *body])
        return aligned(tuple(head), [tuple(line) for line in body])

    def plot(self, kind: Literal["accuracy", "samples", "curves"] = "accuracy") -> Figure:
        """Figure 2 of the paper: accuracy and robust accuracy of every model.

        Parameters
        ----------
        kind
            ``"samples"`` for images of every set beside the originals with their labels,
            ``"curves"`` for the trainings.
        """
        checks.one_of("kind", kind, ("accuracy", "samples", "curves"))
        if kind == "samples":
            return self._samples()
        if kind == "curves":
            return plots.trainings(self.histories)
        groups = {
            name.replace(" ", "\n", 1): {
                "accuracy": each.standard,
                **{
                    f"robust accuracy, {self._work.norm} {radius:g}": each.robust[radius]
                    for radius in self._work.at
                },
            }
            for name, each in self.measured.items()
        }
        return plots.bars(groups, chance=1 / self._classes(), ylabel="% of test rows")

    def save_report(self, path: str | os.PathLike[str]) -> None:
        """Write one HTML file with tables, pictures, settings, times and provenance.

        Without matplotlib it has no pictures, and says so.
        """
        _report.save(Path(path), self, self._work.recipe)

    # --- Parts ---

    def _measured(self, found: dict[str, str]) -> Measured:
        robust = {radius: share(found[f"{radius:g}"]) for radius in self._work.at}
        return Measured(share(found["accuracy"]), robust, share(found["moved"]))

    def shares(self) -> dict[str, dict[str, Accuracy]]:
        """The table: for each model its accuracies, by the names of `columns`."""
        return {
            name: dict(
                zip(
                    self.columns(),
                    (each.standard, *each.robust.values(), each.moved),
                    strict=True,
                )
            )
            for name, each in self.measured.items()
        }

    def columns(self) -> list[str]:
        """Names of the table's columns."""
        per_sample_eps = [f"{self._work.norm} {radius:g}" for radius in self._work.at]
        return ["accuracy", *per_sample_eps, "as label + 1"]

    def _classes(self) -> int:
        return 1 + max(int(label) for label in self._first_rows(2048)[1])

    def _first_rows(self, count: int) -> tuple[Tensor, Tensor]:
        source = Source(self._work.rows)
        rows = source.rows(source.indices[:count], torch.device("cpu"))
        return rows.inputs, rows.labels

    def _samples(self, count: int = 8) -> Figure:
        images, labels = self._first_rows(count)
        shown, under = {"original": images}, {"original": labels.tolist()}
        for name in self.made:
            made = self.dataset(name).subset(slice(count))
            shown[name] = made.images
            under[name] = made.labels.tolist()
        return plots.samples(shown, labels=under, bounds=self._work.bounds)

    def made_lines(self) -> Iterator[tuple[str, str]]:
        """What each set's rows say on average, as sentences."""
        for name, means in self.made.items():
            if name.split()[0] in TARGETED:
                text = f"{means['success']:.1%} of rows are taken for their target"
            else:
                text = (
                    f"activations of the {SOURCES[name]} model: distance "
                    f"{means['distance']:.3g}, {means['distance_before']:.3g} at the start"
                )
            yield name, text


def _as_json(shares: dict[str, Accuracy]) -> dict[str, Any]:
    return {
        name: {
            "share": float(found),
            "count": found.count,
            "total": found.total,
            "interval": list(found.interval),
        }
        for name, found in shares.items()
    }
