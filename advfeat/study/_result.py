"""What a study found: a table, claims, pictures, a report."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

from advfeat import checks, pages, plots
from advfeat.datasets import ConstructedDataset
from advfeat.durable import as_path
from advfeat.loading import Source
from advfeat.metrics import Accuracy, TransferMatrix
from advfeat.results import Result
from advfeat.study._calibration import Calibration
from advfeat.study._claims import Claim, claims_as_table, claims_table
from advfeat.study._comparison import Comparison, compare
from advfeat.study._data import plain
from advfeat.study._findings import Findings, Measured, Run, Spread, percent
from advfeat.study._sections import sections
from advfeat.tables import Table
from advfeat.tables import table as lines
from advfeat.training import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Format = Literal["text", "markdown", "csv", "json"]


class Study(Result):
    """What `run` found, of the stages that are done.

    The attributes are those of one seed. A study of several seeds has a `Study` for each in
    ``runs``; its table, claims, pictures and report are of all of them, and its other attributes
    raise an error.

    Attributes
    ----------
    runs
        One study for each seed; of a single seed, the study itself.
    measured
        Each model on original test data: ``"standard"``, ``"robust"``, and those that learned
        from a dataset by its name. ``standard`` is the accuracy, ``robust`` the robust accuracy at
        each radius, ``shifted`` the fraction of samples classified as the class after their own:
        for a model that learned from D_det, what robust features have taught it.
    histories
        `advfeat.training.History` of each model's training.
    made
        For each dataset, means over its samples: ``success`` of the targeted ones, ``distance``
        and ``distance_before`` of the inverted ones, ``size``.
    transfer
        `advfeat.metrics.TransferMatrix` from the standard and the robust model to all; None before
        that stage.
    leakage
        For D_rand and D_det, accuracy on original data that provably robust linear features alone
        learn from the dataset (see `advfeat.analysis.leakage`); None where there is no such
        feature.
    seconds
        Of calibration and of each stage, in the call that finished it; of several seeds their sum.
    calibration
        What `calibrate` chose and why, for ``recipe="auto"``; else None.
    settings
        What the stages share: eps, norm, bounds, precision, seed, and digests of model and data.
    """

    def __init__(self, runs: Sequence[Run], calibration: Calibration | None = None) -> None:
        self._found = Findings(tuple(runs), calibration)
        self.calibration = calibration

    @property
    def settings(self) -> dict[str, Any]:
        return self._found.settings

    @property
    def seconds(self) -> dict[str, float]:
        return self._found.seconds

    @property
    def chance(self) -> float:
        """Fraction of the commonest class of the test data: what a constant answer gets right."""
        return self._found.chance

    @property
    def claims(self) -> tuple[Claim, ...]:
        """The paper's claims, each with its evidence and a verdict.

        Every ``difference`` is on the same test samples. With one seed its interval speaks of new
        test samples for these very models; with several also of newly trained models.
        """
        return self._found.claims

    @property
    def notes(self) -> list[str]:
        """Where the claims are not confirmed, and what data or settings lack, with numbers."""
        return self._found.notes

    @property
    def runs(self) -> tuple[Study, ...]:
        return (
            (self,)
            if len(self._found.runs) == 1
            else tuple(Study([run]) for run in self._found.runs)
        )

    @property
    def measured(self) -> dict[str, Measured]:
        return self._single("measured").measured

    @property
    def histories(self) -> dict[str, History]:
        return self._single("histories").histories

    @property
    def made(self) -> dict[str, dict[str, float]]:
        return self._single("made").made

    @property
    def transfer(self) -> TransferMatrix | None:
        return self._single("transfer").transfer

    @property
    def leakage(self) -> dict[str, Accuracy | None]:
        return self._single("leakage").leakage

    def model(self, name: str) -> nn.Module:
        """A trained model; read from the folder, or trained now where it is not there."""
        return self._single("model").model(name)

    def dataset(self, name: str) -> ConstructedDataset:
        """A dataset; opened in the folder, or made now where it is not there."""
        return self._single("dataset").dataset(name)

    def _summary(self) -> str:
        names = ", ".join(self._found.fractions()) or "no model yet"
        confirmed = sum(claim.verdict == "confirmed" for claim in self.claims)
        claims = f"; {confirmed} of {len(self.claims)} claims confirmed" if self.claims else ""
        return f"{len(self._found.runs)} seeds, models: {names}{claims}"

    def _content(self) -> Sequence[str | Table]:
        fractions = self._found.fractions()
        body = [[name, *map(percent, columns.values())] for name, columns in fractions.items()]
        parts: list[str | Table] = [Table(["trained on", *self._found.columns()], body)]
        if self.claims:
            parts += ["", claims_as_table(self.claims), self._found.about_intervals()]
        expected: tuple[str, ...] = ()
        if self.calibration is not None and not self.claims:
            expected = self.calibration.warnings  # once measured, the study's own notes say more
        return parts + [f"\nNote: {text}" for text in (*expected, *self.notes)]

    def _fields(self) -> dict[str, Any]:
        """Numbers, claims and settings; models and datasets are in the folder."""
        return {
            "settings": plain(self.settings),
            "seeds": list(self._found.seeds),
            "accuracies": json.loads(self.table("json")),
            "chance": self.chance,
            "claims": list(self.claims),
            "notes": self.notes,
            "seconds": self.seconds,
            "calibration": self.calibration,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Raise an error: a study is read from its folder, by `run` with the same arguments."""
        raise TypeError("a Study is read from its folder: call advfeat.study.run with out=folder")

    def table(self, format: Format = "text") -> str:
        """Accuracies of all models, in percent; of several seeds the mean, lowest and highest.

        In JSON from 0 to 1, with counts and intervals, of several seeds as a list.

        Parameters
        ----------
        format
            ``"text"``, ``"markdown"``, ``"csv"`` or ``"json"``.
        """
        checks.one_of("format", format, ("text", "markdown", "csv", "json"))
        fractions = self._found.fractions()
        if format == "json":
            found = {
                name: {
                    column: _as_json(values[0])
                    if len(values) == 1
                    else [_as_json(value) for value in values]
                    for column, values in columns.items()
                }
                for name, columns in fractions.items()
            }
            return json.dumps(found, indent=1)
        body = [
            [name, *(percent(values) for values in columns.values())]
            for name, columns in fractions.items()
        ]
        return lines(["trained on", *self._found.columns()], body, format)

    def claims_table(self, format: Literal["text", "markdown", "csv"] = "text") -> str:
        """The claims with their evidence: differences in points with 95% intervals, verdicts."""
        checks.one_of("format", format, ("text", "markdown", "csv"))
        return claims_table(self.claims, format)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Figure 2 of the paper: accuracy and robust accuracy of every model."""
        groups = {
            name.replace(" ", "\n", 1): {
                column if column == "accuracy" else f"robust accuracy, {column}": (
                    values[0] if len(values) == 1 else Spread.of(values)
                )
                for column, values in columns.items()
                if column != "shifted labels"
            }
            for name, columns in self._found.fractions().items()
        }
        ax = plots.new_axes(ax, max(5.0, 1.1 * len(groups) + 2), 4.0)
        plots.bars(groups, chance=self.chance, ylabel="% of test samples", ax=ax)
        return ax

    def curves(self) -> Figure:
        """Loss and accuracy of every training; of several seeds, the first."""
        return plots.trainings(self._found.runs[0].histories)

    def pictures(self, count: int = 8) -> Figure:
        """Images of every dataset beside the originals with their labels; of the first seed."""
        run = self._found.runs[0]
        source = Source(self._found.work.samples)
        found = source.samples(source.indices[:count], torch.device("cpu"))
        shown: dict[str, Tensor] = {"original": found.inputs}
        under: dict[str, Sequence[object]] = {"original": found.labels.tolist()}
        for name in run.made:
            made = run.dataset(name).subset(slice(count))
            shown[name] = made.images
            under[name] = made.labels.tolist()
        return plots.samples(shown, labels=under, bounds=self._found.work.bounds)

    def compare(self, other: Study) -> Comparison:
        """Differences to another study on the same test data, such as one with other settings.

        Parameters
        ----------
        other
            A study with the same test data, norm and number of seeds.

        Returns
        -------
        Comparison
            This study minus the other, model by model, with paired intervals.

        Raises
        ------
        ValueError
            The test data, the norm or the number of seeds differ, or no model is in both.
        """
        return compare(self._found, other._found)

    def save_report(
        self, path: str | os.PathLike[str], *, compared_with: Study | None = None
    ) -> None:
        """Write one HTML file with tables, claims, pictures, settings, times and provenance.

        Without matplotlib it has no figures, and names what to install.

        Parameters
        ----------
        path
            The file; its folder is made.
        compared_with
            Another study on the same test data: the report has a table of differences to it.
        """
        s = self.settings
        summary = (
            "After Ilyas et al. (2019), “Adversarial Examples Are Not Bugs, They Are Features”. "
            f"A {s['model']['class']} in {s['norm']} {s['eps']:g}, inputs in {s['bounds']}; "
            f"seed {s['seed']}. Accuracies are on the original test data."
        )
        parts = list(sections(self._found, self._draw))
        if compared_with is not None:
            found = self.compare(compared_with)
            parts += [pages.heading("Compared with another study"), found._repr_html_()]
        if self.calibration is not None:
            parts += [pages.heading("Calibration"), pages.preformatted(str(self.calibration))]
        pages.write(as_path(path), "Robust and non-robust features", summary, parts)

    def _draw(self, kind: str) -> Figure:
        """A figure of the report."""
        if kind == "samples":
            return self.pictures()
        return self.curves() if kind == "curves" else plots.figure_of(self.plot())

    # --- Parts ---

    def _single(self, attribute: str) -> Run:
        """The only run."""
        if len(self._found.runs) > 1:
            raise ValueError(
                f"{attribute}: this study has {len(self._found.runs)} seeds; take it from one of "
                f".runs, as in study.runs[0].{attribute}"
            )
        return self._found.runs[0]


def _as_json(found: Accuracy) -> dict[str, Any]:
    return {
        "fraction": float(found),
        "count": found.count,
        "total": found.total,
        "interval": list(found.interval),
    }
