"""Accuracy against eps, whole, from one run of a minimum-norm attack."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from advfeat import checks, plots, threat
from advfeat.attacks import FAB, FMN, pool
from advfeat.attacks.minimum_norm import MinimumNorm
from advfeat.loading import Data, Source
from advfeat.metrics._accuracy import Accuracy, CleanPass, places, tensor
from advfeat.model import Precision, attackable
from advfeat.threat import Bounds, Norm

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class RobustnessCurve:
    """Distance of each sample to the nearest adversarial example that was found.

    Attributes
    ----------
    distance
        ``(total,)`` in ``norm``: 0 where the model is wrong on the clean input, infinite where
        nothing was found.
    index
        Row number of each sample, int64 ``(total,)``.
    norm
        The norm it is measured in.
    """

    distance: Tensor
    index: Tensor
    norm: Norm

    def at(self, eps: float) -> Accuracy:
        """Robust accuracy at one radius: the share of samples farther than ``eps``."""
        checks.number("eps", eps, low=0.0)
        return Accuracy.of(self.distance > eps, self.index)

    def table(self, eps: Sequence[float]) -> list[dict[str, float]]:
        """Samples of eps and robust accuracy."""
        return [{"eps": radius, "robust_accuracy": float(self.at(radius))} for radius in eps]

    @property
    def median(self) -> float:
        """Median distance: where robust accuracy crosses one half."""
        return float(self.distance.median())

    def __str__(self) -> str:
        """One line: samples, those wrong without an attack, and the median."""
        wrong = int((self.distance == 0).sum())
        return (
            f"{len(self.distance)} samples, {wrong} wrong without an attack, "
            f"median distance {self.median:.4g} in {self.norm}"
        )

    def plot(self) -> Figure:
        """Share of samples that resist, over the radius."""
        return plots.robustness_curves({"model": self}, norm=self.norm)


def robustness_curve(
    model: nn.Module,
    data: Data,
    *,
    norm: Norm,
    attack: FMN | FAB | None = None,
    bounds: Bounds = (0.0, 1.0),
    batch_size: int | None = None,
    precision: Precision = "float32",
    progress: bool | None = None,
) -> RobustnessCurve:
    """Measure robust accuracy at every eps in one run of a minimum-norm attack.

    Parameters
    ----------
    model, data, bounds, batch_size, precision, progress
        As in `robust_accuracy`.
    norm
        In which distances are measured.
    attack
        Default `advfeat.attacks.FMN` with its own defaults (Pintor et al. 2021), and
        `advfeat.attacks.FAB` where that finds nothing: it aims at every class in turn.

    Returns
    -------
    RobustnessCurve
        ``curve.at(eps)`` is an `Accuracy`.

    Examples
    --------
    >>> import torch
    >>> from advfeat.metrics import robustness_curve
    >>> data = torch.utils.data.TensorDataset(torch.eye(3), torch.arange(3))
    >>> curve = robustness_curve(torch.nn.Identity(), data, norm="linf")
    >>> float(curve.at(0.4)), float(curve.at(0.6))
    (1.0, 0.0)
    """
    default = (FMN(norm=norm, bounds=bounds), FAB(norm=norm, bounds=bounds))
    attacks: tuple[MinimumNorm, ...] = default if attack is None else (attack,)
    for each in attacks:
        if not isinstance(each, MinimumNorm) or each.norm != norm or each.eps is not None:
            checks.fail("attack", each, f"expected FMN or FAB in norm={norm!r}, without eps")
        checks.own_bounds(bounds, each.bounds)
    source = Source(data, batch_size)
    clean = CleanPass(source, model, attacks[0].bounds, "robustness curve", progress)
    ids, found = array("q"), array("f")
    with attackable(model, precision=precision) as net:
        for verdict in pool.worst_case(attacks, net, clean.resisting(net), source.pool_size):
            distance = threat.size(verdict.adversarial - verdict.inputs, norm)
            distance = torch.where(verdict.success, distance, torch.inf)
            ids.extend(verdict.ids.tolist())
            found.extend(distance.tolist())
    distances = torch.zeros(clean.index.shape)
    distances[places(clean.index, tensor(ids))] = tensor(found)
    return RobustnessCurve(distances, clean.index, norm)
