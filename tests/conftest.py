"""Fixtures of the whole suite."""

import os
import signal
from dataclasses import replace
from functools import partial

# Of this process and of those that tests start: see `ground_one_thread`.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import advfeat as af
from advfeat.attacks import FAB, AutoAttack, Square
from advfeat.metrics import _diagnose

collect_ignore = ["benchmarks"]  # scripts, to be run by hand
SLOW_DOCTESTS = {  # whole studies, and other trainings
    "advfeat.study._calibrate.calibrate",
    "advfeat.study._run.run",
    "advfeat.metrics._report._result.report",
    "advfeat.analysis._gaussian_study.fit_gaussian",
}


def pytest_collection_modifyitems(items):
    for item in items:
        if item.name in SLOW_DOCTESTS:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def ground_one_thread():
    """Small tensors gain nothing from threads, and on a shared machine lose several times over."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def python_handles_ctrl_c():
    """A shell starts a job in the background with SIGINT ignored; tests raise it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """A value that one process makes and the other processes of this run of pytest-xdist read."""
    parallel = "PYTEST_XDIST_WORKER" in os.environ
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if parallel else folder  # the parent is of all workers of this run

    def get(name, make):
        path = folder / f"{name}.pt"
        if not path.exists():
            part = folder / f"{name}-{os.getpid()}.pt"
            torch.save(make(), part)
            part.replace(path)
        return torch.load(path, weights_only=True)

    return get


@pytest.fixture
def short_ensembles(monkeypatch):
    """Ensembles whose attacks take few steps and queries, for tests of all but their strength."""
    whole = AutoAttack.attacks.fget

    def short(ensemble):
        return tuple(
            replace(attack, **({"queries": 50} if isinstance(attack, Square) else {"steps": 12}))
            for attack in whole(ensemble)
        )

    monkeypatch.setattr(AutoAttack, "attacks", property(short))


@pytest.fixture
def short_boundary_search(monkeypatch):
    """Let `diagnose` search the boundary towards one class, not nine: for tests of all else."""
    monkeypatch.setattr(_diagnose, "FAB", partial(FAB, targets=1))


@pytest.fixture(scope="session")
def digits(made_once):
    """1300 real images of digits to learn from, and 497 to measure on, 1x8x8 in [0, 1]."""

    def read():
        datasets = pytest.importorskip("sklearn.datasets")
        images, labels = datasets.load_digits(return_X_y=True)
        return torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(
            labels
        )

    x, y = made_once("digits", read)
    return TensorDataset(x[:1300], y[:1300]), TensorDataset(x[1300:], y[1300:])


def digit_network():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def trained(train):
    """The weights of a network of digits after training."""
    torch.manual_seed(0)
    net = digit_network()
    train(net)
    return net.state_dict()


def with_weights(weights):
    net = digit_network()
    net.load_state_dict(weights)
    return net.eval()


@pytest.fixture(scope="session")
def standard(digits, made_once, ground_one_thread):
    """A model trained on digits in the standard way. Not to be changed."""

    def train(net):
        af.fit(net, digits[0], epochs=6, lr=0.05, seed=0)

    return with_weights(made_once("standard", lambda: trained(train)))


@pytest.fixture(scope="session")
def robust(digits, made_once, ground_one_thread):
    """A model trained on digits against linf 0.1. Not to be changed."""
    settings = {"eps": 0.1, "norm": "linf", "steps": 3, "step_size": 0.05, "lr": 0.05, "seed": 0}

    def train(net):
        af.adversarial_fit(net, digits[0], **settings, epochs=10)

    return with_weights(made_once("robust", lambda: trained(train)))
