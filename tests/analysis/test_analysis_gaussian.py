"""Section 4's Gaussian model: every formula against Monte Carlo, autograd or another formula."""

import math

import pytest
import torch

from advfeat.analysis import Gaussian, fit_gaussian, gaussian

# The covariance of the worked numbers: condition number 16.
DIAGONAL = torch.tensor([4.0, 1.0, 0.25], dtype=torch.float64)


def tilted(dimensions=3, seed=0):
    """A covariance with all its entries, and a mean."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(dimensions, dimensions, generator=generator, dtype=torch.float64)
    mean = torch.randn(dimensions, generator=generator, dtype=torch.float64)
    eye = torch.eye(dimensions, dtype=torch.float64)
    return Gaussian(mean, factor @ factor.T + 0.3 * eye)


def negative_log_likelihood(points, model):
    """But for what does not depend on the points."""
    centred = points - model.mean
    return (centred @ torch.linalg.inv(model.covariance) * centred).sum(1) / 2


# --- Theorem 1 ---


def test_the_papers_numbers_of_theorem_1():
    truth = Gaussian(torch.ones(3), DIAGONAL)
    assert truth.adversarial_gap(4.8, doubled=True) == pytest.approx(35.708, abs=5e-4)
    assert truth.adversarial_gap(4.8) == pytest.approx(1.1195, abs=5e-5)


def test_the_gap_is_what_an_adversary_found_by_gradients_adds():
    truth, penalty = tilted(), 4.0
    x, y = truth.sample(10_000, seed=1).tensors
    points = (2 * y - 1)[:, None] * x
    delta = torch.zeros_like(points, requires_grad=True)
    optimizer = torch.optim.SGD([delta], lr=0.1)
    for _ in range(100):  # up the penalised loss, which is concave
        loss = negative_log_likelihood(points + delta, truth) - penalty * delta.square().sum(1)
        optimizer.zero_grad()
        (-loss.sum()).backward()
        optimizer.step()
    moved = negative_log_likelihood(points + delta.detach(), truth)
    gap = moved - negative_log_likelihood(points, truth)
    error = float(gap.std()) / math.sqrt(len(gap))
    assert float(gap.mean()) == pytest.approx(truth.adversarial_gap(penalty), abs=4 * error)
    assert error < 0.1 * float(gap.mean())


def test_a_penalty_that_lets_the_adversary_run_away_is_refused():
    truth = Gaussian(torch.ones(3), DIAGONAL)
    with pytest.raises(ValueError, match="penalty"):
        truth.adversarial_gap(1.9)
    with pytest.raises(ValueError, match="penalty"):
        truth.adversarial_gap(3.9, doubled=True)
    assert truth.adversarial_gap(2.1) > 0


# --- Theorem 2 ---


def test_the_robust_covariance_by_hand():
    # 0.25/2 + 1/2 + sqrt(0.25/2 + 0.25^2/4) = 1, exactly.
    robust = Gaussian(torch.ones(3), DIAGONAL).robust_at(2.0)
    expected = DIAGONAL / 2 + 0.5 + (DIAGONAL / 2 + DIAGONAL**2 / 4).sqrt()
    torch.testing.assert_close(robust.covariance, torch.diag(expected))
    assert float(robust.covariance[2, 2]) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("eps", [0.001, 0.1, 0.5, 1.0, 10.0])
def test_the_robust_covariance_lies_eps_away(eps):
    truth = tilted()
    robust = truth.robust(eps)
    values = [torch.linalg.eigvalsh(model.covariance) for model in (robust, truth)]
    by_values = (values[0].sqrt() - values[1].sqrt()).norm()
    assert float(by_values) == pytest.approx(eps, abs=1e-8)
    assert truth.distance(robust) == pytest.approx(eps, abs=1e-8)


def test_the_2_wasserstein_distance_in_one_dimension():
    near, far = Gaussian([1.0], [4.0]), Gaussian([4.0], [36.0])
    assert near.distance(far) == pytest.approx(5.0)  # 3 of the means, 4 of the deviations


def test_the_multiplier_of_a_small_radius():
    truth = tilted()
    eps = 1e-5
    expected = math.sqrt(torch.linalg.inv(truth.covariance).trace()) / eps
    assert truth.multiplier(eps) == pytest.approx(expected, rel=1e-3)
    assert truth.multiplier(0.5) > truth.multiplier(0.6)
    assert truth.robust(0.0) is truth


def test_no_other_covariance_has_a_smaller_robust_likelihood():
    """By perturbing the solution: the risk is the loss after the adversary's best move."""
    truth, eps = tilted(), 0.5
    multiplier = truth.multiplier(eps)
    eye = torch.eye(3, dtype=torch.float64)

    def risk(covariance):
        # max over delta of loss - lambda / 2 |delta|^2, plus lambda / 2 eps^2, with its best lambda
        # at the solution; an upper bound on the risk elsewhere, equal to it there.
        best = torch.linalg.inv(multiplier * covariance - eye)
        stretched = (eye + best) @ truth.covariance @ (eye + best).T
        loss = (torch.logdet(covariance) + (torch.linalg.inv(covariance) @ stretched).trace()) / 2
        cost = (best @ truth.covariance @ best.T).trace() - eps**2
        return float(loss - multiplier / 2 * cost)

    solution = truth.robust(eps).covariance
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        direction = torch.randn(3, 3, generator=generator, dtype=torch.float64)
        direction = 0.05 * (direction + direction.T)
        assert risk(solution + direction) > risk(solution)


