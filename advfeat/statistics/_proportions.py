"""Proportions: an interval, tests against chance and of two models."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from advfeat import checks
from advfeat.statistics._distributions import beta_cdf, normal_half_width

Interval = tuple[float, float]


def wilson_interval(count: int, total: int, level: float = 0.95) -> Interval:
    """Return the Wilson score interval of a proportion.

    Parameters
    ----------
    count, total
        Number of successes, from 0 to ``total``, and number of samples. Without samples the
        interval is (0, 1).
    level
        Confidence level, from 0 to below 1: the fraction of repetitions in which the interval
        contains the true proportion.

    Returns
    -------
    tuple of float
        Low and high end, from 0 to 1.

    Raises
    ------
    ValueError
        ``count`` is not from 0 to ``total``, or ``level`` not from 0 to below 1.
    TypeError
        ``level`` is not a number.

    Examples
    --------
    >>> low, high = wilson_interval(3, 4)
    >>> print(f"{low:.4f} {high:.4f}")
    0.3006 0.9544
    """
    check_level(level)
    check_count(count, total)
    if total == 0:
        return 0.0, 1.0
    z, p = normal_half_width(level), count / total
    spread = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total**2))
    middle, scale = p + z * z / (2 * total), 1 + z * z / total
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def binomial_test(count: int, total: int, chance: float) -> float:
    """Return the probability of at least so many successes by chance alone (exact, one-sided).

    Parameters
    ----------
    count, total
        Number of successes, from 0 to ``total``, and number of samples.
    chance
        Probability of a success under the null hypothesis, from 0 to 1: for a classifier, the
        fraction of the commonest class.

    Returns
    -------
    float
        One-sided p-value: ``P(X >= count)`` for X binomial with ``total`` and ``chance``.

    Raises
    ------
    ValueError
        ``count`` is not from 0 to ``total``, or ``chance`` not from 0 to 1.

    Examples
    --------
    >>> round(binomial_test(2, 2, 0.5), 6)
    0.25
    """
    check_count(count, total)
    if not 0 <= chance <= 1:  # and NaN
        checks.fail("chance", chance, "expected a probability, from 0 to 1")
    if count == 0:
        return 1.0
    return beta_cdf(chance, count, total - count + 1)


def mcnemar(first: Tensor, second: Tensor) -> float:
    """Test whether two models are right on equally many of the same samples (McNemar, exact).

    Only samples on which one model is right and the other is wrong count; under the null
    hypothesis each is as likely to be the one as the other.

    Parameters
    ----------
    first, second
        Whether each sample is classified correctly, bool ``(N,)``, in the same order of samples.

    Returns
    -------
    float
        Two-sided p-value; 1 if the models are right on the same samples.

    Raises
    ------
    ValueError
        The shapes differ, or there is no sample.

    Examples
    --------
    >>> right = torch.tensor([True] * 6 + [False] * 2)
    >>> round(mcnemar(right, ~right), 6)
    0.289062
    """
    check_outcomes(first, second)
    wins, losses = int((first & ~second).sum()), int((second & ~first).sum())
    tail = binomial_test(max(wins, losses), wins + losses, 0.5)
    return min(1.0, 2 * tail)


def check_outcomes(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape or first.ndim not in (1, 2) or not first.numel():
        shapes = (tuple(first.shape), tuple(second.shape))
        checks.fail("first, second", shapes, "expected outcomes of the same samples, (N,) each")
    for name, outcomes in (("first", first), ("second", second)):
        if outcomes.dtype != torch.bool:
            raise TypeError(
                f"{name}: {outcomes.dtype}; expected bool outcomes, as predictions == labels"
            )


def check_level(level: float) -> None:
    checks.number("level", level, low=0.0)
    if level >= 1:
        checks.fail("level", level, "must be below 1; 0.95 gives 95% intervals")


def check_count(count: int, total: int) -> None:
    if not 0 <= count <= total:
        checks.fail("count", count, f"expected from 0 to total={total} successes")
