"""The figures of the library, each from plain numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from advfeat import checks
from advfeat.plots.axes import (
    COLORS,
    as_list,
    figure_of,
    lines,
    new_figure,
    new_panels,
    picture,
    styles,
)
from advfeat.threat import Bounds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# More steps than this no screen shows.
_MOST_STEPS = 2000


def curves(
    rows: Sequence[Mapping[str, float]] | Any,
    *,
    quantities: Sequence[str] = (),
    ax: Sequence[Axes] | None = None,
) -> Figure:
    """Draw loss and accuracies over epochs.

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
        A panel for the loss and one for the accuracies.

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
    """Draw the percentage of samples that are still robust, over the size of the perturbation.

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
        A curve for each model.

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
    end = largest if largest is not None else max(finite, default=1.0) * 1.02 or 1.0
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
    """Draw images of several datasets, one line of images for each.

    Parameters
    ----------
    images
        For each name the images of its line, ``(N, H, W)``, ``(N, 1, H, W)`` or ``(N, 3, H, W)``.
    labels
        For the same names, or some of them, what stands under each image.
    bounds
        Values drawn black and white.

    Returns
    -------
    matplotlib.figure.Figure
        A grid of images.

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
            axes.scatter(as_list(rho), as_list(gamma), s=16, linewidths=0.8, label=label, **style)
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
    r"""Draw images, the changed images, and the difference, magnified (grey where there is none).

    Parameters
    ----------
    source, result
        Images of one shape, as in `samples`.
    labels
        What stands under each image, for ``"source"`` and ``"result"``.
    magnify
        Factor of the difference; by default its largest entry becomes black or white.
    bounds
        Values drawn black and white.

    Returns
    -------
    matplotlib.figure.Figure
        Three lines of images.

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
