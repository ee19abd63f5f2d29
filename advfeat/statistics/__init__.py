"""Intervals and tests for what is reported: proportions, paired differences, correlations."""

from advfeat.statistics._distributions import t_quantile as t_quantile
from advfeat.statistics._estimates import (
    Estimate,
    bootstrap_interval,
    correlation_interval,
    holm,
    mean_outcome,
    paired_difference,
)
from advfeat.statistics._proportions import binomial_test, mcnemar, wilson_interval

__all__ = [
    "Estimate",
    "binomial_test",
    "bootstrap_interval",
    "correlation_interval",
    "holm",
    "mcnemar",
    "mean_outcome",
    "paired_difference",
    "wilson_interval",
]
