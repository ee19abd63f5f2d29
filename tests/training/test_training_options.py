"""What training can do besides: averages, perturbed weights, stopping, formats, records."""

import copy
import csv
import errno
import json
import os
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import advfeat as af
from advfeat.attacks import Square
from advfeat.training import History, Options, crop_flip


def blobs(count=60, classes=3):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(count) % classes
    return TensorDataset(
        0.8 * F.one_hot(y, classes) + 0.2 * torch.rand(count, classes, generator=generator), y
    )


def linear():
    torch.manual_seed(0)
    return nn.Linear(3, 3)


def normed():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 3)
    )


def images(count=24):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(count) % 3
    x = 0.3 * torch.rand(count, 3, 8, 8, generator=generator)
    x[torch.arange(count), y] += 0.5
    return TensorDataset(x, y)


def assert_close_weights(model, twin, **tolerance):
    for name, tensor in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, **tolerance)


def assert_same_weights(model, twin):
    for name, tensor in twin.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def steps_by_hand(twin, batches, after=lambda: None, **sgd):
    optimizer = torch.optim.SGD(twin.train().parameters(), **sgd)
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        optimizer.step()
        after()
    return twin


SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}


# --- The average of the weights ---


def test_the_average_is_that_of_the_weights_after_each_step():
    model, rows = linear(), list(DataLoader(blobs(), batch_size=10))
    af.fit(model, rows, epochs=1, options=Options(ema=0.3))
    twin, path = linear(), []
    start = twin.weight.detach().clone()
    steps_by_hand(twin, rows, lambda: path.append(twin.weight.detach().clone()), **SGD)
    average = start
    for step, weight in enumerate(path, 1):
        decay = min(0.3, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(model.weight.detach(), average)


def test_the_average_has_batchnorm_statistics_of_its_own():
    model, rows = normed(), list(DataLoader(blobs(), batch_size=10))
    af.fit(model, rows, epochs=1, options=Options(ema=0.9))
    twin, own = normed(), normed()
    seen = iter(rows)
    step = 0

    def after():
        nonlocal step
        step += 1
        decay = min(0.9, (1 + step) / (10 + step))
        with torch.no_grad():
            for mine, its in zip(own.parameters(), twin.parameters(), strict=True):
                mine.copy_(decay * mine + (1 - decay) * its)
            own.train()(next(seen)[0])

    steps_by_hand(twin, rows, after, **SGD)
    assert_close_weights(model, own)
    assert not torch.allclose(own[1].running_mean, twin[1].running_mean)


def test_a_frozen_batchnorm_stays_frozen_in_the_average():
    model = normed()
    model.train()
    model[1].eval()
    before = model[1].running_mean.clone()
    af.fit(model, blobs(), epochs=1, options=Options(ema=0.9))
    assert torch.equal(model[1].running_mean, before)


class Counting(nn.Module):
    """A buffer that is no BatchNorm's."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.calls += 1
        return x


def test_the_average_has_the_other_buffers_of_the_model():
    model = nn.Sequential(Counting(), nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    af.fit(model, blobs(50), epochs=2, batch_size=25, options=Options(ema=0.5), seed=0)
    assert model[0].calls == 4


def test_validation_measures_the_average():
    model, held = normed(), blobs(30)
    history = af.fit(
        model, blobs(), epochs=2, batch_size=10, validation=held, options=Options(ema=0.99), seed=0
    )
    assert history.rows[-1]["val_accuracy"] == af.accuracy(model, held)


# --- Perturbed weights, clipping, accumulation ---


def test_perturbed_weights_are_where_the_gradient_is_taken():
    model, twin = normed(), normed()
    x, y = blobs().tensors
    af.fit(model, [(x, y)], epochs=1, options=Options(awp=0.1))
    twin.train()
    probe = copy.deepcopy(twin)
    F.cross_entropy(probe(x), y).backward()
    moved = copy.deepcopy(twin)
    with torch.no_grad():
        for p, g in zip(moved.parameters(), probe.parameters(), strict=True):
            if p.ndim > 1:
                p += 0.1 * p.norm() * g.grad / g.grad.norm()
    F.cross_entropy(moved(x), y).backward()
    optimizer = torch.optim.SGD(twin.parameters(), **SGD)
    for p, g in zip(twin.parameters(), moved.parameters(), strict=True):
        p.grad = g.grad
    optimizer.step()
    twin[1].load_state_dict(dict(twin[1].named_parameters()) | dict(moved[1].named_buffers()))
    # Statistics counted once, and the weights are back where they were before the step.
    assert model[1].num_batches_tracked == 1
    assert_close_weights(model, twin)


def test_long_gradients_are_shortened_to_the_norm_given():
    model, before = linear(), linear()
    still = torch.optim.SGD(model.parameters(), lr=1.0)
    af.fit(model, [blobs().tensors], epochs=1, optimizer=still, options=Options(clip_norm=1e-3))
    pairs = zip(model.parameters(), before.parameters(), strict=True)
    moved = torch.cat([(p - q).flatten() for p, q in pairs])
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("objective", ["pgd", "trades"])
def test_accumulated_parts_give_the_whole_batchs_step(objective):
    models = [linear(), linear()]
    for model, parts in zip(models, (1, 4), strict=True):
        af.adversarial_fit(
            model,
            blobs(50),
            eps=0.1,
            norm="l2",
            random_start=True,
            objective=objective,
            epochs=2,
            batch_size=18,
            seed=1,
            options=Options(accumulate=parts),
        )
    assert_close_weights(models[1], models[0], rtol=0, atol=1e-6)


def test_accumulation_sends_no_more_samples_than_a_part_through_the_model():
    model, sizes = linear(), []
    model.register_forward_pre_hook(lambda m, x: sizes.append(len(x[0])) if m.training else None)
    af.fit(model, blobs(50), epochs=1, batch_size=25, options=Options(accumulate=3), seed=0)
    assert sizes == [9, 8, 8, 9, 8, 8]


def test_samples_left_over_are_not_split_further_than_a_whole_batch():
    model, sizes = nn.Sequential(nn.BatchNorm1d(3), linear()), []
    model.register_forward_pre_hook(lambda m, x: sizes.append(len(x[0])) if m.training else None)
    af.fit(model, blobs(19), epochs=1, batch_size=8, options=Options(accumulate=2), seed=0)
    assert sizes == [4, 4, 4, 4, 3]


# --- Validation and stopping ---


def test_a_share_of_a_dataset_is_split_off_for_validation():
    model, seen = linear(), []
    model.register_forward_pre_hook(lambda m, inputs: seen.append((m.training, inputs[0].clone())))
    af.fit(model, blobs(50), epochs=2, validation=0.2, batch_size=8, seed=3)
    trained = torch.cat([x for training, x in seen if training])
    measured = torch.cat([x for training, x in seen if not training])
    assert len(trained) == 2 * 40
    # Some samples of the training part are seen too: those that the model is inspected on.
    both = torch.cat([trained[:40], measured])
    assert len(trained[:40].unique(dim=0)) == 40
    assert len(both.unique(dim=0)) == 50
    assert torch.equal(trained[:40].sort(0).values, trained[40:].sort(0).values)


@pytest.mark.parametrize(
    ("data", "share", "message"),
    [
        (DataLoader(blobs()), 0.1, "only a dataset can be split"),
        ([blobs().tensors], 0.1, "only a dataset can be split"),
        (blobs(), 0.001, "leaves 0 of 60 samples"),
        (blobs(), 1.0, "leaves 60 of 60 samples"),
        (blobs(), 10.0, "fraction, not a percentage"),
    ],
)
def test_what_cannot_be_split_is_refused(data, share, message):
    with pytest.raises(ValueError, match=f"validation={share}.*{message}"):
        af.fit(linear(), data, epochs=1, validation=share)


def test_patience_ends_training_and_leaves_the_best_epoch():
    model, held = linear(), blobs(30)
    states = []

    def worse(optimizer):
        # Good at first; then each epoch goes further wrong.
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 if epoch < 2 else -3)

    history = af.fit(
        model,
        blobs(),
        epochs=50,
        schedule=worse,
        validation=held,
        options=Options(patience=3),
        on_epoch=lambda _: states.append(copy.deepcopy(model.state_dict())),
        seed=0,
    )
    figures = [row["val_accuracy"] for row in history.rows]
    assert history.best == 1 + figures.index(max(figures))
    assert len(history.rows) == history.best + 3 < 50
    assert all(torch.equal(states[history.best - 1][k], v) for k, v in model.state_dict().items())


def test_patience_without_validation_is_refused():
    with pytest.raises(ValueError, match="patience=2: needs validation"):
        af.fit(linear(), blobs(), epochs=1, options=Options(patience=2))


# --- Formats and precision ---


def test_channels_last_is_for_training_alone():
    model, formats = convolutional(), []
    strides = [p.stride() for p in model.parameters()]
    model.register_forward_pre_hook(
        lambda m, x: formats.append(x[0].is_contiguous(memory_format=torch.channels_last))
    )
    af.fit(model, images(), epochs=1, seed=0)
    assert all(formats)
    assert [p.stride() for p in model.parameters()] == strides


def test_bfloat16_is_the_precision_of_the_model_not_of_the_weights():
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no bfloat16")
    models, dtypes = [convolutional(), convolutional()], []
    models[0][0].register_forward_hook(
        lambda m, _, output: dtypes.append((m.training, output.dtype))
    )
    for model, precision in zip(models, ("bfloat16", "float32"), strict=True):
        af.adversarial_fit(
            model, images(), eps=0.05, norm="linf", epochs=4, lr=0.02, precision=precision, seed=0
        )
    trained = {dtype for training, dtype in dtypes if training}
    attacked = [dtype for training, dtype in dtypes if not training]
    assert trained == {torch.bfloat16}
    assert torch.bfloat16 in attacked[1:]
    assert all(p.dtype == torch.float32 for p in models[0].parameters())
    assert_close_weights(*models, rtol=0, atol=5e-3)
    with pytest.raises(AssertionError):
        assert_same_weights(*models)


@pytest.mark.slow
def test_a_compiled_model_learns_the_same(monkeypatch):
    # The compiler itself is torch's own; what it is given, and that the result is used, is ours.
    compiled = []

    def eager(module):
        compiled.append(module)
        return torch._dynamo.optimize("eager")(module)

    monkeypatch.setattr(torch, "compile", eager)
    models = [convolutional(), convolutional()]
    for model, compile_it in zip(models, (True, False), strict=True):
        af.adversarial_fit(
            model,
            images(),
            eps=0.05,
            norm="linf",
            epochs=2,
            steps=2,
            batch_size=12,
            options=Options(compile=compile_it),
            seed=0,
        )
    assert compiled == [models[0]]
    assert_close_weights(*models)


# --- Records and callbacks ---


def test_on_step_hears_of_every_step():
    heard = []
    history = af.fit(
        linear(), blobs(), epochs=2, batch_size=30, on_step=heard.append, on_epoch=None, seed=0
    )
    assert [(row["epoch"], row["step"]) for row in heard] == [(1, 1), (1, 2), (2, 3), (2, 4)]
    assert set(heard[0]) == {"epoch", "step", "loss", "accuracy", "lr"}
    mean = (heard[0]["loss"] + heard[1]["loss"]) / 2
    assert history.rows[0]["loss"] == pytest.approx(mean, rel=1e-6)


def test_a_small_learning_rate_is_not_printed_as_zero():
    assert "2.0e-05" in str(History([{"epoch": 1, "lr": 2e-5}]))


def test_a_history_is_saved_as_csv_and_json(tmp_path):
    history = af.fit(linear(), blobs(), epochs=2, validation=0.2, seed=0)
    history.save(tmp_path / "history.csv")
    history.save(str(tmp_path / "history.json"))
    with (tmp_path / "history.csv").open() as file:
        read = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert read == history.rows
    found = json.loads((tmp_path / "history.json").read_text())
    assert History(found["rows"], found["best"]) == history
    with pytest.raises(ValueError, match=r"history.txt.*csv or .json"):
        history.save(tmp_path / "history.txt")


@pytest.mark.parametrize("name", ["h.csv", "h.json"])
def test_a_history_that_is_not_written_whole_leaves_the_one_before(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    History([{"epoch": 1, "loss": 0.5}]).save(f"~/{name}")
    before = (tmp_path / name).read_text()

    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device, while {name!r} was written"):
        History([{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.4}]).save(f"~/{name}")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == before


def test_a_history_is_plotted():
    history = af.fit(linear(), blobs(), epochs=2, validation=0.2, seed=0)
    loss, accuracies = history.plot()
    assert loss.lines[0].get_ydata().tolist() == [row["loss"] for row in history.rows]
    labels = [line.get_label() for line in accuracies.lines]
    assert labels == ["accuracy", "validation accuracy"]


def test_without_matplotlib_a_plot_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)  # of other tests
    with pytest.raises(ImportError, match=r"advfeat\[plots\]"):
        History([{"epoch": 1, "loss": 0.5}]).plot()


def test_the_bar_shows_losses_accuracies_and_images(capsys, monkeypatch):
    monkeypatch.setattr("advfeat.training._progress._SECONDS", 0.0)
    for interval in ("_ASKED", "_EVERY"):
        monkeypatch.setattr(f"advfeat.progress.{interval}", 0.0)
    model, twin = normed(), normed()
    settings = {"eps": 0.1, "norm": "l2", "epochs": 2, "batch_size": 20, "seed": 0}
    af.adversarial_fit(model, blobs(), progress=True, **settings)
    shown = capsys.readouterr().err
    assert "/120 " in shown
    assert "img/s" in shown
    assert all(f"{name}=" in shown for name in ("loss", "clean", "robust"))
    af.adversarial_fit(twin, blobs(), progress=False, **settings)
    assert_same_weights(model, twin)


# --- Augmentation ---


def test_crop_flip_gives_windows_of_the_padded_image_some_of_them_mirrored():
    torch.manual_seed(0)
    image = torch.rand(1, 2, 6, 5)
    padded = F.pad(image, (2, 2, 2, 2))
    windows = {}
    for down in range(5):
        for right in range(5):
            window = padded[0, :, down : down + 6, right : right + 5]
            windows[(down, right, False)] = window
            windows[(down, right, True)] = window.flip(2)
    found = set()
    for cropped in crop_flip(image.expand(2000, -1, -1, -1), padding=2):
        found |= {key for key, window in windows.items() if torch.equal(window, cropped)}
    assert found == set(windows)


def test_crop_flip_keeps_dtype_and_refuses_what_is_no_image_batch():
    assert crop_flip(torch.rand(2, 1, 4, 4, dtype=torch.float64), 1).dtype == torch.float64
    with pytest.raises(ValueError, match=r"images=\(3, 8, 8\)"):
        crop_flip(torch.rand(3, 8, 8))


def test_augmentation_follows_from_the_seed_and_leaves_the_global_state():
    models = [convolutional() for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        torch.rand(seed)
        state = torch.get_rng_state()
        af.fit(model, [images().tensors], epochs=2, augment=crop_flip, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
    assert_same_weights(models[0], models[1])
    assert not torch.equal(models[0][0].weight, models[2][0].weight)


# --- Refusals ---


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"ema": 1.0}, ValueError, "ema=1.0: the average would never move"),
        ({"ema": -0.1}, ValueError, "ema=-0.1"),
        ({"awp": -1.0}, ValueError, "awp=-1.0"),
        ({"clip_norm": 0.0}, ValueError, "clip_norm=0.0"),
        ({"label_smoothing": 10}, ValueError, "label_smoothing=10"),
        ({"accumulate": 0}, ValueError, "accumulate=0"),
        ({"compile": "yes"}, TypeError, "compile='yes'"),
        ({"patience": 0}, ValueError, "patience=0"),
    ],
)
def test_bad_options_are_refused(bad, error, message):
    with pytest.raises(error, match=message):
        Options(**bad)


def test_options_of_another_type_are_refused():
    with pytest.raises(TypeError, match=r"options=.*expected advfeat.training.Options"):
        af.fit(linear(), blobs(), epochs=1, options={"ema": 0.9})


def test_an_augmentation_that_leaves_the_box_is_refused_in_the_first_batch():
    with pytest.raises(ValueError, match=r"augment=.*outside bounds"):
        af.adversarial_fit(
            linear(), blobs(), eps=0.1, norm="l2", epochs=1, augment=lambda x: 4 * x - 2
        )


def test_an_attack_that_training_cannot_drive_is_refused():
    attack = Square(eps=0.1, norm="linf")
    with pytest.raises(TypeError, match=r"attack=Square.*PGD or FGSM"):
        af.adversarial_fit(linear(), blobs(), attack=attack, epochs=1)
