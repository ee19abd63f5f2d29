"""The same attack by other libraries: as strong as theirs, in the same ball, on real digits."""

import numpy as np
import pytest
import torch

import advfeat as af

STEPS = 10
# norm: (eps, step size, order); both leave some digits standing and fool others.
BALLS = {"linf": (0.08, 0.02, np.inf), "l2": (0.6, 0.15, 2)}


def foolbox(model, x, y, norm):
    fb = pytest.importorskip("foolbox")
    eps, step, _ = BALLS[norm]
    attack = {"linf": fb.attacks.LinfPGD, "l2": fb.attacks.L2PGD}[norm]
    attack = attack(abs_stepsize=step, steps=STEPS, random_start=False)
    return attack(fb.PyTorchModel(model, bounds=(0, 1)), x, y, epsilons=eps)[1]


def torchattacks(model, x, y, norm):
    ta = pytest.importorskip("torchattacks")
    eps, step, _ = BALLS[norm]
    attack = {"linf": ta.PGD, "l2": ta.PGDL2}[norm]
    return attack(model, eps=eps, alpha=step, steps=STEPS, random_start=False)(x, y)


PEERS = {"foolbox": foolbox, "torchattacks": torchattacks}


def accuracy(model, x, y):
    with torch.no_grad():
        return (model(x).argmax(1) == y).double().mean().item()


def ours(model, x, y, norm):
    eps, step, _ = BALLS[norm]
    return af.pgd(model, x, y, eps=eps, norm=norm, step_size=step, steps=STEPS, returns="last")


def test_the_model_knows_digits(standard, digits):
    assert af.accuracy(standard, digits[1]) > 0.85


@pytest.mark.slow
@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.parametrize("peer", PEERS)
def test_the_last_iterate_is_as_strong_as_the_peers(standard, digits, norm, peer):
    x, y = digits[1].tensors
    found = accuracy(standard, ours(standard, x, y, norm), y)
    theirs = accuracy(standard, PEERS[peer](standard, x, y, norm), y)
    assert abs(found - theirs) <= 0.01
    assert 0.1 < theirs < 0.8  # neither too weak nor too strong an attack to compare


@pytest.mark.slow
@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.parametrize("peer", PEERS)
def test_the_examples_lie_in_the_same_ball(standard, digits, norm, peer):
    x, y = digits[1].tensors
    eps, _, order = BALLS[norm]
    sizes = []
    for x_adv in (ours(standard, x, y, norm), PEERS[peer](standard, x, y, norm)):
        delta = (x_adv.double() - x.double()).flatten(1).numpy()
        sizes.append(np.linalg.norm(delta, order, axis=1))
        assert sizes[-1].max() <= eps + 1e-6
        assert ((x_adv >= 0) & (x_adv <= 1)).all()
    np.testing.assert_allclose(sizes[0].max(), sizes[1].max(), atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.parametrize("peer", PEERS)
def test_robust_accuracy_is_no_higher_than_the_peers(standard, digits, norm, peer):
    # It judges a sample by any iterate, the peers by the last.
    x, y = digits[1].tensors
    eps, step, _ = BALLS[norm]
    attack = af.PGD(eps=eps, norm=norm, step_size=step, steps=STEPS)
    found = af.robust_accuracy(standard, digits[1], attack=attack)
    assert found <= accuracy(standard, PEERS[peer](standard, x, y, norm), y) + 0.01
    assert found <= accuracy(standard, ours(standard, x, y, norm), y)


@pytest.mark.parametrize("peer", PEERS)
def test_the_linf_iterates_are_the_peers(standard, digits, peer):
    # Sign steps have no free choice: but for gradients at zero, the images are the same.
    x, y = (tensor[:100] for tensor in digits[1].tensors)
    difference = (ours(standard, x, y, "linf") - PEERS[peer](standard, x, y, "linf")).abs()
    assert (difference < 1e-5).float().mean() > 0.97
