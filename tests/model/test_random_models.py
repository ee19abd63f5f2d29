"""A few random models; tests/benchmarks/soak_models.py takes a hundred."""

import pytest
from random_models import check


@pytest.mark.parametrize(
    "seed", [*range(5), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(5, 15))]
)
@pytest.mark.filterwarnings("ignore")
def test_results_agree_with_the_reference_or_a_warning_is_given(seed):
    check(seed)