@pytest.mark.parametrize("eps", [0.0, 0.5, 2.0])
@pytest.mark.slow
def test_adversarial_training_converges_to_the_closed_form(eps):
    truth = tilted()
    x, y = truth.sample(2000, seed=3).tensors
    fitted = fit_gaussian(x, y, eps=eps)
    expected = Gaussian.of(x, y).robust(eps)
    off = torch.linalg.matrix_norm(fitted.covariance - expected.covariance)
    assert float(off / torch.linalg.matrix_norm(expected.covariance)) < 0.002
    torch.testing.assert_close(fitted.mean, expected.mean, rtol=0.01, atol=0.01)


# --- Accuracy ---


@pytest.mark.parametrize("eps", [0.0, 0.4])
@pytest.mark.parametrize("learner_eps", [0.0, 1.0])
def test_accuracy_is_that_of_drawn_samples(eps, learner_eps):
    truth = tilted()
    learner = truth.robust(learner_eps)
    x, y = truth.sample(200_000, seed=2).tensors
    w = learner.classifier
    # The worst point of the l2 ball for a linear classifier.
    worst = x - eps * (2 * y - 1)[:, None] * w / w.norm()
    right = ((worst @ w > 0) == (y == 1)).double()
    expected = truth.accuracy(learner, eps)
    error = math.sqrt(expected * (1 - expected) / len(x))
    assert float(right.mean()) == pytest.approx(expected, abs=4 * error)


def test_nothing_is_more_accurate_than_maximum_likelihood():
    truth = tilted()
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        w = torch.randn(3, generator=generator, dtype=torch.float64)
        assert truth.accuracy(w) <= truth.accuracy(truth) + 1e-12


def test_robust_learning_trades_accuracy_for_robust_accuracy():
    truth = Gaussian([1.0, 0.5], [1.0, 0.01])
    robust = truth.robust(0.5)
    assert truth.accuracy(robust) < truth.accuracy(truth)
    assert truth.accuracy(robust, 0.5) > truth.accuracy(truth, 0.5)


# --- Theorem 3 ---


def test_the_papers_numbers_of_theorem_3():
    truth = Gaussian(torch.ones(3), DIAGONAL)
    assert truth.worst_cosine == pytest.approx(0.471, abs=5e-4)
    assert truth.robust_at(2.0).worst_cosine == pytest.approx(0.748, abs=5e-4)


def test_the_worst_cosine_is_the_worst_of_many_and_is_reached():
    model = tilted()
    precision = torch.linalg.inv(model.covariance)
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(100_000, 3, generator=generator, dtype=torch.float64)
    cosines = torch.cosine_similarity(means, means @ precision)
    assert float(cosines.min()) == pytest.approx(model.worst_cosine, rel=0.01)
    assert float(cosines.min()) >= model.worst_cosine


def test_gradients_align_better_the_larger_the_radius():
    truth = tilted()
    found = [truth.robust(eps).worst_cosine for eps in (0.0, 0.1, 1.0, 10.0)]
    assert found == sorted(found)
    assert found[-1] > found[0] + 0.1
    assert Gaussian([1.0, 0.0], [2.0, 2.0]).robust(1.0).worst_cosine == pytest.approx(1.0)


