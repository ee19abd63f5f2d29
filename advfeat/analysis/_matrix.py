"""One accuracy for each pair of a source and a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from advfeat import plots
from advfeat.metrics import Accuracy
from advfeat.results import Result
from advfeat.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False, repr=False)
class AccuracyMatrix(Result):
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

    def _summary(self) -> str:
        return f"{self.what}, sources {', '.join(self.values)}"

    def _content(self) -> Sequence[str | Table]:
        def cell(found: Accuracy) -> str:
            low, high = (100 * end for end in found.interval)
            return f"{100 * float(found):.1f} ({low:.1f} to {high:.1f})"

        names = list(next(iter(self.values.values())))
        rows = [
            (source, *(cell(row[name]) for name in names)) for source, row in self.values.items()
        ]
        return [f"{self.what}, percent", Table(("source", *names), rows)]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Bars: a group for each source, a colour for each model."""
        ax = plots.new_axes(ax)
        plots.bars(self.values, ylabel=f"{self.what} (%)", ax=ax)
        return ax
