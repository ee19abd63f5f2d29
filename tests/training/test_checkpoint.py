"""A run that is cut and resumed ends as if it had never been."""

import copy
import os
import random
import signal
import subprocess
import sys
import textwrap
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, SequentialLR
from torch.utils.data import DataLoader, Dataset, TensorDataset

import advfeat as af
from advfeat.training import Options

SAMPLES = 60


def blobs(count=SAMPLES, classes=3):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(count) % classes
    return TensorDataset(
        0.8 * F.one_hot(y, classes) + 0.2 * torch.rand(count, classes, generator=generator), y
    )


def dropping():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)
    )


class Noisy(Dataset):
    """Samples that draw from all three generators a program has."""

    def __init__(self):
        self.x, self.y = blobs().tensors

    def __len__(self):
        return len(self.y)

    def __getitem__(self, row):
        noise = 0.02 * (random.random() + np.random.rand() + torch.rand(1).item())  # noqa: NPY002
        return (self.x[row] * (1 - noise), self.y[row])


class Cut(Exception):  # noqa: N818
    """The end of a process, for a test."""


def cut_at(step):
    def on_step(row):
        if row["step"] == step:
            raise Cut

    return on_step


def same(found, expected):
    return all(torch.equal(found[name], value) for name, value in expected.items())


def standard(model, **settings):
    return af.fit(model, settings.pop("data", blobs()), **settings)


def adversarial(model, **settings):
    data = settings.pop("data", blobs())
    return af.adversarial_fit(model, data, **({"eps": 0.1, "norm": "linf"} | settings))


RUNS = {
    "standard": (standard, {}),
    "adversarial": (adversarial, {"random_start": True, "attack_mode": "train"}),
    "trades": (adversarial, {"objective": "trades", "steps": 2}),
    "fast": (adversarial, {"method": "fast"}),
    "free": (adversarial, {"method": "free", "steps": 2}),
    "averaged": (standard, {"options": Options(ema=0.9)}),
    "perturbed": (standard, {"options": Options(awp=0.01, clip_norm=1.0, accumulate=2)}),
    "adam": (standard, {"optimizer": lambda p: torch.optim.Adam(p, lr=0.01)}),
    "one cycle": (standard, {"schedule": lambda o: OneCycleLR(o, 0.1, total_steps=12)}),
    "lambda": (standard, {"schedule": lambda o: LambdaLR(o, lambda epoch: 0.7**epoch)}),
    "noisy": (standard, {"data": Noisy()}),
    "split": (adversarial, {"validation": 0.2}),
    "patient": (standard, {"validation": 0.2, "options": Options(patience=1)}),
}
SETTINGS = {"epochs": 3, "batch_size": 15, "seed": 4}


def begun():
    """A model, and the generators of a new process."""
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    return dropping()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "step"), [("fast", 1), *((kind, 6) for kind in RUNS)])
def test_killed_and_resumed_is_uninterrupted_bit_for_bit(kind, step, tmp_path):
    train, settings = RUNS[kind]
    whole = begun()
    expected = train(whole, **SETTINGS, **settings)
    cut = begun()
    folder = tmp_path / "run"
    with pytest.raises(Cut):
        train(cut, **SETTINGS, **settings, checkpoint=folder, on_step=cut_at(step))
    other = dropping()
    with torch.no_grad():
        other[0].weight.zero_()  # what the resumed model had been is nothing to it
    torch.manual_seed(77)
    random.seed(77)
    found = train(other, **SETTINGS, **settings, checkpoint=folder)
    assert same(other.state_dict(), whole.state_dict())
    assert without_seconds(found) == without_seconds(expected)
    assert found.best == expected.best


def without_seconds(history):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history.rows]


def test_a_resumed_loader_goes_on_with_its_own_generator(tmp_path):
    def loader():
        generator = torch.Generator().manual_seed(9)
        return DataLoader(Noisy(), batch_size=15, shuffle=True, generator=generator)

    whole, cut, other = begun(), begun(), dropping()
    begun()
    af.fit(whole, loader(), epochs=3, seed=4)
    begun()
    with pytest.raises(Cut):
        af.fit(cut, loader(), epochs=3, seed=4, checkpoint=tmp_path, on_step=cut_at(6))
    af.fit(other, loader(), epochs=3, seed=4, checkpoint=tmp_path)
    assert same(other.state_dict(), whole.state_dict())


