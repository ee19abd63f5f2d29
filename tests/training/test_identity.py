"""A checkpoint folder belongs to one run: whatever differs is named, whatever does not resumes."""

import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, MultiStepLR, ReduceLROnPlateau, SequentialLR
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

import advfeat as af
from advfeat.training import Options

BASE = {"epochs": 2, "batch_size": 15, "seed": 4}


def blobs(count=60, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % classes
    x = 0.8 * F.one_hot(y, classes) + 0.2 * torch.rand(count, classes, generator=generator)
    return TensorDataset(x, y)


def network(hidden=8, activation=nn.ReLU):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, hidden), nn.BatchNorm1d(hidden), activation(), nn.Linear(hidden, 3)
    )


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# --- Data ---


def one_pixel_changed():
    x, y = blobs().tensors
    x = x.clone()
    x[17, 1] += 1e-3
    return TensorDataset(x, y)


def one_label_changed():
    x, y = blobs().tensors
    y = y.clone()
    y[17] = (y[17] + 1) % 3
    return TensorDataset(x, y)


def reordered():
    x, y = blobs().tensors
    return TensorDataset(x.flip(0), y.flip(0))


@pytest.mark.parametrize(
    "other", [partial(blobs, seed=1), one_pixel_changed, one_label_changed, reordered]
)
def test_another_dataset_of_the_same_length_is_refused(other, tmp_path):
    af.fit(network(), blobs(), **BASE, checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"data\.digest=.*the run in this checkpoint folder had"):
        af.fit(network(), other(), **BASE, checkpoint=tmp_path)


def test_other_samples_of_the_same_dataset_are_refused(tmp_path):
    af.fit(network(), Subset(blobs(), range(30)), **BASE, checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"data\.digest="):
        af.fit(network(), Subset(blobs(), range(30, 60)), **BASE, checkpoint=tmp_path)


def test_other_validation_data_are_refused(tmp_path):
    af.fit(network(), blobs(), **BASE, checkpoint=tmp_path, validation=blobs(30, seed=2))
    af.fit(network(), blobs(), **BASE, checkpoint=tmp_path, validation=blobs(30, seed=2))
    for other in (blobs(30, seed=3), 0.2, None):
        with pytest.raises(ValueError, match="validation"):
            af.fit(network(), blobs(), **BASE, checkpoint=tmp_path, validation=other)


def test_a_loader_that_goes_through_the_data_otherwise_is_refused(tmp_path):
    settings = {"epochs": 2, "seed": 4, "checkpoint": tmp_path}
    af.fit(network(), DataLoader(blobs(), 15, shuffle=True), **settings)
    for other, name in (
        (DataLoader(blobs(), 20, shuffle=True), "batch_size"),
        (DataLoader(blobs(), 15), "sampler"),
        (DataLoader(blobs(), 15, shuffle=True, drop_last=True), "drop_last"),
        (DataLoader(blobs(), 15, sampler=WeightedRandomSampler([1.0] * 60, 60)), "sampler"),
    ):
        with pytest.raises(ValueError, match=rf"data\.{name}="):
            af.fit(network(), other, **settings)


class Stream(IterableDataset):
    def __init__(self, data):
        self.data, self.rng = data, np.random.default_rng(0)

    def __len__(self):
        return 60

    def __iter__(self):
        x, y = self.data.tensors
        return ((x[i], y[i]) for i in self.rng.permutation(60))


def test_another_stream_is_refused_and_the_same_is_not(tmp_path):
    settings = {"epochs": 2, "seed": 4, "checkpoint": tmp_path}
    loader = DataLoader(Stream(blobs()), 15)
    af.fit(network(), loader, **settings)
    af.fit(network(), loader, **settings)  # its generator has moved
    with pytest.raises(ValueError, match=r"data\.dataset\.data"):
        af.fit(network(), DataLoader(Stream(blobs(seed=1)), 15), **settings)


def test_a_constructed_dataset_is_not_another_one(tmp_path):
    settings = BASE | {"checkpoint": tmp_path}
    made = [af.construct_det_dataset(network(), blobs(), eps=eps, steps=1) for eps in (0.1, 0.2)]
    af.fit(network(), made[0], **settings)
    with pytest.raises(ValueError, match=r"data\.digest"):
        af.fit(network(), made[1], **settings)


class Augmenting(Dataset):
    """Draws from every global generator."""

    def __len__(self):
        return 60

    def __getitem__(self, index):
        x, y = blobs()[index]
        noise = random.random() + np.random.rand() + torch.rand(()).item()  # noqa: NPY002
        return x * (1 - 0.01 * noise), y


def test_data_that_are_augmented_at_random_are_the_same_data(tmp_path):
    first, second = network(), network()
    af.fit(first, Augmenting(), **BASE, checkpoint=tmp_path)
    torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
    af.fit(second, Augmenting(), **BASE, checkpoint=tmp_path)
    assert torch.equal(weights(first), weights(second))


def test_the_digest_draws_no_random_number_of_the_users(tmp_path):
    model = network()
    before = [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()]  # noqa: NPY002
    af.fit(model, blobs(), **BASE, checkpoint=tmp_path)
    after = [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()]  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


# --- Model ---


class Other(nn.Sequential):
    pass


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (lambda: network(hidden=9), r"model\.modules\.0"),
        (lambda: network(activation=nn.Tanh), r"model\.modules\.2"),
        (lambda: Other(*network()), r"model\.class"),
        (lambda: network().requires_grad_(False).append(nn.Linear(3, 3)), r"model\.modules"),
    ],
)
def test_another_model_is_refused(other, name, tmp_path):
    af.fit(network(), blobs(), **BASE, checkpoint=tmp_path)
    with pytest.raises(ValueError, match=name):
        af.fit(other(), blobs(), **BASE, checkpoint=tmp_path)


