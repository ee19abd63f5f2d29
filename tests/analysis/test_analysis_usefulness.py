"""Usefulness of features: attacked values against closed forms, and what sorts them."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from advfeat import analysis
from advfeat.analysis._usefulness import NONROBUST, ROBUST, UNDECIDED, USELESS

WIDE = (-100.0, 100.0)


def made(count=150, features=5, classes=3, seed=0):
    """Inputs whose means differ by class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    centres = torch.randn(classes, features, generator=generator)
    return TensorDataset(
        centres[labels] + torch.randn(count, features, generator=generator), labels
    )


def by_definition(features, low, high, labels, label):
    """Rho and gamma of each feature with its own sign, straight from section 2's definitions."""
    y = torch.where(labels == label, 1.0, -1.0).double()
    weight = torch.where(y > 0, 0.5 / (y > 0).sum(), 0.5 / (y < 0).sum())
    found = []
    for f, f_low, f_high in zip(features.T, low.T, high.T, strict=True):
        mean = (weight * f).sum()
        deviation = (weight * (f - mean) ** 2).sum().sqrt()
        f, f_low, f_high = ((part - mean) / deviation for part in (f, f_low, f_high))
        if (weight * y * f).sum() < 0:
            f, f_low, f_high = -f, -f_high, -f_low
        worst = torch.where(y > 0, f_low, -f_high)
        found.append(((weight * y * f).sum(), (weight * worst).sum()))
    return torch.tensor(found).T


@pytest.mark.parametrize(("norm", "dual"), [("l1", torch.inf), ("l2", 2), ("linf", 1)])
def test_attacked_linear_features_agree_with_gohs_decomposition(norm, dual):
    data, eps = made(), 0.2
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    arguments = {"eps": eps, "norm": norm, "seed": 0, "resamples": 20}
    attacked = analysis.usefulness(model, data, steps=10, bounds=WIDE, **arguments)
    exact = analysis.linear_usefulness(model[0].weight, data, **arguments)
    torch.testing.assert_close(attacked.rho, exact.rho, atol=1e-5, rtol=0)
    torch.testing.assert_close(attacked.gamma, exact.gamma, atol=1e-4, rtol=0)
    assert float((exact.rho - exact.gamma).min()) > 0.01
    # And with the definition, feature by feature.
    x, y = data.tensors
    values = (x @ model[0].weight.detach().T).double()
    loss = eps * torch.linalg.vector_norm(model[0].weight.detach().double(), dual, dim=1)
    for label in range(3):
        rho, gamma = by_definition(values, values - loss, values + loss, y, label)
        torch.testing.assert_close(exact.rho[:, label], rho, atol=1e-6, rtol=0)
        torch.testing.assert_close(exact.gamma[:, label], gamma, atol=1e-6, rtol=0)


def test_rho_is_a_correlation():
    labels = torch.tensor([0, 1, 2] * 10)
    exact = nn.functional.one_hot(labels).float()
    data = TensorDataset(exact, labels)
    found = analysis.linear_usefulness(torch.eye(3), data, eps=0.1, norm="linf", seed=0)
    torch.testing.assert_close(found.rho.diagonal(), torch.ones(3).double())
    # Standard deviation one half under weights of one half: 0.1 costs 0.2.
    torch.testing.assert_close(found.gamma.diagonal(), torch.full((3,), 0.8).double())


def test_a_curved_feature_is_attacked_to_its_extremes():
    data, eps = made(features=2), 0.3
    x, y = data.tensors
    found = analysis.usefulness(
        nn.Linear(2, 3), data, layer=lambda x: torch.tanh(x) + x, eps=eps, norm="linf",
        bounds=WIDE, seed=0, resamples=10,
    )  # fmt: skip
    f = lambda x: (torch.tanh(x) + x).double()  # noqa: E731 - monotone in each coordinate
    for label in range(3):
        rho, gamma = by_definition(f(x), f(x - eps), f(x + eps), y, label)
        torch.testing.assert_close(found.rho[:, label], rho, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.gamma[:, label], gamma, atol=1e-5, rtol=0)


