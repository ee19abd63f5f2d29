"""Counter-based random numbers: pure, reproducible, uniform, and apart from the global state."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from advfeat import seeding

FAST = settings(max_examples=40, deadline=None, derandomize=True)
SEEDS = st.integers(-(2**70), 2**70)
INDICES = st.lists(st.integers(0, 2**62), min_size=1, max_size=12, unique=True)
DRAWS = st.integers(0, 2**40)


def numbers(seed, index, draw=0, count=5):
    return seeding.uniform(seeding.keys(seed, torch.as_tensor(index)), draw, count)


def quantile(freedom, sigmas=5):
    """A chi-square value that is not passed by chance."""
    return freedom + sigmas * np.sqrt(2 * freedom)


def chi_square(counts):
    expected = counts.sum() / len(counts)
    return ((counts - expected) ** 2 / expected).sum()


# --- A pure function of (seed, index, draw) ---


@FAST
@given(seed=SEEDS, index=INDICES, draw=DRAWS, data=st.data())
def test_numbers_do_not_depend_on_order_or_companions(seed, index, draw, data):
    together = numbers(seed, index, draw)
    chosen = data.draw(st.permutations(range(len(index))))
    chosen = chosen[: data.draw(st.integers(1, len(index)))]
    assert torch.equal(numbers(seed, [index[i] for i in chosen], draw), together[chosen])


@FAST
@given(seed=SEEDS, index=INDICES, draw=DRAWS, data=st.data())
def test_numbers_do_not_depend_on_the_batch_split(seed, index, draw, data):
    cut = data.draw(st.integers(0, len(index)))
    parts = [part for part in (index[:cut], index[cut:]) if part]
    split = torch.cat([numbers(seed, part, draw) for part in parts])
    assert torch.equal(split, numbers(seed, index, draw))


@FAST
@given(seed=SEEDS, index=INDICES, draws=st.lists(DRAWS, min_size=12, max_size=12))
def test_a_draw_for_each_sample_equals_single_draws(seed, index, draws):
    keys = seeding.keys(seed, torch.tensor(index))
    together = seeding.uniform(keys, torch.tensor(draws[: len(index)]), 3)
    for row, draw in enumerate(draws[: len(index)]):
        assert torch.equal(seeding.uniform(keys[row : row + 1], draw, 3), together[row : row + 1])


def test_fewer_numbers_are_the_first_of_more():
    assert torch.equal(numbers(3, [1, 2], count=4), numbers(3, [1, 2], count=9)[:, :4])


def test_the_mixer_is_splitmix64():
    # First outputs of the reference implementation for seed 0 (Vigna, prng.di.unimi.it).
    golden = 0x9E3779B97F4A7C15
    counter = torch.tensor([golden - 2**64, 2 * golden % 2**64])
    mixed = [int(value) % 2**64 for value in seeding._mix(counter)]
    assert mixed == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def test_a_seed_means_the_same_numbers_in_every_release():
    # Written down, not derived: a saved seed must give the same attack after an update.
    keys = seeding.keys(7, torch.tensor([0, 1]))
    bits = seeding.bits(keys, 0, 1).squeeze(1).tolist()
    assert bits == [1361594495223562893, 9143702761523562948]
    assert seeding.integers(keys, 3, 1000).tolist() == [662, 189]


# --- Independence ---


def correlation(first, second):
    return float(np.corrcoef(first.flatten().numpy(), second.flatten().numpy())[0, 1])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"seed": 0}, {"seed": 1}),
        ({"seed": 5}, {"seed": -5}),
        ({"seed": 5}, {"seed": 5 + 2**63}),
        ({"draw": 0}, {"draw": 1}),
        ({"draw": 0}, {"draw": 2**32}),
        ({"first": 0}, {"first": 100}),
        ({"first": 0}, {"first": 2**32}),
        # Neither may be a copy of the other moved by one.
        ({"seed": 0, "draw": 1}, {"seed": 1, "draw": 0}),
        ({"first": 0, "draw": 1}, {"first": 1, "draw": 0}),
    ],
)
def test_other_seeds_draws_and_indices_give_uncorrelated_numbers(one, other):
    def sample(seed=0, first=0, draw=0):
        return numbers(seed, torch.arange(first, first + 100), draw, 200)

    assert abs(correlation(sample(**one), sample(**other))) < 5 / np.sqrt(100 * 200)


def test_neighbouring_samples_and_columns_are_uncorrelated():
    sample = numbers(1, torch.arange(200), count=200)
    limit = 5 / np.sqrt(200 * 199)
    assert abs(correlation(sample[1:], sample[:-1])) < limit
    assert abs(correlation(sample[:, 1:], sample[:, :-1])) < limit


def test_keys_of_many_samples_and_seeds_do_not_collide():
    keys = [seeding.keys(seed, torch.arange(20_000)) for seed in range(5)]
    assert len(torch.cat(keys).unique()) == 100_000


# --- Distribution ---


def test_uniform_numbers_are_uniform():
    sample = numbers(2, torch.arange(1000), count=100).double()
    assert sample.dtype == torch.float64
    assert abs(sample.mean() - 1 / 2) < 5 * np.sqrt(1 / 12 / 1e5)
    assert abs(sample.var() - 1 / 12) < 5 * np.sqrt(1 / 180 / 1e5)
    assert chi_square(torch.histc(sample, 100, 0, 1)) < quantile(99)


@pytest.mark.parametrize("places", [0, 15, 22])
def test_every_bit_of_a_uniform_number_is_fair(places):
    sample = numbers(3, torch.arange(1000), count=100)
    bit = ((sample * 2**23).long() >> places) & 1
    assert abs(bit.double().mean() - 1 / 2) < 5 * np.sqrt(1 / 4 / 1e5)


@pytest.mark.parametrize(("bits", "expected"), [(0, 2.0**-24), (-1, 1 - 2.0**-24)])
def test_the_extreme_bits_give_numbers_inside_zero_and_one(monkeypatch, bits, expected):
    monkeypatch.setattr(seeding, "bits", lambda keys, draw, count: torch.tensor([[bits]]))
    assert numbers(0, [0], count=1).item() == expected


@pytest.mark.parametrize("high", [1, 2, 10, 1000])
def test_integers_are_uniform_and_in_range(high):
    drawn = seeding.integers(seeding.keys(4, torch.arange(100_000)), 0, high)
    assert drawn.dtype == torch.int64
    assert drawn.min() == 0
    assert drawn.max() == high - 1
    if high > 1:
        assert chi_square(torch.bincount(drawn, minlength=high).double()) < quantile(high - 1)


def test_integers_stay_in_range_up_to_two_to_the_31():
    high = 2**31 - 1
    drawn = seeding.integers(seeding.keys(5, torch.arange(10_000)), 0, high).double()
    assert 0 <= drawn.min() < 0.01 * high
    assert 0.99 * high < drawn.max() < high


# --- Seeds ---


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64 - 1, 2**64 + 7, -(2**80)])
def test_any_integer_is_a_seed_modulo_two_to_the_64(seed):
    assert torch.equal(numbers(seed, [0, 5]), numbers(seed % 2**64, [0, 5]))
    assert not torch.equal(numbers(seed, [0, 5]), numbers(seed + 1, [0, 5]))


@pytest.mark.parametrize("seed", [7, -3, 2**70, np.int64(7), np.uint8(7)])
def test_an_integer_is_its_own_seed(seed):
    assert seeding.resolve(seed) == seed
    assert type(seeding.resolve(seed)) is int


def test_without_a_seed_one_number_is_drawn_from_the_default_generator():
    torch.manual_seed(0)
    drawn, following = seeding.resolve(None), torch.rand(3)
    torch.manual_seed(0)
    assert drawn == int(torch.randint(seeding.MAX_SEED, ()))
    assert torch.equal(following, torch.rand(3))


def test_without_a_seed_two_calls_differ():
    torch.manual_seed(0)
    assert seeding.resolve(None) != seeding.resolve(None)


def test_a_generator_is_drawn_from_and_the_default_one_is_not():
    generator, twin = (torch.Generator().manual_seed(5) for _ in range(2))
    before = torch.get_rng_state()
    first, second = seeding.resolve(generator), seeding.resolve(generator)
    assert first != second
    assert first == seeding.resolve(twin)
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_but_resolving_none_touches_the_global_state():
    before = torch.get_rng_state()
    keys = seeding.keys(seeding.resolve(7), torch.arange(5))
    seeding.uniform(keys, 0, 3)
    seeding.integers(keys, 0, 3)
    torch.rand(3, generator=seeding.generator(7, 1))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_sequential_generator_follows_from_seed_and_draw():
    def sample(seed, draw):
        return torch.rand(8, generator=seeding.generator(seed, draw)).tolist()

    assert sample(-1, 3) == sample(-1, 3)
    distinct = {tuple(sample(seed, draw)) for seed in (0, 1, 2**65) for draw in range(4)}
    # 2**65 is 0 modulo 2**64.
    assert len(distinct) == 8


def test_derived_seeds_follow_from_seed_and_draw_and_differ():
    derived = [seeding.derive(seed, draw) for seed in range(20) for draw in range(20)]
    assert derived == [seeding.derive(seed, draw) for seed in range(20) for draw in range(20)]
    assert len(set(derived)) == 400
