"""Leakage of robust features: made sets whose features are known."""

import pytest
import torch
from torch.utils.data import TensorDataset

from advfeat import analysis
from advfeat.analysis._features import Stacked
from advfeat.analysis._leakage import _logistic_regression, _most_robust


def rows(robust_label, fragile_label, count=400, seed=0):
    """Inputs whose first four numbers say one label, far apart, and the fifth another, barely."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 5, generator=generator)
    large = 0.5 + 0.2 * (2 * robust_label - 1)[:, None] + 0.05 * noise[:, :4]
    small = 0.5 + 0.01 * (2 * fragile_label - 1)[:, None] + 0.002 * noise[:, 4:]
    return torch.cat([large, small], 1).clamp(0, 1)


@pytest.fixture
def sets():
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(2, (400,), generator=generator)
    other = torch.randint(2, (400,), generator=generator)
    true = TensorDataset(rows(y, y), y)
    return {
        "true": true,
        "test": TensorDataset(rows(y, y, seed=2), y),
        # Only the fragile feature agrees with the labels, as in D_rand.
        "random": TensorDataset(rows(other, y), y),
        # The robust feature agrees with the wrong label, as in D_det.
        "opposite": TensorDataset(rows(1 - y, y), y),
        # A set that leaks.
        "leaking": TensorDataset(rows(torch.where(torch.arange(400) < 280, y, other), y), y),
    }


@pytest.mark.parametrize(
    ("made", "lowest", "highest"),
    [("opposite", 0.0, 0.02), ("leaking", 0.95, 1.0)],
)
def test_what_robust_features_teach_is_found(sets, made, lowest, highest):
    found = analysis.leakage(sets[made], sets["true"], sets["test"], eps=0.2, seed=0)
    assert lowest <= found.learned <= highest
    assert found.above_chance == (made == "leaking")
    counts = sets["test"].tensors[1].bincount()
    assert found.chance == int(counts.max()) / 400
    assert found.reference > 0.95
    assert str(found.features) in str(found)


def test_the_features_that_are_used_are_robust_by_the_closed_form(sets):
    found = analysis.leakage(sets["random"], sets["true"], sets["test"], eps=0.2, seed=0)
    assert found.features == 2
    assert bool((found.usefulness.gamma_interval[0].amax(1) > 0).all())
    assert found.usefulness.eps == 0.2


def test_constant_inputs_have_no_robust_feature():
    same = TensorDataset(torch.full((40, 6), 0.3), torch.arange(40) % 2)
    with pytest.raises(ValueError, match="no linear feature is robust"):
        analysis.leakage(same, same, same, eps=0.1, seed=0)


def test_a_radius_at_which_nothing_is_robust_is_refused(sets):
    with pytest.raises(ValueError, match="eps"):
        analysis.leakage(sets["random"], sets["true"], sets["test"], eps=2.0, seed=0)


def noise(count, features, classes, generator, commonest=0.0):
    """Inputs that know nothing of their labels, of which this fraction more is of class 0."""
    labels = torch.randint(classes, (count,), generator=generator)
    labels[torch.rand(count, generator=generator) < commonest] = 0
    labels[: 4 * classes] = torch.arange(4 * classes) % classes
    return TensorDataset(torch.rand(count, features, generator=generator), labels)


def test_chance_is_the_commonest_class():
    """Classes of 85 and 15 percent, pixels of noise: whoever says the first is right in 85%."""
    generator = torch.Generator().manual_seed(0)
    train, test = (noise(600, 64, 2, generator, commonest=0.7) for _ in range(2))
    found = analysis.leakage(train, train, test, eps=0.01, seed=0)
    assert found.chance == float((test.tensors[1] == 0).double().mean()) > 0.8
    assert found.learned <= found.chance
    assert not found.above_chance
    assert found.features == 0
    assert "no linear feature is robust for certain" in str(found)


@pytest.mark.slow
@pytest.mark.parametrize(("classes", "commonest"), [(2, 0.7), (4, 0.0)])
def test_noise_does_not_leak(classes, commonest):
    """200 draws: above chance in at most 5%, give or take 3, and no feature is robust in 95%."""
    generator = torch.Generator().manual_seed(0)
    above = robust = 0
    for seed in range(200):
        train, test = (noise(120, 10, classes, generator, commonest) for _ in range(2))
        found = analysis.leakage(train, train, test, eps=0.001, seed=seed)
        above += found.above_chance
        robust += found.features > 0
    assert above <= 16
    assert robust <= 16


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_no_other_linear_feature_is_more_robustly_useful(sets, norm):
    train, eps = sets["true"], 0.05
    best = _most_robust(Stacked(*train.tensors), 2, eps, norm)
    generator = torch.Generator().manual_seed(0)
    others = torch.cat(
        [best[1:] + size * torch.randn(50, 5, generator=generator) * best[1].norm()
         for size in (1e-3, 0.03, 1.0)]
    )  # fmt: skip
    found = analysis.linear_usefulness(
        torch.cat([best[1:], others]), train, eps=eps, norm=norm, seed=0, resamples=1
    )
    assert found.gamma[0, 1] > 0
    assert bool((found.gamma[1:, 1] <= found.gamma[0, 1] + 1e-4).all())


def test_logistic_regression_reaches_its_optimum():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, generator=generator)
    y = (x[:, 0] + 0.5 * torch.randn(200, generator=generator) > 0).long()
    answer = _logistic_regression(x, y, 2)
    loss = torch.nn.functional.cross_entropy(answer(x), y) + 1e-4 * answer.weight.square().sum()
    gradients = torch.autograd.grad(loss, [*answer.parameters()])
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-4


def test_the_seed_governs_and_the_random_state_is_left(sets):
    arguments = (sets["random"], sets["true"], sets["test"])
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    with torch.random.fork_rng():
        first = analysis.leakage(*arguments, eps=0.2, seed=3)
    assert torch.equal(torch.rand(1), expected)
    torch.manual_seed(6)
    second = analysis.leakage(*arguments, eps=0.2, seed=3)
    assert torch.equal(first.usefulness.gamma, second.usefulness.gamma)
    assert torch.equal(first.learned.correct, second.learned.correct)


def test_the_plot_has_both_accuracies(sets):
    found = analysis.leakage(sets["random"], sets["true"], sets["test"], eps=0.2, seed=0)
    heights = [patch.get_height() for patch in found.plot().patches]
    assert heights == pytest.approx([100 * found.learned, 100 * found.reference])
