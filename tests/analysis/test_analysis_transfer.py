"""Transfer and "just bugs": linear models that share some of their features and not others."""

import functools

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import advfeat as af
from advfeat import analysis
from advfeat.analysis import Transfer
from advfeat.analysis._transfer import TransferPoint
from advfeat.metrics import Accuracy

DET = functools.partial(af.construct_det_dataset, eps=0.3, steps=20, progress=False)


def made(count=40):
    """Two classes; every one of four numbers tells them apart."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(count) % 2
    x = 0.5 + 0.05 * (2 * y - 1)[:, None] + 0.01 * torch.randn(count, 4, generator=generator)
    return TensorDataset(x, y)


def reads(*columns):
    """A model that decides by the sum of some columns."""
    model = nn.Linear(4, 2)
    weight = torch.zeros(4)
    weight[list(columns)] = 10.0
    with torch.no_grad():
        model.weight[1], model.weight[0] = weight, -weight
        model.bias[1] = -float(weight.sum()) / 2
        model.bias[0] = float(weight.sum()) / 2
    return model


def test_examples_transfer_to_models_that_read_the_same_features():
    data = made()
    models = {"same": reads(0, 1), "half": reads(1, 2), "other": reads(2, 3)}
    found = analysis.transfer(
        reads(0, 1), models, data, data, construct=DET, learn=lambda name, d_det: models[name]
    )
    rates = {point.name: float(point.fooled) for point in found.points}
    assert rates == {"same": 1.0, "half": 1.0, "other": 0.0}
    assert [float(point.learned) for point in found.points] == [1.0, 1.0, 1.0]


def test_all_denominators():
    """Of samples both models have right, of those that the source is fooled on, and of all."""
    x, y = made(40).tensors
    wrong = y.clone()
    wrong[:10] = 1 - wrong[:10]  # the source is wrong on these as they are
    data = TensorDataset(x, wrong)
    source = reads(0, 1)
    found = analysis.transfer(
        source, {"same": reads(0, 1)}, data, data, construct=DET, learn=lambda n, d: source
    ).points[0]
    assert (found.fooled.total, found.of_fooled.total, found.of_all.total) == (30, 30, 40)
    assert float(found.clean_error) == 0.25
    # The first ten were moved towards the class they look like: still "wrong".
    assert float(found.of_fooled) == 1.0


def test_learners_get_the_set_from_the_training_data():
    data, seen = made(), {}

    def learn(name, d_det):
        seen[name] = d_det
        return reads(0)

    test = TensorDataset(*(part[:10] for part in data.tensors))
    analysis.transfer(reads(0), {"a": reads(0)}, data, test, construct=DET, learn=learn)
    assert len(seen["a"]) == 40
    assert torch.equal(seen["a"].labels, 1 - data.tensors[1])


def test_the_correlation_is_pearsons():
    def share(count):
        return Accuracy.of(torch.arange(100) < count)

    points = tuple(
        TransferPoint(str(place), share(x), share(y), share(y), share(y), share(5))
        for place, (x, y) in enumerate([(10, 20), (20, 30), (35, 60), (50, 55)])
    )
    found = Transfer(points)
    expected = torch.corrcoef(torch.tensor([[10.0, 20, 35, 50], [20, 30, 60, 55]]))[0, 1]
    assert found.correlation == pytest.approx(float(expected))
    assert f"{found.correlation:.2f}" in str(found)
    low, high = found.correlation_interval
    assert f"{low:.2f} to {high:.2f}" in str(found)
    assert low < float(expected) < high
    other = Transfer(points[:2])
    axes = found.plot(others={"just bugs": other})
    assert len(axes.lines) == 6
    assert axes.lines[0].get_xydata()[0].tolist() == pytest.approx([10, 20])
    assert axes.lines[0].get_color() == axes.lines[4].get_color()


class Constant(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return nn.functional.one_hot(torch.full((len(x),), self.answer), 2) + 0.0 * x[:, :1]


def test_a_constant_model_is_wrong_and_not_fooled():
    data = made()
    found = analysis.transfer(
        reads(0, 1), {"constant": Constant(1), "reads": reads(0)}, data, data, construct=DET,
        learn=lambda name, d_det: reads(0),
    )  # fmt: skip
    constant, other = found.points
    assert (float(constant.fooled), constant.fooled.total) == (0.0, 20)
    assert float(constant.of_fooled) == float(constant.clean_error) == 0.5
    assert (float(other.fooled), float(other.clean_error)) == (1.0, 0.0)


def test_architectures_that_learn_by_chance_do_not_correlate():
    """200 draws of six architectures without any relation: the interval has 0 in it in 95%."""
    generator = torch.Generator().manual_seed(0)

    def share():
        return Accuracy.of(torch.rand(100, generator=generator) < 0.3)

    wrong = 0
    for _ in range(200):
        points = [TransferPoint("a", *(share() for _ in range(5))) for _ in range(6)]
        low, high = Transfer(tuple(points)).correlation_interval
        wrong += low > 0 or high < 0
    assert wrong <= 16  # 8%


def test_an_architecture_that_is_always_wrong_is_left_out_of_the_correlation():
    none = Accuracy.of(torch.zeros(0, dtype=torch.bool))
    share = [Accuracy.of(torch.arange(10) < count) for count in (2, 4, 5, 7)]
    points = [TransferPoint("a", each, each, each, each, each) for each in share]
    odd = TransferPoint("never", share[0], none, none, share[3], share[3])
    found = Transfer((*points, odd))
    assert found.correlation == pytest.approx(1.0)
    assert found.correlation_interval == Transfer(tuple(points)).correlation_interval
    assert "none" in str(found)


def test_a_source_that_cannot_be_fooled_is_reported():
    det = functools.partial(af.construct_det_dataset, eps=0.001, steps=2, progress=False)
    with pytest.raises(ValueError, match="fooled on none"):
        analysis.transfer(
            reads(0), {"a": reads(0)}, made(), made(), construct=det, learn=lambda n, d: reads(0)
        )


# --- Just bugs ---


def test_bugs_fool_the_model_by_what_the_others_do_not_read():
    data = made()
    model, other = reads(0, 1), reads(1, 2)
    shared = DET(model, data)
    bugs = analysis.just_bugs(model, data, others=[other], eps=0.3, steps=20)
    targets = 1 - data.tensors[1]
    for made_set, fooled in ((shared, 1.0), (bugs, 0.0)):
        assert torch.equal(made_set.labels, targets)
        assert bool(made_set.field("success").all())
        assert float(made_set.field("size").max()) <= 0.3 + 1e-6
        on_other = other(made_set.images).argmax(1) == targets
        assert float(on_other.float().mean()) == fooled
    assert bugs.manifest["method"] == "just bugs"
    assert bugs.manifest["model"] == "Linear"


def test_a_step_goes_along_the_sum_of_both_gradients():
    torch.manual_seed(0)
    model, *others = (nn.Linear(4, 3) for _ in range(3))
    x, y = torch.rand(5, 4) * 0.2 + 0.4, torch.tensor([0, 1, 2, 0, 1])
    found = analysis.just_bugs(
        model, TensorDataset(x, y), others=others, eps=0.1, shift=2, steps=1, step_size=0.05
    )
    leaf = x.clone().requires_grad_()
    loss = nn.functional.cross_entropy(model(leaf), (y + 2) % 3, reduction="sum")
    for other in others:
        loss = loss + nn.functional.cross_entropy(other(leaf), y, reduction="sum") / 2
    (gradient,) = torch.autograd.grad(loss, leaf)
    expected = x - 0.05 * gradient / gradient.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found.images, expected)


def test_the_models_are_left_as_they_were():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    other = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    analysis.just_bugs(model, made(), others=[other], steps=2)
    assert model.training
    assert not other.training
    assert all(parameter.requires_grad for parameter in other.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"others": []}, "others"),
        ({"others": [nn.Linear(4, 3)]}, "others"),
        ({"shift": 2}, "shift"),
        ({"eps": 0.0}, "eps"),
    ],
)
def test_bad_arguments_are_refused(change, named):
    arguments = {"others": [reads(1)], "steps": 2} | change
    with pytest.raises(ValueError, match=named):
        analysis.just_bugs(reads(0), made(), **arguments)


def test_labels_beyond_the_classes_are_refused():
    data = TensorDataset(torch.rand(4, 4), torch.tensor([0, 1, 2, 1]))
    with pytest.raises(ValueError, match="classes"):
        analysis.just_bugs(reads(0), data, others=[reads(1)], steps=2)
