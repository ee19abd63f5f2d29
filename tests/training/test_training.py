"""Standard and adversarial training: what is learned, what is recorded, what is left alone."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import MultiStepLR, OneCycleLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

import advfeat as af
from advfeat.training import History


def blobs(count=60, classes=3, dtype=torch.float32):
    """Separable: each class at its own corner."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(count) % classes
    noise = torch.rand(count, classes, generator=generator, dtype=dtype)
    return TensorDataset((0.8 * F.one_hot(y, classes) + 0.2 * noise).to(dtype), y)


def linear(classes=3, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(classes, classes, dtype=dtype)


def normed():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(found, expected):
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


class Seen:
    """Inputs of every forward pass that is trained on."""

    def __init__(self, model):
        self.batches = []
        self.watched = next(model.parameters())
        model.register_forward_pre_hook(self.note)

    def note(self, module, inputs):
        if self.watched.requires_grad:  # an attack freezes it
            self.batches.append(inputs[0].detach().clone())


# --- Learning ---


def test_fit_learns_a_separable_set():
    model = linear()
    history = af.fit(model, blobs(), epochs=30, batch_size=16, seed=0)
    assert af.accuracy(model, blobs()) == 1.0
    assert history.rows[-1]["accuracy"] == 1.0
    assert history.rows[-1]["loss"] < 0.5 * history.rows[0]["loss"]


@pytest.mark.parametrize("kind", ["loader", "shuffled", "list"])
def test_fit_takes_loaders_and_lists(kind):
    model, rows = linear(), blobs()
    data = {
        "loader": DataLoader(rows, batch_size=16),
        "shuffled": DataLoader(rows, batch_size=16, shuffle=True),
        "list": [(x, y, "extra") for x, y in DataLoader(rows, batch_size=16)],
    }[kind]
    af.fit(model, data, epochs=30)
    assert af.accuracy(model, rows) == 1.0


def test_fit_is_stochastic_gradient_descent_as_by_hand():
    model, twin, rows = normed(), normed(), blobs()
    loader = DataLoader(rows, batch_size=16)
    af.fit(model, loader, epochs=3, lr=0.2, momentum=0.8, weight_decay=0.01)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.2, momentum=0.8, weight_decay=0.01)
    for rate in (0.2, 0.02, 0.002):
        optimizer.param_groups[0]["lr"] = rate
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(twin(x), y).backward()
            optimizer.step()
    for name, tensor in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor)


