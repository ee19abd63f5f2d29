"""The same results on a GPU as on the CPU; skipped where there is none."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import advfeat as af
from advfeat import seeding
from advfeat.attacks import Batch, invert
from advfeat.attacks.pool import worst_case
from advfeat.model import attackable

DEVICE = "cuda"
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

ORDER = {"l1": 1, "l2": 2, "linf": np.inf}
EPS = {"l1": 3.0, "l2": 0.5, "linf": 0.05}


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(8 * 64, 16),
        nn.Tanh(),
        nn.Linear(16, 4),
    ).to(dtype)


def images(count=32, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(count, 3, 8, 8, generator=generator, dtype=dtype)
    return x, torch.randint(4, (count,), generator=generator)


def both(model):
    """The model on the CPU, and a copy of it on the GPU."""
    model = model.eval()
    return model, copy.deepcopy(model).to(DEVICE)


def close(found, expected):
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-6)


def right_rows(model, x):
    with torch.no_grad():
        return model(x).argmax(1)


def test_random_bits_are_the_same():
    index = torch.tensor([0, 1, 5, 2**40])
    for seed in (0, 7, -3, 2**63):
        here, there = seeding.keys(seed, index), seeding.keys(seed, index.to(DEVICE))
        assert torch.equal(there.cpu(), here)
        for draw in (0, 3):
            for make in (seeding.bits, seeding.uniform, seeding.integers):
                assert torch.equal(make(there, draw, 100).cpu(), make(here, draw, 100))


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("random_start", [False, True])
def test_pgd_is_that_of_the_cpu(norm, random_start):
    here, there = both(network())
    x, y = images()
    options = {"eps": EPS[norm], "norm": norm, "steps": 5, "random_start": random_start, "seed": 3}
    expected = af.pgd(here, x, y, **options)
    found = af.pgd(there, x.to(DEVICE), y.to(DEVICE), **options)
    assert found.device.type == DEVICE
    # A random start goes through float32 functions that differ in the last bit.
    close(found, expected)


@pytest.mark.parametrize("norm", EPS)
def test_ball_and_box_hold(norm):
    _, model = both(network(torch.float32))
    x, y = (tensor.to(DEVICE) for tensor in images(dtype=torch.float32))
    x_adv = af.pgd(model, x, y, eps=EPS[norm], norm=norm, restarts=2, seed=0)
    delta = (x_adv.double() - x.double()).flatten(1).cpu().numpy()
    assert (np.linalg.norm(delta, ORDER[norm], axis=1) <= EPS[norm] + 1e-6).all()
    assert ((x_adv >= 0) & (x_adv <= 1)).all()


def test_inversion_is_that_of_the_cpu():
    here, there = both(network())
    x, _ = images()
    expected = invert(here, x, x.flip(0), steps=10)
    close(invert(there, x.to(DEVICE), x.flip(0).to(DEVICE), steps=10), expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_robust_accuracy_is_that_of_the_cpu(workers):
    here, there = both(network())
    x, _ = images()
    loader = DataLoader(
        TensorDataset(x, right_rows(here, x)),
        batch_size=9,
        num_workers=workers,
        pin_memory=workers > 0,
    )
    options = {"eps": 1.5, "norm": "l2", "steps": 5, "restarts": 2, "seed": 3}
    expected = af.robust_accuracy(here, loader, **options)
    found = af.robust_accuracy(there, loader, **options)
    assert torch.equal(found.correct, expected.correct)
    assert torch.equal(af.accuracy(there, loader).correct, expected.standard.correct)
    assert 0 < found < 1


def test_constructed_sets_are_those_of_the_cpu():
    here, there = both(network())
    rows = TensorDataset(*images())
    makes = [
        lambda m: af.construct_robust_dataset(m, rows, steps=5, seed=1),
        lambda m: af.construct_nonrobust_dataset(m, rows, steps=5, seed=1, start="noise"),
        lambda m: af.construct_det_dataset(m, rows, steps=5),
        lambda m: af.construct_rand_dataset(m, rows, steps=5, seed=1),
    ]
    for make in makes:
        found, expected = make(there), make(here)
        assert list(found.fields) == list(expected.fields)
        for name, array in expected.fields.items():
            np.testing.assert_allclose(found.fields[name], array, atol=1e-5)


@pytest.mark.parametrize("adversarial", [False, True])
def test_training_is_that_of_the_cpu(adversarial):
    here, there = both(network())
    rows = TensorDataset(*images())
    for model in (here, there):
        options = {"epochs": 2, "batch_size": 8, "seed": 5, "lr": 0.01, "validation": rows}
        if adversarial:
            af.adversarial_fit(model, rows, eps=0.3, norm="l2", random_start=True, **options)
        else:
            af.fit(model, rows, **options)
    for name, tensor in here.state_dict().items():
        torch.testing.assert_close(there.state_dict()[name].cpu(), tensor, rtol=0, atol=1e-5)


def test_the_gpus_random_state_is_untouched():
    _, model = both(network())
    state = torch.cuda.get_rng_state()
    rows = TensorDataset(*images())
    af.robust_accuracy(model, rows, eps=0.1, norm="l2", seed=0)
    af.construct_rand_dataset(model, rows, steps=2, seed=0)
    assert torch.equal(torch.cuda.get_rng_state(), state)


def test_a_generator_on_the_gpu_is_a_seed():
    _, model = both(network())
    x, y = (tensor.to(DEVICE) for tensor in images())

    def attack():
        generator = torch.Generator(DEVICE).manual_seed(3)
        return af.pgd(model, x, y, eps=0.1, norm="l2", random_start=True, seed=generator)

    assert torch.equal(attack(), attack())


def test_inputs_elsewhere_than_the_model_are_refused():
    _, model = both(network())
    x, y = images()
    with pytest.raises(ValueError, match=r"inputs\.device.*cuda"):
        af.pgd(model, x, y, eps=0.1, norm="l2")
    with pytest.raises(ValueError, match=r"labels\.device"):
        af.pgd(model, x.to(DEVICE), y, eps=0.1, norm="l2")


def test_labels_beyond_the_classes_do_not_end_the_process():
    _, model = both(network())
    x, y = images()
    for call in (af.fit, af.adversarial_fit):
        options = {} if call is af.fit else {"eps": 0.1, "norm": "l2"}
        with pytest.raises(ValueError, match="labels"):
            call(model, TensorDataset(x, y + 4), epochs=1, **options)
    assert right_rows(model, x.to(DEVICE)).shape == (32,)


@pytest.mark.parametrize("pool_size", [5, 64])
def test_a_bfloat16_verdict_is_settled_in_float32(pool_size):
    _, model = both(network(torch.float32))
    x = images(200, torch.float32)[0].to(DEVICE)
    y = right_rows(model, x)
    attack = af.PGD(eps=1.5, norm="l2", steps=5, returns="first")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # this hardware computes in bfloat16
        with attackable(model, precision="bfloat16") as net:
            ids = torch.arange(200, device=DEVICE)
            found = list(worst_case([attack], net, [Batch(x, y, ids)], pool_size))
    wanted = ("ids", "adversarial", "success")
    ids, adversarial, success = (torch.cat([getattr(v, w) for v in found]) for w in wanted)
    assert torch.equal(right_rows(model, adversarial) != y[ids], success)
    assert 0 < success.sum() < 200


def test_bfloat16_gradients_are_nearly_as_strong():
    _, model = both(network(torch.float32))
    x = images(200, torch.float32)[0]
    rows = TensorDataset(x, right_rows(model, x.to(DEVICE)).cpu())
    options = {"eps": 1.5, "norm": "l2", "steps": 10}
    full = af.robust_accuracy(model, rows, **options)
    half = af.robust_accuracy(model, rows, precision="bfloat16", **options)
    assert abs(full - half) <= 0.03


def test_a_float16_model_is_attacked():
    # Input gradients of a single sample's loss underflow in float16 unless scaled.
    _, model = both(network(torch.float16))
    x, y = (tensor.to(DEVICE) for tensor in images(dtype=torch.float32))
    x_adv = af.pgd(model, x, y, eps=0.5, norm="l2", steps=5)
    assert x_adv.dtype == torch.float32
    sizes = (x_adv - x).flatten(1).norm(dim=1)
    assert (sizes > 0.4).all()
    assert (sizes <= 0.5 + 1e-6).all()


def test_a_recurrent_model_is_attacked():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(5, 8, num_layers=2, dropout=0.5, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.lstm(x)[0][:, -1])

    torch.manual_seed(0)
    model, copied = both(Recurrent().double())
    x = torch.rand(6, 7, 5, dtype=torch.float64)
    y = right_rows(model, x)
    options = {"eps": 0.3, "norm": "l2", "steps": 5}
    close(
        af.pgd(copied, x.to(DEVICE), y.to(DEVICE), **options),
        af.pgd(model, x, y, **options),
    )
