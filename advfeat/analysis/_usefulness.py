"""Useful and robustly useful features (section 2 of the paper), unit by unit and class by class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from advfeat import checks, plots, seeding, threat
from advfeat.analysis._features import (
    attack_features,
    batches,
    feature_attack,
    stacked,
    table,
)
from advfeat.attacks import PGD, Batch
from advfeat.loading import Data, with_progress
from advfeat.model import Layer, Network, attackable
from advfeat.threat import Bounds, Norm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Rows, of all units together, that are attacked at a time.
_ROWS = 4096
DUAL: dict[Norm, Norm] = {"l1": "linf", "l2": "l2", "linf": "l1"}

USELESS, NONROBUST, UNDECIDED, ROBUST = range(4)
KINDS = ("useless", "useful, non-robust", "undecided", "robust")


@dataclass(frozen=True, eq=False)
class Usefulness:
    """Usefulness rho and robust usefulness gamma of every unit for every class; see `usefulness`.

    All are float64 ``(units, classes)``; a unit is taken with the sign that makes it useful.

    Attributes
    ----------
    rho, gamma
        E[y f(x)] and E[inf y f(x + delta)].
    rho_interval, gamma_interval
        Bootstrap intervals, ``(2, units, classes)``: low and high ends.
    sign
        +1 or -1: the sign the unit is taken with.
    units
        Numbers of the units in their layer, int64 ``(units,)``.
    stuck
        Share of rows, for each unit ``(units,)``, where neither attack moved the input: it has
        no gradient there, as below a ReLU, and its gamma is an overestimate.
    eps, norm
        The ball.
    """

    rho: Tensor
    gamma: Tensor
    rho_interval: Tensor
    gamma_interval: Tensor
    sign: Tensor
    units: Tensor
    stuck: Tensor
    eps: float
    norm: Norm

    @property
    def kind(self) -> Tensor:
        """Of each unit and class, int64: its place in ``KINDS``.

        Robust: the interval of gamma lies above 0. Useful, non-robust: that of rho above 0, that
        of gamma not above. Undecided: useful, and 0 lies within the interval of gamma. Useless:
        the rest.
        """
        useful = self.rho_interval[0] > 0
        kind = torch.where(useful, UNDECIDED, USELESS)
        kind = torch.where(useful & (self.gamma_interval[1] <= 0), NONROBUST, kind)
        return torch.where(useful & (self.gamma_interval[0] > 0), ROBUST, kind)

    @property
    def unit_kind(self) -> Tensor:
        """Of each unit, int64 ``(units,)``: that of the class it does best for.

        Robust if it is so for some class, else undecided if it is so for some, and so on.
        """
        return self.kind.amax(1)

    def __str__(self) -> str:
        """Pairs of unit and class, and units, of each kind."""
        kind, unit_kind = self.kind, self.unit_kind
        rows: list[tuple[object, ...]] = []
        for place, name in enumerate(KINDS):
            chosen, units = kind == place, int((unit_kind == place).sum())
            count = int(chosen.sum())
            means = [
                f"{float(v[chosen].mean()):.3f}" if count else "" for v in (self.rho, self.gamma)
            ]
            rows.append((name, units, f"{units / len(unit_kind):.0%}", count, *means))
        title = f"{len(unit_kind)} units, {kind.numel()} pairs of unit and class, "
        title += f"{self.norm} {self.eps:g}"
        if bool((self.stuck > 0.05).any()):
            title += f"; no gradient in {float(self.stuck.mean()):.0%} of the attacks"
        head = ("", "units", "share", "pairs", "mean rho", "mean gamma")
        return title + "\n" + table(head, rows)

    def plot(self) -> Figure:
        """Rho against gamma, a point for each unit and class, over the three regions."""
        figure, kind = plots.new_figure(6.4, 4.6), self.kind
        plots.usefulness_regions(
            figure.add_subplot(),
            {name: (self.rho[kind == k], self.gamma[kind == k]) for k, name in enumerate(KINDS)},
        )
        figure.axes[0].set_title(f"{self.norm} {self.eps:g}")
        return figure


def usefulness(
    model: nn.Module,
    data: Data,
    *,
    eps: float,
    norm: Norm,
    layer: Layer = None,
    units: Sequence[int] | None = None,
    steps: int = 10,
    bounds: Bounds = (0.0, 1.0),
    level: float = 0.95,
    resamples: int = 1000,
    seed: int | torch.Generator | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Usefulness:
    """Which features are robust, which useful but non-robust, which useless.

    For every unit f of a layer and every class: y is +1 on the class and -1 on the rest, each
    side weighing one half, and f is brought to E[f] = 0 and E[f^2] = 1 under these weights. So
    rho = E[y f(x)] is the correlation of f and y, from 0 to 1, and gamma = E[inf y f(x + delta)]
    is what is left of it when every input is attacked against this very unit (section 2).

    Parameters
    ----------
    model
        Any module; in evaluation mode.
    data
        A dataset, a loader or a list of batches; at least two classes. The work is two attacks for
        each unit and row: take a few hundred rows.
    eps, norm
        The ball, in the units of the inputs.
    layer
        The features: a module's name or the module (its output), a callable of the inputs, or None
        for the input of the Linear that is called last. Below a ReLU a unit at 0 has no
        gradient and cannot be attacked; name the layer before it.
    units
        Numbers of the units to look at; by default all.
    steps
        Of PGD, from the input; its best iterate counts.
    bounds
        The box ``(low, high)`` of valid inputs.
    level, resamples
        Of the bootstrap intervals: share they cover, and how often the rows of each side are drawn
        again.
    seed
        Of the bootstrap; None draws one number from torch's default generator.
    batch_size, progress
        As in `advfeat.accuracy`.

    Examples
    --------
    >>> import torch
    >>> from advfeat import analysis
    >>> x = torch.rand(40, 3)
    >>> data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0.5).long())
    >>> result = analysis.usefulness(
    ...     torch.nn.Linear(3, 2), data, layer=lambda x: x, eps=0.1, norm="linf", seed=0
    ... )
    >>> result.rho.shape, bool((result.gamma <= result.rho).all())
    (torch.Size([3, 2]), True)
    """
    attack = feature_attack(eps, norm, steps, bounds, _signed_unit)
    _check_bootstrap(level, resamples, seed)
    parts: list[_Extremes] = []
    labels: list[Tensor] = []
    with attackable(model, layer=layer) as net:
        chosen: Tensor | None = None
        every = batches(net, model, data, bounds, batch_size)
        for batch in with_progress(every, total=len(every), label="usefulness", progress=progress):
            values = net.features(batch.inputs)
            chosen = _chosen(units, values) if chosen is None else chosen
            low, at_low = _extreme(net, batch.inputs, chosen, -1, attack)
            high, at_high = _extreme(net, batch.inputs, chosen, 1, attack)
            values = values[:, chosen]
            parts.append(
                _Extremes(values, low.minimum(values), high.maximum(values), at_low & at_high)
            )
            labels.append(batch.labels)
    assert chosen is not None
    found = _Extremes(*(torch.cat(field) for field in zip(*parts, strict=True)))
    return _sorted(found, torch.cat(labels), chosen, eps, norm, level, resamples, seed)


def linear_usefulness(
    weight: Tensor,
    data: Data,
    *,
    eps: float,
    norm: Norm,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int | torch.Generator | None = None,
) -> Usefulness:
    """`usefulness` of linear features a^T x in closed form: gamma = rho - eps ||a||_* / std(a^T x).

    The decomposition of Goh's comment (Distill 2019), with the dual norm; no attack is run and
    inputs may leave any box.

    Parameters
    ----------
    weight
        One feature a row, ``(units, d)`` for inputs of d numbers.
    data, eps, norm, level, resamples, seed
        As in `usefulness`.

    Examples
    --------
    >>> import torch
    >>> from advfeat import analysis
    >>> data = torch.utils.data.TensorDataset(torch.tensor([[-1.0], [1.0]]), torch.arange(2))
    >>> result = analysis.linear_usefulness(torch.eye(1), data, eps=0.25, norm="l2", seed=0)
    >>> print(result.rho[0, 1].item(), result.gamma[0, 1].item())
    1.0 0.75
    """
    checks.number("eps", eps, low=0.0)
    checks.norm(norm)
    _check_bootstrap(level, resamples, seed)
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a torch.Tensor, got {type(weight).__name__}")
    rows = stacked(data, weight.device)
    inputs = rows.inputs.flatten(1).to(torch.float64)
    if weight.ndim != 2 or weight.shape[1] != inputs.shape[1]:
        checks.fail("weight.shape", tuple(weight.shape), f"expected (units, {inputs.shape[1]})")
    weight = weight.detach().to(torch.float64)
    values = inputs @ weight.T
    loss = eps * threat.size(weight, DUAL[norm])
    found = _Extremes(values, values - loss, values + loss, torch.zeros_like(values) > 0)
    chosen = torch.arange(len(weight))
    return _sorted(found, rows.labels, chosen, eps, norm, level, resamples, seed)


class _Extremes(NamedTuple):
    """Every unit on every row, ``(N, units)``: its value, and how far an attack can take it."""

    value: Tensor
    low: Tensor
    high: Tensor
    stuck: Tensor  # bool


def _signed_unit(features: Tensor, choice: Tensor) -> Tensor:
    """The unit a row is to raise (numbered from 1), or to lower (numbered from -1)."""
    unit = features.gather(1, choice.abs()[:, None] - 1).squeeze(1)
    return unit * choice.sign()


def _extreme(
    net: Network, inputs: Tensor, units: Tensor, sign: int, attack: PGD
) -> tuple[Tensor, Tensor]:
    """Attack every unit on every row: the values reached ``(N, units)``, and what never moved."""
    reached, stuck = [], []
    for chunk in torch.split(units.to(inputs.device), max(1, _ROWS // len(inputs))):
        repeated = inputs.repeat(len(chunk), *(1,) * (inputs.ndim - 1))
        unit = chunk.repeat_interleave(len(inputs))
        moved = attack_features(net, Batch(repeated, sign * (unit + 1), unit), attack)
        value = net.features(moved).gather(1, unit[:, None]).squeeze(1)
        reached.append(value.view(len(chunk), -1).T)
        still = threat.size(moved - repeated, "linf") == 0
        stuck.append(still.view(len(chunk), -1).T)
    return torch.cat(reached, 1), torch.cat(stuck, 1)


def _sorted(
    found: _Extremes,
    labels: Tensor,
    units: Tensor,
    eps: float,
    norm: Norm,
    level: float,
    resamples: int,
    seed: int | torch.Generator | None,
) -> Usefulness:
    """From values and extremes to rho, gamma and their intervals."""
    classes = int(labels.max()) + 1
    if bool((labels == labels[0]).all()):
        checks.fail("data", "rows of one class", "usefulness compares a class with the rest")
    generator = seeding.generator(seeding.resolve(seed))
    value, low, high = (field.cpu().to(torch.float64) for field in found[:3])
    labels = labels.cpu()
    # Around the mean, so that squares lose no digits. What only rounding moves is no feature.
    mean = value.mean(0)
    moving = value.std(0) > 1e-6 * mean.abs()
    value, low, high = (torch.where(moving, part - mean, 0.0) for part in (value, low, high))
    moments = torch.cat([value, value.square(), low, high], 1)  # (N, 4 units)
    columns = []
    for label in range(classes):
        side = labels == label
        if not bool(side.any()) or bool(side.all()):
            checks.fail("data", f"no row of class {label}", "every class needs rows of its own")
        own = _resampled(moments[side], resamples, generator)
        rest = _resampled(moments[~side], resamples, generator)
        columns.append(_column(own, rest, level))
    rho, gamma, rho_ends, gamma_ends, sign = (
        torch.stack(c, -1) for c in zip(*columns, strict=True)
    )
    stuck = found.stuck.double().mean(0).cpu()
    return Usefulness(rho, gamma, rho_ends, gamma_ends, sign, units.cpu(), stuck, eps, norm)


def _resampled(moments: Tensor, resamples: int, generator: torch.Generator) -> Tensor:
    """Means of the rows ``(1 + resamples, K)``: of themselves, then of as many drawn from them."""
    count = len(moments)
    drawn = torch.randint(count, (resamples, count), generator=generator)
    weights = torch.zeros(resamples + 1, count, dtype=moments.dtype)
    weights[1:].scatter_add_(1, drawn, torch.ones_like(drawn, dtype=moments.dtype))
    weights[0] = 1.0
    return weights @ moments / count


def _column(own: Tensor, rest: Tensor, level: float) -> tuple[Tensor, ...]:
    """Rho, gamma, their intervals and the signs for one class, from both sides' moments."""
    (f, square, low, high), (f_, square_, low_, high_) = own.chunk(4, 1), rest.chunk(4, 1)
    deviation = ((square + square_) / 2 - ((f + f_) / 2).square()).clamp_min(0).sqrt()
    deviation = torch.where(deviation > 0, deviation, torch.inf)
    rho = (f - f_) / 2 / deviation
    sign = torch.where(rho[0] < 0, -1.0, 1.0)
    # Of the unit or of its negative: inf(-f) = -sup f.
    gamma = torch.where(sign > 0, low - high_, low_ - high) / 2 / deviation
    rho = rho * sign
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=rho.dtype)
    intervals = [torch.quantile(part[1:], ends, dim=0) for part in (rho, gamma)]
    return rho[0], gamma[0], *intervals, sign


def _chosen(units: Sequence[int] | None, features: Tensor) -> Tensor:
    count = features.shape[1]
    chosen = torch.arange(count) if units is None else torch.as_tensor(units, dtype=torch.int64)
    if len(chosen) == 0 or int(chosen.min()) < 0 or int(chosen.max()) >= count:
        checks.fail("units", units, f"the layer has units 0 to {count - 1}")
    return chosen


def _check_bootstrap(level: float, resamples: int, seed: object) -> None:
    checks.fraction("level", level)
    checks.count("resamples", resamples, low=1)
    checks.seed(seed)