def test_a_step_that_makes_matters_worse_counts_for_nothing():
    generator = torch.Generator().manual_seed(0)
    x = 0.1 + 0.3 * torch.rand(40, 1, generator=generator)
    y = torch.arange(40) % 2
    found = analysis.usefulness(
        nn.Linear(1, 2), TensorDataset(x, y), layer=torch.square, eps=4.0, norm="l2", steps=1,
        bounds=WIDE, seed=0, resamples=5,
    )  # fmt: skip
    # The one step, of 1, leads past the minimum to a higher value: the input itself is the lowest.
    low, high = x.square().double(), (x + 1).square().double()
    rho, gamma = by_definition(low, low, high, y, 1)
    torch.testing.assert_close(found.rho[:, 1], rho, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.gamma[:, 1], gamma, atol=1e-5, rtol=0)


def test_the_box_limits_the_attack():
    x = torch.tensor([[0.0], [0.0], [1.0], [1.0]])
    data = TensorDataset(x, torch.tensor([0, 0, 1, 1]))
    found = analysis.usefulness(
        nn.Linear(1, 2), data, layer=lambda x: x, eps=0.25, norm="l2", seed=0, resamples=5
    )
    torch.testing.assert_close(found.gamma[0], torch.tensor([0.5, 0.5]).double())


def test_neither_scale_nor_sign_nor_offset_of_a_unit_matters():
    data = made()
    weight = torch.eye(5)
    arguments = {"eps": 0.1, "norm": "l2", "seed": 0, "resamples": 50}
    first = analysis.linear_usefulness(weight, data, **arguments)
    second = analysis.linear_usefulness(-3 * weight, data, **arguments)
    moved = TensorDataset(data.tensors[0] + 50, data.tensors[1])
    third = analysis.linear_usefulness(weight, moved, **arguments)
    for other in (second, third):
        torch.testing.assert_close(first.rho, other.rho, atol=1e-5, rtol=0)
        torch.testing.assert_close(first.gamma, other.gamma, atol=1e-5, rtol=0)
        torch.testing.assert_close(first.gamma_interval, other.gamma_interval, atol=1e-5, rtol=0)
    assert torch.equal(first.sign, -second.sign)


def test_neither_batches_nor_chunks_of_units_matter(monkeypatch):
    data = made(count=40)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    arguments = {"eps": 0.3, "norm": "l2", "bounds": WIDE, "seed": 0, "resamples": 20}
    whole = analysis.usefulness(model, data, **arguments)
    monkeypatch.setattr("advfeat.analysis._usefulness._ROWS", 16)
    pieces = analysis.usefulness(model, data, batch_size=7, **arguments)
    torch.testing.assert_close(whole.gamma, pieces.gamma, atol=1e-5, rtol=0)
    torch.testing.assert_close(whole.gamma_interval, pieces.gamma_interval, atol=1e-5, rtol=0)
    some = analysis.usefulness(model, data, units=[5, 2], **arguments)
    torch.testing.assert_close(some.gamma, whole.gamma[[5, 2]], atol=1e-5, rtol=0)
    assert some.units.tolist() == [5, 2]


