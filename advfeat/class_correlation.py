"""Correlation of features with classes: rho and gamma of section 2, their intervals and null."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from advfeat import checks
from advfeat.statistics import t_quantile

# Units that are resampled together, and numbers in a block of resamples: a bound on memory.
_UNITS, _BLOCK = 128, 4_000_000


class Extremes(NamedTuple):
    """Every unit on every sample, ``(N, units)``: its value, and how far an attack can move it."""

    value: Tensor
    low: Tensor
    high: Tensor


class Correlations(NamedTuple):
    """All ``(units, classes)``, intervals ``(2, units, classes)``; see `correlate`."""

    rho: Tensor
    gamma: Tensor
    rho_interval: Tensor
    gamma_interval: Tensor
    sign: Tensor
    p_value: Tensor


def correlate(
    found: Extremes,
    labels: Tensor,
    *,
    level: float,
    resamples: int,
    generator: torch.Generator,
) -> Correlations:
    """Compute rho and gamma of each unit for each class, with what chance alone would give.

    Rho, gamma and the sign are those of the samples given. As the sign is chosen by the same
    samples, rho is above 0 for pure noise too. Hence:

    - ``p_value`` is from permuted labels, corrected over all units and classes (Westfall and
      Young's max-T): where no unit is useful, the smallest is at most 0.05 in 5% of the cases.
    - Intervals are two-sided and hold for all units, classes and both signs at once, by Student's
      t with bootstrap deviations (Bonferroni), of rho after Fisher's z transform. So they hold for
      the sign that the samples choose, and no sample is lost to choosing it. The bootstrap draws
      within classes.

    A class needs three samples for an interval; of fewer it is unbounded.
    """
    classes = check_classes(labels)
    value, low, high = _centred(found)
    onehot = torch.nn.functional.one_hot(labels.cpu(), classes).to(torch.float64)
    moments = torch.cat([value, value.square(), low, high], 1)  # (N, 4 units)
    rho, gamma, sign = _estimates(onehot.T @ moments, onehot.sum(0))
    p_value, null = _permuted(value, onehot, rho, resamples, generator)
    deviation = _deviations(moments, onehot, sign, resamples, generator)
    # In small classes the bootstrap is uncertain itself; permutations know the scatter around 0.
    deviation[0] = deviation[0].maximum(null * (1 - rho.square()))
    rho_spread, gamma_spread = deviation * _factors(onehot.sum(0), len(rho), level)
    # The largest of many correlations scatters least where it was found: Fisher's z does not.
    exact = rho.clamp(-1 + 1e-15, 1 - 1e-15)
    middle, spread = exact.atanh(), rho_spread / (1 - exact.square())
    rho_interval = torch.stack([middle - spread, middle + spread]).tanh()
    gamma_interval = torch.stack([gamma - gamma_spread, gamma + gamma_spread]).clamp_max(1.0)
    return Correlations(rho, gamma, rho_interval, gamma_interval, sign, p_value)


def signed_correlation(value: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Compute E[y f] of each unit for each class with the unit's own sign, ``(units, classes)``.

    NaN for a class without samples or without others.
    """
    value = _centred(Extremes(value, value, value))[0]
    onehot = torch.nn.functional.one_hot(labels.cpu(), classes).to(torch.float64)
    return _signed_rho(onehot.T @ torch.cat([value, value.square()], 1), onehot.sum(0))


def check_classes(labels: Tensor) -> int:
    """Number of classes; each must have samples, and there must be two."""
    classes = int(labels.max()) + 1
    counts = torch.bincount(labels.cpu(), minlength=classes)
    if int((counts > 0).sum()) < 2:
        checks.fail("data", "samples of one class", "usefulness compares a class with the rest")
    if bool((counts == 0).any()):
        missing = int((counts == 0).nonzero()[0])
        checks.fail("data", f"no sample of class {missing}", "every class needs samples")
    return classes


def _check_finite(value: Tensor) -> None:
    broken = ~value.isfinite()
    if bool(broken.any()):
        unit = int(broken.any(0).nonzero()[0])
        checks.fail(
            "data",
            f"unit {unit} is NaN or infinite on {int(broken[:, unit].sum())} samples",
            "look for NaN in the inputs or weights, or a division, logarithm or square root",
        )


def _centred(found: Extremes) -> tuple[Tensor, Tensor, Tensor]:
    """In float64 around the mean, so that squares lose no digits; 0 for a unit that is constant.

    What only rounding changes is no feature.
    """
    value, low, high = (field.detach().cpu().to(torch.float64) for field in found)
    _check_finite(value)
    mean = value.mean(0)
    moving = value.std(0) > 1e-6 * mean.abs()
    value, low, high = (torch.where(moving, part - mean, 0.0) for part in (value, low, high))
    return value, low, high


def _sides(sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Means over each class and over the rest, from sums by class ``(..., C, K)``."""
    rest = sums.sum(-2, keepdim=True) - sums
    return sums / counts[:, None], rest / (counts.sum() - counts)[:, None]


def _deviation(own: Tensor, rest: Tensor, square: Tensor, square_: Tensor) -> Tensor:
    """Standard deviation where the class and the rest weigh one half each; infinite if 0."""
    deviation = ((square + square_) / 2 - ((own + rest) / 2).square()).clamp_min(0).sqrt()
    return torch.where(deviation > 0, deviation, torch.inf)


def _signed_rho(sums: Tensor, counts: Tensor) -> Tensor:
    """From sums of values and squares by class ``(..., C, 2 U)``: rho ``(..., U, C)``."""
    (f, square), (f_, square_) = (part.chunk(2, -1) for part in _sides(sums, counts))
    return ((f - f_) / 2 / _deviation(f, f_, square, square_)).transpose(-1, -2)


def _estimates(
    sums: Tensor, counts: Tensor, sign: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rho, gamma and sign ``(..., U, C)``, from sums of moments by class ``(..., C, 4 U)``."""
    own, rest = _sides(sums, counts)
    (f, square, low, high), (f_, square_, low_, high_) = own.chunk(4, -1), rest.chunk(4, -1)
    deviation = _deviation(f, f_, square, square_)
    rho = (f - f_) / 2 / deviation
    sign = torch.where(rho < 0, -1.0, 1.0) if sign is None else sign.transpose(-1, -2)
    # Of the unit or of its negative: inf(-f) = -sup f.
    gamma = torch.where(sign > 0, low - high_, low_ - high) / 2 / deviation
    return tuple(part.transpose(-1, -2) for part in (rho * sign, gamma, sign))  # type: ignore[return-value]


def _permuted(
    value: Tensor, onehot: Tensor, rho: Tensor, resamples: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """p-values of rho under permuted labels, corrected over units and classes; its deviation."""
    features, counts = torch.cat([value, value.square()], 1), onehot.sum(0)
    drawn = []
    block = _block(onehot)
    for first in range(0, resamples, block):
        keys = torch.rand(min(block, resamples - first), len(value), generator=generator)
        sums = onehot[keys.argsort(1)].transpose(1, 2) @ features
        drawn.append(_signed_rho(sums, counts).abs().float())
    null = torch.cat([rho.float()[None], *drawn])  # the labels as they are count as one permutation
    scale = null.square().mean(0).sqrt()
    null = torch.where(scale > 0, null / scale, 0.0)
    largest = null.flatten(1).amax(1)
    p_value = (largest[:, None, None] >= null[0] * (1 - 1e-6)).double().mean(0)
    return p_value, scale.double()


def _deviations(
    moments: Tensor, onehot: Tensor, sign: Tensor, resamples: int, generator: torch.Generator
) -> Tensor:
    """Bootstrap deviations of rho and gamma, ``(2, units, classes)``."""
    (units, classes), counts = sign.shape, onehot.sum(0)
    draws = _draws(onehot, resamples, generator)
    deviation = torch.zeros(2, units, classes, dtype=torch.float64)
    for columns in torch.arange(units).split(_UNITS):  # type: ignore[no-untyped-call]
        four = torch.cat([columns + part * units for part in range(4)])
        values = []
        for weight in draws.split(_block(onehot)):  # type: ignore[no-untyped-call]
            by_class = weight[:, None] * onehot.T.float()  # (R, C, N)
            sums = by_class.double() @ moments[:, four]
            rho, gamma, _ = _estimates(sums, counts, sign[columns])
            values.append(torch.stack([rho, gamma], 1))
        deviation[:, columns] = torch.cat(values).std(0) if resamples > 1 else torch.inf
    # Of one draw, or of one or two samples, nothing can be said of how much a value varies.
    deviation[..., (counts < 3) | (counts.sum() - counts < 3)] = torch.inf
    return deviation


def _factors(counts: Tensor, units: int, level: float) -> Tensor:
    """Half-widths of rho and gamma in bootstrap deviations, by class ``(2, 1, C)``.

    The bootstrap variance of n samples is too small by (n - 1) / n, which counts in small classes.
    """
    comparisons = units * (len(counts) if len(counts) > 2 else 1)  # two classes mirror each other
    smaller = torch.minimum(counts, counts.sum() - counts).clamp_min(2).tolist()
    factors = [
        [t_quantile(1 - (1 - level) / (2 * both), n - 1) * (n / (n - 1)) ** 0.5 for n in smaller]
        for both in (comparisons, 2 * comparisons)  # gamma differs with the sign
    ]
    return torch.tensor(factors, dtype=torch.float64)[:, None]


def _block(onehot: Tensor) -> int:
    return max(1, _BLOCK // onehot.numel())


def _draws(onehot: Tensor, resamples: int, generator: torch.Generator) -> Tensor:
    """How often each sample is drawn, ``(R, N)``, as many of each class as there are."""
    counts = torch.zeros(resamples, len(onehot), dtype=torch.float32)
    for side in onehot.T:
        members = side.nonzero().squeeze(1)
        if not len(members):
            continue
        drawn = torch.randint(len(members), (resamples, len(members)), generator=generator)
        counts.scatter_add_(1, members[drawn], torch.ones_like(drawn, dtype=torch.float32))
    return counts
