"""What figures are drawn with: new axes, colours and dashes, lines, bars, matrices."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from advfeat import checks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Okabe and Ito (2008), without their yellow, which is faint on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")

DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "*", ">", "p")

HATCHES = ("", "//", "..", "xx", "--", "\\\\")


def new_figure(width: float = 6.4, height: float = 4.0) -> Figure:
    """An empty figure that no window belongs to."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'advfeat[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def new_axes(ax: Axes | None, width: float = 5.4, height: float = 3.8) -> Axes:
    """The axes of a result's ``plot(ax=None)``: those given, or the only ones of a new figure."""
    return new_panels(None if ax is None else [ax], 1, width, height)[0]


def new_panels(
    ax: Sequence[Axes] | None, count: int, width: float, height: float, **options: Any
) -> tuple[Axes, ...]:
    """As many axes side by side: those given, or those of a new figure.

    The figure is pyplot's where the user has pyplot or sits in a notebook, and so is shown there
    like any other.
    """
    if ax is None:
        if {"matplotlib.pyplot", "ipykernel"} & sys.modules.keys():
            import matplotlib.pyplot

            figure = matplotlib.pyplot.figure(figsize=(width, height), layout="constrained")
        else:
            figure = new_figure(width, height)
        return tuple(figure.subplots(1, count, squeeze=False, **options)[0])
    given = tuple(ax) if isinstance(ax, Iterable) else (ax,)
    if len(given) != count or not all(hasattr(each, "plot") for each in given):
        checks.fail("ax", f"{len(given)} objects", f"expected {count} matplotlib axes")
    return given


def figure_of(axes: Axes) -> Figure:
    """The figure that axes are in."""
    figure: Any = axes.figure
    found: Figure = figure
    return found


def styles() -> Iterator[dict[str, Any]]:
    """Colour, marker and dash of one line after another."""
    for color, marker, dash in zip(
        itertools.cycle(COLORS), itertools.cycle(MARKERS), itertools.cycle(DASHES), strict=False
    ):
        yield {"color": color, "marker": marker, "linestyle": dash}


def lines(
    axes: Axes, x: Sequence[float] | Tensor, series: Mapping[str, Sequence[float] | Tensor]
) -> None:
    """Draw one labelled line for each series, with markers where there are few points."""
    for (name, values), style in zip(series.items(), styles(), strict=False):
        if len(x) > 25:
            style["marker"] = ""
        axes.plot(as_list(x), as_list(values), label=name, markersize=5, **style)


def bars(
    groups: Mapping[str, Mapping[str, float]],
    *,
    chance: float | None = None,
    ylabel: str = "",
    ax: Axes | None = None,
) -> Figure:
    """Bars side by side, as in figure 2 of the paper: a group a dataset, a bar a measure.

    Parameters
    ----------
    groups
        For each group its values by name, from 0 to 1 (accuracies, say); drawn in percent. An
        `advfeat.metrics.Accuracy` brings its 95% interval.
    chance
        Level of guessing, drawn as a line; from 0 to 1.
    ylabel
        Of the vertical axis; by default ``"%"``.
    ax
        Axes to draw into, in place of a new figure.

    Returns
    -------
    matplotlib.figure.Figure
        A bar for each measure, grouped by dataset.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause.

    Examples
    --------
    >>> from advfeat import plots
    >>> figure = plots.bars({"D": {"accuracy": 0.95, "robust accuracy": 0.04}}, chance=0.1)
    >>> [text.get_text() for text in figure.axes[0].get_xticklabels()]
    ['D']
    """
    if not groups:
        checks.fail("groups", groups, "nothing to draw")
    names = list(dict.fromkeys(name for values in groups.values() for name in values))
    axes = new_figure(max(5.0, 1.1 * len(groups) + 2), 4.0).add_subplot() if ax is None else ax
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        offset = (place - (len(names) - 1) / 2) * width
        for column, values in enumerate(groups.values()):
            if name in values:
                _bar(axes, column + offset, width, values[name], place, None if column else name)
    if chance is not None:
        axes.axhline(100 * chance, color="black", linewidth=1, linestyle=":", label="chance")
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set(ylim=(0, 112), ylabel=ylabel or "%")
    legend_above(axes)
    return figure_of(axes)


