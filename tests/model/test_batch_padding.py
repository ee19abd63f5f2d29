"""Models that work with one batch size, or not with a single sample (A16)."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import advfeat as af
from advfeat.attacks import AutoAttack
from advfeat.metrics import robustness_curve

FEATURES, CLASSES, COUNT, BATCH = 6, 3, 22, 8


class Squeezing(nn.Module):
    """Loses the batch axis of a single sample."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x).unsqueeze(2).squeeze()


class OneSize(nn.Module):
    """As a model that was exported with a fixed batch."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x.view(BATCH, FEATURES))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 12), nn.Tanh(), nn.Linear(12, CLASSES))


def data():
    x = torch.rand(COUNT, FEATURES, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return TensorDataset(x, network()(x).argmax(1))


def exported():
    example = torch.rand(BATCH, FEATURES)
    return torch.export.export(network().eval(), (example,)).module()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "make", [lambda: Squeezing(network()), lambda: OneSize(network()), exported]
)
def test_the_verdict_is_that_of_the_model_without_the_limit(make):
    attack = AutoAttack(eps=0.1, norm="linf", version="fast", seed=0)
    expected = af.robust_accuracy(network(), data(), attack=attack, batch_size=BATCH)
    assert 0 < expected.count < COUNT
    model = make()
    robust = af.robust_accuracy(model, data(), attack=attack, batch_size=BATCH)
    assert torch.equal(robust.correct, expected.correct)
    assert torch.equal(robust.broken_by, expected.broken_by)
    assert af.accuracy(model, DataLoader(data(), batch_size=BATCH)).count == COUNT


@pytest.mark.parametrize("batch_size", [1, 7])
def test_a_single_sample_is_enough_for_a_model_that_squeezes(batch_size):
    model = Squeezing(network())
    x, y = data()[:batch_size]
    expected = af.pgd(network(), x, y, eps=0.1, norm="l2", steps=5)
    torch.testing.assert_close(af.pgd(model, x, y, eps=0.1, norm="l2", steps=5), expected)


@pytest.mark.slow
def test_constructions_and_curves_pad_too(monkeypatch):
    monkeypatch.setattr("advfeat.metrics._curve._ROUNDS", 2)
    model = OneSize(network())
    made = af.construct_det_dataset(model, data(), eps=0.5, steps=5, batch_size=BATCH)
    expected = af.construct_det_dataset(network(), data(), eps=0.5, steps=5, batch_size=BATCH)
    torch.testing.assert_close(made.images, expected.images)
    curve = robustness_curve(model, data(), norm="l2", batch_size=BATCH)
    of_plain = robustness_curve(network(), data(), norm="l2", batch_size=BATCH)
    for eps in (0.05, 0.1, 0.2):
        assert curve.at(eps).count == of_plain.at(eps).count


def test_the_first_error_is_told_where_padding_does_not_help():
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("the user's own mistake")

    with pytest.raises(RuntimeError, match="the user's own mistake"):
        af.accuracy(Broken(), data())


class OwnError(Exception):
    pass


@pytest.mark.parametrize("kind", [OwnError, ValueError, RuntimeError, KeyError])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_an_error_of_the_users_comes_as_it_was_raised(kind, batch_size):
    class Broken(nn.Module):
        raised = None
        calls = 0

        def forward(self, x):
            self.calls += 1
            error = kind("the user's own mistake")
            Broken.raised = Broken.raised or error
            raise error

    model = Broken()
    x, y = data()[:batch_size]
    with pytest.raises(kind) as caught:
        af.pgd(model, x, y, eps=0.1, norm="l2")
    assert caught.value is Broken.raised
    assert caught.value.__context__ is None
    assert caught.traceback[-1].name == "forward"
    if kind in (OwnError, KeyError):
        assert model.calls == 1


def test_copies_of_a_single_sample_are_no_batch_to_take_statistics_of():
    model = nn.Sequential(nn.Linear(FEATURES, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES))
    x, y = data()[:1]
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        af.PGD(eps=0.1, norm="l2")(model.train(), x, y, train=True)
