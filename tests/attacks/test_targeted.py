"""Targeted attacks: closed forms on linear models, and losses of one's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset
from toys import DUAL, NORMS, batch, curved, predicted, sizes

from advfeat import attacks
from advfeat.attacks import APGD, FAB, FMN, PGD, AutoAttack, MinimumPGD, SmoothedPGD, Square
from advfeat.metrics import transfer_matrix

WIDE = (-50.0, 50.0)
EPS = {"l1": 2.0, "l2": 0.8, "linf": 0.3}


def three_classes(offset=0.0):
    """Logits w . x - offset, -(w . x) - offset and 0: class 0 lies on one side, 1 on the other."""
    torch.manual_seed(0)
    model = nn.Linear(6, 3).double()
    model.weight.data[1] = -model.weight.data[0]
    model.weight.data[2] = 0
    model.bias.data = torch.tensor([-offset, -offset, 0.0], dtype=torch.float64)
    return model


def inputs(count=5):
    return 0.5 + 0.1 * batch(count, (6,))


BALL = {
    "pgd": lambda **s: PGD(**s, steps=60, targeted=True),
    "apgd": lambda **s: APGD(**s, targeted=True, seed=0),
    "apgd-margin": lambda **s: APGD(**s, targeted=True, loss="margin", seed=0),
    "apgd-own": lambda **s: APGD(**s, targeted=True, loss=own_loss, seed=0),
    "smoothed": lambda **s: SmoothedPGD(**s, targeted=True, scales=(0.0,), seed=0),
    "smoothed-own": lambda **s: SmoothedPGD(
        **s, targeted=True, loss=own_loss, scales=(0.0,), seed=0
    ),
}


def own_loss(logits, labels):
    """Grows as the model is more wrong about the labels, as in other libraries."""
    return F.cross_entropy(logits, labels, reduction="none")


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "name", [n if "-" not in n else pytest.param(n, marks=pytest.mark.slow) for n in BALL]
)
@pytest.mark.slow
def test_a_targeted_attack_reaches_the_face_of_the_ball_towards_the_target(name, norm):
    model, x = three_classes(offset=8.0), inputs()
    for target in (0, 1):
        labels = torch.full((len(x),), target)
        found = BALL[name](eps=EPS[norm], norm=norm, bounds=WIDE)(model, x, labels)
        gain = (found - x) @ model.weight.data[target]
        best = EPS[norm] * model.weight.data[target].norm(p=DUAL[norm])
        assert (gain >= 0.99 * best).all()
        assert (sizes(found, x, norm) <= EPS[norm] * (1 + 1e-6)).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", [FAB, FMN, MinimumPGD])
@pytest.mark.slow
def test_a_targeted_minimum_norm_attack_finds_the_distance_of_the_target(kind, norm):
    model, x = three_classes(offset=1.0), inputs()
    labels = predicted(model, x)
    for target in (0, 1):
        toward = torch.full_like(labels, target)
        found = kind(norm=norm, bounds=WIDE, targeted=True, steps=100)(model, x, toward)
        assert (predicted(model, found) == target).all()
        gap = (1.0 - x @ model.weight.data[target]).clamp_min(0)
        # The other class is beyond the input: class 2 is the last on the way.
        best = gap / model.weight.data[target].norm(p=DUAL[norm])
        far = best > 0
        assert far.any()
        assert (sizes(found, x, norm)[far] <= 1.01 * best[far].detach().numpy()).all()
        assert (sizes(found, x, norm)[far] >= 0.999 * best[far].detach().numpy()).all()
        assert (sizes(found, x, norm)[~far] == 0).all()


@pytest.mark.parametrize("norm", ["l2", pytest.param("linf", marks=pytest.mark.slow)])
def test_what_a_targeted_attack_reports_is_what_the_model_says(norm):
    model, x = curved(), batch(10)
    toward = (predicted(model, x) + 1) % 4
    settings = {"eps": 2 * EPS[norm], "norm": norm, "targeted": True}
    runs = {
        "apgd": APGD(**settings, steps=30, seed=0),
        "fab": FAB(**settings, steps=30),
        "fmn": FMN(**settings, steps=30),
        "square": Square(**settings, queries=200, seed=0),
    }
    hits = {}
    for name, attack in runs.items():
        found = attack(model, x, toward)
        hits[name] = predicted(model, found) == toward
        assert (sizes(found, x, norm) <= 2 * EPS[norm] * (1 + 1e-5)).all()
    assert hits["apgd"].sum() >= hits["square"].sum()
    assert hits["apgd"].any()
    whole = AutoAttack(**settings, version="fast", seed=0)
    found = predicted(model, whole(model, x, toward)) == toward
    assert (found | ~hits["apgd"]).all()


@pytest.mark.parametrize("version", ["fast", "standard", "strong"])
@pytest.mark.parametrize("norm", NORMS)
def test_every_attack_of_a_targeted_ensemble_is_targeted(version, norm):
    ensemble = AutoAttack(eps=0.1, norm=norm, version=version, targeted=True)
    assert all(attack.targeted for attack in ensemble.attacks)
    assert all(getattr(a, "targets", 0) == 0 for a in ensemble.attacks if isinstance(a, APGD))


def test_functions_take_targeted_and_a_loss():
    model, x = curved(), batch(6)
    toward = (predicted(model, x) + 1) % 4
    found = attacks.apgd(
        model, x, toward, eps=0.5, norm="linf", steps=20, targeted=True, loss=own_loss, seed=0
    )
    named = attacks.apgd(model, x, toward, eps=0.5, norm="linf", steps=20, targeted=True, seed=0)
    assert torch.equal(predicted(model, found) == toward, predicted(model, named) == toward)
    assert (predicted(model, found) == toward).any()
    attacks.fab(model, x, toward, norm="l2", steps=5, targeted=True)
    attacks.smoothed_pgd(model, x, toward, eps=0.5, norm="l2", steps=5, targeted=True, seed=0)
    with pytest.raises(ValueError, match="targets"):
        APGD(eps=0.1, norm="l2", targets=3, targeted=True)
    with pytest.raises(ValueError, match="reduction='none'"):
        attacks.apgd(model, x, toward, eps=0.1, norm="l2", loss=F.cross_entropy)


def test_targeted_transfer_counts_the_target_class():
    torch.manual_seed(0)
    first, second = (nn.Linear(12, 4).double() for _ in range(2))
    x = batch(30)
    data = TensorDataset(x, predicted(first, x))

    def following(y):
        return (y + 1) % 4

    attack = PGD(eps=0.6, norm="linf", steps=30, targeted=True)
    models = {"first": first, "second": second}
    matrix = transfer_matrix(models, models, data, attack, target_labels=following)
    made = attack(first, x, following(data.tensors[1]))
    said = predicted(second, made) == following(data.tensors[1])
    assert float(matrix.of_all[0, 1]) == pytest.approx(said.double().mean().item())
    clean = predicted(second, x) == following(data.tensors[1])
    assert float(matrix.clean_error[1]) == pytest.approx(clean.double().mean().item())
    assert float(matrix.clean_error[0]) == 0
    with pytest.raises(ValueError, match="target_labels"):
        transfer_matrix(models, models, data, attack)
    untargeted = PGD(eps=0.6, norm="linf")
    with pytest.raises(ValueError, match="target_labels"):
        transfer_matrix(models, models, data, untargeted, target_labels=following)
