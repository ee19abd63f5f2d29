"""Random models: ``expectation=k`` in every attack, measure and construction (EOT)."""

import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from toys import batch, linear, predicted

import advfeat as af
from advfeat import attacks
from advfeat.checks import ResultWarning
from advfeat.metrics import robustness_curve, transfer_matrix

X = batch(24, dtype=torch.float32)
EPS = 0.05


class Noisy(nn.Module):
    """A linear model with noise in its inputs: the mean over many calls is that without noise."""

    def __init__(self, noise):
        super().__init__()
        self.model, self.noise, self.calls = linear(4), noise, 0

    def forward(self, x):
        self.calls += 1
        return self.model(x + self.noise(x))


NOISES = {
    "torch": lambda x: 0.1 * torch.randn_like(x),
    "NumPy": lambda x: torch.from_numpy(0.1 * np.random.randn(*x.shape)).to(x),  # noqa: NPY002
    "Python": lambda x: 0.1 * (2 * random.random() - 1) * torch.ones_like(x),
}


def noisy(name="torch"):
    model = Noisy(NOISES[name])
    return model, predicted(model.model, X)


def states():
    return torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002


def same_states(before):
    now = states()
    return torch.equal(before[0], now[0]) and before[1:] == now[1:]


CALLS = {
    "pgd": lambda m, y, k: af.pgd(m, X, y, eps=EPS, norm="linf", steps=4, expectation=k),
    "fgsm": lambda m, y, k: af.fgsm(m, X, y, eps=EPS, norm="linf", expectation=k),
    "apgd": lambda m, y, k: attacks.apgd(
        m, X, y, eps=EPS, norm="linf", steps=4, seed=0, expectation=k
    ),
    "fmn": lambda m, y, k: attacks.fmn(m, X, y, norm="l2", steps=5, expectation=k),
    "fab": lambda m, y, k: attacks.fab(m, X, y, norm="l2", steps=3, expectation=k),
    "minimum_pgd": lambda m, y, k: attacks.minimum_pgd(
        m, X, y, norm="l2", steps=5, seed=0, expectation=k
    ),
    "square": lambda m, y, k: attacks.square(
        m, X, y, eps=EPS, norm="linf", queries=10, seed=0, expectation=k
    ),
    "smoothed": lambda m, y, k: attacks.smoothed_pgd(
        m, X, y, eps=EPS, norm="linf", steps=4, seed=0, expectation=k
    ),
    "AutoAttack": lambda m, y, k: attacks.AutoAttack(
        eps=EPS, norm="linf", version="fast", seed=0
    )(m, X, y, expectation=k),
    "invert": lambda m, y, k: attacks.invert(
        m, X, X.flip(0), layer="model", steps=4, expectation=k
    ),
    "accuracy": lambda m, y, k: af.accuracy(m, TensorDataset(X, y), expectation=k).correct,
    "robust_accuracy": lambda m, y, k: af.robust_accuracy(
        m, TensorDataset(X, y), eps=EPS, norm="linf", seed=0, steps=4, expectation=k
    ).correct,
    "curve": lambda m, y, k: robustness_curve(
        m, TensorDataset(X, y), norm="l2", attack=attacks.FMN(norm="l2", steps=5), expectation=k
    ).distance,
    "transfer": lambda m, y, k: transfer_matrix(
        {"a": m}, {"b": m}, TensorDataset(X, y), af.PGD(eps=EPS, norm="linf", steps=4),
        expectation=k,
    ).of_all,
    "D_det": lambda m, y, k: af.construct_det_dataset(
        m, TensorDataset(X, y), eps=EPS, norm="l2", steps=4, expectation=k
    ).images,
    "D_rand": lambda m, y, k: af.construct_rand_dataset(
        m, TensorDataset(X, y), eps=EPS, norm="l2", steps=4, seed=0, expectation=k
    ).images,
    "D_R": lambda m, y, k: af.construct_robust_dataset(
        m, TensorDataset(X, y), layer="model", steps=4, seed=0, expectation=k
    ).images,
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [n if n != "AutoAttack" else pytest.param(n, marks=pytest.mark.slow) for n in CALLS],
)
@pytest.mark.slow
@pytest.mark.usefixtures("short_ensembles")
def test_calls_with_an_expectation_repeat_without_a_warning(name):
    model, y = noisy()
    before = states()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = CALLS[name](model, y, 3)
        assert same_states(before)
        torch.manual_seed(5)
        assert torch.equal(first, CALLS[name](model, y, 3))
        calls = model.calls
        CALLS[name](model, y, 6)
    assert model.calls - calls > 1.5 * calls / 2


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.slow
def test_the_average_of_many_calls_is_the_model_without_noise(noise):
    """At 0.05 in linf a sample is robust whose lead is above the sum of the weights, exactly."""
    model, y = noisy(noise)
    plain = model.model
    exact = af.robust_accuracy(plain, TensorDataset(X, y), eps=EPS, norm="linf", seed=0)
    before = states()
    settings = {"eps": EPS, "norm": "linf", "steps": 5, "seed": 0}
    found = af.robust_accuracy(model, TensorDataset(X, y), expectation=100, **settings)
    assert same_states(before)
    assert abs(found - exact) <= 2 / len(X)
    with pytest.warns(ResultWarning, match="expectation=k"):
        af.robust_accuracy(model, TensorDataset(X, y), **settings)


@pytest.mark.parametrize("k", [1, 4])
def test_a_ball_of_radius_0_gives_the_clean_accuracy(k):
    model, y = noisy()
    data = TensorDataset(X, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        robust = af.robust_accuracy(model, data, eps=0, norm="linf", seed=0, expectation=k)
        curve = robustness_curve(
            model, data, norm="l2", attack=attacks.FMN(norm="l2", steps=3), expectation=k
        )
        clean = af.accuracy(model, data, expectation=k)
    assert robust == robust.standard
    if k > 1:
        assert robust == clean == curve.at(0)


def test_the_manifest_says_so():
    model, y = noisy()
    made = af.construct_det_dataset(model, TensorDataset(X, y), eps=EPS, steps=1, expectation=2)
    assert made.manifest["settings"]["expectation"] == 2
