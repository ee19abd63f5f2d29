"""What people do with `fit` in practice: schedules, optimisers, loaders, labels, signals."""

import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter

import combinations
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from combinations import SAM, Lookahead, ScheduleFree
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import advfeat as af
from advfeat.checks import ResultWarning
from advfeat.distributed import SINGLE
from advfeat.training import Options
from advfeat.training._batch_checks import BatchChecks
from advfeat.training._batches import BatchReader

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.step", "ignore:The epoch parameter")


def blobs(count=60, classes=3):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(count) % classes
    x = 0.8 * F.one_hot(y, classes) + 0.2 * torch.rand(count, classes, generator=generator)
    return TensorDataset(x, y)


def linear():
    torch.manual_seed(0)
    return nn.Linear(3, 3)


def normed():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(model, expected):
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def assert_close(model, expected, **tolerance):
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], **tolerance)


# --- Schedules ---


def rates(schedule, *, epochs=4, batch_size=6, model=None, **options):
    """Rate of every step: 10 steps an epoch."""
    model, found = linear() if model is None else model, []
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.register_step_pre_hook(lambda o, *_: found.append(o.param_groups[0]["lr"]))
    af.fit(
        model,
        options.pop("data", blobs()),
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer,
        schedule=schedule,
        seed=0,
        **options,
    )
    return found


def cosine_with_warmup(optimizer, warmup=5, total=40):
    """As in transformers."""

    def factor(step):
        if step < warmup:
            return step / warmup
        return 0.5 * (1 + np.cos(np.pi * (step - warmup) / (total - warmup)))

    return LambdaLR(optimizer, factor)


STEPPED = {
    "one cycle": lambda o: OneCycleLR(o, 0.1, total_steps=40),
    "cyclic": lambda o: CyclicLR(o, 0.01, 0.1, step_size_up=5),
    "one cycle in parts": lambda o: SequentialLR(
        o, [LinearLR(o, total_iters=5), OneCycleLR(o, 0.1, total_steps=40)], [5]
    ),
    "one cycle chained": lambda o: ChainedScheduler([OneCycleLR(o, 0.1, total_steps=40)]),
    "lambda warm-up": lambda o: LambdaLR(o, lambda step: min(1.0, (step + 1) / 20)),
    "transformers": cosine_with_warmup,
    "linear warm-up": lambda o: LinearLR(o, 0.1, total_iters=20),
    "warm-up and cosine": lambda o: SequentialLR(
        o, [LinearLR(o, 0.01, total_iters=10), CosineAnnealingLR(o, 30)], [10]
    ),
    "cosine over all steps": lambda o: CosineAnnealingLR(o, 40),
}
EVERY_EPOCH = {
    "steps": lambda o: StepLR(o, 2, 0.5),
    "milestones": lambda o: MultiStepLR(o, [2]),
    "milestones that are never reached": lambda o: MultiStepLR(o, [30]),
    "cosine": lambda o: CosineAnnealingLR(o, 4),
    "exponential": lambda o: ExponentialLR(o, 0.9),
    "lambda": lambda o: LambdaLR(o, lambda epoch: 0.5**epoch),
    "warm-up over epochs": lambda o: LambdaLR(o, lambda epoch: min(1.0, (epoch + 1) / 3)),
    "constant": lambda o: ConstantLR(o, 0.5, total_iters=2),
}


@pytest.mark.parametrize("name", STEPPED)
def test_a_schedule_over_steps_is_recognised(name):
    schedule = STEPPED[name]
    found = rates(schedule)
    assert found == pytest.approx(rates(schedule, schedule_every="step"))
    assert len(set(np.round(found[:5], 8))) == 5  # it moves within the first epoch
    assert max(found) >= 0.09


@pytest.mark.parametrize("name", EVERY_EPOCH)
def test_a_schedule_over_epochs_stays_one(name):
    schedule = EVERY_EPOCH[name]
    found = rates(schedule)
    assert found == pytest.approx(rates(schedule, schedule_every="epoch"))
    assert all(len(set(found[k : k + 10])) == 1 for k in range(0, 40, 10))


def test_schedule_every_has_the_last_word():
    found = rates(lambda o: StepLR(o, 1, 0.5), epochs=1, schedule_every="step")
    assert found == pytest.approx([0.1 * 0.5**k for k in range(10)])
    with pytest.raises(ValueError, match="schedule_every='batch'"):
        rates(lambda o: StepLR(o, 1), schedule_every="batch")
    with pytest.raises(ValueError, match="schedule_every='step': ReduceLROnPlateau"):
        rates(lambda o: ReduceLROnPlateau(o), schedule_every="step")


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_plateau_schedule_gets_the_validation_figure(mode):
    # A model that does not learn: its figure never improves, so each epoch cuts the rate.
    model = linear()
    model.weight.data.zero_()
    schedule = lambda o: ReduceLROnPlateau(o, mode, factor=0.5, patience=0)  # noqa: E731
    held = TensorDataset(torch.zeros(6, 3), torch.arange(6) % 3)
    found = rates(
        schedule,
        model=model,
        validation=held,
        data=TensorDataset(torch.zeros(60, 3), blobs().tensors[1]),
    )
    assert found[::10] == pytest.approx([0.1, 0.1, 0.05, 0.025])
    # And one that does: validation rises from epoch to epoch, or stays at 1 within the threshold.
    learned = rates(schedule, epochs=2, validation=blobs(30))
    assert learned[10] == 0.1


def test_what_on_epoch_changes_is_saved(tmp_path):
    def run(folder, stop=None):
        model = linear()
        optimizer = SGD(model.parameters(), lr=0.1)
        heard = []

        def on_epoch(row):
            heard.append(row["lr"])
            if row["epoch"] == 2:
                optimizer.param_groups[0]["lr"] *= 0.5
                with torch.no_grad():
                    model.bias.zero_()

        def on_step(row):
            if row["step"] == stop:
                raise KeyboardInterrupt

        flat = MultiStepLR(optimizer, [99])
        settings = {"epochs": 4, "batch_size": 30, "seed": 0, "schedule": flat}
        try:
            af.fit(
                model, blobs(), optimizer=optimizer, **settings,
                checkpoint=folder, on_epoch=on_epoch, on_step=on_step,
            )  # fmt: skip
        except KeyboardInterrupt:
            return None
        return heard, weights(model)

    whole = run(None)
    assert run(tmp_path, stop=5) is None
    heard, found = run(tmp_path)
    assert heard == whole[0][2:] == [0.05, 0.05]
    assert all(torch.equal(found[name], value) for name, value in whole[1].items())


