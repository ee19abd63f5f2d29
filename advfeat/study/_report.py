"""One HTML file that needs nothing else: sections of tables, pictures and text."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from advfeat.durable import write_whole
from advfeat.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ccc; text-align: right;
         white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; height: auto; } pre { overflow-x: auto; background: #f4f4f4; padding: 1rem; }
.note { color: #555; }
"""


def write(path: Path, summary: str, parts: Sequence[str]) -> None:
    """Write the report whole or not at all."""
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>advfeat study</title><style>{_STYLE}</style></head><body>"
        "<h1>Robust and non-robust features</h1>"
        f"<p>{escape(summary)}</p>" + "\n".join(parts) + "</body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page)


def heading(text: str) -> str:
    """A section begins."""
    return f"<h2>{escape(text)}</h2>"


def note(text: str) -> str:
    """A paragraph in grey."""
    return f'<p class="note">{escape(text)}</p>'


def paragraph(text: str) -> str:
    """Plain text."""
    return f"<p>{escape(text)}</p>"


def preformatted(text: str) -> str:
    """Text as it is."""
    return f"<pre>{escape(text)}</pre>"


def bullets(lines: Sequence[tuple[str, str]]) -> str:
    """A list; the first part of each line in bold."""
    items = "".join(f"<li><b>{escape(name)}</b>: {escape(text)}</li>" for name, text in lines)
    return f"<ul>{items}</ul>"


def rows(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table."""
    return table(head, body, "html")


def picture(alternative: str, draw: Callable[[], Figure]) -> str:
    """A figure inside the page, or a sentence that says why there is none."""
    try:
        figure = draw()
    except ImportError as error:
        return note(str(error))
    except ValueError as error:  # samples that are no images
        return note(f"No picture: {error}")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    data = base64.b64encode(file.getvalue()).decode()
    # On a narrow screen it is scrolled, not shrunk until nobody can read it.
    least = f"min-width: min(44rem, {110 * figure.get_figwidth():.0f}px)"
    source = f"data:image/png;base64,{data}"
    return (
        f'<div class="wide"><img alt="{escape(alternative)}" style="{least}" src="{source}"></div>'
    )
