"""Tables as text."""

from __future__ import annotations


def table(head: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    """Lines of aligned columns, the first to the left."""
    cells = [head, *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def _cell(value: object) -> str:
    return f"{float(value):.4f}" if isinstance(value, float) else str(value)
