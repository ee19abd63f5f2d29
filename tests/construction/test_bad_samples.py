"""A bad sample is named by its index, before work where labels are known; locks; full disks."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from builds import METHODS, build, contents, dataset, network
from torch.utils.data import Dataset, Subset, TensorDataset

import advfeat as af
from advfeat.datasets import export_released
from advfeat.datasets.writer import lock_folder


def many(count=1200):
    return torch.rand(count, 1, 3, 3), torch.arange(count) % 4


class Plain(Dataset):
    """Samples whose labels cannot be known without reading them."""

    def __init__(self, inputs, labels):
        self.inputs, self.classes = inputs, labels

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return self.inputs[index], int(self.classes[index])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 7.0])
@pytest.mark.parametrize("method", ["D_R", "D_det"])
def test_a_bad_input_is_named(method, value):
    x, y = many()
    x[1000, 0, 1, 1] = value
    with pytest.raises(ValueError, match=r"inputs\[1000\]"):
        build(method, data=TensorDataset(x, y), steps=1, batch_size=300)


@pytest.mark.parametrize("label", [-1, 4, 100])
@pytest.mark.parametrize("kind", ["tensors", "subset", "targets", "plain"])
def test_a_bad_label_is_named(kind, label, tmp_path):
    x, y = many()
    y[1000] = label
    data = Plain(x, y) if kind in ("plain", "targets") else TensorDataset(x, y)
    if kind == "targets":
        data.targets = y.tolist()
    if kind == "subset":
        data = Subset(data, range(1, 1200))
    model, calls = network(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    index = 999 if kind == "subset" else 1000
    with pytest.raises(ValueError, match=rf"labels\[{index}\]={label}"):
        build("D_det", tmp_path / "set", data=data, model=model, steps=1, batch_size=300)
    if kind != "plain":
        # The number of classes is known from one forward pass; nothing else was done.
        assert len(calls) == 1
        assert not (tmp_path / "set" / "manifest.json").exists()


def test_labels_that_are_kept_and_not_returned_are_no_error():
    x, y = many(40)
    data = Plain(x, y)
    data.targets = [9] * 40
    assert len(build("D_det", data=data, steps=1)) == 40


# --- No folder ---


def test_a_file_in_place_of_a_folder_and_an_empty_name_are_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match=r"out=.*file.*expected a folder"):
        build("D_det", tmp_path / "file", steps=1)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"'.' is this folder"):
        build("D_det", "", steps=1)
    assert not list((tmp_path / "empty").iterdir())


# --- In use ---


@pytest.mark.slow
@pytest.mark.parametrize("who", ["this thread", "another thread", "another process"])
def test_a_folder_in_use_is_refused_to_threads_and_processes(who, tmp_path):
    out, errors = tmp_path / "set", []

    def attempt():
        try:
            build("D_det", out)
        except BlockingIOError as error:
            errors.append(str(error))

    with lock_folder(out):
        if who == "this thread":
            attempt()
        elif who == "another thread":
            thread = threading.Thread(target=attempt)
            thread.start()
            thread.join()
        else:
            code = f"from builds import build; build('D_det', {str(out)!r})"
            path = os.pathsep.join(sys.path)
            env = {**os.environ, "PYTHONPATH": path}
            done = subprocess.run(
                [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
            )
            assert done.returncode
            errors.append(done.stderr)
    assert "in use by" in errors[0]
    assert str(out) in errors[0]
    assert torch.equal(build("D_det", out).images, build("D_det").images)


def test_threads_that_build_one_folder_at_once_give_one_dataset(tmp_path):
    found, errors = [], []
    # Not made in the threads: `network` seeds the random state that all threads share.
    model, data = network(), dataset()

    def attempt():
        try:
            found.append(build("D_R", tmp_path / "set", model=model, data=data))
        except BlockingIOError as error:
            errors.append(error)

    threads = [threading.Thread(target=attempt) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) + len(errors) == 4
    assert found
    expected = build("D_R").images
    assert all(torch.equal(made.images, expected) for made in found)


# --- Full disks ---


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(place)]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(mount, check=False).returncode:
        pytest.skip("cannot mount a small disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("how", ["save", "build", "export"])
def test_a_full_disk_names_the_folder_and_leaves_what_was_there(how, small_disk):
    good = build("D_det", small_disk / "good")
    before = contents(small_disk / "good")
    large = af.ConstructedDataset(
        {"images": np.ones((100, 1, 32, 32), "f4"), "labels": np.zeros(100, int)}
    )
    x = torch.rand(4000, 1, 3, 3)
    data, out = TensorDataset(x, torch.arange(4000) % 4), small_disk / "large"
    write = {
        "save": lambda: large.save(out),
        "export": lambda: export_released(large, out),
        "build": lambda: build("D_det", out, data=data),
    }[how]
    with pytest.raises(OSError, match="large") as raised:
        write()
    assert "No space left" in str(raised.value)
    assert contents(small_disk / "good") == before
    assert torch.equal(af.ConstructedDataset.open(small_disk / "good").images, good.images)
    assert not (small_disk / "large" / "manifest.json").exists()


@pytest.mark.parametrize("method", METHODS)
def test_good_samples_pass(method):
    assert len(build(method, steps=1)) == 22
