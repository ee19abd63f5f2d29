"""Two published measures of input gradients beside `alignment`: Etmann's and LIGS."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advfeat import checks, plots, seeding, threat
from advfeat.analysis._features import batches, named_models, nearby
from advfeat.attacks import Batch
from advfeat.loading import Data
from advfeat.model import Network, attackable
from advfeat.results import Result
from advfeat.tables import Table
from advfeat.threat import Bounds, Norm

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False, repr=False)
class GradientMeasures(Result):
    """Etmann's alignment and LIGS of several models; see `gradient_measures`.

    Attributes
    ----------
    alignment
        Of each model and sample, ``(N,)``: a length in the units of the inputs.
    similarity
        Of each model and sample, ``(N,)``: a cosine.
    eps, norm
        Ball of the random points.
    """

    alignment: Mapping[str, Tensor]
    similarity: Mapping[str, Tensor]
    eps: float
    norm: Norm

    def _summary(self) -> str:
        return f"{', '.join(self.alignment)}, {self.norm} {self.eps:g}"

    def _content(self) -> Sequence[str | Table]:
        def cell(values: Tensor) -> str:
            if len(values) == 1:
                return f"{float(values):.3f}"
            return f"{float(values.mean()):.3f} +- {float(values.std()) / len(values) ** 0.5:.3f}"

        return [
            Table(
                ("model", "Etmann's alignment", f"LIGS, {self.norm} {self.eps:g}"),
                [
                    (name, cell(self.alignment[name]), cell(self.similarity[name]))
                    for name in self.alignment
                ],
            )
        ]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Mean similarity of each model."""
        groups = {
            name: {"LIGS": float(values.mean().clamp(0, 1))}
            for name, values in self.similarity.items()
        }
        ax = plots.new_axes(ax)
        plots.bars(groups, ylabel="gradient similarity (%)", ax=ax)
        return ax


def gradient_measures(
    models: Mapping[str, nn.Module],
    data: Data,
    *,
    eps: float,
    norm: Norm = "l2",
    draws: int = 4,
    bounds: Bounds = (0.0, 1.0),
    seed: int | None = None,
    batch_size: int | None = None,
) -> GradientMeasures:
    """Measure input gradients as published, to compare with `alignment`.

    Etmann et al. (2019): ``abs(<x, g>) / ||g||`` with g the gradient of the largest logit. For a
    score w^T x it is the distance of x to the boundary w^T x = 0. Local input-gradient similarity
    (LIGS): the cosine of the gradients of the *loss* at x and at random points of the ball, mean
    of ``draws``, as in Andriushchenko and Flammarion (2020); 1 for a linear model of two classes.
    `alignment` takes the margin's gradient and cosines with images and class means.

    Parameters
    ----------
    models
        By name.
    data
        A dataset, a loader or a list of batches.
    eps, norm, draws
        Ball of the random points, and how many for each sample.
    bounds, batch_size
        As in `advfeat.robust_accuracy`.
    seed
        Of the points; None draws one number.

    Returns
    -------
    GradientMeasures
        Both measures of every sample. A sample without a gradient has 0.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause.

    Examples
    --------
    >>> import torch
    >>> from advfeat import analysis
    >>> data = torch.utils.data.TensorDataset(torch.rand(20, 6), torch.arange(20) % 2)
    >>> found = analysis.gradient_measures({"mine": torch.nn.Linear(6, 2)}, data, eps=0.1, seed=0)
    >>> round(float(found.similarity["mine"].mean()), 3)
    1.0
    """
    named = named_models(models)
    checks.number("eps", eps, low=0.0)
    norm = checks.norm(norm)
    checks.count("draws", draws, low=1)
    checks.seed(seed)
    seed = seeding.resolve(seed)
    aligned, similar = {}, {}
    for name, model in named.items():
        parts: list[tuple[Tensor, Tensor]] = []
        with attackable(model) as net:
            for batch in batches(net, model, data, bounds, batch_size):
                with net.given(batch.extras):
                    parts.append(
                        _measures(net, batch, nearby(batch, draws, eps, norm, seed), draws)
                    )
        aligned[name], similar[name] = (torch.cat(p) for p in zip(*parts, strict=True))
    return GradientMeasures(aligned, similar, eps, norm)


def _measures(
    net: Network, batch: Batch, points: Iterator[Tensor], draws: int
) -> tuple[Tensor, Tensor]:
    """Both measures of a batch's samples, on the host."""
    inputs = batch.inputs

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.double(), batch.labels, reduction="none")

    def largest(logits: Tensor) -> Tensor:
        return logits.amax(1)

    saliency = _unit(net.logits_gradient(inputs, largest).gradient)
    here = _unit(net.logits_gradient(inputs, loss).gradient)
    total = torch.zeros(len(inputs), dtype=here.dtype, device=here.device)
    for near in points:
        there = _unit(net.logits_gradient(near, loss).gradient)
        total += (here * there).sum(1) / draws
    return (inputs.flatten(1) * saliency).sum(1).abs().cpu(), total.cpu()


def _unit(gradient: Tensor) -> Tensor:
    return threat.steepest(gradient.flatten(1), "l2")