def test_misalignment_is_the_spread_of_mahalanobis_lengths_on_the_l2_ball():
    model = tilted()
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(100_000, 3, generator=generator, dtype=torch.float64)
    directions /= directions.norm(dim=1, keepdim=True)
    lengths = (directions @ torch.linalg.inv(model.covariance) * directions).sum(1).sqrt()
    assert float(lengths.max() / lengths.min()) == pytest.approx(model.misalignment, rel=0.02)


# --- Samples ---


def test_samples_have_the_mean_and_the_covariance():
    truth = tilted()
    x, y = truth.sample(100_000, seed=5).tensors
    found = Gaussian.of(x, y)
    assert truth.distance(found) < 0.03
    assert set(y.tolist()) == {0, 1}
    assert float(y.double().mean()) == pytest.approx(0.5, abs=0.01)
    again = truth.sample(100_000, seed=5).tensors
    assert torch.equal(x, again[0])
    assert not torch.equal(x, truth.sample(100_000, seed=6).tensors[0])


# --- The study and its figure ---


def test_the_table_has_a_line_a_radius():
    study = gaussian([1.0, 1.0], [4.0, 0.25], eps=(0.0, 1.0))
    lines = str(study).splitlines()
    assert len(lines) == 3
    assert f"{study.truth.accuracy(study.learned[1], 1.0):.4f}" in lines[2]


def test_figure_4_draws_the_learned_metrics_ball():
    study = gaussian([1.0, 1.0], [[4.0, 1.0], [1.0, 2.0]])
    panels = study.plot()
    assert len(panels) == 3
    ball = next(line for line in panels[1].lines if line.get_label().startswith("learned metric"))
    points = torch.tensor(ball.get_xydata())
    precision = torch.linalg.inv(study.learned[1].covariance)
    lengths = (points @ precision * points).sum(1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"mean": [[1.0]], "covariance": [[1.0]]}, "mean.shape"),
        ({"mean": [1.0, 1.0], "covariance": [1.0, 1.0, 1.0]}, "covariance.shape"),
        ({"mean": [1.0, 1.0], "covariance": [1.0, -1.0]}, "covariance"),
        ({"mean": [1.0, 1.0], "covariance": [[1.0, 0.5], [0.0, 1.0]]}, "symmetric"),
        ({"mean": [1.0], "covariance": [1.0], "eps": []}, "eps"),
        ({"mean": [1.0], "covariance": [1.0], "eps": [-1.0]}, "eps"),
    ],
)
def test_bad_parameters_are_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        gaussian(**arguments)


def test_only_two_dimensions_are_drawn():
    with pytest.raises(ValueError, match="two dimensions"):
        gaussian([1.0], [1.0]).plot()


@pytest.mark.parametrize("scale", [0.01, 100.0])
@pytest.mark.slow
def test_adversarial_fit_does_not_depend_on_the_units(scale):
    truth = Gaussian([1.0, 0.5], [[1.0, 0.3], [0.3, 0.5]])
    inputs, labels = truth.sample(300, seed=0).tensors
    expected = fit_gaussian(inputs, labels, eps=0.5)
    found = fit_gaussian(scale * inputs, labels, eps=0.5 * scale)
    close = {"rtol": 1e-4, "atol": 1e-5}  # Adam's own epsilon has no unit
    torch.testing.assert_close(found.covariance / scale**2, expected.covariance, **close)
    torch.testing.assert_close(found.mean / scale, expected.mean, **close)
    assert not found.mean.requires_grad


@pytest.mark.parametrize("learn", [Gaussian.of, lambda x, y: fit_gaussian(x, y, eps=0.1)])
def test_a_third_class_is_refused(learn):
    with pytest.raises(ValueError, match="labels=2: two classes"):
        learn(torch.rand(3, 2), torch.arange(3))


def test_a_constant_feature_is_named():
    inputs, labels = Gaussian([1.0, 2.0], [1.0, 1.0]).sample(20, seed=0).tensors
    inputs[:, 1] = 0  # a black pixel
    with pytest.raises(ValueError, match="feature 1 is constant"):
        fit_gaussian(inputs, labels, eps=0.1)
    with pytest.raises(ValueError, match="feature 0 is constant"):
        fit_gaussian(inputs[:1], labels[:1], eps=0.1)