def test_without_a_seed_the_checkpoint_has_it(tmp_path):
    torch.manual_seed(5)
    whole = dropping()
    af.fit(whole, blobs(), epochs=3, batch_size=15)
    torch.manual_seed(5)
    cut = dropping()
    with pytest.raises(Cut):
        af.fit(cut, blobs(), epochs=3, batch_size=15, checkpoint=tmp_path, on_step=cut_at(6))
    torch.manual_seed(99)
    other = dropping()
    af.fit(other, blobs(), epochs=3, batch_size=15, checkpoint=tmp_path)
    assert same(other.state_dict(), whole.state_dict())


def test_a_finished_run_is_only_loaded(tmp_path):
    model, other, steps = begun(), dropping(), []
    first = af.fit(model, blobs(), **SETTINGS, checkpoint=tmp_path)
    again = af.fit(other, blobs(), **SETTINGS, checkpoint=tmp_path, on_step=steps.append)
    assert steps == []
    assert again == first
    assert same(other.state_dict(), model.state_dict())


def test_a_run_that_was_stopped_stays_stopped(tmp_path):
    model, steps = begun(), []
    settings = SETTINGS | {"checkpoint": tmp_path}
    af.fit(model, blobs(), **settings, on_epoch=lambda row: False)
    history = af.fit(dropping(), blobs(), **settings, on_step=steps.append)
    assert len(history.rows) == 1
    assert steps == []


# --- What is written ---


def test_last_and_best_load_with_weights_only(tmp_path):
    model, held = begun(), blobs(30)
    states = []
    history = af.fit(
        model,
        blobs(),
        epochs=4,
        batch_size=15,
        validation=held,
        checkpoint=tmp_path,
        on_epoch=lambda _: states.append(copy.deepcopy(model.state_dict())),
        seed=1,
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "last.pt"]
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert same(last["model"], states[-1])
    assert same(best["model"], states[history.best - 1])
    fresh = dropping()
    fresh.load_state_dict(best["model"])
    assert af.accuracy(fresh, held) == max(row["val_accuracy"] for row in history.rows)


def test_the_saved_model_is_the_average(tmp_path):
    model = begun()
    af.fit(model, blobs(), **SETTINGS, checkpoint=tmp_path, options=Options(ema=0.9))
    assert same(torch.load(tmp_path / "last.pt", weights_only=True)["model"], model.state_dict())


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    af.fit(begun(), blobs(), **SETTINGS, checkpoint=tmp_path)
    before = (tmp_path / "last.pt").read_bytes()

    def half(state, file):
        file.write(b"half")
        raise OSError("no space left on device")

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "last.pt").write_bytes(before)
    monkeypatch.setattr(torch, "save", half)
    from advfeat.training._checkpoint import CheckpointFolder

    with pytest.raises(OSError, match=r"last\.pt"):
        CheckpointFolder(tmp_path / "other").write({"epoch": 9})
    assert (tmp_path / "other" / "last.pt").read_bytes() == before


@pytest.mark.parametrize("seed", [0, 1])
def test_divergence_keeps_the_last_good_checkpoint_and_says_where(tmp_path, seed):
    model = begun()

    def explode(optimizer):
        return LambdaLR(optimizer, lambda epoch: 1.0 if epoch < 2 else 1e30)

    states = []
    with pytest.raises(FloatingPointError, match=r"epoch 3 \(step \d+, lr 1e\+29\).*epoch 2"):
        af.fit(
            model,
            blobs(),
            epochs=5,
            batch_size=15,
            schedule=explode,
            checkpoint=tmp_path,
            on_epoch=lambda _: states.append(copy.deepcopy(model.state_dict())),
            seed=seed,
        )
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    assert last["epoch"] == 2
    assert same(last["model"], states[-1])


def test_weights_broken_by_the_last_step_of_an_epoch_are_not_saved(tmp_path):
    model, (x, y) = begun(), blobs().tensors
    with pytest.raises(FloatingPointError, match=r"a weight is not finite in epoch 1 \(step 1, "):
        af.fit(
            model,
            [(x, y)],
            epochs=2,
            checkpoint=tmp_path,
            on_step=lambda _: model[0].weight.data.fill_(torch.inf),
        )
    assert torch.load(tmp_path / "last.pt", weights_only=True)["epoch"] == 0


