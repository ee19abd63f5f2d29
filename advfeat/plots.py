"""Pictures, with matplotlib (an extra): each function returns a figure and shows nothing.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; lines and bars differ in
dash, marker or hatch as well, so that a figure survives being printed in grey.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from advfeat import checks
from advfeat.threat import Bounds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["attack_steps", "bars", "curves", "differences", "robustness_curves", "samples"]

# Okabe and Ito (2008), without their yellow, which is faint on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "//", "..", "xx", "--", "\\\\")


# More steps than this no screen shows.
_MOST_STEPS = 2000


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
        axes.plot(_list(x), _list(values), label=name, markersize=5, **style)


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
    _legend_above(axes)
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


def curves(
    rows: Sequence[Mapping[str, float]] | Any,
    *,
    quantities: Sequence[str] = (),
    ax: Sequence[Axes] | None = None,
) -> Figure:
    """Loss and accuracies over epochs.

    Parameters
    ----------
    rows
        What `advfeat.fit` returns, or its ``rows``: one mapping an epoch.
    quantities
        Names to draw; by default the loss and every accuracy there is.
    ax
        Axes to draw into, in place of a new figure: one for accuracies, one for other quantities.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause.

    Examples
    --------
    >>> from advfeat import plots
    >>> row = {"epoch": 1, "loss": 2.0, "accuracy": 0.3}
    >>> [axes.get_ylabel() for axes in plots.curves([row]).axes]
    ['loss', 'accuracy (%)']
    """
    rows = getattr(rows, "rows", rows)
    if not rows:
        checks.fail("rows", rows, "no epoch was recorded")
    names = list(quantities) or [n for n in rows[-1] if n == "loss" or "accuracy" in n]
    missing = [name for name in names if name not in rows[-1]]
    if missing:
        checks.fail("quantities", missing, f"the rows have {sorted(rows[-1])}")
    accuracies = [name for name in names if "accuracy" in name]
    others = [name for name in names if "accuracy" not in name]
    panels = [part for part in (others, accuracies) if part]
    if ax is None:
        ax = new_figure(8.0 if len(panels) == 2 else 5.0, 3.4).subplots(
            1, len(panels), squeeze=False
        )[0]
    epochs = [row.get("epoch", place + 1) for place, row in enumerate(rows)]
    for axes, part in zip(new_panels(ax, len(panels), 8.0, 3.4), panels, strict=True):
        scale = 100 if part is accuracies else 1
        spelled = {
            n.replace("val_", "validation ").replace("_", " "): [
                scale * row.get(n, float("nan")) for row in rows
            ]
            for n in part
        }
        lines(axes, epochs, spelled)
        axes.set(xlabel="epoch", ylabel="accuracy (%)" if part is accuracies else " / ".join(part))
        if part is accuracies:
            axes.set_ylim(0, 102)
        if len(part) > 1 or part is accuracies:
            axes.legend(fontsize=9, framealpha=0.9)
        axes.grid(alpha=0.3)
    return figure_of(axes)


def trainings(histories: Mapping[str, Sequence[Mapping[str, float]] | Any]) -> Figure:
    """Loss and accuracy on the training batches over the epochs of several trainings.

    Parameters
    ----------
    histories
        For each model what `advfeat.fit` returned, or its ``rows``.

    Examples
    --------
    >>> from advfeat import plots
    >>> rows = [{"epoch": 1, "loss": 2.0, "accuracy": 0.3}]
    >>> [axes.get_ylabel() for axes in plots.trainings({"mine": rows}).axes]
    ['loss', 'accuracy on training batches (%)']
    """
    if not histories:
        checks.fail("histories", histories, "nothing to draw")
    figure = new_figure(9.5, 3.8)
    panels = figure.subplots(1, 2)
    for (name, history), style in zip(histories.items(), styles(), strict=False):
        rows = getattr(history, "rows", history)
        epochs = [row["epoch"] for row in rows]
        for axes, quantity, scale in zip(panels, ("loss", "accuracy"), (1, 100), strict=True):
            values = [scale * row[quantity] for row in rows]
            axes.plot(epochs, values, label=name, markersize=4, **style)
    panels[0].set(xlabel="epoch", ylabel="loss")
    panels[1].set(xlabel="epoch", ylabel="accuracy on training batches (%)", ylim=(0, 102))
    for axes in panels:
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def attack_steps(steps: Sequence[Any], *, ax: Sequence[Axes] | None = None) -> Figure:
    """Draw what ``on_step`` of an attack was called with: means over the samples of a batch.

    Parameters
    ----------
    steps
        The `advfeat.attacks.AttackStep` of every step, as ``on_step=steps.append`` gathers them.
    ax
        Four axes to draw on: loss, gradient norm, success and distance. None for a new figure.

    Returns
    -------
    matplotlib.figure.Figure
        A panel each for loss, gradient norm, success and distance, over the steps.

    Raises
    ------
    ValueError
        There is no step.

    Examples
    --------
    >>> import torch
    >>> from advfeat.attacks import PGD
    >>> steps, attack = [], PGD(eps=0.1, norm="l2")
    >>> _ = attack(torch.nn.Linear(4, 3), torch.rand(2, 4), torch.tensor([0, 2]),
    ...            on_step=steps.append)
    >>> figure = attack_steps(steps)
    """
    if not len(steps):
        checks.fail("steps", steps, "no step at all; pass on_step=steps.append to the attack")
    panels = new_panels(ax, 4, 10.4, 2.4)
    names = {"loss": "loss", "gradient_norm": "l2 norm of the gradient"}
    names |= {"success": "fooled, %", "distance": "distance"}
    for axes, (name, title) in zip(panels, names.items(), strict=True):
        means = [getattr(step, name).double().mean().item() for step in steps]
        means = [100 * mean for mean in means] if name == "success" else means
        axes.plot([step.step for step in steps], means, color=COLORS[0])
        axes.set(xlabel="step", title=title)
        axes.grid(alpha=0.3)
    return figure_of(panels[0])


def robustness_curves(
    distances: Mapping[str, Any],
    *,
    norm: str = "",
    largest: float | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Fraction of samples that need a larger perturbation, over its size.

    Parameters
    ----------
    distances
        For each model the distance of every sample to its nearest adversarial example, ``(N,)``:
        0 where the model is wrong without one, infinite where none was found. Or anything with
        such a ``distance``.
    norm
        In which the distances are, for the axis.
    largest
        Right end of the axis; by default the largest finite distance.
    ax
        Axes to draw into, in place of a new figure.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause.

    Examples
    --------
    >>> import torch
    >>> from advfeat import plots
    >>> figure = plots.robustness_curves({"mine": torch.tensor([0.0, 0.2, 0.5])}, norm="l2")
    >>> figure.axes[0].get_xlabel()
    'l2 size of the perturbation'
    """
    tensors = {name: torch.as_tensor(getattr(d, "distance", d)) for name, d in distances.items()}
    finite = [float(d[torch.isfinite(d)].max()) for d in tensors.values() if d.isfinite().any()]
    end = largest if largest is not None else max(finite, default=1.0) * 1.02
    axes = new_figure(5.4, 3.8).add_subplot() if ax is None else ax
    for (name, d), style in zip(tensors.items(), styles(), strict=False):
        edges, left = _remaining(d, end)
        axes.step(
            [*edges, end], [*left, left[-1]], where="post", label=name,
            color=style["color"], linestyle=style["linestyle"],
        )  # fmt: skip
    axes.set(
        xlim=(0, end), ylim=(0, 102), ylabel="samples still robust (%)",
        xlabel=f"{norm} size of the perturbation".strip(),
    )  # fmt: skip
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    return figure_of(axes)