class Longer(IterableDataset):
    """Gives more batches than its length says."""

    def __len__(self):
        return 40

    def __iter__(self):
        x, y = blobs().tensors
        return ((x[i], y[i]) for i in range(60))


@pytest.mark.filterwarnings("ignore:Length of IterableDataset")
@pytest.mark.parametrize(
    "schedule",
    [
        "one_cycle",
        lambda o: OneCycleLR(o, 0.1, total_steps=8),
        lambda o: SequentialLR(
            o, [LinearLR(o, total_iters=2), OneCycleLR(o, 0.1, total_steps=6)], [2]
        ),
    ],
)
def test_a_loader_that_is_longer_than_its_length_trains_on(schedule, tmp_path):
    loader = DataLoader(Longer(), batch_size=10)
    steps = []
    history = af.fit(
        linear(),
        loader,
        epochs=2,
        schedule=schedule,
        on_step=steps.append,
        checkpoint=tmp_path,
        seed=0,
    )
    assert len(steps) == 12
    assert len(history.rows) == 2
    assert (
        af.fit(linear(), loader, epochs=2, schedule=schedule, checkpoint=tmp_path, seed=0)
        == history
    )


# --- Optimisers ---


def test_a_schedule_free_optimizer_is_measured_and_left_in_evaluation_mode():
    model, by_hand, rows = linear(), linear(), list(DataLoader(blobs(), 10))
    optimizer = ScheduleFree(model.parameters())
    held = blobs(30)
    history = af.fit(
        model,
        rows,
        epochs=2,
        optimizer=optimizer,
        schedule=lambda o: MultiStepLR(o, [9]),
        validation=held,
    )
    twin = ScheduleFree(by_hand.parameters())
    for _ in range(2):
        twin.train()
        for x, y in rows:
            twin.zero_grad()
            F.cross_entropy(by_hand(x), y).backward()
            twin.step()
        twin.eval()
    assert_close(model, weights(by_hand))
    assert not optimizer.param_groups[0]["train_mode"]
    assert history.rows[-1]["val_accuracy"] == af.accuracy(by_hand, held)


def test_a_schedule_free_checkpoint_in_mid_epoch_holds_the_weights_to_use(tmp_path):
    model = linear()

    def stop(row):
        if row["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        af.fit(
            model,
            blobs(),
            epochs=2,
            batch_size=10,
            optimizer=ScheduleFree,
            checkpoint=tmp_path,
            on_step=stop,
            seed=0,
        )
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    twin = linear()
    order = BatchReader(
        blobs(), batch_size=10, seed=0, device=torch.device("cpu"), process=SINGLE,
        checked=BatchChecks((-9.0, 9.0)), weight_field=None,
    ).epoch(1)  # fmt: skip
    optimizer = ScheduleFree(twin.parameters())
    optimizer.train()
    for batch, _ in zip(order, range(3), strict=False):
        optimizer.zero_grad()
        F.cross_entropy(twin(batch.inputs), batch.labels).backward()
        optimizer.step()
    optimizer.eval()
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(saved["model"][name], value)


def test_lbfgs_gets_its_closure():
    model, by_hand, (x, y) = linear(), linear(), blobs().tensors
    af.fit(
        model, [(x, y)], epochs=3, optimizer=lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=4),
        schedule=lambda o: MultiStepLR(o, [9]),
    )  # fmt: skip
    twin = torch.optim.LBFGS(by_hand.parameters(), lr=0.5, max_iter=4)

    def closure():
        twin.zero_grad()
        loss = F.cross_entropy(by_hand(x), y)
        loss.backward()
        return loss

    for _ in range(3):
        twin.step(closure)
    assert_close(model, weights(by_hand))


class Quiet(SAM):
    """A SAM that says only in its step that it needs a closure."""

    def step(self, closure=None):
        if closure is None:
            raise RuntimeError("a closure is required")
        self.up()
        with torch.enable_grad():
            closure()
        self.down()

    def up(self):
        SAM.first_step(self, zero_grad=True)

    def down(self):
        SAM.second_step(self)

    first_step = second_step = None


@pytest.mark.parametrize("kind", [SAM, Quiet])
def test_sam_climbs_and_descends(kind):
    model, by_hand, rows = linear(), linear(), list(DataLoader(blobs(), 10))
    af.fit(model, rows, epochs=1, optimizer=kind, schedule=lambda o: MultiStepLR(o, [9]))
    twin = SAM(by_hand.parameters())
    for x, y in rows:
        twin.zero_grad()
        F.cross_entropy(by_hand(x), y).backward()
        twin.first_step(zero_grad=True)
        F.cross_entropy(by_hand(x), y).backward()
        twin.second_step(zero_grad=True)
    assert_close(model, weights(by_hand))


def awp(model):
    af.fit(model, blobs(), epochs=1, optimizer=SAM, options=Options(awp=0.01))


def free(model):
    settings = {"eps": 0.1, "norm": "l2", "epochs": 1, "method": "free"}
    af.adversarial_fit(model, blobs(), optimizer=torch.optim.LBFGS, **settings)


@pytest.mark.parametrize("run", [awp, free])
def test_a_closure_that_would_be_another_loss_is_refused_before_any_work(run):
    model, calls = linear(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match="closure"):
        run(model)
    assert not calls


