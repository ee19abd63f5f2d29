"""The same attack by other libraries: as strong as theirs, in the same ball, on real digits."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import advfeat as af

datasets = pytest.importorskip("sklearn.datasets")

STEPS = 10
# norm: (eps, step size, order); both leave some digits standing and fool others.
BALLS = {"linf": (0.08, 0.02, np.inf), "l2": (0.6, 0.15, 2)}


@pytest.fixture(scope="module")
def digits():
    images, labels = datasets.load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)
    return TensorDataset(x[:1300], y[:1300]), TensorDataset(x[1300:], y[1300:])


@pytest.fixture(scope="module")
def model(digits):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )
    af.fit(net, digits[0], epochs=6, lr=0.05, seed=0)
    return net.eval()


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


def test_the_model_knows_digits(model, digits):
    assert af.accuracy(model, digits[1]) > 0.85


@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.parametrize("peer", PEERS)
def test_the_last_iterate_is_as_strong_as_the_peers(model, digits, norm, peer):
    x, y = digits[1].tensors
    found = accuracy(model, ours(model, x, y, norm), y)
    theirs = accuracy(model, PEERS[peer](model, x, y, norm), y)
    assert abs(found - theirs) <= 0.01
    assert 0.1 < theirs < 0.8  # neither too weak nor too strong an attack to compare


@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.parametrize("peer", PEERS)
def test_the_examples_lie_in_the_same_ball(model, digits, norm, peer):
    x, y = digits[1].tensors
    eps, _, order = BALLS[norm]
    sizes = []
    for x_adv in (ours(model, x, y, norm), PEERS[peer](model, x, y, norm)):
        delta = (x_adv.double() - x.double()).flatten(1).numpy()
        sizes.append(np.linalg.norm(delta, order, axis=1))
        assert sizes[-1].max() <= eps + 1e-6
        assert ((x_adv >= 0) & (x_adv <= 1)).all()
    np.testing.assert_allclose(sizes[0].max(), sizes[1].max(), atol=1e-3)


@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.parametrize("peer", PEERS)
def test_robust_accuracy_is_no_higher_than_the_peers(model, digits, norm, peer):
    # It judges a sample by any iterate, the peers by the last.
    x, y = digits[1].tensors
    eps, step, _ = BALLS[norm]
    attack = af.PGD(eps=eps, norm=norm, step_size=step, steps=STEPS)
    found = af.robust_accuracy(model, digits[1], attack=attack)
    assert found <= accuracy(model, PEERS[peer](model, x, y, norm), y) + 0.01
    assert found <= accuracy(model, ours(model, x, y, norm), y)


@pytest.mark.parametrize("peer", PEERS)
def test_the_linf_iterates_are_the_peers(model, digits, peer):
    # Sign steps have no free choice: but for gradients at zero, the images are the same.
    x, y = (tensor[:100] for tensor in digits[1].tensors)
    difference = (ours(model, x, y, "linf") - PEERS[peer](model, x, y, "linf")).abs()
    assert (difference < 1e-5).float().mean() > 0.97