def _remaining(distances: Tensor, end: float) -> tuple[list[float], list[float]]:
    """Distances up to ``end`` and the percentage of samples beyond each; thinned where many.

    A distance that is NaN counts as none: the sample is not robust.
    """
    ordered = distances.detach().double().cpu().flatten().nan_to_num(nan=-1.0, posinf=torch.inf)
    ordered = ordered.sort().values
    shown = ordered[(ordered >= 0) & (ordered <= end)]
    edges: Tensor = torch.unique(torch.cat([torch.zeros(1, dtype=torch.float64), shown]))
    if len(edges) > _MOST_STEPS:
        edges = edges[torch.linspace(0, len(edges) - 1, _MOST_STEPS).round().long()]
    beyond = len(ordered) - torch.searchsorted(ordered, edges, right=True)
    return edges.tolist(), (100 * beyond.double() / max(1, len(ordered))).tolist()


def samples(
    images: Mapping[str, Tensor],
    *,
    labels: Mapping[str, Sequence[object]] | None = None,
    bounds: Bounds = (0.0, 1.0),
) -> Figure:
    """Images in samples.

    Parameters
    ----------
    images
        For each sample its images ``(N, H, W)``, ``(N, 1, H, W)`` or ``(N, 3, H, W)``.
    labels
        For samples by name, what stands under each image.
    bounds
        Values drawn black and white.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause.

    Examples
    --------
    >>> import torch
    >>> from advfeat import plots
    >>> figure = plots.samples({"mine": torch.rand(4, 1, 8, 8)}, labels={"mine": [0, 1, 2, 3]})
    >>> len(figure.axes)
    4
    """
    if not images:
        checks.fail("images", images, "nothing to draw")
    rows = {name: picture(stack) for name, stack in images.items()}
    columns = max(len(stack) for stack in rows.values())
    low, high = bounds
    shown = {name: (stack - low) / (high - low) for name, stack in rows.items()}
    figure = new_figure(1.1 * columns + 1.2, 1.25 * len(shown))
    grid = figure.subplots(len(shown), columns, squeeze=False)
    for row, (name, stack) in enumerate(shown.items()):
        texts = (labels or {}).get(name, ())
        for column in range(columns):
            axes = grid[row, column]
            axes.set(xticks=[], yticks=[])
            if column >= len(stack):
                axes.axis("off")
                continue
            axes.imshow(stack[column].clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1)
            if column < len(texts):
                axes.set_xlabel(str(texts[column]), fontsize=9, labelpad=2)
        grid[row, 0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10)
    return figure


