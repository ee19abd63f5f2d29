"""Balls and boxes, against references in float64 NumPy that share no code with the library."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from advfeat import threat
from advfeat.threat import NORMS

FAST = settings(max_examples=40, deadline=None, derandomize=True)
ORDER = {"l1": 1, "l2": 2, "linf": np.inf}
DUAL = {"l1": np.inf, "l2": 2, "linf": 1}
# Kolmogorov-Smirnov: sqrt(n) * D stays below this with probability 0.999.
KS_LIMIT = 1.95


def as_rows(tensor):
    return tensor.flatten(1).double().numpy()


def lengths(delta, norm):
    return np.linalg.norm(as_rows(delta), ORDER[norm], axis=1)


def each(value, count):
    """Float, or one float a row, as one a row."""
    return np.broadcast_to(np.asarray(value, dtype=np.float64), (count,))


def nearest(points, center, eps, norm, bounds):
    """Projection of each row on ball and box: bisection for the multiplier of the ball."""
    radius = each(eps, len(points))[:, None]
    points, center = as_rows(points), as_rows(center)
    sign, size = np.sign(points - center), np.abs(points - center)
    room = np.where(sign > 0, bounds[1] - center, center - bounds[0])
    if norm == "linf":
        return center + sign * np.minimum(np.minimum(size, radius), room)

    def shrunk(t):
        kept = size * (1 - t) if norm == "l2" else size - t * size.max(1, keepdims=True)
        return np.minimum(np.maximum(kept, 0), room)

    def outside(t):
        return np.linalg.norm(shrunk(t), ORDER[norm], axis=1, keepdims=True) > radius

    low, high = np.zeros_like(radius), np.ones_like(radius)
    high = np.where(outside(low), high, low)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = np.where(outside(middle), middle, low), np.where(outside(middle), high, middle)
    return center + sign * shrunk(high)


@st.composite
def problems(draw, dtype=None):
    """Points, centers in the box (some on its walls), a radius or one a row, and bounds."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = dtype or draw(st.sampled_from([torch.float32, torch.float64]))
    shape = draw(st.sampled_from([(1, 1), (1, 7), (3, 12), (8, 5), (3, 2, 6), (8, 3, 4, 4)]))
    low, high = draw(st.sampled_from([(0.0, 1.0), (-1.0, 1.0), (-2.5, 0.5)]))
    spread = draw(st.sampled_from([0.0, 0.01, 0.3, 5.0]))
    unit = torch.rand(shape, generator=generator, dtype=dtype)
    if draw(st.booleans()):
        unit = (2 * unit - 0.5).clamp(0, 1)
    center = (low + (high - low) * unit).clamp(low, high)
    noise = torch.randn(shape, generator=generator, dtype=dtype)
    points = center + spread * noise.pow(draw(st.sampled_from([1, 3])))
    if draw(st.booleans()):
        eps = draw(st.sampled_from([0.0, 1e-3, 0.3, 2.0]))
    else:
        eps = 2 * torch.rand(shape[0], generator=generator, dtype=dtype)
        eps[0] = 0.0
    return points, center, eps, (low, high)


def scale_of(points):
    return max(1.0, float(points.abs().max()))


# --- size ---


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(1, 4), (3, 2, 5), (8, 3, 4, 4)])
def test_size_is_the_norm_of_each_sample(norm, shape):
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(threat.size(delta, norm).numpy(), lengths(delta, norm), rtol=1e-5)
    assert threat.size(delta, norm, keepdim=True).shape == (shape[0], *(1,) * (len(shape) - 1))


# --- steepest ---


def test_steepest_directions_by_hand():
    gradient = torch.tensor([[3.0, -4.0, 0.0]])
    assert torch.equal(threat.steepest(gradient, "l1"), torch.tensor([[0.0, -1.0, 0.0]]))
    assert torch.equal(threat.steepest(gradient, "linf"), torch.tensor([[1.0, -1.0, 0.0]]))
    torch.testing.assert_close(threat.steepest(gradient, "l2"), gradient / 5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(8, 6), (3, 2, 5), (2, 3, 4, 4)])
