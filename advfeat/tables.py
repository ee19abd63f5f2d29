"""The one table: as text, Markdown, HTML or CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from html import escape
from typing import Literal, NamedTuple, TypeAlias

Format: TypeAlias = Literal["text", "markdown", "html", "csv"]


def table(head: Sequence[object], rows: Sequence[Sequence[object]], format: Format = "text") -> str:
    """Lines of columns, the first to the left, the others to the right.

    Floats have four digits; anything else is printed as it is.
    """
    cells = [[str(value) for value in head], *([_cell(value) for value in row] for row in rows)]
    if format == "csv":
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerows(cells)
        return file.getvalue()
    if format == "markdown":
        rule = ["---", *("---:" for _ in head[1:])]
        return "\n".join(f"| {' | '.join(line)} |" for line in [cells[0], rule, *cells[1:]])
    if format == "html":
        columns = zip(*cells[1:], strict=True) if rows else [()] * len(cells[0])
        words = [all(not cell or cell[0].isalpha() for cell in column) for column in columns]
        marks = ["", *(' class="words"' if only else "" for only in words[1:])]
        tags = ["th", *("td" for _ in rows)]
        lines = (
            "".join(f"<{tag}{m}>{escape(c)}</{tag}>" for c, m in zip(line, marks, strict=True))
            for tag, line in zip(tags, cells, strict=True)
        )
        body = "".join(f"<tr>{line}</tr>" for line in lines)
        return f'<div class="wide"><table>{body}</table></div>'
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


class Table(NamedTuple):
    """Head and lines of a table, not yet written in any format."""

    head: Sequence[object]
    rows: Sequence[Sequence[object]]


def render(parts: Sequence[str | Table], format: Format = "text") -> str:
    """Sentences and tables below each other."""

    def written(part: str | Table) -> str:
        if isinstance(part, Table):
            return table(part.head, part.rows, format)
        if format != "html":
            return part
        return f"<p>{escape(part)}</p>".replace("\n", "<br>")

    # A Markdown table ends at an empty line.
    return ("\n\n" if format == "markdown" else "\n").join(map(written, parts))


def _cell(value: object) -> str:
    return f"{float(value):.4f}" if isinstance(value, float) else str(value)
