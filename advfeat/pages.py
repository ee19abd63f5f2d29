"""One HTML file that needs nothing else: sections of tables, pictures and text."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from advfeat.durable import write_whole
from advfeat.tables import table
from advfeat.threat import Bounds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array: TypeAlias = npt.NDArray[Any]

_LEAST_PIXELS = 96  # smaller images are enlarged by whole factors

_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --page: #fff; --line: #ccc; --soft: #f4f4f4;
        --grey: #555; --good: #1b7837; --warn: #8a5a00; --bad: #b2182b; --curve: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --page: #16181c; --line: #444;
        --soft: #24272d; --grey: #aaa; --good: #6cc98a; --warn: #f0b64b; --bad: #ff7b86;
        --curve: #5ab4e8; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
       max-width: 66rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
         white-space: nowrap; }
th:first-child, td:first-child, .words { text-align: left; }
th:first-child, td:first-child { padding-left: 0; white-space: normal; min-width: 6.5rem; }
p, li { max-width: 48rem; }
img { max-width: 100%; height: auto; background: #fff; } td img { min-width: 4rem; }
pre { overflow-x: auto; background: var(--soft); padding: 1rem; }
@media (max-width: 32rem) { th, td { padding: .3rem .45rem; } body { margin-top: 1rem; } }
.note { color: var(--grey); } summary { cursor: pointer; }
"""


def write(path: Path, title: str, summary: str, parts: Sequence[str], *, style: str = "") -> None:
    """Write a page whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page(title, summary, parts, style=style))


def page(title: str, summary: str, parts: Sequence[str], *, style: str = "") -> str:
    """One HTML page that loads nothing."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}{style}</style></head><body>"
        f"<h1>{escape(title)}</h1>"
        f"<p>{escape(summary)}</p>" + "\n".join(parts) + "</body></html>\n"
    )


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


def folded(summary: str, *parts: str) -> str:
    """Parts of a page that are shown when asked for."""
    return f"<details><summary>{escape(summary)}</summary>{''.join(parts)}</details>"


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
    # On a narrow screen it is scrolled, not shrunk until nobody can read it.
    least = f"min-width: min(44rem, {110 * figure.get_figwidth():.0f}px)"
    source = data_uri(file.getvalue())
    return (
        f'<div class="wide"><img alt="{escape(alternative)}" style="{least}" src="{source}"></div>'
    )


def is_image(inputs: Tensor) -> bool:
    """Whether one sample is a grey or coloured image that can be shown."""
    grey = inputs.ndim == 2 or (inputs.ndim == 3 and inputs.shape[0] == 1)
    coloured = inputs.ndim == 3 and inputs.shape[0] == 3
    return (grey or coloured) and min(inputs.shape[-2:]) >= 4


def image_uri(inputs: Tensor, bounds: Bounds) -> str:
    """One image as the source of an ``img``."""
    low, high = bounds
    shown = (inputs.detach().float().cpu() - low) / (high - low)
    if shown.ndim == 3:
        shown = shown[0] if shown.shape[0] == 1 else shown.movedim(0, -1)
    pixels = (255 * shown.nan_to_num(0.5).clamp(0, 1)).round().to(torch.uint8).numpy()
    factor = max(1, _LEAST_PIXELS // max(pixels.shape[:2]))
    return data_uri(png(np.repeat(np.repeat(pixels, factor, 0), factor, 1)))


def data_uri(png_file: bytes) -> str:
    """A PNG as the source of an image, inside the page."""
    return f"data:image/png;base64,{base64.b64encode(png_file).decode()}"


def png(pixels: Array) -> bytes:
    """Encode uint8 pixels ``(H, W)`` or ``(H, W, 3)``; needs no imaging library."""
    height, width = pixels.shape[:2]
    colour = 2 if pixels.ndim == 3 else 0
    lines = np.ascontiguousarray(pixels, dtype=np.uint8).reshape(height, -1)
    raw = b"".join(b"\x00" + line.tobytes() for line in lines)

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(raw, 9)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