def test_lookahead_keeps_its_slow_weights(tmp_path):
    make = lambda p: Lookahead(SGD(p, lr=0.1))  # noqa: E731
    af.fit(linear(), blobs(), epochs=1, batch_size=10, optimizer=make, checkpoint=tmp_path, seed=0)
    assert "slow" in torch.load(tmp_path / "last.pt", weights_only=True)["learned"]["optimizer"]


# --- Losses, weights, soft labels ---


def descended(batches, loss, epochs=1):
    model = linear()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for _ in range(epochs):
        for batch in batches:
            optimizer.zero_grad()
            loss(model, *batch).backward()
            optimizer.step()
    return weights(model)


def focal(logits, labels):
    right = logits.softmax(1).gather(1, labels[:, None]).squeeze(1)
    return (1 - right) ** 2 * F.cross_entropy(logits, labels, reduction="none")


def test_a_loss_of_ones_own():
    model, rows = linear(), list(DataLoader(blobs(), 10))
    history = af.fit(model, rows, epochs=1, loss=focal)
    assert_close(model, descended(rows, lambda m, x, y: focal(m(x), y).mean()))
    assert history.rows[0]["loss"] > 0
    for bad, message in (
        (nn.CrossEntropyLoss(), "reduction='none'"),
        (lambda z, y: F.cross_entropy(z, y), "one value for each sample"),
        ("focal", "expected a callable"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            af.fit(linear(), rows, epochs=1, loss=bad)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_class_weights_are_those_of_torch(accumulate):
    weight = torch.tensor([1.0, 3.0, 0.5])
    model, rows = linear(), list(DataLoader(blobs(), 14))
    options = Options(class_weights=[1.0, 3.0, 0.5], accumulate=accumulate)
    history = af.fit(model, rows, epochs=1, options=options)
    assert_close(model, descended(rows, lambda m, x, y: F.cross_entropy(m(x), y, weight)))
    assert history.rows[0]["loss"] > 0
    with pytest.raises(ValueError, match=r"class_weights=2: the model has 3 classes"):
        af.fit(linear(), rows, epochs=1, options=Options(class_weights=[1.0, 2.0]))


@pytest.mark.parametrize("kind", ["mapping", "tuple"])
def test_sample_weights_are_a_field_of_the_batch(kind):
    (x, y), w = blobs().tensors, torch.rand(60, generator=torch.Generator().manual_seed(1))
    batches = list(zip(x.split(10), y.split(10), w.split(10), strict=True))
    given = [{"x": a, "y": b, "w": c} for a, b, c in batches] if kind == "mapping" else batches
    model = linear()
    af.fit(model, given, epochs=1, options=Options(sample_weight="w" if kind == "mapping" else 2))

    def loss(m, x, y, w):
        return (w * F.cross_entropy(m(x), y, reduction="none")).sum() / w.sum()

    assert_close(model, descended(batches, loss))
    with pytest.raises(ValueError, match="sample_weight='v': no such field"):
        af.fit(linear(), given, epochs=1, options=Options(sample_weight="v"))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -1.0])
def test_a_bad_weight_is_named_by_its_sample(wrong):
    x, y = blobs().tensors
    weights = torch.ones(len(x))
    weights[7] = wrong

    class Weighted(torch.utils.data.Dataset):
        def __len__(self):
            return len(x)

        def __getitem__(self, index):
            return x[index], y[index], weights[index]

    options = Options(sample_weight=2)
    with pytest.raises(ValueError, match=r"sample_weight\[7\]="):
        af.fit(normed(), Weighted(), epochs=1, seed=0, options=options)
    batches = [(x[:8], y[:8], weights[:8])]
    with pytest.raises(ValueError, match=r"sample_weight \(batch 1\)\[7\]="):
        af.fit(normed(), batches, epochs=1, seed=0, options=options)


def test_a_sample_without_weight_is_as_if_it_were_not_there():
    (x, y) = blobs().tensors
    w = (torch.arange(60) % 2).float()
    model, twin = linear(), linear()
    af.fit(model, [(x, y, w)], epochs=3, options=Options(sample_weight=2))
    af.fit(twin, [(x[1::2], y[1::2])], epochs=3)
    assert_close(model, weights(twin))


def test_a_batch_without_weight_is_passed_and_an_epoch_without_is_an_error():
    x, y = blobs().tensors
    first, rows, twin = linear(), [], linear()
    batches = [(x[:30], y[:30], torch.ones(30)), (x[30:], y[30:], torch.zeros(30))]
    plain = {"epochs": 1, "momentum": 0.0, "weight_decay": 0.0}
    found = af.fit(first, batches, **plain, options=Options(sample_weight=2), on_step=rows.append)
    expected = af.fit(twin, [(x[:30], y[:30])], **plain)
    assert_close(first, weights(twin))
    assert found.rows[0]["loss"] == pytest.approx(expected.rows[0]["loss"])
    assert math.isnan(rows[1]["loss"])
    with pytest.raises(ValueError, match="every sample of the epoch has a weight of 0"):
        af.fit(linear(), [(x, y)], epochs=1, options=Options(class_weights=[0.0, 0.0, 0.0]))


def mixup(x, y):
    soft = F.one_hot(y, 3).float()
    return 0.7 * x + 0.3 * x.flip(0), 0.7 * soft + 0.3 * soft.flip(0)


def test_soft_labels_of_the_batch_and_of_augment():
    rows = list(DataLoader(blobs(), 10))
    mixed = [mixup(x, y) for x, y in rows]
    expected = descended(mixed, lambda m, x, y: F.cross_entropy(m(x), y))
    model, other = linear(), linear()
    history = af.fit(model, mixed, epochs=1)
    assert (
        af.fit(other, rows, epochs=1, augment=mixup).rows[0]["accuracy"]
        == history.rows[0]["accuracy"]
    )
    assert_close(model, expected)
    assert_close(other, expected)
    for bad, message in (
        (torch.full((10, 3), 0.5), "sum 1.5"),
        (torch.full((10, 2), 0.5), r"labels\.shape=.*3 classes"),
        (torch.tensor([[1.5, -0.5, 0.0]]).expand(10, 3), "class probabilities"),
    ):
        with pytest.raises(ValueError, match=message):
            af.fit(linear(), [(rows[0][0], bad)], epochs=1)


