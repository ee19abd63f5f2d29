"""What training recorded: rows to print, save and plot."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from advfeat import checks, plots
from advfeat.durable import as_path, write_whole
from advfeat.results import Result
from advfeat.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(repr=False)
class History(Result):
    """What training recorded: one row an epoch, as plain dictionaries.

    Attributes
    ----------
    rows
        One dictionary an epoch.
    best
        Epoch with the highest validation figure, None without validation.

    Examples
    --------
    >>> print(History([{"epoch": 1, "loss": 0.5, "seconds": 1.0}]))
    epoch    loss  seconds
    1      0.5000   1.0000
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    best: int | None = None

    def __post_init__(self) -> None:
        """Take rows from JSON as well."""
        self.rows = list(self.rows)

    def _fields(self) -> dict[str, Any]:
        # A validation accuracy is a plain number here, without its outcomes.
        rows = [
            {n: v if isinstance(v, int) else float(v) for n, v in row.items()} for row in self.rows
        ]
        return {"rows": rows, "best": self.best}

    def _summary(self) -> str:
        if not self.rows:
            return "no epochs"
        last = [f"{n} {_cell(v)}" for n, v in self.rows[-1].items() if n == "loss" or "acc" in n]
        count = len(self.rows)
        epochs = "1 epoch" if count == 1 else f"{count} epochs"
        return ", ".join([epochs, *last])

    def _content(self) -> Sequence[str | Table]:
        if not self.rows:
            return ["(no epochs)"]
        names = self._names()
        return [Table(names, [[_cell(row.get(name)) for name in names] for row in self.rows])]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the rows to a ``.csv`` file, or rows and best epoch to a ``.json`` file."""
        path = as_path(path)
        if path.suffix == ".json":
            write_whole(path, json.dumps(self.to_dict(), indent=1) + "\n")
        elif path.suffix == ".csv":
            file = io.StringIO()
            writer = csv.DictWriter(file, self._names())
            writer.writeheader()
            writer.writerows(self.rows)
            write_whole(path, file.getvalue())
        else:
            checks.fail("path", str(path), "name a file that ends in .csv or .json")

    def plot(self, ax: Sequence[Axes] | None = None) -> tuple[Axes, ...]:
        """Loss and accuracies over the epochs, in two panels."""
        if not self.rows:
            checks.fail("rows", self.rows, "no epoch was recorded")
        panels = 1 + any("accuracy" in name for name in self.rows[-1])
        axes = plots.new_panels(ax, panels, 8.0 if panels == 2 else 5.0, 3.4)
        plots.curves(self, ax=axes)
        return axes

    def _names(self) -> list[str]:
        """Every column, in the order in which they first appear."""
        return list(dict.fromkeys(name for row in self.rows for name in row))


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    if isinstance(value, int):
        return str(value)
    # A small learning rate is not 0.
    return f"{float(value):.1e}" if 0 < abs(value) < 1e-3 else f"{float(value):.4f}"