def sorted_features():
    """Three features: large and useful, small and useful, large and useless; eps = 0.3."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 2
    y = 2.0 * labels - 1
    noise = torch.randn(400, 3, generator=generator)
    x = torch.stack([y + 0.3 * noise[:, 0], 0.1 * y + 0.05 * noise[:, 1], noise[:, 2]], 1)
    return TensorDataset(x, labels)


def test_features_are_sorted_into_kinds():
    result = analysis.linear_usefulness(
        torch.eye(3), sorted_features(), eps=0.3, norm="linf", level=0.99, seed=0
    )
    assert result.kind[:, 0].tolist() == [ROBUST, NONROBUST, USELESS]
    assert result.unit_kind.tolist() == [ROBUST, NONROBUST, USELESS]
    # At the radius where gamma is 0, the data cannot tell.
    exact = result.rho[1, 0] - result.gamma[1, 0]
    edge = 0.3 * float(result.rho[1, 0] / exact)
    at_edge = analysis.linear_usefulness(
        torch.eye(3), sorted_features(), eps=edge, norm="linf", seed=0
    )
    assert at_edge.unit_kind[1] == UNDECIDED
    line = next(line for line in str(at_edge).splitlines() if "undecided" in line)
    assert line.split()[1:4] == ["1", "33%", "2"]


def test_a_unit_that_never_changes_is_useless():
    x, y = made().tensors
    data = TensorDataset(torch.cat([x, torch.full((len(x), 1), 0.3)], 1), y)
    found = analysis.linear_usefulness(torch.eye(6), data, eps=0.1, norm="l2", seed=0)
    assert found.rho[5].tolist() == [0, 0, 0]
    assert found.kind[5].tolist() == [USELESS] * 3
    assert bool(torch.isfinite(found.gamma).all())


@pytest.mark.slow
def test_intervals_are_as_wide_as_results_scatter():
    generator = torch.Generator().manual_seed(1)

    def once(resamples=1):
        labels = torch.randint(2, (200,), generator=generator)
        x = labels[:, None] + torch.randn(200, 1, generator=generator)
        data = TensorDataset(x, labels)
        return analysis.linear_usefulness(
            torch.eye(1), data, eps=0.2, norm="l2", seed=0, resamples=resamples
        )

    found = once(resamples=1000)
    others = [once() for _ in range(200)]
    for name in ("rho", "gamma"):
        low, high = getattr(found, f"{name}_interval")[:, 0, 0]
        scatter = torch.stack([getattr(other, name)[0, 0] for other in others]).std()
        assert low < getattr(found, name)[0, 0] < high
        assert float(high - low) / (2 * 1.96) == pytest.approx(float(scatter), rel=0.25)


def test_units_without_a_gradient_are_reported():
    data = made()
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([-1000.0, 1000.0, 0.0, 0.0]))
    arguments = {"eps": 0.1, "norm": "l2", "bounds": WIDE, "seed": 0, "resamples": 5}
    below = analysis.usefulness(model, data, **arguments)
    assert below.stuck[:2].tolist() == [1.0, 0.0]
    assert 0 < float(below.stuck[2]) < 1
    assert "no gradient" in str(below)
    before = analysis.usefulness(model, data, layer="0", **arguments)
    assert before.stuck.tolist() == [0, 0, 0, 0]
    assert "no gradient" not in str(before)


def test_the_model_and_the_random_state_are_left_alone():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    analysis.usefulness(
        model, made(), eps=0.1, norm="l2", bounds=WIDE, seed=0, resamples=5, steps=2
    )
    assert torch.equal(torch.rand(1), expected)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"units": [4]}, "units"),
        ({"units": []}, "units"),
        ({"eps": 0.0}, "eps"),
        ({"norm": "l3"}, "norm"),
        ({"level": 95}, "level"),
        ({"resamples": 0}, "resamples"),
    ],
)
def test_bad_arguments_are_refused(change, named):
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    arguments = {"eps": 0.1, "norm": "l2", "bounds": WIDE} | change
    with pytest.raises(ValueError, match=named):
        analysis.usefulness(model, made(), **arguments)


def test_one_class_has_no_rest():
    data = TensorDataset(torch.rand(4, 2), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="one class"):
        analysis.linear_usefulness(torch.eye(2), data, eps=0.1, norm="l2")


def test_the_plot_has_every_point_in_its_region():
    result = analysis.linear_usefulness(
        torch.eye(3), sorted_features(), eps=0.3, norm="linf", level=0.99, seed=0
    )
    axes = result.plot()
    points = {
        part.get_label().split(" (")[0]: part.get_offsets()
        for part in axes.collections
        if "(" in part.get_label()
    }
    assert len(points["robust"]) == 2
    assert (points["robust"][:, 1] > 0).all()
    assert (points["useful, non-robust"][:, 1] < 0).all()


def test_weights_that_are_no_tensor_are_refused():
    data = TensorDataset(torch.rand(6, 2), torch.arange(6) % 2)
    with pytest.raises(TypeError, match=r"weight: expected a torch\.Tensor, got list"):
        analysis.linear_usefulness([[1.0, 0.0]], data, eps=0.1, norm="l2")


def noise(count, features, classes, generator):
    """Inputs that know nothing of their labels; every class occurs."""
    labels = torch.arange(count) % classes
    return TensorDataset(torch.randn(count, features, generator=generator), labels)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "classes"), [(128, 10), (60, 2)])
def test_in_pure_noise_no_unit_is_useful_in_95_percent_of_the_cases(count, classes):
    """The largest of 16 units and all classes is what a naive interval falls for."""
    generator = torch.Generator().manual_seed(0)
    wrong = outside = 0
    for seed in range(200):
        found = analysis.linear_usefulness(
            torch.eye(16), noise(count, 16, classes, generator), eps=0.1, norm="l2", seed=seed,
            resamples=99,
        )  # fmt: skip
        wrong += bool((found.unit_kind != USELESS).any())
        outside += bool((found.rho_interval[0] > 0).any())
    assert wrong <= 16  # 8%
    assert outside <= 16


@pytest.mark.slow
def test_attacked_units_of_noise_are_not_useful_either():
    generator = torch.Generator().manual_seed(0)
    wrong = 0
    for seed in range(200):
        found = analysis.usefulness(
            nn.Linear(4, 3), noise(40, 4, 3, generator), layer=lambda x: x, eps=0.5, norm="l2",
            bounds=WIDE, steps=1, resamples=39, seed=seed, progress=False,
        )  # fmt: skip
        wrong += bool((found.unit_kind != USELESS).any())
    assert wrong <= 16


def test_weak_features_are_found_where_samples_suffice():
    """Power: a correlation of 0.2 among 30 units of noise, 2000 samples."""
    generator = torch.Generator().manual_seed(0)
    x, y = noise(2000, 31, 2, generator).tensors
    x[:, 4] += 0.4 * y
    found = analysis.linear_usefulness(
        torch.eye(31), TensorDataset(x, y), eps=0.5, norm="l2", seed=0
    )
    assert found.unit_kind.nonzero().tolist() == [[4]]
    assert found.unit_kind[4] == NONROBUST
    assert found.rho_interval[0, 4, 1] < 0.2 < found.rho_interval[1, 4, 1]


def test_a_class_of_two_samples_has_no_interval():
    x, y = made(count=60, classes=3).tensors
    keep = torch.cat([(y != 2).nonzero().squeeze(1), (y == 2).nonzero().squeeze(1)[:2]])
    found = analysis.linear_usefulness(
        torch.eye(5), TensorDataset(x[keep], y[keep]), eps=0.1, norm="l2", seed=0, resamples=50
    )
    assert found.rho_interval[0, :, 2].tolist() == [-1.0] * 5
    assert bool(torch.isneginf(found.gamma_interval[0, :, 2]).all())
    assert bool(torch.isfinite(found.gamma_interval[..., :2]).all())


def test_values_that_are_no_numbers_raise_an_error():
    """NaN would pass for a unit that never changes, and be called useless."""
    x, y = torch.rand(20, 3), torch.arange(20) % 2
    broken = x.clone()
    broken[3, 0] = float("nan")
    weight = torch.eye(3)
    weight[1, 1] = float("inf")
    with pytest.raises(ValueError, match="NaN or infinite in sample 3"):
        analysis.linear_usefulness(torch.eye(3), TensorDataset(broken, y), eps=0.1, norm="l2")
    with pytest.raises(ValueError, match="unit 1 is NaN or infinite on 20 samples"):
        analysis.linear_usefulness(weight, TensorDataset(x + 0.1, y), eps=0.1, norm="l2")
    data = TensorDataset(x, y)
    with pytest.raises(ValueError, match="NaN or infinite features on 20 samples"):
        analysis.linear_probe(torch.nn.Identity(), data, data, layer=lambda v: v / 0 * 0)