@pytest.mark.parametrize("objective", ["pgd", "trades"])
def test_soft_labels_are_attacked_by_their_own_cross_entropy(objective):
    # Hard labels in another guise train the same model.
    rows = list(DataLoader(blobs(), 10))
    soft = [(x, F.one_hot(y, 3).float()) for x, y in rows]
    model, twin = linear(), linear()
    for m, data in ((model, soft), (twin, rows)):
        af.adversarial_fit(m, data, eps=0.1, norm="l2", epochs=2, objective=objective, seed=0)
    assert_close(model, weights(twin))


def test_mart_refuses_soft_labels():
    soft = [(blobs().tensors[0], F.one_hot(blobs().tensors[1], 3).float())]
    with pytest.raises(ValueError, match="MART"):
        af.adversarial_fit(linear(), soft, eps=0.1, norm="l2", epochs=1, objective="mart")


# --- More epochs, signals, locks ---


@pytest.mark.parametrize("schedule", [None, lambda o: StepLR(o, 2, 0.5), "one_cycle"])
def test_a_finished_run_is_trained_on_for_more_epochs(schedule, tmp_path):
    settings = {"batch_size": 10, "seed": 0, "checkpoint": tmp_path, "schedule": schedule}
    first = af.fit(linear(), blobs(), epochs=2, **settings)
    model = linear()
    history = af.fit(model, blobs(), epochs=5, **settings)
    assert [row["epoch"] for row in history.rows] == [1, 2, 3, 4, 5]
    assert history.rows[:2] == first.rows
    assert_same(model, torch.load(tmp_path / "last.pt", weights_only=True)["model"])
    if schedule not in (None, "one_cycle"):
        whole = linear()
        af.fit(whole, blobs(), epochs=5, batch_size=10, seed=0, schedule=schedule)
        assert_same(model, weights(whole))
    with pytest.raises(ValueError, match="epochs=3: the run in this checkpoint folder has 5"):
        af.fit(linear(), blobs(), epochs=3, **settings)


def test_a_run_in_its_middle_keeps_its_number_of_epochs_where_the_schedule_follows_from_it(
    tmp_path,
):
    def stop(row):
        if row["step"] == 8:
            raise KeyboardInterrupt

    settings = {"batch_size": 10, "seed": 0, "checkpoint": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        af.fit(linear(), blobs(), epochs=3, **settings, on_step=stop)
    with pytest.raises(ValueError, match=r"epochs=6: .* had 3, and its schedule follows from that"):
        af.fit(linear(), blobs(), epochs=6, **settings)


def test_ctrl_c_saves_the_middle_of_an_epoch(tmp_path):
    def stop(row):
        if row["step"] == 8:
            signal.raise_signal(signal.SIGINT)

    settings = {"epochs": 3, "batch_size": 10, "seed": 0}
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        af.fit(normed(), blobs(), **settings, checkpoint=tmp_path, on_step=stop)
    assert signal.getsignal(signal.SIGINT) is handler
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    assert (saved["epoch"], saved["batches"], saved["step"]) == (1, 2, 8)
    model, whole, steps = normed(), normed(), []
    af.fit(model, blobs(), **settings, checkpoint=tmp_path, on_step=steps.append)
    af.fit(whole, blobs(), **settings)
    assert [row["step"] for row in steps] == list(range(9, 19))
    assert_same(model, weights(whole))


def test_a_second_ctrl_c_is_not_waited_with(tmp_path):
    def stop(row):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("still running")

    with pytest.raises(KeyboardInterrupt):
        af.fit(linear(), blobs(), epochs=1, checkpoint=tmp_path, on_step=stop)


def test_without_a_checkpoint_ctrl_c_is_pythons_own():
    seen = []
    af.fit(
        linear(), blobs(), epochs=1, on_step=lambda _: seen.append(signal.getsignal(signal.SIGINT))
    )
    assert seen[0] is signal.getsignal(signal.SIGINT)


def test_two_threads_in_one_folder(tmp_path):
    inside, leave, errors = threading.Event(), threading.Event(), []

    def hold(_):
        inside.set()
        leave.wait(20)

    first = threading.Thread(
        target=lambda: af.fit(
            linear(), blobs(), epochs=1, checkpoint=tmp_path, on_step=hold, seed=0
        )
    )
    first.start()
    assert inside.wait(20)
    try:
        af.fit(linear(), blobs(), epochs=1, checkpoint=tmp_path, seed=0)
    except OSError as error:
        errors.append(error)
    leave.set()
    first.join()
    (error,) = errors
    assert isinstance(error, BlockingIOError)
    assert f"checkpoint={str(tmp_path)!r}: in use by a thread of this process" in str(error)
    # Then it is free, and nothing is left behind.
    af.fit(linear(), blobs(), epochs=1, checkpoint=tmp_path, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_in_one_folder(tmp_path):
    child = os.fork()
    if child == 0:
        af.fit(
            linear(),
            blobs(),
            epochs=1,
            checkpoint=tmp_path,
            on_step=lambda _: time.sleep(20),
            seed=0,
        )
        os._exit(0)
    try:
        for _ in range(2000):
            if (tmp_path / "last.pt").exists():
                break
            time.sleep(0.01)
        with pytest.raises(BlockingIOError, match=f"in use by process {child} on"):
            af.fit(linear(), blobs(), epochs=1, checkpoint=tmp_path, seed=0)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    af.fit(linear(), blobs(), epochs=1, checkpoint=tmp_path, seed=0)


# --- Damaged and full disks ---


@pytest.mark.parametrize("keep", [0, 10, 2000])
def test_a_truncated_checkpoint_is_named(keep, tmp_path):
    af.fit(normed(), blobs(), epochs=1, checkpoint=tmp_path, seed=0)
    file = tmp_path / "last.pt"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(OSError, match=r"checkpoint=.*last\.pt.*cannot be read"):
        af.fit(normed(), blobs(), epochs=1, checkpoint=tmp_path, seed=0)


def test_a_file_that_is_no_checkpoint_is_named(tmp_path):
    (tmp_path / "last.pt").write_text("not a checkpoint, but long enough to look like something")
    with pytest.raises(OSError, match=r"checkpoint=.*last\.pt"):
        af.fit(normed(), blobs(), epochs=1, checkpoint=tmp_path, seed=0)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small disk")
def test_a_full_disk_names_the_file_and_keeps_the_last_good_checkpoint(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)],
        check=False,
        capture_output=True,
    )
    if done.returncode:
        pytest.skip("cannot mount")
    try:
        filler = disk / "filler"

        def fill(row):
            if row["epoch"] == 2:
                with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                    while True:
                        file.write(b"0" * 4096)

        settings = {"epochs": 4, "seed": 0, "checkpoint": disk / "run"}
        with pytest.raises(OSError, match=r"No space left.*last\.pt"):
            af.fit(normed(), blobs(), **settings, on_epoch=fill)
        assert sorted(path.name for path in (disk / "run").iterdir()) == ["last.pt"]
        saved = torch.load(disk / "run" / "last.pt", weights_only=True)
        assert saved["epoch"] == 2
        filler.unlink()
        model, whole = normed(), normed()
        af.fit(model, blobs(), **settings)
        af.fit(whole, blobs(), epochs=4, seed=0)
        assert_same(model, weights(whole))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


