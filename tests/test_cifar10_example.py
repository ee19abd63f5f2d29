"""examples/cifar10.py on made images: both formats of the data, cut and gone on with."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROWS = 24
SCRIPT = Path(__file__).parents[1] / "examples" / "cifar10.py"


pytestmark = pytest.mark.slow


def images(seed):
    """Images whose class is the brightness of a corner, and labels."""
    random = np.random.default_rng(seed)
    labels = np.arange(ROWS) % 10
    pixels = random.integers(0, 200, (ROWS, 32, 32, 3), dtype=np.uint8)
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
        own = slice(place * 5, min(ROWS, place * 5 + 5))
        _batch(path / name, pixels[own], labels[own])
    _batch(path / "test_batch", *images(1))
    return path


def _batch(file, pixels, labels):
    flat = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
    file.write_bytes(pickle.dumps({b"data": flat, b"labels": labels.tolist()}))


def run(data, out, *more):
    command = [sys.executable, SCRIPT, "--data", data, "--out", out, "--rows", str(ROWS)]
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
    assert made["rows"] == ROWS


def test_both_formats_are_the_same_data(study, tmp_path):
    out, _ = study
    run(as_batches(tmp_path), tmp_path / "out", "--stages", "train standard")
    one, other = (json.loads((o / "study.json").read_text()) for o in (out, tmp_path / "out"))
    assert one == other
