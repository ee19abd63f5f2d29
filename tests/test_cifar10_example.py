"""examples/cifar10.py on made images: both formats of the data, interrupted and resumed."""

import functools
import hashlib
import json
import os
import pickle
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import advfeat as af
from advfeat import analysis

SAMPLES = 15
SCRIPT = Path(__file__).parents[1] / "examples" / "cifar10.py"


pytestmark = pytest.mark.slow


def images(seed):
    """Images whose class is the brightness of a corner, and labels."""
    random = np.random.default_rng(seed)
    labels = np.arange(SAMPLES) % 10
    pixels = random.integers(0, 200, (SAMPLES, 32, 32, 3), dtype=np.uint8)
    pixels[:, :8, :8] = (25 * labels)[:, None, None, None]
    return pixels, labels


def as_npz(folder):
    (x_train, y_train), (x_test, y_test) = images(0), images(1)
    np.savez(folder / "c.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return folder / "c.npz"


def as_batches(folder):
    """The layout of the original cifar-10-batches-py."""
    path = folder / "cifar-10-batches-py"
    path.mkdir()
    parts = dict(zip([f"data_batch_{i}" for i in range(1, 6)], range(5), strict=True))
    pixels, labels = images(0)
    for name, place in parts.items():
        own = slice(place * SAMPLES // 5, (place + 1) * SAMPLES // 5)
        _batch(path / name, pixels[own], labels[own])
    _batch(path / "test_batch", *images(1))
    return path


def _batch(file, pixels, labels):
    flat = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
    file.write_bytes(pickle.dumps({b"data": flat, b"labels": labels.tolist()}))


def run(data, out, *more):
    command = [sys.executable, SCRIPT, "--data", data, "--out", out, "--samples", str(SAMPLES)]
    command += ["--epochs", "1", "--precision", "float32", "--device", "cpu", *more]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cifar")
    run(as_npz(folder), folder / "out", "--stages", "train standard")
    printed = run(as_npz(folder), folder / "out", "--stages", "measure D_det")
    return folder / "out", printed


def test_it_goes_on_and_prints_the_table_and_where_the_report_is(study):
    out, printed = study
    assert "train standard: 0 s" in printed  # was done by the call before
    assert "| D_det | " in printed
    assert str(out / "report.html") in printed
    made = json.loads((out / "sets" / "D_det" / "manifest.json").read_text())
    assert made["settings"]["eps"] == 1.0
    assert made["samples"] == SAMPLES


def test_both_formats_are_the_same_data(study, tmp_path):
    out, _ = study
    run(as_batches(tmp_path), tmp_path / "out", "--stages", "train standard")
    one, other = (json.loads((o / "study.json").read_text()) for o in (out, tmp_path / "out"))
    assert one == other


def test_the_download_is_checked_unpacked_and_read(tmp_path):
    folder = as_batches(tmp_path)
    archive = tmp_path / "c.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder, folder.name)
    data, checksum = tmp_path / "data", hashlib.sha256(archive.read_bytes()).hexdigest()
    given = ["--download", "--url", archive.as_uri(), "--stages", "train standard"]
    command = [sys.executable, SCRIPT, "--data", data, "--out", tmp_path / "out", *given]
    refused = subprocess.run(
        list(map(str, [*command, "--sha256", "0" * 64])), capture_output=True, text=True
    )
    assert refused.returncode == 1
    assert f"SHA-256 is {checksum}" in refused.stderr
    assert not list(data.iterdir())
    run(data, tmp_path / "out", *given, "--sha256", checksum)
    assert {p.name for p in (data / folder.name).iterdir()} == {p.name for p in folder.iterdir()}


def test_the_estimate_is_from_this_machine_and_lists_every_stage(tmp_path):
    module = runpy.run_path(str(SCRIPT))
    given = ["--data", str(as_npz(tmp_path)), "--budget", "cpu", "--samples", str(SAMPLES)]
    given += ["--device", "cpu", "--precision", "float32"]
    options = module["parser"].parse_args(given)
    speed = module["Work"](training=0.01, gradients=0.02, evaluated=0.1)
    printed = module["estimate"](options, speed)
    chosen = module["cpu_recipe"]()
    hours = {line[:24].strip(): line[24:].split()[-1] for line in printed.splitlines()[2:-1]}
    epochs, robust, inversion = chosen.standard["epochs"], chosen.robust, chosen.sets["D_R"]
    seconds = {
        "train standard": epochs * SAMPLES / 0.01,
        "train robust": robust["epochs"] * SAMPLES * (1 / 0.01 + robust["steps"] / 0.02),
        "make D_R": inversion["steps"] * SAMPLES / 0.02,
    }
    for stage, expected in seconds.items():
        assert float(hours[stage]) == pytest.approx(expected / 3600, abs=0.005)
    assert {f"train {name}" for name in chosen.sets} < set(hours)
    measured = module["probe"](options, seconds=0.01)
    assert min(measured.training, measured.gradients, measured.evaluated) > 0


def test_the_half_hour_on_a_gpu_runs_tiny_on_the_cpu(tmp_path):
    """Every command of tests/benchmarks/gpu.sh, on 10 images and the budget `cpu`."""
    script = SCRIPT.parents[1] / "tests" / "benchmarks" / "gpu.sh"
    environment = {
        **os.environ,
        "DATA": str(as_npz(tmp_path)),
        "OUT": str(tmp_path / "results"),
        "CACHE": str(tmp_path / "cache"),
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
    }
    for part in "123":
        done = subprocess.run(
            ["bash", script, part, "--device", "cpu", "--tiny"],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    results = tmp_path / "results"
    assert "| inversion | bfloat16 |" in (results / "rates.txt").read_text()
    assert (results / "report.html").stat().st_size > 10_000
    stages = {file.stem for file in (results / "stages").iterdir()}
    assert {"train-robust", "make-D_R", "measure-D_R", "make-D_rand-control"} <= stages
    _, table = (results / "study.txt").read_text().split("| PGD-20, l2 | 0.25 | 0.5 |\n")
    (line,) = (line for line in table.splitlines() if line.startswith("| D_R |"))
    near, far = (float(cell) for cell in line.split("|")[2:4])
    assert 0 <= far <= near <= 100


@pytest.fixture(scope="module")
def figure_3():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        patch.delitem(sys.modules, "cifar10", raising=False)  # one parser for one script
        return runpy.run_path(str(SCRIPT.with_name("cifar10_transfer.py")))


def test_the_architectures_of_figure_3_are_different_and_return_ten_logits(figure_3):
    weights = set()
    for make in figure_3["ARCHITECTURES"].values():
        model = make()
        model(torch.rand(2, 3, 32, 32)).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
        weights.add(sum(p.numel() for p in model.parameters()))
    assert len(weights) == len(figure_3["ARCHITECTURES"]) == 9


def test_figure_3_has_a_column_for_each_training_and_their_mean(figure_3):
    data = TensorDataset(torch.eye(3), torch.arange(3))
    source, wrong = torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3)
    torch.nn.init.eye_(source.weight)
    torch.nn.init.zeros_(wrong.weight)
    torch.nn.init.zeros_(wrong.bias)  # class 0 for all images
    det = functools.partial(af.construct_det_dataset, eps=0.9, steps=10)
    results = [
        analysis.transfer(
            source, {"one": source}, data, data, construct=det, learn=lambda *_, model=model: model
        )
        for model in (source, wrong)
    ]
    printed = figure_3["table"](results, {"one": source}).splitlines()
    assert [len(line.split("|")) for line in printed] == [9, 9, 9]
    cells = printed[-1].replace("|", "").split()
    assert cells[:4] == ["one", "9", "100.0", "100.0"]
    assert "33.3 (6.1 to 79.2)" in printed[-1]
    (mean,) = figure_3["averaged"](results).points
    assert float(mean.learned) == pytest.approx(2 / 3)
    assert float(mean.fooled) == 1.0