# --- Models ---


@pytest.mark.slow
def test_a_compiled_model_is_saved_as_the_model_inside(tmp_path):
    models = [normed(), normed()]
    compiled = torch.compile(models[0], backend="eager")
    af.fit(
        compiled, blobs(), epochs=1, checkpoint=tmp_path / "compiled", validation=blobs(30), seed=0
    )
    af.fit(
        models[1], blobs(), epochs=1, checkpoint=tmp_path / "plain", validation=blobs(30), seed=0
    )
    assert_close(models[0], weights(models[1]))
    for name in ("last.pt", "best.pt"):
        saved = torch.load(tmp_path / "compiled" / name, weights_only=True)["model"]
        assert not any("_orig_mod" in key for key in saved)
        normed().load_state_dict(saved)
    # The plain model resumes what the compiled one began.
    af.fit(
        normed(), blobs(), epochs=1, checkpoint=tmp_path / "compiled", validation=blobs(30), seed=0
    )


def backbone():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU())
    model = nn.Sequential(body.requires_grad_(False), nn.BatchNorm1d(8), nn.Linear(8, 3))
    return model


@pytest.mark.parametrize("adversarial", [False, True])
def test_a_frozen_backbone_in_evaluation_mode_stays_there(adversarial):
    model = backbone().eval()
    modes = {}
    for name, module in model.named_modules():
        module.register_forward_pre_hook(
            lambda m, _, name=name: modes.setdefault(name, set()).add(m.training)
        )
    before = weights(model)
    if adversarial:
        af.adversarial_fit(model, blobs(), eps=0.1, norm="l2", epochs=2, attack_mode="train")
    else:
        af.fit(model, blobs(), epochs=2, options=Options(ema=0.5))
    assert all(
        torch.equal(before[k], v) for k, v in model.state_dict().items() if k.startswith("0.")
    )
    assert True not in modes["0.1"] | modes["0.2"] | modes["0"]
    assert True in modes["1"]
    assert model[1].num_batches_tracked > 0
    assert not any(m.training for m in model.modules())


class Adapted(nn.Module):
    """A frozen layer with a low-rank update beside it (LoRA)."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(3, 3).requires_grad_(False)
        self.down, self.up = nn.Linear(3, 1, bias=False), nn.Linear(1, 3, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_low_rank_updates_train_and_the_base_does_not(tmp_path):
    torch.manual_seed(0)
    model = Adapted().eval()
    before = weights(model)
    af.fit(model, blobs(), epochs=2, checkpoint=tmp_path, seed=0)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"down.weight", "up.weight"}


def test_a_parametrised_layer_trains_and_resumes(tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))

    model, other = make(), make()
    af.fit(model, blobs(), epochs=2, checkpoint=tmp_path, seed=0)
    af.fit(other, blobs(), epochs=2, checkpoint=tmp_path, seed=0)
    assert_same(other, weights(model))


class Returning(nn.Module):
    """A network that returns more than logits."""

    def __init__(self, pack, width=12):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.ReLU())
        self.head, self.pack = nn.Linear(width, 3), pack

    def forward(self, x):
        features = self.body(x)
        return self.pack(features, self.head(features))


def test_features_that_are_taken_for_logits_are_warned_of_by_their_shapes():
    model = Returning(lambda features, logits: (features, logits))
    with pytest.warns(UserWarning, match=r"\(\d+, 12\) and \(\d+, 3\).*output=1") as heard:
        af.fit(model, blobs(), epochs=1)
    assert len(heard) == 1


@pytest.mark.parametrize(
    ("pack", "output"),
    [
        (lambda f, z: (f, z), 1),
        (lambda f, z: (f, z), -1),
        (lambda f, z: [z, f], 0),
        (lambda f, z: {"hidden": f, "scores": z}, "scores"),
        (lambda f, z: (f, {"z": z}), lambda found: found[1]["z"]),
    ],
)
@pytest.mark.parametrize("adversarial", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_output_chooses_the_logits(pack, output, adversarial, tmp_path):
    models = [Returning(pack), Returning(lambda f, z: z)]
    settings = {"epochs": 2, "batch_size": 20, "validation": 0.2, "seed": 0}
    settings["options"] = Options(ema=0.5)
    histories = []
    for model, chosen in zip(models, (output, None), strict=True):
        train = {"eps": 0.1, "norm": "l2"} if adversarial else {}
        fit = af.adversarial_fit if adversarial else af.fit
        folder = tmp_path / str(chosen is None)
        history = fit(model, blobs(), **settings, **train, output=chosen, checkpoint=folder)
        histories.append([{k: v for k, v in row.items() if k != "seconds"} for row in history.rows])
    assert histories[0] == histories[1]
    assert_same(models[0], weights(models[1]))
    assert "body.0.weight" in torch.load(tmp_path / "False" / "last.pt", weights_only=True)["model"]


class Viewing(nn.Module):
    """A network that fails on channels_last activations, and returns features too."""

    def __init__(self, pack):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head, self.pack = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 3), pack

    def forward(self, x):
        features = self.conv(x).view(len(x), -1)
        return self.pack(features, self.head(features))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: m,
        pytest.param(lambda m: torch.compile(m, backend="eager"), marks=pytest.mark.slow),
    ],
)
def test_wrapped_models_that_channels_last_does_not_fit(wrap):
    x = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(x, torch.arange(24) % 3)
    settings = {
        "epochs": 2,
        "batch_size": 12,
        "validation": data,
        "seed": 0,
        "eps": 0.1,
        "steps": 2,
    }
    settings |= {"norm": "l2", "options": Options(ema=0.5)}
    models = [Viewing(lambda f, z: (f, z)), Viewing(lambda f, z: z)]
    for model, output in zip(models, (1, None), strict=True):
        af.adversarial_fit(wrap(model), data, output=output, **settings)
    assert_close(models[0], weights(models[1]))


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (5, ValueError, "a tuple of 2"),
        ("logits", ValueError, "no such part"),
        (1.5, TypeError, "1.5"),
    ],
)
def test_an_output_that_is_not_there_is_refused(output, error, message):
    with pytest.raises(error, match=f"output=.*{message}"):
        af.fit(Returning(lambda f, z: (f, z)), blobs(), epochs=1, output=output)


@pytest.mark.parametrize(
    "pack", [lambda f, z: {"f": f, "logits": z}, lambda f, z: (z, None), lambda f, z: z]
)
def test_one_candidate_for_logits_is_not_warned_of(pack):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        af.fit(Returning(pack), blobs(), epochs=1)


class BatchDependent(nn.Module):
    """Normalises by the batch in evaluation mode too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(3, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 3)
        )

    def forward(self, x):
        return self.net(x)


class AlwaysDropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 3)

    def forward(self, x):
        return F.dropout(self.net(x))


@pytest.mark.parametrize("kind", [BatchDependent, AlwaysDropping])
@pytest.mark.parametrize("adversarial", [False, True])
def test_outputs_that_depend_on_the_batch_or_on_chance_are_warned_of_once(kind, adversarial):
    particular = {"eps": 0.1, "norm": "l2"} if adversarial else {}
    train = af.adversarial_fit if adversarial else af.fit
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        train(kind(), blobs(), epochs=2, validation=blobs(30), seed=0, **particular)
    told = [w for w in heard if "the same" in str(w.message) or "batch" in str(w.message)]
    assert len(told) == 1, [str(w.message) for w in heard]


# --- What cannot be kept ---


class Hidden(Dataset):
    """Draws from a source that nothing can save."""

    def __len__(self):
        return 60

    def __getitem__(self, index):
        x, y = blobs()[index]
        return x * (1 - 0.01 * int.from_bytes(os.urandom(2), "big") / 65536), y


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Hidden, "reading a sample twice gives two values"),
        (
            lambda: DataLoader(combinations.Global(), 15, num_workers=1, persistent_workers=True),
            "persistent_workers=True",
        ),
        (
            lambda: DataLoader(combinations.Owning(), 15, num_workers=1, persistent_workers=True),
            "persistent_workers=True",
        ),
    ],
)
def test_what_a_resumed_run_cannot_repeat_is_said_when_it_begins(data, message, tmp_path):
    model, calls = linear(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(UserWarning, match=message) as heard:
        af.fit(model, data(), epochs=1, checkpoint=tmp_path, seed=0)
    assert len(heard) == 1
    assert calls
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        af.fit(linear(), data(), epochs=1, seed=0)  # nothing to resume, nothing to say


def test_workers_that_draw_nothing_are_not_warned_of(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader = DataLoader(blobs(), 15, shuffle=True, num_workers=1, persistent_workers=True)
        af.fit(linear(), loader, epochs=1, checkpoint=tmp_path, seed=0)


# --- Callbacks, labels, samples ---


@pytest.mark.parametrize("answer", [False, np.False_, torch.tensor(False)])
def test_every_spelling_of_false_stops(answer):
    history = af.fit(linear(), blobs(), epochs=3, on_epoch=lambda _: answer)
    assert len(history.rows) == 1


@pytest.mark.parametrize("answer", [None, 0, "", np.True_, True])
def test_nothing_else_stops(answer):
    assert len(af.fit(linear(), blobs(), epochs=2, on_epoch=lambda _: answer).rows) == 2


def spoiled(index, *, label=None, value=None):
    x, y = (t.clone() for t in blobs(1200).tensors)
    if label is not None:
        y[index] = label
    if value is not None:
        x[index, 1] = value
    return TensorDataset(x, y)


class Slow(Dataset):
    """No labels to be read apart."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data[index]


class Transformed(Slow):
    """Passes the samples of another dataset on."""

    def __init__(self, data):
        super().__init__(data)
        self.dataset = data


class Folder(Slow):
    """Keeps paths and classes, as torchvision's ImageFolder does."""

    def __init__(self, data):
        super().__init__(data)
        self.samples = [(f"{n}.png", int(y)) for n, y in enumerate(data.tensors[1])]


class Named(TensorDataset):
    pass


@pytest.mark.parametrize(
    "wrap",
    [
        lambda d: d,
        lambda d: DataLoader(d, 32, shuffle=True),
        lambda d: Subset(d, range(1200)),
        lambda d: torch.utils.data.ConcatDataset([d, blobs()]),
        Transformed,
        Folder,
        lambda d: Named(*d.tensors),
        lambda d: Subset(Transformed(Folder(d)), torch.arange(1200)),
        lambda d: torch.utils.data.StackDataset(*d.tensors),
        lambda d: torch.utils.data.StackDataset(x=d.tensors[0], y=d.tensors[1]),
    ],
)
@pytest.mark.parametrize(("label", "message"), [(7, "3 classes"), (-1, "start at 0")])
def test_a_bad_label_is_found_before_any_step_and_named(wrap, label, message):
    steps = []
    with pytest.raises(ValueError, match=rf"labels\[1000\]={label}: .*{message}"):
        af.fit(linear(), wrap(spoiled(1000, label=label)), epochs=1, on_step=steps.append)
    assert steps == []


def test_a_bad_label_in_a_column_of_hugging_face_is_found_before_any_step():
    datasets = pytest.importorskip("datasets")
    if not hasattr(datasets, "Dataset"):
        pytest.skip("another package of this name")
    x, y = spoiled(1000, label=7).tensors
    data = datasets.Dataset.from_dict({"x": x.tolist(), "label": y.tolist()}).with_format("torch")
    steps = []
    with pytest.raises(ValueError, match=r"labels\[1000\]=7"):
        af.fit(linear(), data, epochs=1, on_step=steps.append)
    assert steps == []


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"label": 7}, r"labels\[1000\]=7"),
        ({"value": float("nan")}, r"inputs\[1000\]=.*finite"),
        ({"value": 7.0}, r"inputs\[1000\]=.*outside bounds"),
    ],
)
def test_a_bad_sample_of_any_dataset_is_named(fault, message):
    data = Slow(spoiled(1000, **fault))
    with pytest.raises(ValueError, match=message):
        af.adversarial_fit(linear(), data, eps=0.1, norm="l2", steps=1, epochs=1)
    held_apart = Subset(data, list(range(1199, -1, -1)))
    with pytest.raises(ValueError, match=message):
        af.adversarial_fit(linear(), held_apart, eps=0.1, norm="l2", steps=1, epochs=1)


