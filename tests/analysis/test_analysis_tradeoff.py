"""The trade-off and the cost of D_R, and learning from mistakes alone."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import advfeat as af
from advfeat import analysis
from advfeat.analysis import RobustDatasetCost


def made(count=200, seed=0):
    """Two classes, told apart well by a small number and less well by a large one."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (count,), generator=generator)
    sign = (2 * y - 1)[:, None]
    noise = torch.randn(count, 2, generator=generator)
    large, small = 0.2 * sign + 0.12 * noise[:, :1], 0.02 * sign + 0.006 * noise[:, 1:]
    return TensorDataset((0.5 + torch.cat([large, small], 1)).clamp(0, 1), y)


def learn(eps):
    model = nn.Sequential(nn.Linear(2, 2))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    options = {"epochs": 12, "lr": 2.0, "weight_decay": 0.0, "batch_size": 50, "seed": 0}
    if eps:
        af.adversarial_fit(model, made(), eps=eps, norm="linf", **options)
    else:
        af.fit(model, made(), **options)
    return model


def test_the_points_are_what_robust_accuracy_says():
    test, attack = made(seed=1), af.PGD(eps=0.1, norm="linf", steps=5)
    found = analysis.tradeoff(learn, test, eps=[0.0, 0.1], attack=attack)
    assert found.eps == (0.0, 0.1)
    for eps, point in zip(found.eps, found.robust, strict=True):
        expected = af.robust_accuracy(learn(eps), test, attack=attack)
        assert point == expected
        assert point.standard == expected.standard
    assert all(seconds > 0 for seconds in found.seconds)
    assert found.robust[1] > found.robust[0]
    assert len(str(found).splitlines()) == 3
    lines = found.plot().lines
    assert lines[1].get_ydata().tolist() == pytest.approx([100 * p for p in found.robust])


def test_radii_are_refused_before_any_training():
    def never(eps):
        raise AssertionError

    attack = af.PGD(eps=0.1, norm="l2")
    for eps in ([], 0.5, [0.1, -0.1]):
        with pytest.raises(ValueError, match="eps"):
            analysis.tradeoff(never, made(), eps=eps, attack=attack)


def test_the_cost_counts_every_part():
    train, test = made(), made(seed=1)
    attack = af.PGD(eps=0.1, norm="linf", steps=5)
    given = {}

    def construct(model, data):
        given["robust"], given["data"] = model, data
        return af.construct_robust_dataset(
            model, data, layer=lambda x: x, steps=3, seed=0, progress=False
        )

    def fit_standard(data):
        given.setdefault("sets", []).append(data)
        return learn(0.0)

    found = analysis.robust_dataset_cost(
        train, test, fit_standard=fit_standard, fit_adversarial=lambda data: learn(0.1),
        attack=attack, construct=construct,
    )  # fmt: skip
    assert given["data"] is train
    assert given["sets"][0] is train
    assert isinstance(given["sets"][1], af.ConstructedDataset)
    assert found.adversarial == af.robust_accuracy(given["robust"], test, attack=attack)
    assert found.standard == found.from_robust_dataset
    assert set(found.seconds) == {
        "standard", "adversarial", "construction", "from_robust_dataset"
    }  # fmt: skip
    assert "construction of D_R" in str(found)
    assert len(found.plot().get_xticklabels()) == 3


def test_break_even():
    accuracy = af.robust_accuracy(nn.Linear(2, 2), made(), eps=0.1, norm="l2", steps=1)
    seconds = {"standard": 1.0, "adversarial": 8.0, "construction": 30.0, "from_robust_dataset": 2}
    found = RobustDatasetCost(accuracy, accuracy, accuracy, seconds)
    assert found.break_even == 5.0
    slow = RobustDatasetCost(accuracy, accuracy, accuracy, seconds | {"from_robust_dataset": 9})
    assert slow.break_even == math.inf


# --- Mistakes ---


def noisy(count=200, seed=0):
    """The same data with one label in five wrong."""
    x, y = made(count, seed).tensors
    return TensorDataset(x, torch.where(torch.arange(count) % 5 == 0, 1 - y, y))


def maker():
    """A linear model of both numbers, which gets nearly all true labels right."""
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-10.0, -20.0], [10.0, 20.0]]))
        model.bias.copy_(torch.tensor([15.0, -15.0]))
    return model


def test_mistakes_are_the_samples_a_model_gets_wrong_labelled_by_it():
    data, model = noisy(), maker()
    x, y = data.tensors
    said = model(x).argmax(1)
    wrong = analysis.mistakes(model, data, batch_size=7)
    rows = (said != y).nonzero().squeeze(1)
    assert 3 < len(rows) < 100
    assert torch.equal(wrong.field("index"), rows)
    assert torch.equal(wrong.images, x[rows])
    assert torch.equal(wrong.labels, said[rows])
    assert torch.equal(wrong.field("source_labels"), y[rows])


def test_a_model_without_mistakes_is_reported():
    data = TensorDataset(torch.eye(2), torch.arange(2))
    with pytest.raises(ValueError, match="no mistake"):
        analysis.mistakes(nn.Identity(), data)


def test_mistakes_alone_teach_what_their_maker_knew():
    train, test, model = noisy(600), noisy(seed=1), maker()

    def student(wrong):
        assert bool((wrong.labels != wrong.field("source_labels")).all())
        fresh = nn.Linear(2, 2)
        af.fit(fresh, wrong, epochs=30, lr=1.0, batch_size=50, seed=0)
        return fresh

    found = analysis.mislabelled(model, train, test, learn=student)
    # Every label it saw was wrong.
    assert found.above_chance
    assert found.chance == int(test.tensors[1].bincount().max()) / len(test)
    assert found.teacher == af.accuracy(model, test)
    assert str(len(found.mistakes)) in str(found)
    assert len(found.plot().patches) == 2


@pytest.mark.slow
def test_mistakes_on_noise_teach_nothing():
    """200 draws of labels 70 to 30 percent: above chance in at most 5%, give or take 3."""
    generator = torch.Generator().manual_seed(0)
    above = 0
    for seed in range(200):
        x = torch.rand(2, 60, 4, generator=generator)
        y = (torch.rand(2, 60, generator=generator) < 0.3).long()
        train, test = (TensorDataset(*part) for part in zip(x, y, strict=True))

        def student(wrong, seed=seed):
            with torch.random.fork_rng():
                fresh = nn.Linear(4, 2)
            af.fit(fresh, wrong, epochs=2, lr=0.5, batch_size=30, seed=seed, progress=False)
            return fresh

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            teacher = nn.Linear(4, 2)
        above += analysis.mislabelled(teacher, train, test, learn=student).above_chance
    assert above <= 16
