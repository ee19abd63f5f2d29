"""What training recorded: rows to print, save and plot."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from advfeat import checks, plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class History:
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
        1  0.5000   1.0000
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    best: int | None = None

    def __str__(self) -> str:
        """A table of all rows."""
        if not self.rows:
            return "(no epochs)"
        names = self._names()
        lines = [[_cell(row.get(name)) for name in names] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(names, *lines, strict=True)]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in [names, *lines]
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the rows to a ``.csv`` file, or rows and best epoch to a ``.json`` file."""
        path = Path(path)
        if path.suffix == ".json":
            path.write_text(json.dumps({"best": self.best, "rows": self.rows}, indent=1) + "\n")
        elif path.suffix == ".csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, self._names())
                writer.writeheader()
                writer.writerows(self.rows)
        else:
            checks.fail("path", str(path), "name a file that ends in .csv or .json")

    def plot(self) -> Figure:
        """Loss and accuracies over the epochs."""
        return plots.curves(self)

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