def test_a_bad_sample_of_a_loader_is_named_by_its_place():
    loader = DataLoader(Slow(spoiled(1000, value=float("nan"))), 32)
    with pytest.raises(ValueError, match=r"inputs \(batch 32\)\[8\]="):
        af.fit(linear(), loader, epochs=1)


def labelled(labels):
    x = torch.rand(len(labels), 3, generator=torch.Generator().manual_seed(0))
    return list(zip(x, labels, strict=True))


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (TensorDataset(torch.rand(6, 3), torch.tensor([0, 1, 2, -1, 2, 3])), ValueError,
         r"labels\[3\]=-1: .*without a label: leave those out"),
        (TensorDataset(torch.rand(4, 3), torch.tensor([1, -1, 1, -1])), ValueError,
         r"labels\[1\]=-1: .*\(y \+ 1\) // 2"),
        (TensorDataset(torch.rand(4, 3), torch.tensor([1, 2, -5, 0])), ValueError,
         r"labels\[2\]=-5: class indices start at 0$"),
        (TensorDataset((torch.rand(4, 3) * 65535).to(torch.int32), torch.arange(4) % 3), TypeError,
         "/ 65535"),
        (TensorDataset((torch.rand(4, 3) * 255).to(torch.uint8), torch.arange(4) % 3), TypeError,
         "/ 255"),
        (DataLoader(labelled(["cat", "dog"])), TypeError, r"classes\.index"),
        (labelled([0, 1]), TypeError, r"A list of samples\?.*DataLoader"),
    ],
)  # fmt: skip
def test_advice_fits_what_is_wrong_with_the_data(data, error, message):
    with pytest.raises(error, match=message):
        af.fit(linear(), data, epochs=1)


@pytest.mark.parametrize(
    ("largest", "advice"), [(255, "divide by 255"), (60000, "divide by 65535")]
)
def test_images_that_are_not_scaled(largest, advice):
    data = TensorDataset(largest * torch.linspace(0, 1, 18).view(6, 3), torch.arange(6) % 3)
    with pytest.raises(ValueError, match=rf"inputs\[\d\]=.*{advice}"):
        af.adversarial_fit(linear(), data, eps=0.1, norm="l2", epochs=1)


class Mapped(Dataset):
    """Keeps labels that are not those it returns."""

    targets = torch.tensor([-1, 1] * 30)

    def __len__(self):
        return 60

    def __getitem__(self, index):
        return blobs()[index][0], (int(self.targets[index]) + 1) // 2


def test_labels_that_the_dataset_maps_are_not_refused():
    assert len(af.fit(linear(), Mapped(), epochs=1).rows) == 1


# --- Warm-up of eps ---


def test_eps_rises_over_the_warm_up():
    half = [(torch.full((4, 3), 0.5), torch.arange(4) % 3)] * 4
    attack = {"eps": 0.4, "norm": "linf", "steps": 1, "step_size": 0.4, "random_start": False}
    sizes = []
    af.adversarial_fit(
        Leaning(sizes), half, **attack, epochs=3, warmup=2, seed=0, lr=1e-9,
    )  # fmt: skip
    expected = [0.4 * min(1.0, step / 8) for step in range(1, 13)]
    assert sizes == pytest.approx(expected, abs=1e-6)


class Leaning(nn.Module):
    """A linear model that notes how far from 0.5 the inputs are that it is trained on."""

    def __init__(self, sizes):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.sizes = nn.Linear(3, 3), sizes

    def forward(self, x):
        if self.training:
            self.sizes.append((x - 0.5).abs().max().item())
        return self.net(x)


def test_a_warm_up_that_leaves_no_epoch_is_refused():
    with pytest.raises(ValueError, match="warmup=3: no epoch of 3"):
        af.adversarial_fit(linear(), blobs(), eps=0.1, norm="l2", epochs=3, warmup=3)


def hopeless():
    """Two classes whose difference the ball covers."""
    y = torch.arange(120) % 3
    return TensorDataset(0.5 + 0.01 * F.one_hot(y, 3).float(), y)


def test_a_loss_that_never_left_chance_is_warned_of():
    with pytest.warns(UserWarning, match=r"never left chance.*1\.099.*3 classes.*warmup=1"):
        af.adversarial_fit(
            linear(), hopeless(), eps=0.3, norm="linf", epochs=3, batch_size=10, seed=0
        )