def usefulness_regions(axes: Axes, points: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Draw rho against gamma by kind, over the regions of robust and of non-robust features."""
    gammas = torch.cat([gamma for _, gamma in points.values()])
    bottom = min(-0.1, 1.05 * float(gammas.min()))
    axes.fill_between([0, 1], [0, 0], [0, 1], color=COLORS[4], alpha=0.25, linewidth=0)
    axes.fill_between([0, 1], bottom, 0, color=COLORS[5], alpha=0.2, linewidth=0)
    for (name, (rho, gamma)), style in zip(points.items(), _KIND_STYLES, strict=True):
        if len(rho):
            label = f"{name} ({len(rho)})"
            axes.scatter(_list(rho), _list(gamma), s=16, linewidths=0.8, label=label, **style)
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle=":")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlim=(0, 1), ylim=(bottom, 1), xlabel="usefulness rho")
    axes.set_ylabel("robust usefulness gamma")
    axes.legend(loc="upper left", fontsize=8)


_KIND_STYLES: tuple[dict[str, Any], ...] = (
    {"color": "0.55", "marker": "."},
    {"color": COLORS[1], "marker": "x"},
    {"color": COLORS[6], "marker": "+"},
    {"color": COLORS[0], "marker": "o"},
)


def differences(
    source: Tensor,
    result: Tensor,
    *,
    labels: Mapping[str, Sequence[object]] | None = None,
    magnify: float | None = None,
    bounds: Bounds = (0.0, 1.0),
) -> Figure:
    r"""Images, what became of them, and the difference magnified (grey where there is none).

    Parameters
    ----------
    source, result
        Images of one shape, as in `samples`.
    labels
        What stands under each image, for ``"source"`` and ``"result"``.
    magnify
        Factor of the difference; by default the one that takes its largest entry to black or white.
    bounds
        Values drawn black and white.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause.

    Examples
    --------
    >>> import torch
    >>> from advfeat import plots
    >>> x = torch.rand(4, 1, 8, 8)
    >>> figure = plots.differences(x, x + 0.1, labels={"source": [0, 1, 2, 3]})
    >>> len(figure.axes), figure.axes[8].get_ylabel()
    (12, 'difference\nx 5')
    """
    if source.shape != result.shape:
        checks.fail("result.shape", tuple(result.shape), f"expected that of {tuple(source.shape)}")
    low, high = bounds
    delta = (result - source).detach()
    peak = float(delta.abs().max())
    factor = magnify or ((high - low) / (2 * peak) if peak else 1.0)
    shown = {"source": source, "result": result}
    shown[f"difference\nx {factor:.3g}"] = (low + high) / 2 + factor * delta
    return samples(shown, labels=labels, bounds=bounds)


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


def _legend_above(axes: Axes) -> None:
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False, fontsize=9)


def _list(values: Sequence[float] | Tensor) -> list[float]:
    if isinstance(values, Tensor):
        return [float(value) for value in values.tolist()]
    return [float(value) for value in values]
