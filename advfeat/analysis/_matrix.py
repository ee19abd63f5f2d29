"""One accuracy for each pair of a source and a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from advfeat import plots
from advfeat.metrics import Accuracy
from advfeat.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class AccuracyMatrix:
    """What each model scores on the data of each source.

    Attributes
    ----------
    values
        For each source, by the name of the model, an `advfeat.metrics.Accuracy`.
    what
        What is counted, for the title.
    """

    values: Mapping[str, Mapping[str, Accuracy]]
    what: str

    def __str__(self) -> str:
        """Percent, with 95% intervals."""

        def cell(found: Accuracy) -> str:
            low, high = (100 * end for end in found.interval)
            return f"{100 * float(found):.1f} ({low:.1f} to {high:.1f})"

        names = list(next(iter(self.values.values())))
        rows = [
            (source, *(cell(row[name]) for name in names)) for source, row in self.values.items()
        ]
        return f"{self.what}, percent\n" + table(("source", *names), rows)

    def plot(self) -> Figure:
        """Bars: a group for each source, a colour for each model."""
        return plots.bars(self.values, ylabel=f"{self.what} (%)")