def test_a_loss_that_did_is_not():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        af.adversarial_fit(linear(), blobs(), eps=0.05, norm="linf", epochs=5, batch_size=5, seed=0)


# --- Reading ahead ---


class Noting(Dataset):
    """Notes in which thread it is read."""

    def __init__(self, draws=False):
        self.threads, self.draws = [], draws

    def __len__(self):
        return 60

    def __getitem__(self, index):
        self.threads.append(threading.current_thread() is threading.main_thread())
        x, y = blobs()[index]
        return (x * (1 - 0.01 * torch.rand(())) if self.draws else x), y


def test_a_dataset_is_read_ahead_unless_it_draws_random_numbers():
    still, drawing = Noting(), Noting(draws=True)
    af.fit(linear(), still, epochs=3, batch_size=10, seed=0)
    af.fit(linear(), drawing, epochs=3, batch_size=10, seed=0)
    assert still.threads == [True] * 60 + [False] * 120
    assert all(drawing.threads)


def test_reading_ahead_changes_nothing():
    models = [normed(), normed()]
    for model, data in zip(models, (blobs(), Noting()), strict=True):
        af.fit(model, data, epochs=3, batch_size=10, seed=0)
    assert_same(models[0], weights(models[1]))


# --- Waiting for the device ---


def is_only_on_the_cpu(frame):
    """Whether a value is read where the library has made sure that it is on the CPU."""
    while frame is not None and "/advfeat/" not in frame.f_code.co_filename:
        frame = frame.f_back
    where = "" if frame is None else f"{frame.f_globals['__name__']}.{frame.f_code.co_name}"
    return where in {"advfeat.threat.finite", "advfeat.model.inputs._call"}


class Reads(TorchDispatchMode):
    """Counts the values that are read back from tensors."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count = Counter()
        tolist = torch.Tensor.tolist

        def counted(tensor):
            self.count["tolist"] += 1
            with torch._C._DisableTorchDispatch():
                return tolist(tensor)

        monkeypatch.setattr(torch.Tensor, "tolist", counted)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        if name in {"_local_scalar_dense", "nonzero", "equal", "masked_select"}:
            self.count[name] += not is_only_on_the_cpu(sys._getframe())
        return function(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        None,
        {},
        {"random_start": True},
        {"objective": "trades"},
        {"objective": "mart"},
        {"method": "free"},
        {"options": Options(ema=0.9, awp=0.01, clip_norm=1.0, accumulate=2)},
    ],
    ids=str,
)
def test_a_step_reads_one_value_at_most(settings, monkeypatch):
    counts = []
    for steps in (10, 40):
        (x, y), model = blobs(4 * steps).tensors, normed()
        data = list(zip(x.split(4), y.split(4), strict=True))
        with Reads(monkeypatch) as reads:
            if settings is None:
                af.fit(model, data, epochs=1, seed=0)
            else:
                af.adversarial_fit(model, data, eps=0.1, norm="linf", epochs=1, seed=0, **settings)
        counts.append(sum(reads.count.values()))
    assert counts[1] - counts[0] <= 30


def test_folding_is_compared_once_in_a_hundred_steps(monkeypatch):
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no bfloat16")
    counts = []
    for steps in (10, 40):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
        )
        x, y = torch.rand(4 * steps, 3, 8, 8), torch.arange(4 * steps) % 3
        data = list(zip(x.split(4), y.split(4), strict=True))
        with Reads(monkeypatch) as reads:
            af.adversarial_fit(
                model, data, eps=0.1, norm="linf", steps=2, epochs=1, seed=0, precision="bfloat16"
            )
        counts.append(sum(reads.count.values()))
    assert counts[1] - counts[0] <= 30


# --- What is on around the call, and what a model does to its own gradient ---


@pytest.mark.parametrize("adversarial", [False, True])
@pytest.mark.parametrize(
    "around",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
    ],
)
def test_what_is_on_around_the_call_changes_nothing(around, adversarial):
    settings = {"epochs": 1, "seed": 0, "batch_size": 20}
    if adversarial:
        settings |= {"eps": 0.1, "norm": "l2", "steps": 1}
    run = af.adversarial_fit if adversarial else af.fit
    plain, inside = linear(), linear()
    run(plain, blobs(), **settings)
    with around():
        run(inside, blobs(), **settings)
    assert torch.equal(plain.weight, inside.weight)


class Ending(nn.Module):
    def __init__(self, end):
        super().__init__()
        self.model, self.end = nn.Linear(3, 3), end

    def forward(self, x):
        return self.end(self.model(x))


def test_a_loss_without_a_gradient_is_named():
    with pytest.raises(ValueError, match="no gradient by the weights"):
        af.fit(Ending(lambda z: z.detach()), blobs(), epochs=1)


@pytest.mark.parametrize("end", [lambda z: z.softmax(1), torch.sigmoid])
def test_probabilities_are_not_trained_as_logits_without_a_word(end):
    with pytest.warns(ResultWarning, match="probabilities.*cross-entropy"):
        af.fit(Ending(end), blobs(), epochs=1)


def test_probabilities_may_have_a_loss_of_their_own():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        af.fit(
            Ending(lambda z: z.softmax(1)),
            blobs(),
            epochs=1,
            loss=lambda p, y: F.nll_loss(p.log(), y, reduction="none"),
        )


@pytest.mark.parametrize("change", [lambda x: x[:2], lambda x: torch.cat([x, x])])
def test_augment_keeps_the_number_of_samples(change):
    with pytest.raises(ValueError, match=r"augment=.*samples"):
        af.fit(linear(), blobs(), epochs=1, augment=change)


def test_a_checkpoint_of_another_program_and_a_folder_without_a_name(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "last.pt")
    with pytest.raises(OSError, match=r"last\.pt.*something else"):
        af.fit(linear(), blobs(), epochs=1, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="name of a folder"):
        af.fit(linear(), blobs(), epochs=1, checkpoint="")