# --- What is refused ---


def halved(x):
    return x / 2


def test_going_on_with_the_optimizer_at_another_rate_is_refused(tmp_path):
    def run(lr):
        adversarial(begun(), **SETTINGS, checkpoint=tmp_path, optimizer=partial(Adam, lr=lr))

    run(1e-3)
    run(1e-3)
    with pytest.raises(
        ValueError, match=r"optimizer\.groups\[0\]\.lr=0\.01: the run .* had 0\.001"
    ):
        run(1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.2}, r"lr=0.2: the run in this checkpoint folder had 0.1"),
        ({"epochs": 2}, r"epochs=2: the run in this checkpoint folder has 3 already"),
        ({"seed": 5}, r"seed=5: the run"),
        ({"data": blobs(30)}, r"data\.samples=30: the run .* had 60"),
        ({"eps": 0.2}, r"attack\.eps=0\.2: the run .* had 0\.1"),
        ({"objective": "mart"}, r"objective='mart': the run"),
        ({"augment": halved}, r"augment=.*halved.*: the run .* had None"),
        ({"optimizer": Adam}, r"optimizer\.class='Adam': the run .* had 'SGD"),
    ],
)
def test_going_on_with_other_settings_is_refused(change, message, tmp_path):
    adversarial(begun(), **SETTINGS, checkpoint=tmp_path)
    with pytest.raises(ValueError, match=message):
        adversarial(begun(), **(SETTINGS | {"checkpoint": tmp_path} | change))


def test_a_checkpoint_that_is_no_folder_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match=r"checkpoint=.*this is a file"):
        af.fit(dropping(), blobs(), epochs=1, checkpoint=file)
    with pytest.raises(TypeError, match="checkpoint=5"):
        af.fit(dropping(), blobs(), epochs=1, checkpoint=5)


# --- SIGTERM ---

PROGRAM = textwrap.dedent(
    """
    import os, signal, sys
    sys.path.insert(0, sys.argv[1])
    import torch
    torch.set_num_threads(1)
    from test_checkpoint import RUNS, SETTINGS, begun

    def on_step(row):
        if row["step"] == int(sys.argv[4]):
            os.kill(os.getpid(), signal.SIGTERM)

    train, settings = RUNS[sys.argv[3]]
    train(begun(), **SETTINGS, **settings, checkpoint=sys.argv[2], on_step=on_step)
    print("not killed")
    """
)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "step"), [("noisy", 6)])
def test_sigterm_saves_the_middle_of_an_epoch_and_ends_the_process(kind, step, tmp_path, request):
    folder = tmp_path / "run"
    here = str(request.path.parent)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, here, str(folder), kind, str(step)],
        check=False,
        capture_output=True,
        text=True,
        cwd=request.config.rootpath,
    )
    assert done.returncode == -signal.SIGTERM, done.stderr
    saved = torch.load(folder / "last.pt", weights_only=True)
    assert (saved["epoch"], saved["batches"], saved["step"]) == (1, 2, 6)
    train, settings = RUNS[kind]
    whole = begun()
    expected = train(whole, **SETTINGS, **settings)
    other, steps = dropping(), []
    found = train(
        other,
        **SETTINGS,
        **settings,
        checkpoint=folder,
        on_step=lambda row: steps.append(row["step"]),
    )
    assert steps == list(range(7, 13))
    assert same(other.state_dict(), whole.state_dict())
    assert without_seconds(found) == without_seconds(expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_sigterm_in_the_middle_of_an_epoch_loses_nothing(kind, tmp_path):
    # The same within one process, whose own handler has the last word.
    train, settings = RUNS[kind]
    whole = begun()
    expected = train(whole, **SETTINGS, **settings)

    def handler(*_):
        raise Cut

    previous = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(Cut):
            train(
                begun(),
                **SETTINGS,
                **settings,
                checkpoint=tmp_path,
                on_step=lambda row: row["step"] == 6 and signal.raise_signal(signal.SIGTERM),
            )
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 6
    other = dropping()
    found = train(other, **SETTINGS, **settings, checkpoint=tmp_path)
    assert same(other.state_dict(), whole.state_dict())
    assert without_seconds(found) == without_seconds(expected)


def test_the_last_look_of_an_epoch_is_not_lost_by_sigterm_after_its_last_step(tmp_path):
    def ended(row):
        if row["step"] == 8:
            signal.raise_signal(signal.SIGTERM)

    def handler(*_):
        raise Cut

    settings, folders = SETTINGS | {"epochs": 2, "method": "fast"}, [tmp_path / n for n in "ab"]
    adversarial(begun(), **settings, checkpoint=folders[0])
    previous = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(Cut):
            adversarial(begun(), **settings, checkpoint=folders[1], on_step=ended)
    finally:
        signal.signal(signal.SIGTERM, previous)
    adversarial(dropping(), **settings, checkpoint=folders[1])
    whole, found = (torch.load(folder / "last.pt", weights_only=True) for folder in folders)
    assert same(*(state["guard"]["good"]["raw"]["state"] for state in (found, whole)))


def test_a_schedule_in_parts_is_resumed(tmp_path):
    def schedule(o):
        parts = [LambdaLR(o, lambda e: 0.5 + 0.5 * e), CosineAnnealingLR(o, 2)]
        return SequentialLR(o, parts, [1])

    rates = {"whole": [], "cut": []}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of SequentialLR
        for name, folder in (("whole", None), ("cut", tmp_path)):
            settings = SETTINGS | {"schedule": schedule, "checkpoint": folder}
            if folder is not None:
                with pytest.raises(Cut):
                    af.fit(begun(), blobs(), **settings, on_step=cut_at(6))
            history = af.fit(begun(), blobs(), **settings)
            rates[name] = [row["lr"] for row in history.rows]
    assert rates["whole"] == rates["cut"]


def test_sigterm_while_the_last_epoch_is_measured_is_not_lost(tmp_path):
    heard, steps, model = [], [], dropping()

    def kill(module, *_):
        if len(steps) == SAMPLES / 15 and not module.training:
            os.kill(os.getpid(), signal.SIGTERM)

    model.register_forward_hook(kill)
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("SIGTERM"))
    try:
        settings = SETTINGS | {"epochs": 1, "validation": blobs(9), "checkpoint": tmp_path}
        standard(model, **settings, on_step=steps.append)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard
    assert torch.load(tmp_path / "last.pt", weights_only=True)["finished"]


