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
)
from advfeat.attacks import PGD, Batch
from advfeat.attacks.samples import select_samples
from advfeat.class_correlation import Extremes, correlate
from advfeat.loading import Data
from advfeat.model import Layer, Network, attackable
from advfeat.progress import with_progress
from advfeat.results import Result
from advfeat.tables import Table
from advfeat.threat import Bounds, Norm

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Samples, of all units together, that are attacked at a time.
_ROWS = 4096
DUAL: dict[Norm, Norm] = {"l1": "linf", "l2": "l2", "linf": "l1"}

USELESS, NONROBUST, UNDECIDED, ROBUST = range(4)
KINDS = ("useless", "useful, non-robust", "undecided", "robust")


@dataclass(frozen=True, eq=False, repr=False)
class Usefulness(Result):
    """Usefulness rho and robust usefulness gamma of every unit for every class; see `usefulness`.

    All are float64 ``(units, classes)``; a unit is taken with the sign that makes it useful.

    Attributes
    ----------
    rho, gamma
        E[y f(x)] and E[inf y f(x + delta)] on these samples. The sign is chosen on the same
        samples, so rho is above 0 for pure noise too: the intervals and ``p_value`` say what is
        there.
    rho_interval, gamma_interval
        ``(2, units, classes)``: low and high ends, for all units, classes and both signs at once
        with probability ``level``, so that the choice of the sign does not matter. Unbounded for
        a class of fewer than three samples.
    sign
        +1 or -1: the sign the unit is taken with.
    p_value
        Of rho under permuted labels, corrected over all units and classes.
    units
        Numbers of the units in their layer, int64 ``(units,)``.
    stuck
        Fraction of samples, for each unit ``(units,)``, where neither attack moved the input: the
        unit has no gradient there, as below a ReLU, and its gamma is an overestimate.
    eps, norm
        The ball.
    level
        Of the intervals; a pair is useful where its ``p_value`` is at most 1 - level and its
        interval of rho lies above 0.
    """

    rho: Tensor
    gamma: Tensor
    rho_interval: Tensor
    gamma_interval: Tensor
    sign: Tensor
    p_value: Tensor
    units: Tensor
    stuck: Tensor
    eps: float
    norm: Norm
    level: float = 0.95

    @property
    def kind(self) -> Tensor:
        """Of each unit and class, int64: its place in ``KINDS``.

        Useful: ``p_value`` is at most 1 - level and the interval of rho lies above 0. Of these
        robust where the interval of gamma lies above 0, non-robust where it does not reach above
        0, and undecided where 0 lies within.
        Useless: the rest.
        """
        useful = (self.p_value <= 1 - self.level + 1e-9) & (self.rho_interval[0] > 0)
        kind = torch.where(useful, UNDECIDED, USELESS)
        kind = torch.where(useful & (self.gamma_interval[1] <= 0), NONROBUST, kind)
        return torch.where(useful & (self.gamma_interval[0] > 0), ROBUST, kind)

    @property
    def unit_kind(self) -> Tensor:
        """Of each unit, int64 ``(units,)``: that of the class it does best for.

        Robust if it is so for some class, else undecided if it is so for some, and so on.
        """
        return self.kind.amax(1)

    def _summary(self) -> str:
        units, classes = self.rho.shape
        return f"{units} units, {classes} classes, {self.norm} {self.eps:g}"

    def _content(self) -> Sequence[str | Table]:
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
        head = ("", "units", "fraction", "pairs", "mean rho", "mean gamma")
        return [title, Table(head, rows)]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Rho against gamma, a point for each unit and class, over the three regions."""
        axes, kind = plots.new_axes(ax, 6.4, 4.6), self.kind
        plots.usefulness_regions(
            axes,
            {name: (self.rho[kind == k], self.gamma[kind == k]) for k, name in enumerate(KINDS)},
        )
        axes.set_title(f"{self.norm} {self.eps:g}")
        return axes


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
    """Find which features are robust, which are useful but non-robust, and which are useless.

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
        each unit and sample: take a few hundred samples.
    eps, norm
        The ball, in the units of the inputs.
    layer
        The features: a module's name or the module (its output), a callable of the inputs, or None
        for the input of the Linear that is called last. Below a ReLU a unit at 0 has no
        gradient and cannot be attacked; name the layer before it.
    units
        Numbers of the units to attack; by default all.
    steps
        Of PGD, from the input; its best iterate counts.
    bounds
        Lowest and highest valid input, ``(low, high)``.
    level, resamples
        Of the intervals and of the decision what is useful; and how often samples are drawn again
        and labels permuted. With fewer than ``1 / (1 - level)`` nothing can be called useful.
    seed
        Seed of draws and permutations: an integer or a generator; None draws one number from
        torch's default generator.
    batch_size, progress
        As in `advfeat.accuracy`.

    Returns
    -------
    Usefulness
        Rho and gamma with intervals and p-values, and the kind of each unit. In pure noise no
        unit at all is called useful in 95% of the cases (``level``).

    Raises
    ------
    ValueError
        The data have one class only, ``units`` are not units of the layer, ``eps`` is not above 0,
        or ``level`` is not from 0 to 1.
    TypeError
        ``model`` is no module, or an argument is of another type.

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
    options = _Options(level, resamples, seed)
    options.check()
    parts: list[Extremes] = []
    stuck: list[Tensor] = []
    labels: list[Tensor] = []
    with attackable(model, layer=layer) as net:
        chosen: Tensor | None = None
        every = batches(net, model, data, bounds, batch_size)
        for batch in with_progress(every, total=len(every), label="usefulness", progress=progress):
            with net.given(batch.extras):
                values = net.features(batch.inputs)
            chosen = _chosen(units, values) if chosen is None else chosen
            low, at_low = _extreme(net, batch, chosen, -1, attack)
            high, at_high = _extreme(net, batch, chosen, 1, attack)
            values = values[:, chosen]
            parts.append(Extremes(values, low.minimum(values), high.maximum(values)))
            stuck.append(at_low & at_high)
            labels.append(batch.labels)
    assert chosen is not None
    found = Extremes(*(torch.cat(field) for field in zip(*parts, strict=True)))
    return _result(found, torch.cat(labels), chosen, torch.cat(stuck), (eps, norm), options)


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
    inputs may leave any bounds.

    Parameters
    ----------
    weight
        One linear feature a on each row, ``(units, d)`` for inputs of d numbers;
        ``torch.eye(d)`` for the inputs themselves.
    data, eps, norm, level, resamples, seed
        As in `usefulness`.

    Returns
    -------
    Usefulness
        As from `usefulness`, with exact ``gamma``; ``stuck`` is 0.

    Raises
    ------
    ValueError
        ``weight`` is not ``(units, d)``, the data have one class only, or an argument is out of
        range as in `usefulness`.

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
    norm = checks.norm(norm)
    options = _Options(level, resamples, seed)
    options.check()
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a torch.Tensor, got {type(weight).__name__}")
    samples = stacked(data, weight.device)
    inputs = samples.inputs.flatten(1).to(torch.float64)
    if weight.ndim != 2 or weight.shape[1] != inputs.shape[1]:
        checks.fail("weight.shape", tuple(weight.shape), f"expected (units, {inputs.shape[1]})")
    weight = weight.detach().to(torch.float64)
    values = inputs @ weight.T
    loss = eps * threat.size(weight, DUAL[norm])
    found = Extremes(values, values - loss, values + loss)
    units = torch.arange(len(weight))
    return _result(found, samples.labels, units, torch.zeros_like(values), (eps, norm), options)