# --- Optimiser, schedule, callables ---


def two_rates(rate):
    def make(parameters):
        parameters = list(parameters)
        groups = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": rate}]
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    return make


def scaled(x, factor=1.0):
    return x * factor


class Scaling:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x):
        return x * self.factor

    def method(self, x):
        return x * self.factor


def closing_over(factor):
    return lambda x: x * factor


def weighting(weight):
    return nn.CrossEntropyLoss(weight=torch.tensor(weight), reduction="none")


DIFFERENCES = {
    "milestones": (
        "schedule",
        lambda o: MultiStepLR(o, [1]),
        lambda o: MultiStepLR(o, [2]),
        "milestones",
    ),
    "factor": (
        "schedule",
        lambda o: ReduceLROnPlateau(o, factor=0.5),
        lambda o: ReduceLROnPlateau(o, factor=0.1),
        "factor",
    ),
    "parts": (
        "schedule",
        lambda o: SequentialLR(o, [LambdaLR(o, lambda e: 1.0), MultiStepLR(o, [1])], [1]),
        lambda o: SequentialLR(o, [LambdaLR(o, lambda e: 1.0), MultiStepLR(o, [3])], [1]),
        r"parts\[1\]",
    ),
    "lambda": (
        "schedule",
        lambda o: LambdaLR(o, partial(scaled, factor=0.5)),
        lambda o: LambdaLR(o, partial(scaled, factor=0.7)),
        "factor",
    ),
    "group": ("optimizer", two_rates(0.01), two_rates(0.02), r"groups\[1\]\.lr"),
    "nesterov": (
        "optimizer",
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
        "nesterov",
    ),
    "partial": ("augment", partial(scaled, factor=1.0), partial(scaled, factor=0.9), "factor"),
    "closure": ("augment", closing_over(1.0), closing_over(0.9), "factor"),
    "code": ("augment", lambda x: x * 1.0, lambda x: x * 0.9, "code"),
    "object": ("augment", Scaling(1.0), Scaling(0.9), "factor"),
    "method": ("augment", Scaling(1.0).method, Scaling(0.9).method, "factor"),
    "loss": ("loss", weighting([1.0, 1.0, 1.0]), weighting([1.0, 2.0, 1.0]), "weight"),
    "options": ("options", Options(clip_norm=1.0), Options(clip_norm=2.0), "clip_norm"),
    "class weights": (
        "options",
        Options(class_weights=[1.0, 1.0, 1.0]),
        Options(class_weights=[1.0, 2.0, 1.0]),
        "class_weights",
    ),
    "lr": ("lr", 0.1, 0.2, "lr"),
    "seed": ("seed", 4, 5, "seed"),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("name", DIFFERENCES)
def test_other_settings_are_refused_and_named_and_the_same_are_not(name, tmp_path):
    argument, first, other, place = DIFFERENCES[name]
    settings = BASE | {"checkpoint": tmp_path}
    af.fit(network(), blobs(), **(settings | {argument: first}))
    af.fit(network(), blobs(), **(settings | {argument: first}))
    with pytest.raises(ValueError, match=rf"{argument}.*{place}|{place}.*the run"):
        af.fit(network(), blobs(), **(settings | {argument: other}))


def test_a_function_of_a_script_is_the_same_where_another_script_imports_it(tmp_path):
    def halved_in(module, factor=0.5):
        augment = partial(lambda x, factor: factor * x, factor=factor)
        augment.func.__module__, augment.func.__qualname__ = module, "halved"
        return augment

    settings = BASE | {"checkpoint": tmp_path}
    af.fit(network(), blobs(), **settings, augment=halved_in("__main__"))
    af.fit(network(), blobs(), **settings, augment=halved_in("study"))
    af.fit(network(), blobs(), **settings, augment=halved_in("__main__"))
    with pytest.raises(ValueError, match="factor"):
        af.fit(network(), blobs(), **settings, augment=halved_in("study", 0.4))
    af.fit(
        network(),
        blobs(),
        **settings | {"checkpoint": tmp_path / "imported"},
        augment=halved_in("study"),
    )
    for module in ("my_study", "other"):
        with pytest.raises(ValueError, match=rf"function='{module}.halved'"):
            af.fit(
                network(),
                blobs(),
                **settings | {"checkpoint": tmp_path / "imported"},
                augment=halved_in(module),
            )


def test_the_loss_of_an_attack_is_part_of_the_run(tmp_path):
    def run(factor):
        loss = partial(F.cross_entropy, reduction="none", label_smoothing=factor)
        attack = af.PGD(eps=0.1, norm="l2", steps=2, loss=loss)
        af.adversarial_fit(network(), blobs(), attack=attack, **BASE, checkpoint=tmp_path)

    run(0.0)
    run(0.0)
    with pytest.raises(ValueError, match=r"attack\.loss\.keywords\.label_smoothing"):
        run(0.1)


def test_an_optimizer_in_mid_run_is_the_optimizer_it_was(tmp_path):
    # In a notebook the cell is run again with the same objects.
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    def stop(row):
        if row["step"] == 6:
            raise KeyboardInterrupt

    settings = {"optimizer": optimizer, "schedule": schedule, "checkpoint": tmp_path} | BASE
    with pytest.raises(KeyboardInterrupt):
        af.fit(model, blobs(), **settings, on_step=stop)
    history = af.fit(model, blobs(), **settings)
    assert [row["lr"] for row in history.rows] == [0.1, 0.05]
