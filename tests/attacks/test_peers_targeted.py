"""Targeted attacks, and the ensemble, beside other libraries' on a curved model and on digits."""

import numpy as np
import pytest
import torch
from toys import NORMS, ORDER, adv_lib, batch, curved, predicted, sizes

from advfeat.attacks import APGD, AutoAttack, fab, fmn, square

# Balls in which some samples become the target class and others do not.
EPS = {"l1": 0.5, "l2": 0.2, "linf": 0.08}


@pytest.fixture(scope="module")
def case():
    """Model, inputs, labels, and the likeliest wrong class of each."""
    model, x = curved(dtype=torch.float32), batch(60, dtype=torch.float32)
    with torch.no_grad():
        likeliest = model(x).topk(2, dim=1).indices
    return model, x, likeliest[:, 0], likeliest[:, 1]


def reached(model, x, target):
    return (predicted(model, x) == target).double().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_targeted_apgd_reaches_the_target_as_often_as_adv_libs(case, norm):
    model, x, _, target = case
    peer = adv_lib("auto_pgd").apgd
    torch.manual_seed(0)
    theirs = peer(model, x, target, EPS[norm], ORDER[norm], targeted=True, loss_function="ce")
    ours = APGD(eps=EPS[norm], norm=norm, targeted=True, seed=0)(model, x, target)
    assert 0.1 < reached(model, theirs, target) < 0.9
    assert reached(model, ours, target) >= reached(model, theirs, target) - 1 / 60
    assert sizes(ours, x, norm).max() <= EPS[norm] * (1 + 1e-5)


def adv_lib_fmn(model, x, target, norm):
    return adv_lib("fast_minimum_norm").fmn(model, x, target, ORDER[norm], True, steps=100)


def foolbox_fmn(model, x, target, norm):
    fb = pytest.importorskip("foolbox")
    attack = getattr(fb.attacks, f"{norm.replace('l', 'L', 1).replace('Linf', 'LInf')}FMNAttack")
    goal = fb.criteria.TargetedMisclassification(target)
    return attack(steps=100)(fb.PyTorchModel(model, bounds=(0, 1)), x, goal, epsilons=None)[1]


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("peer", [adv_lib_fmn, foolbox_fmn])
def test_targeted_fmn_comes_as_close_as_the_peers(case, peer, norm):
    model, x, _, target = case
    theirs = peer(model, x, target, norm)
    ours = fmn(model, x, target, norm=norm, steps=100, targeted=True)
    both = ((predicted(model, theirs) == target) & (predicted(model, ours) == target)).numpy()
    assert both.mean() > 0.3
    assert reached(model, ours, target) >= reached(model, theirs, target) - 1 / 60
    longer = sizes(ours, x, norm)[both] / sizes(theirs, x, norm)[both] - 1
    assert np.median(longer) < 1e-3
    assert np.quantile(longer, 0.9) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_targeted_fab_finds_the_points_of_torchattacks(case, norm):
    ta = pytest.importorskip("torchattacks")
    model, x, y, target = case
    name = {"l1": "L1", "l2": "L2", "linf": "Linf"}[norm]
    attack = ta.FAB(model, norm=name, steps=20, multi_targeted=True, n_classes=4)
    attack.target_class = 2  # its count from the end: the likeliest wrong class
    theirs = attack.attack_single_run_targeted(x, y).detach()
    ours = fab(model, x, target, norm=norm, steps=20, targeted=True)
    both = ((predicted(model, theirs) == target) & (predicted(model, ours) == target)).numpy()
    assert both.mean() > 0.8
    assert reached(model, ours, target) >= reached(model, theirs, target) - 1 / 60
    longer = sizes(ours, x, norm)[both] / sizes(theirs, x, norm)[both] - 1
    assert (np.abs(longer) < 1e-3).mean() >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_targeted_square_reaches_the_target_as_often_as_torchattacks(standard, digits, norm):
    ta = pytest.importorskip("torchattacks")
    x = digits[1].tensors[0][:150]
    with torch.no_grad():
        target = standard(x).topk(2, dim=1).indices[:, 1]
    eps = {"l2": 1.2, "linf": 0.15}[norm]
    peer = ta.Square(standard, norm={"l2": "L2", "linf": "Linf"}[norm], eps=eps, n_queries=100)
    peer.set_mode_targeted_by_label(quiet=True)
    rates = {"ours": 0.0, "theirs": 0.0}
    for seed in range(2):
        peer.seed = seed
        ours = square(
            standard, x, target, eps=eps, norm=norm, queries=100, targeted=True, seed=seed
        )
        rates["ours"] += reached(standard, ours, target) / 2
        rates["theirs"] += reached(standard, peer(x, target), target) / 2
    assert 0.1 < rates["theirs"] < 0.9
    assert rates["ours"] >= rates["theirs"] - 0.03


@pytest.mark.slow
def test_the_ensemble_leaves_no_more_than_that_of_torchattacks(standard, digits):
    ta = pytest.importorskip("torchattacks")
    x, y = (tensor[:16] for tensor in digits[1].tensors)
    right = predicted(standard, x) == y
    x, y = x[right], y[right]
    peer = ta.AutoAttack(standard, norm="Linf", eps=0.08, n_classes=10, seed=0)
    peer._autoattack.attacks[-1].n_queries = 500  # its random search takes minutes
    theirs = peer(x, y)
    ours = AutoAttack(eps=0.08, norm="linf", version="standard", seed=0)(standard, x, y)
    left = {"ours": reached(standard, ours, y), "theirs": reached(standard, theirs, y)}
    assert 0.1 < left["theirs"] < 0.9
    assert left["ours"] <= left["theirs"] + 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_the_targeted_ensemble_reaches_what_any_of_the_peers_does(case, norm):
    model, x, target = case[0], case[1][:24], case[3][:24]
    torch.manual_seed(0)
    apgd = adv_lib("auto_pgd").apgd(
        model, x, target, EPS[norm], ORDER[norm], targeted=True, loss_function="ce"
    )
    near = adv_lib_fmn(model, x, target, norm)
    near = torch.where((torch.tensor(sizes(near, x, norm)) <= EPS[norm])[:, None], near, x)
    theirs = (predicted(model, apgd) == target) | (predicted(model, near) == target)
    attack = AutoAttack(eps=EPS[norm], norm=norm, version="standard", targeted=True, seed=0)
    ours = predicted(model, attack(model, x, target)) == target
    assert 0.1 < theirs.double().mean() < 0.9
    assert not bool((theirs & ~ours).any())
