"""Sets built in a folder: killed anywhere and gone on with, the bytes are the same."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from builds import (
    BATCH,
    METHODS,
    ONE_OF_EACH,
    SAMPLES,
    Failing,
    Stopped,
    build,
    contents,
    dataset,
    finished,
    forks,
    half_built,
    network,
    stop,
)
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import advfeat as af
from advfeat.datasets.writer import FolderWriter

# --- Whole ---


@pytest.mark.parametrize("method", METHODS)
def test_a_folder_holds_what_memory_would(method, tmp_path):
    on_disk, in_memory = build(method, tmp_path / "set"), build(method)
    assert list(on_disk.fields) == list(in_memory.fields)
    for name, array in in_memory.fields.items():
        np.testing.assert_array_equal(on_disk.fields[name], array)
        assert isinstance(on_disk.fields[name], np.memmap)
    assert on_disk.manifest.items() >= in_memory.manifest.items()
    again = af.ConstructedDataset.open(tmp_path / "set")
    assert torch.equal(again.images, in_memory.images)


def test_a_folder_holds_nothing_but_arrays_and_the_manifest(tmp_path):
    made = build("D_rand", tmp_path / "a" / "set")
    names = {path.name for path in (tmp_path / "a" / "set").iterdir()}
    assert names == {"manifest.json", "done.npy"} | {f"{name}.npy" for name in made.fields}


@pytest.mark.parametrize("method", METHODS)
def test_a_finished_folder_is_returned_at_once(method, tmp_path):
    build(method, tmp_path / "set")
    before = contents(tmp_path / "set")
    calls = []
    model = network()
    model.register_forward_hook(lambda *_: calls.append(1))
    made = build(method, tmp_path / "set", model=model)
    assert len(made) == SAMPLES
    assert not calls
    assert contents(tmp_path / "set") == before


def test_a_read_only_finished_folder_is_returned_too(tmp_path):
    made = build("D_det", tmp_path / "set")
    for path in (tmp_path / "set").iterdir():
        path.chmod(0o444)
    (tmp_path / "set").chmod(0o555)
    assert torch.equal(build("D_det", tmp_path / "set").images, made.images)
    (tmp_path / "set").chmod(0o755)


# --- Killed ---


@pytest.mark.slow
@forks
def test_killed_at_every_system_call_and_gone_on_with(tmp_path):
    method = "D_R"
    build(method, tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    survived, midway = False, 0
    for moment in range(0, 10_000, 7):
        folder = tmp_path / f"killed-{moment}"
        child = os.fork()
        if child == 0:
            _die_at(moment)
            build(method, folder)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            survived = True
        # What counts as finished is right already.
        safe = finished(folder)
        for name in ("images", "labels") if safe else ():
            rows = np.load(folder / "done.npy") == 1
            found, expected = (
                np.load(at / f"{name}.npy")[rows] for at in (folder, tmp_path / "whole")
            )
            np.testing.assert_array_equal(found, expected)
        build(method, folder)
        assert contents(folder) == whole
        midway += 0 < safe < SAMPLES
        if survived:
            break
    assert survived
    assert midway > 3


def _die_at(moment):
    """Make the process kill itself at the n-th call that changes a file."""
    calls = iter(range(moment))
    for name in ("write", "fsync", "rename", "open", "ftruncate", "posix_fallocate"):
        real = getattr(os, name)

        def counted(*arguments, real=real, **options):
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        setattr(os, name, counted)


@pytest.mark.slow
@forks
@pytest.mark.parametrize("method", ONE_OF_EACH)
def test_killed_at_random_moments_and_gone_on_with(method, tmp_path):
    build(method, tmp_path / "whole", steps=40)
    generator, folder, kills = random.Random(0), tmp_path / "killed", 0
    while finished(folder) < SAMPLES:
        child = os.fork()
        if child == 0:
            build(method, folder, steps=40)
            os._exit(0)
        # At least one more batch, so that this ends; then at any moment.
        before = finished(folder)
        while finished(folder) <= before and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.02))
        try:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            kills += os.WIFSIGNALED(status)
        except (ChildProcessError, ProcessLookupError):
            pass
    assert kills >= 1
    build(method, folder, steps=40)
    assert contents(folder) == contents(tmp_path / "whole")


@pytest.mark.parametrize("method", METHODS)
def test_an_error_on_the_way_loses_no_finished_sample(method, tmp_path):
    build(method, tmp_path / "whole")
    folder = tmp_path / "set"

    def stop():
        if finished(folder) >= BATCH:
            raise Stopped

    with pytest.raises(Stopped):
        build(method, folder, data=Failing(SAMPLES - 1, stop))
    assert BATCH <= finished(folder) < SAMPLES
    build(method, folder)
    assert contents(folder) == contents(tmp_path / "whole")


def test_another_batch_size_goes_on_with_the_same_samples(tmp_path):
    whole = build("D_R", tmp_path / "whole")
    made = build("D_R", half_built(tmp_path / "set", "D_R"), batch_size=3)
    torch.testing.assert_close(made.images, whole.images, rtol=0, atol=1e-6)


def test_without_a_seed_a_folder_goes_on_with_its_own(tmp_path):
    options = {"seed": None, "model": network()}
    torch.manual_seed(4)
    whole = build("D_rand", tmp_path / "whole", **options)
    torch.manual_seed(5)
    again = build("D_rand", tmp_path / "whole", **options)
    assert torch.equal(again.images, whole.images)
    # What follows in the user's program draws the same numbers, whether rows were left or not.
    following = torch.rand(1)
    torch.manual_seed(5)
    other = build("D_rand", tmp_path / "new", **options)
    assert torch.equal(torch.rand(1), following)
    assert other.manifest["settings"]["seed"] != whole.manifest["settings"]["seed"]


# --- Asked to stop ---

SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
from builds import Failing, build, finished
class Watched(Failing):
    told = False
    def __getitem__(self, row):
        # Whichever row is read when the first ones are finished: rows are read ahead.
        if not self.told and finished({folder!r}):
            self.told = True
            print("under way", flush=True)
            time.sleep(3)
        return self.data[row]
build("D_rand", {folder!r}, data=Watched(-1, None))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_in_order_and_tells_how_to_go_on(number, tmp_path):
    folder, script = tmp_path / "set", tmp_path / "build.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parents[1]), folder=str(folder)))
    with subprocess.Popen(
        [sys.executable, str(script), "--name", "two words"],
        cwd=Path(af.__file__).parent.parent,
        env=os.environ | {"PYTHONPATH": str(Path(af.__file__).parent.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell has what it starts in the background ignore SIGINT, and tests inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        process.stdout.readline()
        process.send_signal(number)
        _, told = process.communicate(timeout=60)
    assert process.returncode in {-number, 128 + number, 1}
    assert f"{finished(folder)} of {SAMPLES} samples are safe in {str(folder)!r}" in told
    assert f"{script} --name 'two words'" in told
    build("D_rand", folder)
    build("D_rand", tmp_path / "whole")
    assert contents(folder) == contents(tmp_path / "whole")


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_the_users_own_handler_stays_in_charge(tmp_path):
    heard = []

    def own(*_):
        heard.append(1)

    before = signal.signal(signal.SIGTERM, own)
    try:
        act = lambda: heard or os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
        build("D_det", tmp_path / "set", data=Failing(3, act))
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [1]
    build("D_det", tmp_path / "other")
    assert signal.getsignal(signal.SIGTERM) is before


# --- Another set ---


class Brighter(Dataset):
    def __len__(self):
        return SAMPLES

    def __getitem__(self, row):
        image, label = dataset()[row]
        return (image + 0.01 if row == 7 else image).clamp(0, 1), label


class Augmented(Dataset):
    def __len__(self):
        return SAMPLES

    def __getitem__(self, row):
        image, label = dataset()[row]
        return image.flip(2) if torch.rand(()) < 0.5 else image, label


def other_weights():
    model = network()
    with torch.no_grad():
        model[4].weight[0, 0] += 1e-3
    return model


def other_statistics():
    model = network()
    model[2].running_mean[0] += 1e-3
    return model


OTHER = {
    "steps": ({"steps": 5}, "steps=4 there, 5 here"),
    "step size": ({"step_size": 0.3}, r"step_size=.* there, 0\.3 here"),
    "eps": ({"eps": 0.5}, r"eps=0\.4 there, 0\.5 here"),
    "norm": ({"norm": "linf"}, "norm='l2' there, 'linf' here"),
    "seed": ({"seed": 4}, "seed=3 there, 4 here"),
    "bounds": ({"bounds": (0.0, 1.5)}, "bounds="),
    "exclude_label": ({"exclude_label": True}, "exclude_label=False there, True here"),
    "precision": ({"precision": "bfloat16"}, "precision='float32' there"),
    "dtype": ({"dtype": "uint8"}, "dtype='float32' there, 'uint8' here"),
    "weights": ({"model": other_weights()}, "model"),
    "running statistics": ({"model": other_statistics()}, "model"),
    "activation": ({"model": network(nn.Tanh)}, "model"),
    "one image": ({"data": Brighter()}, "source data"),
    "fewer rows": ({"data": dataset(20)}, "22 samples there, 20 here"),
    "augmentation": ({"data": Augmented()}, "augmentation"),
}


@pytest.mark.parametrize("state", ["finished", "half built"])
@pytest.mark.parametrize("name", OTHER)
@pytest.mark.slow
def test_another_set_is_refused_and_the_difference_named(name, state, tmp_path):
    options, told = OTHER[name]
    folder = tmp_path / "set"
    build("D_rand", folder) if state == "finished" else half_built(folder)
    before = contents(folder)
    with pytest.raises(ValueError, match=rf"out=.*set.*{told}"):
        build("D_rand", folder, **options)
    assert contents(folder) == before


def test_another_method_or_start_is_refused(tmp_path):
    build("D_R", tmp_path / "set")
    with pytest.raises(ValueError, match="method is D_R there, D_NR here"):
        build("D_NR", tmp_path / "set")
    with pytest.raises(ValueError, match="start='images' there, 'noise' here"):
        build("D_R", tmp_path / "set", start="noise")
    given = torch.rand(SAMPLES, 1, 3, 3)
    build("D_R", tmp_path / "given", start=given)
    build("D_R", tmp_path / "given", start=given.clone())
    with pytest.raises(ValueError, match="start="):
        build("D_R", tmp_path / "given", start=given.flip(0))


def test_what_makes_no_difference_is_not_asked_for(tmp_path):
    build("D_rand", tmp_path / "set")
    loader = DataLoader(dataset(), batch_size=BATCH, shuffle=True)
    for data in (loader, Failing(-1, stop)):
        build("D_rand", tmp_path / "set", data=data, model=network().train())


@pytest.mark.parametrize("method", ONE_OF_EACH)
def test_bad_options_are_refused(method):
    with pytest.raises(TypeError, match="out=5"):
        build(method, 5)
    with pytest.raises(ValueError, match="dtype='float16'"):
        build(method, dtype="float16")


def test_a_rank_that_does_not_see_the_folder_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="folder that all of them share"):
        FolderWriter(tmp_path)


def test_a_layer_that_is_a_function_goes_by_its_name(tmp_path):
    model = network()
    build("D_R", tmp_path / "set", model=model, layer=lambda x: model[:2](x))
    build("D_R", tmp_path / "set", model=model, layer=lambda x: model[:2](x))
    with pytest.raises(ValueError, match="layer="):
        build("D_R", tmp_path / "set", model=model, layer=model[1])


# --- Memory ---


@forks
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_samples(tmp_path):
    # The set is 25 MB on disk; the source is one image, seen 2000 times.
    rows = TensorDataset(torch.rand(1, 3, 32, 32).expand(2000, -1, -1, -1), torch.arange(2000) % 4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 4))

    def peak():
        text = Path("/proc/self/status").read_text()
        return int(text.split("VmHWM:")[1].split()[0]) / 1024

    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        few = TensorDataset(*rows[:100])
        build("D_det", data=few, model=model, steps=1, out=tmp_path / "first", batch_size=20)
        Path("/proc/self/clear_refs").write_text("5")
        before = peak()
        build("D_det", data=rows, model=model, steps=1, out=tmp_path / "set", batch_size=20)
        os.write(write, f"{peak() - before}".encode())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert float(os.read(read, 100)) < 12
