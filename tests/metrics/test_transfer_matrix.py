"""Transfer: three denominators, counted by hand where the model is simple enough."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import advfeat as af
from advfeat.attacks import APGD, AutoAttack
from advfeat.metrics import transfer_matrix
from advfeat.statistics import wilson_interval


class Threshold(nn.Module):
    """Says 1 where one feature is above a threshold."""

    def __init__(self, feature, threshold=0.5):
        super().__init__()
        self.feature, self.threshold = feature, threshold

    def forward(self, x):
        lead = x[:, self.feature] - self.threshold
        return torch.stack([-lead, lead], 1)


def rows():
    # Columns: the features of two models; the label is what both say, but for the last row.
    x = torch.tensor([[0.2, 0.45], [0.3, 0.8], [0.9, 0.9], [0.55, 0.95], [0.8, 0.2]])
    return TensorDataset(x, torch.tensor([0, 0, 1, 1, 1]))


def test_all_denominators_counted_by_hand():
    first, second = Threshold(0), Threshold(1)
    models = {"first": first, "second": second}
    attack = af.PGD(eps=0.25, norm="linf", steps=5)
    matrix = transfer_matrix(models, models, rows(), attack)
    # A model's own feature alone has a gradient: each attack moves one column by 0.25.
    # first's examples: 0.45, 0.55, 0.65, 0.30, 0.55, fooling it on rows 1 and 3.
    # second is wrong on rows 1 and 4 anyway; its column is as it was.
    # second's examples: 0.70, 0.55 (further up), 0.65, 0.70, 0 (further down): row 0 is fooled.
    assert matrix.clean_error.tolist() == pytest.approx([0.0, 0.4])
    assert matrix.of_all.tolist() == [pytest.approx([0.4, 0.4]), pytest.approx([0.0, 0.6])]
    assert matrix.of_fooled.tolist() == [pytest.approx([1.0, 0.5]), pytest.approx([0.0, 1.0])]
    # Both have rows 0, 2 and 3 right.
    assert matrix.both_right.tolist() == [[5, 3], [3, 3]]
    assert matrix.fooled.tolist() == [pytest.approx([0.4, 0.0]), pytest.approx([0.0, 1 / 3])]
    assert matrix.interval("second", "second") == wilson_interval(1, 3)
    lines = [line.split() for line in str(matrix).splitlines()]
    assert lines[1:] == [["first", "40.0", "0.0"], ["second", "0.0", "33.3"],
                         ["clean", "error", "0.0", "40.0"]]  # fmt: skip


@pytest.mark.parametrize("answer", [0, 1])
def test_a_constant_model_is_never_fooled(answer):
    class Constant(nn.Module):
        def forward(self, x):
            return nn.functional.one_hot(torch.full((len(x),), answer), 2) + 0.0 * x[:, :1]

    models = {"constant": Constant(), "other": Threshold(0)}
    matrix = transfer_matrix(
        {"other": models["other"]}, models, rows(), af.PGD(eps=0.5, norm="linf", steps=5)
    )
    assert matrix.fooled.tolist() == [[0.0, 1.0]]
    assert matrix.clean_error[0] > 0.3


def test_a_model_that_is_always_wrong_has_no_rate():
    class Never(nn.Module):
        def forward(self, x):
            return torch.stack([x[:, 0], -x[:, 0], x[:, 0] + 100], 1)

    matrix = transfer_matrix(
        {"a": Threshold(0)}, {"never": Never()}, rows(), af.PGD(eps=0.5, norm="linf", steps=2)
    )
    assert matrix.both_right.tolist() == [[0]]
    assert bool(matrix.fooled.isnan().all())
    assert "none right" in str(matrix)
    assert matrix.interval("a", "never") == (0.0, 1.0)


def test_a_source_that_is_never_fooled_has_no_share_of_fooled():
    models = {"a": Threshold(0), "b": Threshold(1)}
    matrix = transfer_matrix(models, models, rows(), af.PGD(eps=0.01, norm="linf", steps=2))
    assert matrix.of_fooled[0].isnan().all()
    assert not matrix.of_all.isnan().any()


@pytest.mark.slow
def test_the_diagonal_is_the_attack_on_the_model_itself(standard, robust, digits):
    data = TensorDataset(*(tensor[:100] for tensor in digits[1].tensors))
    x, y = data.tensors
    attack = af.PGD(eps=0.1, norm="linf", steps=5)
    models = {"standard": standard, "robust": robust}
    matrix = transfer_matrix(models, models, DataLoader(data, batch_size=33, shuffle=True), attack)
    for place, model in enumerate(models.values()):
        with torch.no_grad():
            wrong = model(attack(model, x, y)).argmax(1) != y
        assert float(matrix.of_all[place, place]) == pytest.approx(wrong.float().mean().item())
        assert float(matrix.of_fooled[place, place]) == 1.0
    assert (matrix.of_all >= matrix.clean_error - 0.05).all()
    # The robust model is harder to fool by the other's examples than by its own.
    assert matrix.of_all[0, 1] < matrix.of_all[1, 1]


@pytest.mark.parametrize(
    "attack",
    [
        APGD(eps=0.1, norm="linf", steps=5),
        pytest.param(AutoAttack(eps=0.1, norm="linf", version="fast"), marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("short_ensembles")
def test_random_attacks_follow_the_seed(standard, robust, digits, attack):
    data = TensorDataset(*(tensor[:20] for tensor in digits[1].tensors))

    def found():
        torch.manual_seed(3)
        return transfer_matrix({"a": standard}, {"b": robust}, data, attack, batch_size=7).of_all

    assert torch.equal(found(), found())


@pytest.mark.parametrize(
    ("change", "error", "cause"),
    [
        ({"sources": {}}, TypeError, "mappings"),
        ({"targets": [nn.Identity()]}, TypeError, "mappings"),
        ({"targets": {"a": len}}, TypeError, "Module"),
        ({"attack": "pgd"}, ValueError, "eps, norm"),
        ({"attack": "pdg", "eps": 0.1, "norm": "l2"}, ValueError, "attack"),
        ({"attack": len}, TypeError, "attack"),
        ({"eps": 0.1}, ValueError, "has its own"),
        ({"bounds": (0.0, 2.0)}, ValueError, "has its own"),
        ({"seed": "one"}, TypeError, "seed"),
        ({"attack": af.PGD(eps=0.1, norm="l2", targeted=True)}, ValueError, "targeted"),
    ],
)
def test_bad_input_is_refused(change, error, cause):
    good = {"sources": {"a": Threshold(0)}, "targets": {"a": Threshold(0)}, "data": rows()}
    good["attack"] = af.PGD(eps=0.1, norm="linf")
    with pytest.raises(error, match=cause):
        transfer_matrix(**(good | change))
