"""Folders that are damaged, foreign, busy, full or closed: a clear error, no finished row lost."""

import json
import os
import pickle
import resource
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from builds import BATCH, SAMPLES, Failing, build, contents, finished, forks, half_built
from torch import nn
from torch.utils.data import TensorDataset

import advfeat as af

as_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root")


@pytest.fixture(params=["finished", "half built"])
def folder(request, tmp_path):
    if request.param == "finished":
        build("D_rand", tmp_path / "set")
        return tmp_path / "set"
    return half_built(tmp_path / "set")


def refused(folder, told):
    """Both to go on and to open, and nothing in the folder is touched."""
    before = contents(folder)
    with pytest.raises(ValueError, match=told):
        build("D_rand", folder)
    # An unfinished folder is not opened at all.
    with pytest.raises(ValueError, match=rf"{told}|unfinished"):
        af.ConstructedDataset.open(folder)
    assert contents(folder) == before


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


# --- Damaged ---


@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "done.npy"])
@pytest.mark.parametrize("keep", [0, 40, -1])
def test_an_array_cut_short(folder, name, keep):
    path = folder / name
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, rf"set.*{name[:-4]}\.npy is missing, cut short or no array")


@pytest.mark.parametrize("kind", ["pickle", "object array", "other shape", "other type"])
def test_something_else_in_place_of_an_array(folder, kind):
    path = folder / "images.npy"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    elif kind == "object array":
        np.save(path, np.array([Bomb()] * SAMPLES, dtype=object), allow_pickle=True)
    elif kind == "other shape":
        np.save(path, np.zeros((SAMPLES, 9), np.float32))
    else:
        np.save(path, np.zeros((SAMPLES, 1, 3, 3), np.float64))
    refused(folder, r"images\.npy")


@pytest.mark.parametrize("text", ["", '{"format": 3,', "[1]", '{"format": 3}'])
def test_a_damaged_manifest(folder, text):
    (folder / "manifest.json").write_text(text)
    refused(folder, "manifest")


@pytest.mark.parametrize("number", [1, 2, 99])
def test_a_manifest_from_another_version(folder, number):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": number}))
    refused(folder, f"format {number}; this version reads 3")


def test_samples_made_by_another_version_are_not_mixed(tmp_path):
    folder = half_built(tmp_path / "set")
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["versions"]["advfeat"] = "0.0.1"
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"begun by advfeat 0\.0\.1"):
        build("D_rand", folder)


def test_samples_made_with_another_torch_are_told(tmp_path):
    folder = half_built(tmp_path / "set")
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(manifest))
    with pytest.warns(UserWarning, match=r"begun with torch 1\.0"):
        build("D_rand", folder)
    assert finished(folder) == SAMPLES


def test_a_field_that_leads_out_of_the_folder_is_not_read(folder):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["fields"]["../../secret"] = {"dtype": "float32", "shape": []}
    path.write_text(json.dumps(manifest))
    np.save(folder.parent.parent / "secret.npy", np.zeros(SAMPLES, np.float32))
    refused(folder, "secret")


def test_a_field_of_no_shape_is_refused(folder):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["fields"]["labels"]["shape"] = 5
    path.write_text(json.dumps(manifest))
    refused(folder, "manifest.json says nonsense of field 'labels'")


# --- Foreign ---


def test_a_folder_with_something_else_in_it(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match=r"out=.*set.*thesis\.tex"):
        build("D_rand", tmp_path / "set")
    assert contents(tmp_path / "set") == {"thesis.tex": b"mine"}


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "set").write_text("mine")
    with pytest.raises(OSError, match="set"):
        build("D_rand", tmp_path / "set")
    with pytest.raises(OSError, match="set"):
        build("D_rand", tmp_path / "set" / "below")
    assert (tmp_path / "set").read_text() == "mine"


def test_an_empty_folder_is_as_good_as_none(tmp_path):
    (tmp_path / "set").mkdir()
    assert len(build("D_rand", tmp_path / "set")) == SAMPLES


# --- Busy, full, closed ---


@forks
def test_two_processes_on_one_folder(tmp_path):
    folder = tmp_path / "set"
    told, (heard, ask) = os.pipe(), os.pipe()

    def wait():
        if finished(folder):
            os.write(told[1], b"x")
            os.read(heard, 1)

    child = os.fork()
    if child == 0:
        build("D_rand", folder, data=Failing(SAMPLES - 1, wait))
        os._exit(0)
    os.read(told[0], 1)
    try:
        with pytest.raises(BlockingIOError, match=rf"out=.*set.*in use by process {child} on"):
            build("D_rand", folder)
    finally:
        os.write(ask, b"xxxxxxxxxxxx")
        status = os.waitpid(child, 0)[1]
    assert status == 0
    build("D_rand", tmp_path / "alone")
    assert contents(folder) == contents(tmp_path / "alone")


def in_a_child(act):
    """What the error says that a process of its own ends with."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            act()
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as told:
        text = told.read()
    os.waitpid(child, 0)
    return text


def limit_file_size(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@forks
def test_no_room_is_known_before_any_work(tmp_path):
    def act():
        limit_file_size(500)
        build("D_rand", tmp_path / "set")

    told = in_a_child(act)
    assert told.startswith("OSError")
    assert f"out={str(tmp_path / 'set')!r}" in told
    assert "the dataset needs" in told
    assert contents(tmp_path / "set") == {}
    assert len(build("D_rand", tmp_path / "set")) == SAMPLES


@forks
def test_a_disk_that_fails_on_the_way(tmp_path):
    folder = tmp_path / "set"

    def fail():
        if finished(folder) >= BATCH:
            limit_file_size(200)

    told = in_a_child(lambda: build("D_rand", folder, data=Failing(SAMPLES - 1, fail)))
    assert told.startswith("OSError")
    assert f"{finished(folder)} of {SAMPLES} samples are safe there" in told
    assert BATCH <= finished(folder) < SAMPLES
    build("D_rand", folder)
    build("D_rand", tmp_path / "alone")
    assert contents(folder) == contents(tmp_path / "alone")


@as_root
@pytest.mark.skipif(shutil.which("mount") is None, reason="needs mount")
def test_a_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        (disk / "other").write_bytes(bytes(150_000))
        rows = TensorDataset(torch.rand(30, 1, 32, 32), torch.arange(30) % 4)
        model = nn.Sequential(nn.Flatten(), nn.Linear(1024, 4))
        with pytest.raises(OSError, match=r"out=.*No space left.*the dataset needs"):
            build("D_rand", disk / "set", data=rows, model=model)
        (disk / "other").unlink()
        build("D_rand", disk / "set", data=rows, model=model)
        assert len(af.ConstructedDataset.open(disk / "set")) == 30
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@as_root
@pytest.mark.parametrize("state", ["new", "half built"])
def test_no_write_permission(state):
    place = Path(tempfile.mkdtemp())
    try:
        folder = place / "set"
        if state == "half built":
            half_built(folder)
            before = contents(folder)
        place.chmod(0o755)
        os.seteuid(65534)
        try:
            with pytest.raises(PermissionError, match=r"out=.*set.*no permission"):
                build("D_rand", folder)
        finally:
            os.seteuid(0)
        if state == "half built":
            assert contents(folder) == before
    finally:
        shutil.rmtree(place)
