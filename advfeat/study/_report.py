"""A study as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import io
import json
import math
import platform
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from advfeat._version import __version__
from advfeat.durable import write_whole
from advfeat.study._data import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from advfeat.study._recipe import Recipe
    from advfeat.study._result import Study

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


def save(path: Path, study: Study, recipe: Recipe) -> None:
    """Write the report whole or not at all."""
    parts = [
        "<h1>Robust and non-robust features</h1>",
        f"<p>{escape(_summary(study))}</p>",
        *_accuracies(study),
        *_sets(study),
        *_transfer(study),
        *_leakage(study),
        *_trainings(study),
        *_provenance(study, recipe),
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>advfeat study</title><style>{_STYLE}</style></head><body>"
        + "\n".join(parts)
        + "</body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page)


def _summary(study: Study) -> str:
    s = study.settings
    return (
        f"After Ilyas et al. (2019), “Adversarial Examples Are Not Bugs, They Are Features”. "
        f"A {s['model']['class']} in {s['norm']} {s['eps']:g}, inputs in {s['bounds']}; "
        f"seed {s['seed']}. Accuracies are on the true test data."
    )


def _accuracies(study: Study) -> list[str]:
    if not study.measured:
        return []
    rows = [
        [name, *(_with_interval(share) for share in shares.values())]
        for name, shares in study.shares().items()
    ]
    note = (
        "Percent, with 95% intervals. “As label + 1” is the share of test rows that a model takes "
        "for the class after their own: what robust features teach a model of D_det."
    )
    return [
        "<h2>Accuracy</h2>",
        _table(["trained on", *study.columns()], rows),
        f'<p class="note">{note}</p>',
        _picture("accuracy of every model", study.plot),
    ]


def _sets(study: Study) -> list[str]:
    if not study.made:
        return []
    lines = "".join(
        f"<li><b>{escape(name)}</b>: {escape(text)}</li>" for name, text in study.made_lines()
    )
    return [
        "<h2>Sets</h2>",
        f"<ul>{lines}</ul>",
        _picture("images of every set, with their labels", lambda: study.plot("samples")),
    ]


def _transfer(study: Study) -> list[str]:
    if study.transfer is None:
        return []
    matrix = study.transfer
    rows = [
        # NaN where no example fools the model it was made on.
        [source, *("none" if math.isnan(value) else f"{100 * value:.1f}" for value in row)]
        for source, row in zip(matrix.sources, matrix.fooled.tolist(), strict=True)
    ]
    note = (
        "Percent of the test samples that both models classify correctly, and that the second one "
        "gets wrong when they are attacked on the first; clean error in the last row."
    )
    return [
        "<h2>Transfer</h2>",
        _table(["made on", *matrix.targets], rows),
        f'<p class="note">{note}</p>',
    ]


def _leakage(study: Study) -> list[str]:
    if not study.leakage:
        return []
    rows = [
        [name, "no linear feature is robust" if found is None else _with_interval(found)]
        for name, found in study.leakage.items()
    ]
    note = "Accuracy on true data of provably robust linear features alone that learned from a set."
    return [
        "<h2>Leakage</h2>",
        _table(["set", "accuracy"], rows),
        f'<p class="note">{note}</p>',
    ]


def _trainings(study: Study) -> list[str]:
    if not study.histories:
        return []
    return ["<h2>Trainings</h2>", _picture("loss and accuracy", lambda: study.plot("curves"))]


def _provenance(study: Study, recipe: Recipe) -> list[str]:
    rows = [[name, f"{seconds:.1f}"] for name, seconds in study.seconds.items()]
    rows.append(["all", f"{sum(study.seconds.values()):.1f}"])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    made_by = (
        f"advfeat {__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.system()} {device or platform.machine()}, {torch.get_num_threads()} threads"
    )
    settings = {**study.settings, "recipe": vars(recipe)}
    text = json.dumps(plain(settings), indent=1)
    return [
        "<h2>Time</h2>",
        _table(["stage", "seconds"], rows),
        '<p class="note">Of the call that finished the stage.</p>',
        "<h2>Settings</h2>",
        f"<p>{escape(made_by)}</p>",
        f"<pre>{escape(text)}</pre>",
    ]


def _with_interval(share: Any) -> str:
    low, high = share.interval
    return f"{100 * share:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table><tr>{cells}</tr>{body}</table></div>'


def _picture(alternative: str, draw: Callable[[], Figure]) -> str:
    try:
        figure = draw()
    except ImportError as error:
        return f'<p class="note">{escape(str(error))}</p>'
    except ValueError as error:  # rows that are no images
        return f'<p class="note">No picture: {escape(str(error))}</p>'
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    data = base64.b64encode(file.getvalue()).decode()
    # On a narrow screen it is scrolled, not shrunk until nobody can read it.
    least = f"min-width: min(44rem, {110 * figure.get_figwidth():.0f}px)"
    source = f"data:image/png;base64,{data}"
    return (
        f'<div class="wide"><img alt="{escape(alternative)}" style="{least}" src="{source}"></div>'
    )