def _signed_unit(features: Tensor, choice: Tensor) -> Tensor:
    """The unit a sample is to raise (numbered from 1), or to lower (numbered from -1)."""
    unit = features.gather(1, choice.abs()[:, None] - 1).squeeze(1)
    return unit * choice.sign()


def _extreme(
    net: Network, batch: Batch, units: Tensor, sign: int, attack: PGD
) -> tuple[Tensor, Tensor]:
    """Attack every unit on every sample: values reached ``(N, units)``, and what never moved."""
    inputs, reached, stuck = batch.inputs, [], []
    for chunk in torch.split(units.to(inputs.device), max(1, _ROWS // len(inputs))):
        place = torch.arange(len(inputs), device=inputs.device).repeat(len(chunk))
        repeated, extras = select_samples((inputs, batch.extras), place)
        unit = chunk.repeat_interleave(len(inputs))
        many = Batch(repeated, sign * (unit + 1), unit, extras=extras)
        moved = attack_features(net, many, attack)
        with net.given(extras):
            value = net.features(moved).gather(1, unit[:, None]).squeeze(1)
        reached.append(value.view(len(chunk), -1).T)
        still = threat.size(moved - repeated, "linf") == 0
        stuck.append(still.view(len(chunk), -1).T)
    return torch.cat(reached, 1), torch.cat(stuck, 1)


def _result(
    found: Extremes,
    labels: Tensor,
    units: Tensor,
    stuck: Tensor,
    ball: tuple[float, Norm],
    options: _Options,
) -> Usefulness:
    """From values and extremes to rho, gamma, their intervals and p-values."""
    generator = seeding.generator(seeding.resolve(options.seed))
    return Usefulness(
        *correlate(
            found, labels, level=options.level, resamples=options.resamples, generator=generator
        ),
        units.cpu(),
        stuck.double().mean(0).cpu(),
        *ball,
        options.level,
    )


def _chosen(units: Sequence[int] | None, features: Tensor) -> Tensor:
    count = features.shape[1]
    chosen = torch.arange(count) if units is None else torch.as_tensor(units, dtype=torch.int64)
    if len(chosen) == 0 or int(chosen.min()) < 0 or int(chosen.max()) >= count:
        checks.fail("units", units, f"the layer has units 0 to {count - 1}")
    return chosen


class _Options(NamedTuple):
    """Of intervals and permutations."""

    level: float
    resamples: int
    seed: int | torch.Generator | None

    def check(self) -> None:
        checks.fraction("level", self.level)
        checks.count("resamples", self.resamples, low=1)
        checks.seed(self.seed)