def counts(axes: Axes, numbers: Mapping[str, int], *, total: int) -> None:
    """Draw a horizontal bar for each number of samples, the first on top."""
    for place, (name, count) in enumerate(numbers.items()):
        axes.barh(
            place, count, label=name, edgecolor="black", linewidth=0.8,
            color=COLORS[(place + 4) % len(COLORS)], hatch=HATCHES[place % len(HATCHES)],
        )  # fmt: skip
        axes.text(count, place, f" {count}", va="center", fontsize=9)
    axes.set_yticks(range(len(numbers)), list(numbers))
    axes.set(xlim=(0, 1.1 * max(1, total)), xlabel="samples")
    axes.invert_yaxis()


def limits(axes: Axes, found: Mapping[str, tuple[float, float]], *, xlabel: str) -> None:
    """Draw values as horizontal bars, each with its limit; hatched where it is above."""
    for place, (name, (value, limit)) in enumerate(found.items()):
        above = value > limit
        axes.barh(
            place, value, color=COLORS[1] if above else COLORS[4], hatch="//" if above else "",
            edgecolor="black", linewidth=0.8, label=name,
        )  # fmt: skip
        axes.plot([limit, limit], [place - 0.45, place + 0.45], color="black", linewidth=2)
        axes.text(max(value, limit), place, f" {value:.3g}", va="center", fontsize=9)
    axes.set_yticks(range(len(found)), list(found))
    largest = max((max(pair) for pair in found.values()), default=1.0)
    axes.set(xlim=(0, 1.2 * max(0.05, largest)), xlabel=f"{xlabel} (line: limit)")
    axes.invert_yaxis()


def grouped(axes: Axes, series: Mapping[str, Sequence[float]], names: Sequence[str]) -> None:
    """Draw bars side by side for each name, one a series, in the units of the values."""
    width = 0.8 / len(series)
    for place, (name, values) in enumerate(series.items()):
        at = [at + (place - (len(series) - 1) / 2) * width for at in range(len(names))]
        axes.bar(
            at, list(values), 0.95 * width, label=name, edgecolor="black", linewidth=0.8,
            color=COLORS[(place + 4) % len(COLORS)], hatch=HATCHES[place % len(HATCHES)],
        )  # fmt: skip
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(names)), list(names))
    axes.legend(frameon=False)


def heat_map(axes: Axes, values: Tensor, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Draw percentages as a matrix with its numbers."""
    axes.imshow(values.numpy(), cmap="cividis", vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(len(columns)), list(columns))
    axes.set_yticks(range(len(rows)), list(rows))
    for i, j in itertools.product(range(len(rows)), range(len(columns))):
        value = float(values[i, j])
        color = "black" if value > 55 else "white"
        axes.text(j, i, f"{value:.0f}", ha="center", va="center", color=color)


def _bar(axes: Axes, at: float, width: float, value: float, place: int, label: str | None) -> None:
    height = 100 * float(value)
    axes.bar(
        at,
        height,
        0.95 * width,
        label=label,
        color=COLORS[(place + 4) % len(COLORS)],
        hatch=HATCHES[place % len(HATCHES)],
        edgecolor="black",
        linewidth=0.8,
    )
    top = height
    if hasattr(value, "interval"):
        low, high = (100 * end for end in value.interval)
        top = high
        ends = [[max(0.0, height - low)], [max(0.0, high - height)]]
        axes.errorbar(at, height, ends, color="black", capsize=2)
    axes.text(at, top + 1, f"{height:.0f}", ha="center", va="bottom", fontsize=8)


def stretched(images: Tensor) -> Tensor:
    """Images of any range, brought to [0, 1] all together."""
    low, high = images.aminmax()
    return (images - low) / (high - low).clamp_min(1e-12)


def picture(images: Tensor) -> Tensor:
    """Images as matplotlib takes them, ``(N, H, W)`` or ``(N, H, W, 3)``, on the CPU."""
    stack = images.detach().float().cpu()
    if stack.ndim == 4 and stack.shape[1] == 1:
        return stack[:, 0]
    if stack.ndim == 4 and stack.shape[1] == 3:
        return stack.movedim(1, -1)
    if stack.ndim == 3:
        return stack
    shape = tuple(images.shape)
    checks.fail("images.shape", shape, "expected (N, H, W), (N, 1, H, W) or (N, 3, H, W)")


def legend_above(axes: Axes) -> None:
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False, fontsize=9)


def as_list(values: Sequence[float] | Tensor) -> list[float]:
    if isinstance(values, Tensor):
        return [float(value) for value in values.tolist()]
    return [float(value) for value in values]
