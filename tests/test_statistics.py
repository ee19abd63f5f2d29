"""Intervals and tests against SciPy and against how often they are wrong."""

import math

import pytest
import torch

from advfeat import statistics

NAN = math.nan


def _correlation(pairs):
    return torch.corrcoef(pairs.T)[0, 1]


@pytest.fixture(scope="module")
def stats():
    """Not imported by every process that collects this file."""
    return pytest.importorskip("scipy.stats")


@pytest.mark.parametrize(("count", "total"), [(0, 5), (3, 4), (50, 100), (999, 1000)])
def test_wilson_and_binomial_are_scipys(stats, count, total):
    reference = stats.binomtest(count, total, 0.3, alternative="greater")
    assert statistics.binomial_test(count, total, 0.3) == pytest.approx(reference.pvalue, rel=1e-9)
    for level in (0.9, 0.95):
        interval = stats.binomtest(count, total).proportion_ci(level, method="wilson")
        assert statistics.wilson_interval(count, total, level) == pytest.approx(
            (interval.low, interval.high), abs=1e-9
        )


def test_no_sample_says_nothing():
    assert statistics.wilson_interval(0, 0) == (0.0, 1.0)
    assert statistics.correlation_interval(0.9, 3) == (-1.0, 1.0)
    assert statistics.correlation_interval(math.nan, 30) == (-1.0, 1.0)


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (5, 0), (3, 9), (60, 40), (700, 800)])
def test_mcnemar_is_the_binomial_test_of_the_discordant_samples(stats, wins, losses):
    outcomes = torch.zeros(2, wins + losses + 7, dtype=torch.bool)
    outcomes[0, :wins] = True
    outcomes[1, wins : wins + losses] = True
    expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert statistics.mcnemar(*outcomes) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("freedom", [1.0, 2.3, 7.0, 300.0])
def test_students_t_is_scipys(stats, freedom):
    for probability in (0.6, 0.975, 0.999):
        expected = stats.t.ppf(probability, freedom)
        assert statistics.t_quantile(probability, freedom) == pytest.approx(expected, rel=1e-8)


def test_fisher_z_is_scipys(stats):
    x = torch.randn(12, generator=torch.Generator().manual_seed(0)).double()
    y = x + torch.randn(12, generator=torch.Generator().manual_seed(1)).double()
    reference = stats.pearsonr(x.numpy(), y.numpy())
    expected = reference.confidence_interval(0.9)
    found = statistics.correlation_interval(reference.statistic, 12, 0.9)
    assert found == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_holm_is_the_step_down_method():
    found = statistics.holm(torch.tensor([[0.04, 0.01], [0.03, 0.9]]))
    expected = torch.tensor([[0.09, 0.04], [0.09, 0.9]]).double()
    torch.testing.assert_close(found, expected)


def test_a_paired_difference_covers_the_true_one():
    """1000 pairs of models of known accuracy: the interval misses in about 5%."""
    generator = torch.Generator().manual_seed(0)
    missed = rejected = 0
    for _ in range(1000):
        common = torch.rand(150, generator=generator) < 0.5
        parts = torch.rand(2, 150, generator=generator) < 0.7
        first, second = (common | part for part in parts)
        found = statistics.paired_difference(first, second)
        assert found.value == pytest.approx(float(first.double().mean() - second.double().mean()))
        missed += found.sign != 0
        rejected += found.p_value <= 0.05
    assert 20 <= missed <= 80
    assert rejected <= missed + 10


def test_models_that_vary_between_trainings_do_not_make_a_difference():
    """Each training has an accuracy of its own; pairs of one kind differ in more than samples."""
    generator = torch.Generator().manual_seed(1)
    missed = 0
    for _ in range(300):
        accuracy = 0.7 + 0.08 * torch.randn(2, 4, 1, generator=generator)
        difficulty = torch.rand(1, 1, 200, generator=generator)
        noise = torch.rand(2, 4, 200, generator=generator)
        first, second = (0.5 * difficulty + 0.5 * noise) < accuracy.clamp(0, 1)
        missed += statistics.paired_difference(first, second).sign != 0
    assert missed <= 24  # 8%


def test_a_mean_over_trainings_agrees_with_students_t(stats):
    """Where samples do not vary, it is the t interval of the models' accuracies."""
    outcomes = torch.tensor([0.1, 0.3, 0.2, 0.6]).double()[:, None].expand(4, 50)
    found = statistics.mean_outcome(outcomes)
    expected = stats.t.interval(0.95, 3, 0.3, float(outcomes[:, 0].std()) / 2)
    assert found.interval == pytest.approx(expected)
    assert found.p_value == pytest.approx(stats.ttest_1samp(outcomes[:, 0], 0).pvalue)
    assert (found.samples, found.repeats) == (50, 4)