def robust_and_weak(count=400, weak=60):
    """One feature that eps cannot undo but is wrong at times; many weak ones that eps can."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(count) % 2
    sign = 2.0 * y - 1
    wrong = torch.rand(count, generator=generator) < 0.1
    strong = 0.5 + 0.3 * torch.where(wrong, -sign, sign)
    noise = 0.1 * torch.randn(count, weak, generator=generator)
    fragile = 0.5 + 0.04 * sign[:, None] + noise
    return TensorDataset(torch.cat([strong[:, None], fragile], 1).clamp(0, 1), y)


@pytest.mark.slow
def test_adversarial_training_raises_robust_accuracy():
    torch.manual_seed(0)
    standard = nn.Linear(61, 2)
    robust = copy.deepcopy(standard)
    rows = robust_and_weak()
    settings = {"epochs": 30, "optimizer": lambda p: torch.optim.Adam(p, lr=0.05), "seed": 0}
    af.fit(standard, rows, **settings)
    af.adversarial_fit(robust, rows, eps=0.1, norm="linf", **settings)
    measured = [af.robust_accuracy(m, rows, eps=0.1, norm="linf") for m in (standard, robust)]
    assert measured[0] < 0.3
    assert measured[1] > 0.8


@pytest.mark.parametrize("attack_mode", ["eval", "train"])
@pytest.mark.parametrize("mix", [0.0, 0.35])  # 7 of 20: no multiple of the classes
def test_adversarial_training_is_training_on_adversarial_examples(attack_mode, mix):
    # The attack runs on a copy, so nothing of it can reach the statistics of the twin.
    model, twin, rows = normed(), normed(), blobs()
    loader = DataLoader(rows, batch_size=20)
    settings = {"eps": 0.2, "norm": "l2", "epochs": 2, "lr": 0.1}
    af.adversarial_fit(model, loader, attack_mode=attack_mode, mix=mix, **settings)
    attack = af.PGD(eps=0.2, norm="l2", steps=7, step_size=0.2 / 5)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    twin.train()
    for rate in (0.1, 0.01):
        optimizer.param_groups[0]["lr"] = rate
        for x, y in loader:
            clean = round(20 * mix)
            other = copy.deepcopy(twin)
            x_adv = attack(other, x[clean:], y[clean:], train=attack_mode == "train")
            optimizer.zero_grad()
            F.cross_entropy(twin(torch.cat([x[:clean], x_adv])), y).backward()
            optimizer.step()
    for name, tensor in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor)


def test_all_clean_equals_standard_training():
    model, twin = normed(), normed()
    af.adversarial_fit(model, blobs(), eps=0.2, norm="l2", epochs=2, mix=1.0, seed=4)
    af.fit(twin, blobs(), epochs=2, seed=4)
    assert_same_weights(weights(model), weights(twin))


@pytest.mark.parametrize("mix", [0.0, 0.25, 0.5])
def test_mix_is_the_share_left_clean(mix):
    model, (x, y) = linear(), blobs().tensors
    seen = Seen(model)
    af.adversarial_fit(model, [(x, y)], eps=0.1, norm="linf", epochs=1, mix=mix)
    clean = (seen.batches[0] == x).all(1)
    assert clean.sum() == round(mix * len(x))


# --- Order, seeds, random numbers ---


def test_the_same_seed_gives_the_same_weights_bit_for_bit():
    models = [normed() for _ in range(3)]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        af.fit(model, blobs(), epochs=2, batch_size=16, seed=seed)
    assert_same_weights(weights(models[1]), weights(models[0]))
    assert not torch.equal(models[2][0].weight, models[0][0].weight)


def test_a_numpy_integer_is_a_seed():
    models = [normed(), normed()]
    for model, seed in zip(models, (5, np.int64(5)), strict=True):
        af.fit(model, blobs(), epochs=1, batch_size=16, seed=seed)
    assert_same_weights(weights(models[1]), weights(models[0]))


def test_without_a_seed_torch_manual_seed_governs():
    models = [normed(), normed()]
    for model in models:
        torch.manual_seed(9)
        af.fit(model, blobs(), epochs=1, batch_size=16)
    assert_same_weights(weights(models[1]), weights(models[0]))


def test_a_seed_leaves_the_global_random_state_alone():
    model = normed()
    state = torch.get_rng_state()
    settings = {"epochs": 1, "seed": 5, "validation": blobs()}
    af.fit(model, blobs(), **settings)
    af.adversarial_fit(model, blobs(), eps=0.1, norm="l2", random_start=True, **settings)
    assert torch.equal(torch.get_rng_state(), state)


def test_each_epoch_is_another_order_of_all_samples():
    model, rows = linear(), blobs()
    seen = Seen(model)
    af.fit(model, rows, epochs=2, batch_size=16, seed=0)
    assert [len(b) for b in seen.batches] == [16, 16, 16, 12] * 2
    first, second = torch.cat(seen.batches[:4]), torch.cat(seen.batches[4:])
    assert not torch.equal(first, second)
    expected = sorted(rows.tensors[0].tolist())
    assert sorted(first.tolist()) == expected
    assert sorted(second.tolist()) == expected


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"), [(5, 2, [2, 2]), (3, 1, [1, 1, 1]), (1, 8, [1])]
)
def test_only_a_last_batch_of_a_single_sample_is_left_out(count, batch_size, sizes):
    model = linear()
    seen = Seen(model)
    af.fit(model, blobs(count), epochs=1, batch_size=batch_size, seed=0)
    assert [len(b) for b in seen.batches] == sizes


@pytest.mark.parametrize("wrap", [lambda loader: loader, list], ids=["loader", "list"])
def test_a_single_sample_that_is_left_over_by_a_loader_is_left_out(wrap):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    rows = blobs(17)
    history = af.fit(model, wrap(DataLoader(rows, batch_size=8)), epochs=1, seed=0)
    assert len(history.rows) == 1


def still():
    """A model without input gradients, whose rows stay at their random starts."""
    model = linear()
    nn.init.zeros_(model.weight)
    return model, torch.optim.SGD(model.parameters(), lr=0.0)


def test_random_starts_are_new_for_every_sample_and_step():
    model, optimizer = still()
    seen = Seen(model)
    rows = [(torch.full((6, 3), 0.5), torch.arange(6) % 3)] * 2
    af.adversarial_fit(
        model, rows, eps=0.1, norm="l2", random_start=True, epochs=2, optimizer=optimizer, seed=1
    )
    starts = torch.cat(seen.batches)
    assert len(starts.unique(dim=0)) == 24


@pytest.mark.parametrize("given", [False, True])
def test_the_seed_governs_random_starts_of_a_given_attack_too(given):
    found = []
    for noise in (0, 1):
        torch.manual_seed(noise)
        attack = af.PGD(eps=0.3, norm="l2", steps=1, random_start=True, seed=8 if given else None)
        model, optimizer = still()
        seen = Seen(model)
        rows = [(torch.full((6, 3), 0.5), torch.arange(6) % 3)] * 2
        torch.manual_seed(noise)
        af.adversarial_fit(model, rows, attack=attack, epochs=1, optimizer=optimizer, seed=5)
        found.append(torch.cat(seen.batches))
    assert torch.equal(found[0], found[1])


# --- Optimiser and schedule ---


def rates(make, rows, **options):
    """Learning rate of every optimiser step."""
    model, found = linear(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda o, *_: found.append(o.param_groups[0]["lr"]))
    schedule = None if make is None else make(optimizer)
    af.fit(model, rows, optimizer=optimizer, schedule=schedule, **options)
    return found


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (6, [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]),
        (3, [0.1, 0.01, 0.001]),
        (1, [0.1]),
        (7, [0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.001]),
    ],
)
def test_by_default_the_rate_falls_by_ten_at_one_and_two_thirds(epochs, expected):
    assert rates(None, blobs(), epochs=epochs, seed=0) == pytest.approx(expected)


@pytest.mark.parametrize("wrap", ["instance", "callable"])
def test_a_schedule_is_stepped_every_epoch(wrap):
    def make(optimizer):
        if wrap == "callable":
            return lambda o: StepLR(o, 1, 0.5)
        return StepLR(optimizer, 1, 0.5)

    found = rates(make, blobs(), epochs=3, batch_size=30, seed=0)
    assert found == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025, 0.025])


def test_one_cycle_is_stepped_every_batch():
    found = rates(
        lambda o: OneCycleLR(o, max_lr=0.4, total_steps=6), blobs(), epochs=3, batch_size=30, seed=0
    )
    optimizer = torch.optim.SGD(linear().parameters(), lr=0.1)
    schedule = OneCycleLR(optimizer, max_lr=0.4, total_steps=6)
    expected = []
    for step in range(6):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < 5:
            schedule.step()
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("wrap", ["instance", "callable"])
def test_another_optimizer(wrap):
    model, rows = linear(), blobs()
    made = []

    def make(parameters):
        made.append(torch.optim.Adam(parameters, lr=0.05))
        return made[0]

    optimizer = make(model.parameters()) if wrap == "instance" else make
    af.fit(model, rows, epochs=10, optimizer=optimizer, schedule=lambda o: MultiStepLR(o, [99]))
    assert af.accuracy(model, rows) == 1.0
    assert all("exp_avg" in made[0].state[p] for p in model.parameters())


# --- What is left alone ---


def test_an_optimizer_of_another_model_is_refused():
    other = torch.optim.SGD(linear().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="none of its parameters is the model's"):
        af.fit(linear(), blobs(), epochs=1, optimizer=other)


def test_a_schedule_of_another_optimizer_is_refused():
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(ValueError, match="schedule='StepLR': it steps another optimizer"):
        af.fit(model, blobs(), epochs=1, schedule=schedule)


def test_parameters_that_the_optimizer_does_not_have_keep_no_gradients():
    model = nn.Sequential(linear(), nn.Linear(3, 3))
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    af.fit(model, blobs(), epochs=2, optimizer=optimizer, seed=0)
    assert all(p.grad is None for p in model.parameters())


def test_frozen_parameters_do_not_move():
    model = normed()
    model[0].weight.requires_grad_(False)
    before = weights(model)
    af.fit(model, blobs(), epochs=2, seed=0)
    assert torch.equal(model[0].weight, before["0.weight"])
    assert not torch.equal(model[3].weight, before["3.weight"])


@pytest.mark.parametrize("adversarial", [False, True])
def test_a_frozen_batchnorm_stays_frozen(adversarial):
    model = normed()
    model.train()
    model[1].eval()
    before = weights(model)
    if adversarial:
        af.adversarial_fit(model, blobs(), eps=0.1, norm="l2", epochs=2, attack_mode="train")
    else:
        af.fit(model, blobs(), epochs=2)
    assert torch.equal(model[1].running_mean, before["1.running_mean"])
    assert model[1].num_batches_tracked == 0
    assert not model[1].training


class KeepsStatistics(nn.Sequential):
    """Fine-tuning as it is often written: ``train`` leaves the normalisation alone."""

    def train(self, mode=True):
        super().train(mode)
        self[1].eval()
        return self


@pytest.mark.parametrize("training", [False, True])
def test_a_train_of_the_models_own_is_obeyed(training):
    model = KeepsStatistics(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
    assert model[1].training  # nobody has called train yet
    if not training:
        model.eval()
    model[2].eval()
    seen = []
    model[2].register_forward_pre_hook(lambda m, _: seen.append(m.training))
    af.fit(model, blobs(), epochs=1)
    assert model[1].num_batches_tracked == 0
    assert (True in seen) != training  # what the caller has put in evaluation mode stays there
    assert model[1].training == training


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_is_restored(training):
    model = normed().train(training)
    af.fit(model, blobs(), epochs=1)
    assert [m.training for m in model.modules()] == [training] * 5


def test_the_mode_is_restored_after_a_failure():
    model = normed().eval()
    with pytest.raises(ZeroDivisionError):
        af.fit(model, blobs(), epochs=1, augment=lambda x: x / (1 // 0))
    assert not any(m.training for m in model.modules())


def test_a_model_in_evaluation_mode_is_trained_in_training_mode():
    model = normed().eval()
    af.fit(model, blobs(), epochs=2, batch_size=30)
    assert model[1].num_batches_tracked == 4


def test_the_data_are_not_modified():
    rows = blobs()
    before = [tensor.clone() for tensor in rows.tensors]
    af.adversarial_fit(linear(), rows, eps=0.1, norm="linf", epochs=1, random_start=True)
    assert torch.equal(rows.tensors[0], before[0])
    assert torch.equal(rows.tensors[1], before[1])


# --- What is recorded, and what stops it ---


def test_history_has_one_row_an_epoch():
    history = af.fit(linear(), blobs(), epochs=3, seed=0)
    assert [row["epoch"] for row in history.rows] == [1, 2, 3]
    assert {"epoch", "loss", "accuracy", "lr", "seconds"} == set(history.rows[0])


def test_loss_and_accuracy_are_of_the_samples_as_they_went_by():
    model, rows = linear(), blobs()
    x, y = rows.tensors
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    # 60 rows in batches of 16: the last is smaller, and each sample weighs the same.
    history = af.fit(model, rows, epochs=1, batch_size=16, optimizer=optimizer, seed=0)
    assert history.rows[0]["loss"] == pytest.approx(F.cross_entropy(model(x), y).item(), abs=1e-6)
    assert history.rows[0]["accuracy"] == pytest.approx(float(af.accuracy(model, rows)))


def test_validation_is_recorded():
    model, rows, held = linear(), blobs(), blobs(30)
    history = af.fit(model, rows, epochs=2, validation=held, seed=0)
    assert history.rows[-1]["val_accuracy"] == af.accuracy(model, held)
    model = linear()
    history = af.adversarial_fit(model, rows, eps=0.3, norm="l2", epochs=2, validation=held, seed=0)
    expected = af.robust_accuracy(model, held, eps=0.3, norm="l2", steps=20)
    assert history.rows[-1]["val_robust_accuracy"] == expected
    assert history.rows[-1]["val_accuracy"] == expected.standard


def test_on_epoch_sees_each_epoch_and_false_stops():
    seen = []

    def on_epoch(row):
        seen.append(row["epoch"])
        return row["epoch"] < 3 if row["epoch"] > 1 else None

    history = af.fit(linear(), blobs(), epochs=10, on_epoch=on_epoch)
    assert seen == [1, 2, 3]
    assert len(history.rows) == 3


def test_a_history_prints_as_a_table():
    history = af.fit(linear(), blobs(), epochs=2, validation=blobs(9), seed=0)
    lines = str(history).splitlines()
    assert lines[0].split() == ["epoch", "loss", "accuracy", "lr", "seconds", "val_accuracy"]
    assert [line.split()[0] for line in lines[1:]] == ["1", "2"]
    assert len({len(line) for line in lines}) == 1
    assert str(History()) == "(no epochs)"


def test_divergence_says_where():
    model = normed().eval()
    with pytest.raises(FloatingPointError, match=r"epoch 1 .*lr 1e\+30"):
        af.fit(model, blobs(), epochs=3, batch_size=8, lr=1e30)
    assert not model.training


# --- Augmentation and kinds of models ---


def test_augmentation_is_of_the_batches_and_before_the_attack():
    model, rows = linear(), blobs()
    seen, shapes = Seen(model), []

    def grey(x):
        shapes.append(tuple(x.shape))
        return torch.full_like(x, 0.5)

    af.adversarial_fit(model, rows, eps=0.1, norm="linf", epochs=1, batch_size=30, augment=grey)
    assert shapes == [(30, 3), (30, 3)]
    away = (torch.cat(seen.batches) - 0.5).abs().amax(1)
    torch.testing.assert_close(away, torch.full((60,), 0.1))


class Wrapped(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.net = linear()
        self.kind = kind

    def forward(self, x):
        z = self.net(x)
        return {"logits": z, "hidden": x} if self.kind == "dict" else (z, x)


@pytest.mark.parametrize("kind", ["dict", "tuple"])
def test_models_may_return_dicts_and_tuples(kind):
    model, twin = Wrapped(kind), linear()
    for m in (model, twin):
        af.adversarial_fit(m, blobs(), eps=0.1, norm="l2", epochs=2, seed=0)
    assert_same_weights(weights(model.net), weights(twin))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_precision_train(dtype):
    rows = blobs(dtype=dtype)
    model = linear(dtype=dtype)
    af.fit(model, rows, epochs=20, batch_size=10, seed=0)
    af.adversarial_fit(model, rows, eps=0.1, norm="l2", epochs=3, batch_size=10, seed=0)
    assert model.weight.dtype == dtype
    assert af.robust_accuracy(model, rows, eps=0.1, norm="l2") == 1.0