def test_the_steepest_direction_has_unit_size_and_gains_the_dual_norm(norm, shape):
    # No direction of unit size gains more than the dual norm (Hoelder).
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    direction = threat.steepest(gradient, norm)
    np.testing.assert_allclose(lengths(direction, norm), 1, rtol=1e-6)
    gained = (as_rows(gradient) * as_rows(direction)).sum(1)
    best = np.linalg.norm(as_rows(gradient), DUAL[norm], axis=1)
    np.testing.assert_allclose(gained, best, rtol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_no_random_direction_of_unit_size_gains_more(norm):
    generator = torch.Generator().manual_seed(2)
    gradient = torch.randn(1, 5, generator=generator)
    others = torch.randn(2000, 5, generator=generator)
    others /= torch.from_numpy(lengths(others, norm))[:, None]
    gained = (threat.steepest(gradient, norm) * gradient).sum()
    assert gained >= (others * gradient).sum(1).max()


def test_ties_in_l1_share():
    gradient = torch.tensor([[2.0, -2.0, 1.0]])
    assert torch.equal(threat.steepest(gradient, "l1"), torch.tensor([[0.5, -0.5, 0.0]]))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("dtype", "magnitude"),
    [
        (torch.float32, 1e-38),
        (torch.float32, 1e-42),
        (torch.float32, 1e30),
        (torch.float64, 1e-310),
        (torch.float64, 1e300),
    ],
)
def test_tiny_and_huge_gradients_are_directions(norm, dtype, magnitude):
    gradient = torch.tensor([[3.0, -1.0, 2.0]], dtype=dtype)
    # A subnormal holds few digits, so the direction is that of the numbers as they are held.
    held = (gradient * magnitude).double() / magnitude
    expected = threat.steepest(held, norm).to(dtype)
    torch.testing.assert_close(threat.steepest(gradient * magnitude, norm), expected)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bad", [float("nan"), 0.0])
def test_zero_and_nan_gradients_give_no_direction(norm, bad):
    gradient = torch.tensor([[bad, bad, bad], [1.0, 2.0, -5.0]])
    direction = threat.steepest(gradient, norm)
    assert torch.equal(direction[0], torch.zeros(3))
    assert torch.equal(direction[1:], threat.steepest(gradient[1:], norm))


@pytest.mark.parametrize("norm", NORMS)
def test_an_entry_that_is_nan_is_dropped_alone(norm):
    gradient = torch.tensor([[float("nan"), 1.0, -3.0], [1.0, 2.0, -5.0]])
    direction = threat.steepest(gradient, norm)
    known = threat.steepest(torch.tensor([[0.0, 1.0, -3.0], [1.0, 2.0, -5.0]]), norm)
    assert torch.equal(direction, known)


@pytest.mark.parametrize("norm", NORMS)
def test_an_infinite_entry_is_the_largest(norm):
    gradient = torch.tensor([[float("inf"), 1.0, -float("inf")], [1.0, 2.0, -5.0]])
    direction = threat.steepest(gradient, norm)
    small = 1.0 if norm == "linf" else 0.0
    each = {"linf": 1.0, "l2": 0.5**0.5, "l1": 0.5}[norm]
    torch.testing.assert_close(direction[0], torch.tensor([each, small, -each]))
    assert torch.equal(direction[1:], threat.steepest(gradient[1:], norm))


# --- projection ---


@pytest.mark.parametrize("norm", NORMS)
@FAST
@given(problem=problems())
def test_projection_gives_the_nearest_point_of_ball_and_box(norm, problem):
    points, center, eps, bounds = problem
    found = as_rows(threat.project(points, center, eps, norm, bounds))
    expected = nearest(points, center, eps, norm, bounds)
    precision = 1e-6 if points.dtype == torch.float32 else 1e-13
    np.testing.assert_allclose(found, expected, rtol=0, atol=precision * scale_of(points))


@pytest.mark.parametrize("norm", NORMS)
@FAST
@given(problem=problems(dtype=torch.float64), seed=st.integers(0, 2**31))
def test_no_feasible_point_makes_an_acute_angle_with_what_projection_removes(norm, problem, seed):
    # The variational inequality <p - P(p), z - P(p)> <= 0, which holds for P(p) alone.
    points, center, eps, bounds = problem
    projected = as_rows(threat.project(points, center, eps, norm, bounds))
    radius = each(eps, len(points))[:, None]
    rng = np.random.default_rng(seed)
    for sharpness in (1, 4):
        delta = rng.standard_normal(projected.shape) ** (2 * sharpness - 1)
        size = np.linalg.norm(delta, ORDER[norm], axis=1, keepdims=True)
        delta *= radius * rng.choice([1.0, 0.7], size=size.shape) / size
        # Clipping to a box around the center moves every entry towards it: still in the ball.
        feasible = np.clip(as_rows(center) + delta, *bounds)
        angle = ((as_rows(points) - projected) * (feasible - projected)).sum(1)
        assert (angle <= 1e-10 * scale_of(points) ** 2).all()


