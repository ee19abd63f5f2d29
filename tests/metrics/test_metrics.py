"""Accuracy clean and under attack: counts, intervals, closed forms, and what they depend on."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import advfeat as af
from advfeat.losses import is_success
from advfeat.metrics import Accuracy, RobustAccuracy

WIDE = (-100.0, 100.0)
DUAL = {"l1": math.inf, "l2": 2, "linf": 1}


def data(count=60, features=6, classes=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(count, features, generator=generator, dtype=dtype)
    y = torch.randint(classes, (count,), generator=generator)
    return TensorDataset(x, y)


def linear(features=6, classes=2, dtype=torch.float32):
    torch.manual_seed(1)
    return nn.Linear(features, classes, dtype=dtype)


def curved(classes=3):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, classes)).double()
    for parameter in net.parameters():
        parameter.data *= 3
    return net


# --- The number ---


def test_accuracy_is_a_float_with_its_counts():
    found = Accuracy.of(torch.tensor([True, False, True, True]))
    assert isinstance(found, float)
    assert (found.count, found.total) == (3, 4)
    assert found == 0.75
    assert 0.7 < found < 0.8
    assert found + 0.25 == 1.0
    assert max(0.5, found) is found
    assert f"{found:.1%}" == "75.0%"
    assert f"{found:.3f}" == "0.750"
    assert round(found, 1) == 0.8
    assert torch.tensor(found) == 0.75
    assert found.index.tolist() == [0, 1, 2, 3]
    assert Accuracy.of(torch.tensor([True, False]), torch.tensor([7, 5])).index.tolist() == [7, 5]


def test_accuracy_survives_pickling_and_copying():
    rows = data()
    found = af.robust_accuracy(linear(), rows, eps=0.05, norm="l2", steps=2)
    for again in (pickle.loads(pickle.dumps(found)), copy.deepcopy(found)):
        assert again == found
        assert again.interval == found.interval
        assert torch.equal(again.correct, found.correct)
        assert again.standard == found.standard


@pytest.mark.parametrize("right", [0, 7, 10])
def test_the_interval_is_wilsons(right):
    n, p, z = 10, right / 10, 1.959963984540054
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    found = Accuracy.of(torch.arange(10) < right).interval
    assert found == pytest.approx((max(0, centre - half), min(1, centre + half)), abs=1e-12)


def test_the_interval_is_where_the_score_test_turns():
    # Its definition: the p with |p_hat - p| = z sqrt(p (1 - p) / n).
    for p in Accuracy.of(torch.arange(10) < 7).interval:
        assert abs(0.7 - p) == pytest.approx(1.959963984540054 * math.sqrt(p * (1 - p) / 10))


# --- Standard accuracy ---


def test_outcomes_are_in_the_order_of_the_samples():
    model, rows = linear(), data()
    x, y = rows.tensors
    with torch.no_grad():
        expected = model(x).argmax(1) == y
    assert 0 < expected.sum() < 60
    found = af.accuracy(model, rows, batch_size=7)
    assert torch.equal(found.correct, expected)
    assert torch.equal(found.index, torch.arange(60))
    assert found == expected.double().mean().item()
    assert found.count == expected.sum()


class Mapped(Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        x, y = self.rows[row]
        return {"image": x, "label": y, "name": f"row {row}"}


def kinds_of_data():
    rows = data()
    x, y = rows.tensors
    return {
        "dataset": rows,
        "loader": DataLoader(rows, batch_size=7),
        "shuffled loader": DataLoader(rows, batch_size=7, shuffle=True),
        "dropping loader": DataLoader(rows, batch_size=7, drop_last=True),
        "workers": DataLoader(rows, batch_size=20, num_workers=1),
        "list of batches": list(zip(x.split(9), y.split(9), strict=True)),
        "with extras": TensorDataset(x, y, torch.arange(60), torch.rand(60, 2)),
        "mappings": Mapped(rows),
        "loader of mappings": DataLoader(Mapped(rows), batch_size=16),
        "list of mappings": [{"x": x[:40], "y": y[:40]}, {"x": x[40:], "y": y[40:]}],
    }


@pytest.mark.parametrize("kind", kinds_of_data())
@pytest.mark.parametrize("measure", ["clean", "robust"])
def test_every_kind_of_data_gives_the_same_outcomes(kind, measure):
    model = linear()

    def found(rows):
        if measure == "clean":
            return af.accuracy(model, rows)
        attack = af.PGD(eps=0.05, norm="l2", restarts=2, seed=0, steps=4)
        return af.robust_accuracy(model, rows, attack=attack)

    expected, result = found(data()), found(kinds_of_data()[kind])
    assert torch.equal(result.correct, expected.correct)
    assert torch.equal(result.index, expected.index)


def test_a_subset_is_numbered_by_its_own_samples():
    rows = data()
    found = af.accuracy(linear(), Subset(rows, [5, 3, 50]))
    expected = af.accuracy(linear(), rows).correct[[5, 3, 50]]
    assert torch.equal(found.correct, expected)
    assert found.index.tolist() == [0, 1, 2]


def test_accuracy_is_of_the_evaluation_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))
    model[0].running_mean.fill_(0.5)
    expected = af.accuracy(model.eval(), data())
    assert torch.equal(af.accuracy(model.train(), data(), batch_size=7).correct, expected.correct)


# --- Robust accuracy ---


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_a_linear_models_robust_accuracy_is_the_closed_form(norm):
    model, rows = linear(), data(200)
    x, y = rows.tensors
    with torch.no_grad():
        logits = model(x)
        margin = (logits.gather(1, y[:, None]) - logits.gather(1, 1 - y[:, None])).squeeze(1)
        dual = (model.weight[0] - model.weight[1]).norm(DUAL[norm])
    # Half way between two rows: none lies on the border, where rounding decides.
    right = margin[margin > 0].sort().values
    eps = float(right[len(right) // 2 :][:2].mean() / dual)
    assert ((margin - eps * dual).abs() > 1e-5).all()
    found = af.robust_accuracy(model, rows, eps=eps, norm=norm, steps=40, bounds=WIDE)
    assert torch.equal(found.correct, margin > eps * dual)
    assert torch.equal(found.standard.correct, margin > 0)
    assert 0 < found < found.standard


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
@pytest.mark.parametrize("restarts", [1, 3])
def test_with_eps_zero_it_is_standard_accuracy(norm, restarts):
    model, rows = curved(), data(classes=3, dtype=torch.float64)
    attack = af.PGD(eps=0.0, norm=norm, restarts=restarts, steps=3)
    found = af.robust_accuracy(model, rows, attack=attack)
    clean = af.accuracy(model, rows)
    assert torch.equal(found.correct, clean.correct)
    assert 0 < clean < 1


def test_standard_in_the_same_pass_is_accuracy():
    model, rows = curved(), data(classes=3, dtype=torch.float64)
    found = af.robust_accuracy(model, rows, eps=0.1, norm="linf", steps=3)
    clean = af.accuracy(model, rows)
    assert isinstance(found, RobustAccuracy)
    assert torch.equal(found.standard.correct, clean.correct)
    assert torch.equal(found.standard.index, clean.index)


@pytest.mark.parametrize("eps", [0.02, 0.1, 0.5])
def test_robust_samples_are_right_on_clean_data(eps):
    model, rows = curved(), data(classes=3, dtype=torch.float64)
    found = af.robust_accuracy(model, rows, eps=eps, norm="linf", steps=5)
    assert (found.standard.correct | ~found.correct).all()
    assert found < found.standard


def test_it_does_not_depend_on_the_batch_size():
    model, rows = curved(), data(classes=3, dtype=torch.float64)
    attack = af.PGD(eps=0.1, norm="l2", steps=3, restarts=3, seed=5)
    found = [af.robust_accuracy(model, rows, attack=attack, batch_size=size) for size in (1, 7, 64)]
    assert torch.equal(found[0].correct, found[1].correct)
    assert torch.equal(found[0].correct, found[2].correct)
    assert 0 < found[0] < found[0].standard


def test_a_sample_is_fooled_as_by_pgd_on_it_alone():
    # What the engine does with its pool, and what the plain function does, agree row by row.
    model, rows = curved(), data(classes=3, dtype=torch.float64)
    x, y = rows.tensors
    attack = af.PGD(eps=0.15, norm="linf", steps=4, restarts=2, returns="first", seed=3)
    found = af.robust_accuracy(model, rows, attack=attack, batch_size=16)
    with torch.no_grad():
        standing = (model(x).argmax(1) == y) & (model(attack(model, x, y)).argmax(1) == y)
    assert torch.equal(found.correct, standing)
    assert 0 < found < found.standard


def test_steps_are_those_of_pgd():
    model, rows = curved(), data(classes=3, dtype=torch.float64)
    settings = {"eps": 0.2, "norm": "l2", "steps": 4}
    expected = af.robust_accuracy(model, rows, **settings)
    found = af.robust_accuracy(model, rows, attack=af.PGD(**settings))
    assert torch.equal(found.correct, expected.correct)
    assert 0 < found < found.standard


def test_an_attack_is_judged_by_any_of_its_iterates():
    # Whatever the attack returns elsewhere, a sample is robust only if no iterate fools.
    model, rows = curved(), data(classes=3, dtype=torch.float64)
    settings = {"eps": 0.2, "norm": "linf", "steps": 3, "step_size": 0.2}
    found = [
        af.robust_accuracy(model, rows, attack=af.PGD(returns=returns, **settings))
        for returns in ("last", "best", "first")
    ]
    assert torch.equal(found[0].correct, found[1].correct)
    assert torch.equal(found[0].correct, found[2].correct)


def test_fgsm_can_be_the_attack():
    model, rows = curved(), data(classes=3, dtype=torch.float64)
    x, y = rows.tensors
    x_adv = af.fgsm(model, x, y, eps=0.1, norm="linf")
    with torch.no_grad():
        expected = (model(x_adv).argmax(1) == y) & (model(x).argmax(1) == y)
    found = af.robust_accuracy(model, rows, attack=af.FGSM(eps=0.1, norm="linf"))
    assert torch.equal(found.correct, expected)


def test_without_a_seed_torch_manual_seed_governs():
    model, rows = curved(), data(classes=3, dtype=torch.float64)

    def found():
        attack = af.PGD(eps=0.15, norm="linf", steps=1, restarts=2)
        return af.robust_accuracy(model, rows, attack=attack).correct

    torch.manual_seed(0)
    first, others = found(), [found() for _ in range(5)]
    torch.manual_seed(0)
    assert torch.equal(found(), first)
    assert any(not torch.equal(first, other) for other in others)


def test_the_random_state_is_untouched_where_nothing_is_random():
    model, rows = linear(), data()
    state = torch.get_rng_state()
    af.robust_accuracy(model, rows, eps=0.1, norm="l2", steps=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_wrong_everywhere_has_accuracy_zero():
    rows = TensorDataset(torch.eye(3), torch.tensor([1, 2, 0]))
    found = af.robust_accuracy(nn.Identity(), rows, eps=0.1, norm="l2")
    assert (found, found.standard, found.total) == (0.0, 0.0, 3)


def test_nan_among_logits_is_no_answer():
    # Torch's argmax takes NaN for the largest, and so names the label now and then.
    logits = torch.tensor([[torch.nan, torch.nan], [torch.nan, 0.0], [1.0, torch.nan], [1.0, 0.0]])
    rows = TensorDataset(logits.nan_to_num(nan=-1.0), torch.zeros(4, dtype=torch.int64))

    class Undefined(nn.Module):
        def forward(self, x):
            return torch.where(x < 0, torch.nan, x)

    assert af.accuracy(Undefined(), rows).correct.tolist() == [False, False, False, True]
    for targeted in (True, False):
        hits = is_success(logits, rows.tensors[1], targeted)
        assert hits.tolist() == [not targeted] * 3 + [targeted]
