"""Signals are noticed or raised at once; a write that fails names its file and leaves the last."""

import os
import signal
import threading

import numpy as np
import pytest
import torch
from builds import build
from torch import nn
from torch.utils.data import TensorDataset

import advfeat as af
from advfeat.durable import Termination

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture(autouse=True)
def handlers():
    """As in a fresh interpreter, and as they were afterwards."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def current():
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noticed_and_waits(number):
    before, termination = current(), Termination()
    with termination.watched():
        signal.raise_signal(number)
        assert termination.noticed == number
    assert current() == before


def test_passing_on_does_what_the_signal_would_have_done():
    calls, termination = [], Termination()
    signal.signal(signal.SIGTERM, lambda *_: calls.append("own"))
    with termination.watched():
        signal.raise_signal(signal.SIGTERM)
        assert not calls
        termination.pass_on()
        assert calls == ["own"]
        assert termination.noticed is None
        # And it is watched further.
        signal.raise_signal(signal.SIGTERM)
        assert termination.noticed == signal.SIGTERM


def test_a_second_ctrl_c_is_not_waited_with():
    termination = Termination()
    with termination.watched():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_at_once_sigterm_ends_the_work_and_ctrl_c_is_pythons():
    before = current()
    with pytest.raises(SystemExit) as ended, Termination(at_once=True).watched():
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == 128 + signal.SIGTERM
    assert current() == before
    with pytest.raises(KeyboardInterrupt), Termination(at_once=True).watched():
        signal.raise_signal(signal.SIGINT)
    assert current() == before


def test_at_once_leaves_a_handler_of_ones_own():
    calls = []
    signal.signal(signal.SIGTERM, lambda *_: calls.append(1))
    with Termination(at_once=True).watched():
        signal.raise_signal(signal.SIGTERM)
    assert calls == [1]


@pytest.mark.parametrize("at_once", [False, True])
def test_what_is_ignored_stays_so(at_once):
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    termination = Termination(at_once=at_once)
    with termination.watched():
        for number in SIGNALS:
            signal.raise_signal(number)
    assert termination.noticed is None
    assert current() == [signal.SIG_IGN] * 2


@pytest.mark.parametrize("at_once", [False, True])
def test_other_threads_watch_nothing(at_once):
    before, seen = current(), []

    def work():
        with Termination(at_once=at_once).watched():
            seen.append(current())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


# --- Writes that fail: a limit on the size of files, where no disk can be mounted ---


@pytest.fixture
def small_files():
    """Files of at most 20 kB; given as a function, which lifts the limit."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size=20_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


DATA = TensorDataset(torch.rand(4000, 1, 3, 3), torch.arange(4000) % 4)


@pytest.mark.slow
def test_a_dataset_that_does_not_fit_is_named_and_leaves_nothing(small_files, tmp_path):
    limit, lift = small_files
    large = af.ConstructedDataset(
        {"images": np.ones((100, 1, 32, 32), "f4"), "labels": np.zeros(100, int)}
    )
    limit()
    with pytest.raises(OSError, match=r"File too large.*MB"):
        build("D_det", tmp_path / "built", data=DATA, steps=1)
    with pytest.raises(OSError, match="saved"):
        large.save(tmp_path / "saved")
    lift()
    assert list((tmp_path / "built").iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["built"]
    assert len(build("D_det", tmp_path / "built", data=DATA, steps=1)) == 4000


def test_a_checkpoint_that_does_not_fit_is_named_and_leaves_the_last_one(small_files, tmp_path):
    limit, lift = small_files
    data = TensorDataset(*DATA[:32])

    def fit(**settings):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(9, 2000), nn.ReLU(), nn.Linear(2000, 4))
        af.fit(model, data, epochs=3, seed=0, **settings)
        return model.state_dict()

    expected = fit()
    with pytest.raises(OSError, match=r"File too large.*last\.pt"):
        fit(checkpoint=tmp_path, on_epoch=lambda row: limit() if row["epoch"] == 2 else None)
    lift()
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    assert torch.load(tmp_path / "last.pt", weights_only=True)["epoch"] == 2
    found = fit(checkpoint=tmp_path)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