@pytest.mark.parametrize("norm", NORMS)
@FAST
@given(problem=problems())
def test_ball_and_box_hold_together_for_every_sample(norm, problem):
    points, center, eps, bounds = problem
    found = threat.project(points, center, eps, norm, bounds)
    assert found.shape == points.shape
    assert found.dtype == points.dtype
    assert (lengths(found.double() - center.double(), norm) <= each(eps, len(points)) + 1e-6).all()
    assert ((found >= bounds[0]) & (found <= bounds[1])).all()


@pytest.mark.parametrize("norm", NORMS)
@FAST
@given(problem=problems())
def test_projecting_twice_changes_nothing(norm, problem):
    points, center, eps, bounds = problem
    once = threat.project(points, center, eps, norm, bounds)
    twice = threat.project(once, center, eps, norm, bounds)
    torch.testing.assert_close(twice, once, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
@FAST
@given(problem=problems())
def test_points_inside_stay_where_they_are(norm, problem):
    points, center, _, bounds = problem
    points = points.clamp(*bounds)
    size = torch.from_numpy(lengths(points.double() - center.double(), norm))
    inside = threat.project(points, center, 1.001 * size + 1e-6, norm, bounds)
    torch.testing.assert_close(inside, points, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_a_radius_of_zero_gives_the_center(norm):
    center = torch.rand(3, 4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(threat.project(center + 1, center, 0.0, norm), center)


def test_without_a_radius_only_the_box_is_left():
    points = torch.tensor([[-5.0, 0.25, 5.0]])
    found = threat.project(points, torch.zeros(1, 3), None, "l2", (-1.0, 2.0))
    assert torch.equal(found, torch.tensor([[-1.0, 0.25, 2.0]]))


# Float32 rounding grows with the number of entries, and in l1 all of it can have one sign.
@pytest.mark.parametrize("spread", [0.01, 0.5, 10.0])
@pytest.mark.parametrize(("norm", "eps"), [("l1", 12.0), ("l1", 0.5), ("l2", 1.0), ("linf", 0.03)])
def test_ball_and_box_hold_to_1e6_at_image_size(norm, eps, spread):
    generator = torch.Generator().manual_seed(4)
    center = torch.rand(32, 3072, generator=generator)
    points = center + spread * torch.randn(32, 3072, generator=generator)
    found = threat.project(points, center, eps, norm)
    assert lengths(found.double() - center.double(), norm).max() <= eps + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1
    expected = nearest(points, center, eps, norm, (0.0, 1.0))
    np.testing.assert_allclose(as_rows(found), expected, rtol=0, atol=1e-6 * scale_of(points))


def test_l1_projection_is_exact_in_float64_where_magnitudes_differ_wildly():
    # A search that stops half-way stays inside the ball and is not noticed otherwise.
    generator = torch.Generator().manual_seed(5)
    center = torch.rand(8, 3072, generator=generator, dtype=torch.float64)
    noise = torch.randn(8, 3072, generator=generator, dtype=torch.float64)
    points = center + 10 * noise
    for eps in (0.5, 12.0, 300.0):
        found = as_rows(threat.project(points, center, eps, "l1"))
        expected = nearest(points, center, eps, "l1", (0.0, 1.0))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_l2_projection_is_exact_where_the_box_stops_one_entry_after_another():
    # Each entry's wall lies where what the one before it left of the radius moves it past.
    squares = 0.5 ** torch.arange(1, 14, dtype=torch.float64)
    eps_square = left = 0.25 * squares.sum()
    below, scale, free, walls = 0.0, 0.25, squares.sum(), []
    for square in squares:
        walls.append((below + scale) / 2)
        left, free = left - square * walls[-1], free - square
        below, scale = scale, left / free
    walls[-1] = 1.0
    room = (squares * torch.tensor(walls)).sqrt()
    center = (1 - room)[None]
    points, eps = center + squares.sqrt(), eps_square.sqrt().item()
    found = as_rows(threat.project(points, center, eps, "l2"))
    expected = nearest(points, center, eps, "l2", (0.0, 1.0))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_the_box_holds_exactly_where_its_ends_differ_wildly(norm):
    # The room up to 0.3 is rounded like the hundred that the center is away from it.
    center = -100 * torch.rand(50, 20, generator=torch.Generator().manual_seed(8))
    found = threat.project(torch.full_like(center, 5.0), center, 1e4, norm, (-100.0, 0.3))
    assert found.max() <= 0.3


@pytest.mark.parametrize("norm", NORMS)
def test_a_sample_is_projected_alike_alone_and_in_a_batch(norm):
    generator = torch.Generator().manual_seed(6)
    center = torch.rand(8, 3, 5, generator=generator)
    points = center + torch.randn(8, 3, 5, generator=generator)
    eps = torch.rand(8, generator=generator)
    together = threat.project(points, center, eps, norm)
    for row in range(8):
        one = slice(row, row + 1)
        alone = threat.project(points[one], center[one], eps[one], norm)
        torch.testing.assert_close(alone, together[one], rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_a_float_radius_keeps_its_float64_digits(norm):
    center = torch.full((1, 1), 0.5, dtype=torch.float64)
    found = threat.project(center + 1, center, 0.3, norm)
    assert abs(found.item() - 0.8) < 1e-15


@pytest.mark.parametrize("norm", NORMS)
def test_projection_leaves_its_arguments_alone(norm):
    points, center = torch.full((2, 3), 2.0), torch.full((2, 3), 0.5)
    threat.project(points, center, 0.1, norm)
    assert torch.equal(points, torch.full((2, 3), 2.0))
    assert torch.equal(center, torch.full((2, 3), 0.5))


# --- random points ---


def random_points(count, d, norm, eps=1.0, seed=7):
    # The same half-integer grid as the library's own generator: neither 0 nor 1.
    whole = torch.randint(2**23, (count, d + 1), generator=torch.Generator().manual_seed(seed))
    return threat.point_in_ball((whole + 0.5) / 2**23, eps, norm)


def ks(sample, cdf):
    """Kolmogorov-Smirnov statistic of a sample, times the root of its size."""
    expected = cdf(np.sort(sample))
    steps = np.arange(len(sample) + 1) / len(sample)
    gap = max((steps[1:] - expected).max(), (expected - steps[:-1]).max())
    return np.sqrt(len(sample)) * gap


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("d", [1, 2, 48, 3072])
def test_random_points_lie_in_the_ball(norm, d):
    assert lengths(random_points(200, d, norm), norm).max() <= 1 + 1e-6


@pytest.mark.parametrize("norm", NORMS)
def test_extreme_numbers_give_points_in_the_ball(norm):
    ends = [2.0**-24, 0.5 - 2.0**-24, 0.5 + 2.0**-24, 1 - 2.0**-24]
    uniform = torch.tensor(list(itertools.product(ends, repeat=4)))
    points = threat.point_in_ball(uniform, 0.7, norm)
    assert torch.isfinite(points).all()
    assert lengths(points, norm).max() <= 0.7 + 1e-6


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("d", [1, 3, 48])
def test_the_size_of_a_random_point_is_u_to_the_one_over_d(norm, d):
    # A ball of radius r holds the share r^d of the volume, in every norm.
    size = lengths(random_points(4000, d, norm), norm)
    assert ks(size, lambda r: r**d) < KS_LIMIT


@pytest.mark.parametrize("norm", NORMS)
def test_random_points_fall_in_all_orthants_alike(norm):
    points = random_points(8000, 3, norm)
    orthant = ((points > 0).long() * torch.tensor([1, 2, 4])).sum(1)
    counts = torch.bincount(orthant, minlength=8).double()
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert chi_square < 24.3  # 0.999 quantile for 7 degrees of freedom


def test_coordinates_of_linf_points_are_uniform():
    points = random_points(4000, 3, "linf").double().numpy()
    for coordinate in points.T:
        assert ks(coordinate, lambda x: (x + 1) / 2) < KS_LIMIT


def test_directions_of_l2_points_are_uniform_on_the_sphere():
    # In three dimensions each coordinate of a uniform direction is uniform (Archimedes).
    points = random_points(4000, 3, "l2").double().numpy()
    directions = points / np.linalg.norm(points, axis=1, keepdims=True)
    for coordinate in directions.T:
        assert ks(coordinate, lambda x: (x + 1) / 2) < KS_LIMIT


def test_directions_of_l1_points_are_uniform_on_the_simplex():
    # In three dimensions a coordinate's share of the size is Beta(1, 2).
    points = np.abs(random_points(4000, 3, "l1").double().numpy())
    shares = points / points.sum(1, keepdims=True)
    for share in shares.T:
        assert ks(share, lambda x: 1 - (1 - x) ** 2) < KS_LIMIT


@pytest.mark.parametrize("norm", NORMS)
def test_each_sample_has_its_own_radius(norm):
    eps = torch.tensor([0.0, 0.5, 2.0])
    unit = random_points(3, 6, norm)
    torch.testing.assert_close(random_points(3, 6, norm, eps), unit * eps[:, None])