@pytest.mark.parametrize("seeds", [2, 3])
def test_differences_that_are_never_negative_are_still_differences(seeds):
    right = (torch.arange(40) < 30).expand(seeds, -1)
    low, high = statistics.paired_difference(right, right).interval
    assert low == pytest.approx(-high)
    assert high > 0
    first, second = right.clone(), right.clone()
    second[0, 7] = False
    won = statistics.paired_difference(first, second)
    lost = statistics.paired_difference(second, first)
    assert won.interval[0] < 0 < won.interval[1]
    assert won.interval == pytest.approx([-end for end in reversed(lost.interval)])


def test_bootstrap_is_as_wide_as_the_mean_scatters():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    low, high = statistics.bootstrap_interval(values, torch.mean, seed=0)
    assert (high - low) / (2 * 1.96) == pytest.approx(float(values.std()) / 20, rel=0.1)
    state = torch.get_rng_state()
    assert statistics.bootstrap_interval(values, torch.mean, seed=0) == (low, high)
    assert torch.equal(state, torch.get_rng_state())


def test_outcomes_of_other_samples_are_refused():
    with pytest.raises(ValueError, match="same samples"):
        statistics.paired_difference(torch.ones(3).bool(), torch.ones(4).bool())


@pytest.mark.parametrize("level", [1.0, 95, -0.1])
def test_a_level_is_a_fraction_below_one(level):
    right = torch.tensor([True, False])
    for call in (
        lambda: statistics.wilson_interval(1, 2, level),
        lambda: statistics.paired_difference(right, ~right, level),
        lambda: statistics.mean_outcome(right, level),
        lambda: statistics.correlation_interval(0.5, 9, level),
        lambda: statistics.bootstrap_interval(right.float(), torch.mean, level=level),
    ):
        with pytest.raises(ValueError, match="level"):
            call()


@pytest.mark.parametrize("samples", [2, 3, 7])
def test_few_samples_that_all_agree_are_not_certain(samples):
    """Two trainings, every outcome the same: no scatter is seen, and the interval has a width."""
    right = torch.ones(2, samples, dtype=torch.bool)
    for found in (
        statistics.mean_outcome(right),
        statistics.paired_difference(right, ~right),
    ):
        low, high = found.interval
        assert found.value == high == 1.0
        assert low < 0.9
        assert found.p_value > 0
    # Models that disagree about which sample they have wrong have equal means everywhere.
    crossed = torch.eye(2, dtype=torch.bool)
    low, high = statistics.mean_outcome(crossed).interval
    assert low < 0.2
    assert high > 0.8


def test_intervals_stay_where_values_can_be():
    first, second = torch.ones(3, 20, dtype=torch.bool), torch.zeros(3, 20, dtype=torch.bool)
    second[:, 0] = True
    assert statistics.paired_difference(first, second).interval[1] == 1.0
    assert statistics.mean_outcome(second).interval[0] == 0.0


def test_differences_of_one_model_have_students_t_interval(stats):
    values = torch.tensor([-1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    found = statistics.mean_outcome(values)
    reference = stats.ttest_1samp(values.double().numpy(), 0.0)
    interval = reference.confidence_interval(0.95)
    assert found.interval == pytest.approx((interval.low, min(1.0, interval.high)), abs=1e-9)
    assert found.p_value == pytest.approx(reference.pvalue, rel=1e-6)


@pytest.mark.parametrize(
    "call",
    [
        lambda: statistics.wilson_interval(5, 4),
        lambda: statistics.wilson_interval(-1, 4),
        lambda: statistics.binomial_test(5, 4, 0.5),
        lambda: statistics.binomial_test(3, 4, 1.5),
        lambda: statistics.binomial_test(3, 4, NAN),
        lambda: statistics.correlation_interval(1.2, 10),
        lambda: statistics.holm([NAN, 0.01]),
        lambda: statistics.holm([2.0, -1.0]),
        lambda: statistics.mean_outcome(torch.tensor([NAN, 1.0])),
        lambda: statistics.mean_outcome(torch.zeros(0, dtype=torch.bool)),
        lambda: statistics.bootstrap_interval(torch.tensor([NAN, 1.0]), torch.mean, seed=0),
        lambda: statistics.bootstrap_interval(torch.tensor([3.0]), torch.mean, seed=0),
        lambda: statistics.bootstrap_interval(torch.ones(5, 2), _correlation, seed=0),
    ],
)
def test_what_is_no_count_probability_or_outcome_raises_an_error(call):
    with pytest.raises(ValueError, match=r"expected|undefined|nothing is known"):
        call()


def test_numbers_are_not_outcomes():
    """Labels or logits in place of outcomes would give a number that means nothing."""
    for compare in (statistics.mcnemar, statistics.paired_difference):
        with pytest.raises(TypeError, match="expected bool outcomes"):
            compare(torch.tensor([1, 2, 0]), torch.tensor([0, 1, 0]))


def test_resamples_without_a_correlation_are_left_out():
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randn(8, 2, generator=generator).round()
    low, high = statistics.bootstrap_interval(pairs, _correlation, seed=0)
    assert -1 <= low <= high <= 1