def test_sigterm_does_not_save_broken_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("advfeat.training._resume._SAVE_EVERY", 0.0)

    def on_step(row):
        if row["step"] == 6:
            with torch.no_grad():
                model[0].weight.fill_(torch.nan)
            os.kill(os.getpid(), signal.SIGTERM)

    model = dropping()
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with pytest.raises(FloatingPointError, match="step 6"):
            standard(model, **SETTINGS, checkpoint=tmp_path, on_step=on_step)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["epoch"] == 1


def test_a_run_that_is_out_of_patience_is_over_though_killed_as_it_says_so(tmp_path):
    def cut(row):
        if row["epoch"] == 2:
            raise Cut

    still = {"lr": 1e-12, "validation": blobs(9), "options": Options(patience=1)}
    settings = SETTINGS | still | {"checkpoint": tmp_path}
    with pytest.raises(Cut):
        standard(dropping(), **settings, on_epoch=cut)
    assert len(standard(dropping(), **settings).rows) == 2


def test_going_on_with_another_schedule_is_refused(tmp_path):
    standard(dropping(), **SETTINGS, checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"schedule='one_cycle': the run .* had 'default'"):
        standard(dropping(), **SETTINGS, checkpoint=tmp_path, schedule="one_cycle")


@pytest.mark.parametrize(
    ("seconds", "on_epoch", "written"), [(1e9, None, 2), (0.0, None, 5), (1e9, lambda row: None, 5)]
)
def test_short_epochs_are_not_all_saved(seconds, on_epoch, written, tmp_path, monkeypatch):
    """The first state and the last always; between them where the last one is old."""
    monkeypatch.setattr("advfeat.training._resume._SAVE_EVERY", seconds)
    saved = []
    monkeypatch.setattr(torch, "save", lambda state, file, real=torch.save: (
        saved.append(state["epoch"]), real(state, file)
    ))  # fmt: skip
    af.fit(dropping(), blobs(), epochs=4, seed=0, checkpoint=tmp_path / "run", on_epoch=on_epoch)
    assert len(saved) == written
    assert (saved[0], saved[-1]) == (0, 4)
