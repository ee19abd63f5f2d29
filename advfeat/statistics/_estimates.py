"""Estimates with intervals: differences, means over trainings, correlations, several tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from advfeat import checks, seeding
from advfeat.results import Result
from advfeat.statistics._distributions import normal_half_width, t_cdf, t_quantile
from advfeat.statistics._proportions import (
    Interval,
    check_level,
    check_outcomes,
    mcnemar,
    wilson_interval,
)


@dataclass(frozen=True, repr=False)
class Estimate(Result):
    """A value with its interval; printed in points of a percentage.

    Attributes
    ----------
    value
        The estimate.
    interval
        Low and high end.
    p_value
        Two-sided, of the hypothesis that the true value is 0; NaN where it was not tested.
    level
        Fraction of repetitions in which the interval contains the true value.
    samples, repeats
        How many test samples, and how many trained models of each kind, it is computed from.
    """

    value: float
    interval: Interval
    p_value: float
    level: float
    samples: int
    repeats: int = 1

    @property
    def sign(self) -> int:
        """+1 if the whole interval is above 0, -1 if it is below, else 0."""
        return (self.interval[0] > 0) - (self.interval[1] < 0)

    def _summary(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def paired_difference(first: Tensor, second: Tensor, level: float = 0.95) -> Estimate:
    """Estimate the difference of two accuracies on the same samples, with its interval.

    Parameters
    ----------
    first, second
        Whether each sample is classified correctly: bool ``(N,)`` of one model each, or ``(S, N)``
        of S trained models each, in the same order of samples.
    level
        Confidence level of the interval, from 0 to below 1.

    Returns
    -------
    Estimate
        ``value``: the accuracy of ``first`` minus that of ``second``, from -1 to 1, with
        ``interval`` and two-sided ``p_value``. For one model each, the interval is that of Bonett
        and Price (2012) and the p-value that of `mcnemar`; both hold for new samples and these two
        models. For several models each, both are those of `mean_outcome`, and hold for newly
        trained models too; model s of ``first`` is paired with model s of ``second``.

    Raises
    ------
    ValueError
        The shapes differ, are not ``(N,)`` or ``(S, N)``, or have no sample; or ``level`` is not
        from 0 to below 1.

    Examples
    --------
    >>> first = torch.tensor([True] * 90 + [False] * 10)
    >>> print(paired_difference(first, torch.arange(100) < 70))
    +20.0 (+11.4 to +27.8)
    """
    check_level(level)
    check_outcomes(first, second)
    if first.ndim == 2 and len(first) > 1:
        return mean_outcome(first.double() - second.double(), level)
    first, second = first.reshape(-1), second.reshape(-1)
    total = len(first)
    wins, losses = int((first & ~second).sum()), int((second & ~first).sum())
    won, lost = (wins + 1) / (total + 2), (losses + 1) / (total + 2)
    spread = normal_half_width(level) * math.sqrt((won + lost - (won - lost) ** 2) / (total + 2))
    interval = (max(-1.0, won - lost - spread), min(1.0, won - lost + spread))
    value = (wins - losses) / total
    return Estimate(value, interval, mcnemar(first, second), level, total)


def mean_outcome(outcomes: Tensor, level: float = 0.95) -> Estimate:
    """Estimate a mean over samples and over trained models, with its interval.

    Parameters
    ----------
    outcomes
        ``(N,)`` of one model, or ``(S, N)`` of S trained models on the same samples. Bool (right
        or wrong), or numbers from -1 to 1, such as differences of outcomes.
    level
        Confidence level of the interval, from 0 to below 1.

    Returns
    -------
    Estimate
        ``value``: the mean over all. The interval of one model's bool outcomes is Wilson's, and
        there is no p-value (NaN). Otherwise interval and p-value (of a mean of 0) are those of
        Student's t. Its variance is the variance between the means of samples divided by N, plus
        the variance between the means of models divided by S; the degrees of freedom are
        Satterthwaite's. If all means are equal, the variance is computed with two more samples,
        one at each end of the range.

    Raises
    ------
    ValueError
        ``outcomes`` are empty, of another shape, or not all from -1 to 1; or ``level`` is not from
        0 to below 1.
    TypeError
        ``level`` is not a number.

    Examples
    --------
    >>> right = torch.tensor([[True, True, True, False], [True, False, True, False]])
    >>> mean_outcome(right).value, mean_outcome(right[0]).interval == wilson_interval(3, 4)
    (0.625, True)
    """
    check_level(level)
    is_fraction = outcomes.dtype == torch.bool  # differences may happen to be 0 and 1 alone
    outcomes = _check_values(outcomes)
    repeats, total = outcomes.shape
    value = float(outcomes.mean())
    if repeats == 1 and is_fraction:
        interval = wilson_interval(int(outcomes.sum()), total, level)
        return Estimate(value, interval, math.nan, level, total)
    parts = _variances(outcomes)
    if sum(part for part, _ in parts) == 0:
        # Few samples that all agree do not show how much they vary: two more, one at each end.
        ends = torch.tensor([0.0 if is_fraction else -1.0, 1.0], dtype=torch.float64, device="cpu")
        parts = _variances(torch.cat([outcomes.cpu(), ends.expand(repeats, 2)], 1))
    variance = sum(part for part, _ in parts)
    freedom = variance**2 / sum(part**2 / count for part, count in parts)
    spread = t_quantile((1 + level) / 2, freedom) * math.sqrt(variance)
    p_value = 2 * (1 - t_cdf(abs(value) / math.sqrt(variance), freedom))
    low = max(0.0 if is_fraction else -1.0, value - spread)
    return Estimate(value, (low, min(1.0, value + spread)), p_value, level, total, repeats)


def _variances(outcomes: Tensor) -> list[tuple[float, int]]:
    """Of the mean: from samples, and from models where there are several; degrees of freedom."""
    return [
        (float(means.var()) / len(means), len(means) - 1)
        for means in (outcomes.mean(0), outcomes.mean(1))
        if len(means) > 1
    ]


def correlation_interval(correlation: float, count: int, level: float = 0.95) -> Interval:
    """Return the interval of Pearson's correlation by Fisher's z transform.

    Parameters
    ----------
    correlation
        Pearson's correlation of a sample, from -1 to 1. NaN (of a constant) gives (-1, 1).
    count
        Number of pairs that it was computed from. Below 4 the interval is (-1, 1).
    level
        Confidence level of the interval, from 0 to below 1.

    Returns
    -------
    tuple of float
        Low and high end, from -1 to 1.

    Raises
    ------
    ValueError
        ``correlation`` is not from -1 to 1, or ``level`` not from 0 to below 1.
    TypeError
        ``level`` is not a number.

    Examples
    --------
    >>> low, high = correlation_interval(0.9, 6)
    >>> print(f"{low:.2f} {high:.2f}")
    0.33 0.99
    """
    check_level(level)
    if abs(correlation) > 1 + 1e-6:
        checks.fail("correlation", correlation, "expected a number from -1 to 1")
    if count < 4 or math.isnan(correlation):
        return -1.0, 1.0
    z = math.atanh(min(max(correlation, -1 + 1e-15), 1 - 1e-15))
    spread = normal_half_width(level) / math.sqrt(count - 3)
    return math.tanh(z - spread), math.tanh(z + spread)


def bootstrap_interval(
    values: Tensor,
    statistic: Callable[[Tensor], Tensor],
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int | torch.Generator | None = None,
) -> Interval:
    """Return the percentile bootstrap interval of a statistic of independent samples.

    Parameters
    ----------
    values
        ``(N, ...)``, one entry for each sample along the first axis, at least two, all finite. For
        pairs, ``(N, 2)``: they stay together.
    statistic
        A function of the samples drawn, ``(N, ...) -> number``. Resamples in which it is NaN, such
        as the correlation of a constant, are left out.
    level
        Confidence level of the interval, from 0 to below 1.
    resamples
        How many times N samples are drawn with replacement.
    seed
        Seed of the draws: an integer or a generator; None draws one number from torch's default
        generator.

    Returns
    -------
    tuple of float
        Low and high end: the quantiles ``(1 - level) / 2`` and ``(1 + level) / 2`` of the
        statistic over the resamples, in the statistic's units.

    Raises
    ------
    ValueError
        There are fewer than two samples, some are NaN or infinite, the statistic is NaN in more
        than half of the resamples, or ``level`` or ``resamples`` is out of range.
    TypeError
        ``level``, ``resamples`` or ``seed`` is of another type.

    Examples
    --------
    >>> low, high = bootstrap_interval(torch.arange(100.0), torch.mean, seed=0)
    >>> low < 49.5 < high
    True
    """
    check_level(level)
    checks.count("resamples", resamples, low=1)
    checks.seed(seed)
    if len(values) < 2:
        checks.fail("values", tuple(values.shape), "of fewer than two samples nothing is known")
    if not bool(values.isfinite().all()):
        checks.fail("values", "NaN or infinite", "every resample that draws one is undefined")
    generator = seeding.generator(seeding.resolve(seed))
    drawn = torch.stack(
        [
            torch.as_tensor(
                statistic(values[torch.randint(len(values), (len(values),), generator=generator)])
            ).double()
            for _ in range(resamples)
        ]
    )
    drawn = drawn[~drawn.isnan()]
    if 2 * len(drawn) < resamples:
        checks.fail("statistic", "NaN", "undefined in most resamples: too few samples, or constant")
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64, device="cpu")
    low, high = torch.quantile(drawn, ends).tolist()
    return low, high


def holm(p_values: Sequence[float] | Tensor) -> Tensor:
    """Return p-values corrected for the number of tests (Holm's step-down method).

    If every hypothesis with a result of at most 0.05 is rejected, the probability of at least one
    false rejection is at most 5%, for any dependence between the tests (Holm 1979).

    Parameters
    ----------
    p_values
        One for each test, from 0 to 1: a sequence, or a tensor of any shape.

    Returns
    -------
    Tensor
        Corrected p-values, float64 of the same shape, at most 1.

    Raises
    ------
    ValueError
        A p-value is NaN, or not from 0 to 1.

    Examples
    --------
    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    """
    given = torch.as_tensor(p_values, dtype=torch.float64)
    if not bool(((given >= 0) & (given <= 1)).all()):  # and NaN
        checks.fail("p_values", given.tolist(), "expected probabilities, from 0 to 1")
    order = given.flatten().argsort()
    factors = torch.arange(given.numel(), 0, -1, dtype=torch.float64, device="cpu")
    corrected = torch.empty_like(given.flatten())
    corrected[order] = (factors * given.flatten()[order]).cummax(0).values.clamp_max(1.0)
    return corrected.view(given.shape)


def _check_values(outcomes: Tensor) -> Tensor:
    """Outcomes or their differences in float64, ``(S, N)``."""
    if outcomes.ndim not in (1, 2) or not outcomes.numel():
        checks.fail("outcomes", tuple(outcomes.shape), "expected (N,) or (S, N), and a sample")
    outcomes = outcomes.double()
    if not bool((outcomes.abs() <= 1).all()):  # and NaN
        checks.fail("outcomes", "NaN, or beyond 1", "expected right or wrong, or differences")
    return outcomes if outcomes.ndim == 2 else outcomes[None]
