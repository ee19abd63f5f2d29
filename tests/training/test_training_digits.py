"""Training on digits does what the literature says it does."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import ConstantLR
from torch.utils.data import DataLoader, TensorDataset

import advfeat as af
from advfeat.training import _overfitting


@pytest.fixture(scope="module")
def digits():
    """1437 images to train on and 360 others, pixels in [0, 1]."""
    found = pytest.importorskip("sklearn.datasets").load_digits()
    x = torch.tensor(found.images, dtype=torch.float32).flatten(1) / 16
    y = torch.tensor(found.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return TensorDataset(x[:1437], y[:1437]), TensorDataset(x[1437:], y[1437:])


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-3)


def constant(optimizer):
    return ConstantLR(optimizer, 1.0)


LEARNING = {"optimizer": adam, "schedule": constant, "seed": 0}
ATTACK = af.PGD(eps=0.15, norm="linf", steps=20)


def plain_loop(model, batches, eps, epochs):
    """PGD training as it is written in papers' scripts: float32, no library."""
    optimizer = adam(model.parameters())
    for _ in range(epochs):
        for x, y in batches:
            model.eval()
            x_adv = x.clone()
            for _ in range(7):
                x_adv.requires_grad_(True)
                loss = F.cross_entropy(model(x_adv), y)
                (gradient,) = torch.autograd.grad(loss, x_adv)
                x_adv = x_adv.detach() + eps / 5 * gradient.sign()
                x_adv = torch.min(torch.max(x_adv, x - eps), x + eps).clamp(0, 1)
            model.train()
            optimizer.zero_grad()
            F.cross_entropy(model(x_adv), y).backward()
            optimizer.step()


@pytest.mark.slow
def test_pgd_training_reaches_what_a_plain_loop_reaches(digits):
    train, held = digits
    figures = []
    for seed in range(3):
        ours, low, plain = mlp(seed), mlp(seed), mlp(seed)
        order = torch.Generator().manual_seed(seed)
        batches = list(DataLoader(train, batch_size=64, shuffle=True, generator=order))
        plain_loop(plain, batches, eps=0.15, epochs=4)
        for model, precision in ((ours, "float32"), (low, "bfloat16")):
            with warnings.catch_warnings():
                # Where the processor has no bfloat16, this is float32 once more.
                warnings.filterwarnings("ignore", message="precision='bfloat16'")
                af.adversarial_fit(
                    model, batches, eps=0.15, norm="linf", epochs=4, precision=precision, **LEARNING
                )
        found = [af.robust_accuracy(m, held, attack=ATTACK) for m in (ours, low, plain)]
        figures.append([[float(r.standard), float(r)] for r in found])
    ours, low, plain = torch.tensor(figures).mean(0)
    assert plain[1] > 0.3  # it learned something to compare
    assert (ours - plain).abs().max() < 0.015
    assert (low - plain).abs().max() < 0.015


@pytest.mark.slow
def test_trades_trades_accuracy_for_robustness(digits):
    train, held = digits
    settings = {"eps": 0.15, "norm": "linf", "objective": "trades", "steps": 4, **LEARNING}
    figures = []
    for seed in range(3):
        models = [mlp(seed), mlp(seed)]
        for model, beta in zip(models, (0.5, 20.0), strict=True):
            af.adversarial_fit(model, train, beta=beta, epochs=6, batch_size=64, **settings)
        found = [af.robust_accuracy(m, held, attack=ATTACK) for m in models]
        figures.append([[float(r.standard), float(r)] for r in found])
    little, much = torch.tensor(figures).mean(0)
    assert much[0] < little[0] - 0.005
    assert much[1] > little[1] + 0.04


def standing(model, rows, eps):
    """Accuracy under the training attack and under PGD-20."""
    x, y = rows.tensors
    one = af.FGSM(eps=eps, norm="linf", step_size=1.25 * eps, random_start=True, seed=0)
    return [
        float((model(attack(model, x, y)).argmax(1) == y).float().mean())
        for attack in (one, af.PGD(eps=eps, norm="linf", steps=20))
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the loss never left chance")
def test_fast_training_does_not_collapse_where_the_unguarded_one_does(digits):
    train, _ = digits
    settings = {"eps": 0.3, "norm": "linf", "epochs": 15, "batch_size": 64, **LEARNING}
    guarded, unguarded = mlp(), mlp()
    af.adversarial_fit(guarded, train, method="fast", **settings)
    af.adversarial_fit(
        unguarded, train, steps=1, step_size=1.25 * 0.3, random_start=True, **settings
    )
    one, many = standing(unguarded, train, 0.3)
    assert many < 0.5 * one
    one_guarded, many_guarded = standing(guarded, train, 0.3)
    assert many_guarded > 0.5 * one_guarded
    assert many_guarded > 1.5 * many


@pytest.mark.slow
def test_free_training_makes_a_model_robust(digits):
    train, held = digits
    free, standard = mlp(), mlp()
    settings = {"batch_size": 64, **LEARNING}
    af.adversarial_fit(
        free, train, method="free", eps=0.15, norm="linf", steps=4, epochs=3, **settings
    )
    af.fit(standard, train, epochs=8, **settings)
    found = [af.robust_accuracy(m, held, attack=ATTACK) for m in (free, standard)]
    assert found[0] > found[1] + 0.2
    assert found[0].standard > 0.85


# --- The guard itself ---


def blobs():
    return TensorDataset(
        torch.rand(90, 64, generator=torch.Generator().manual_seed(0)), torch.arange(90) % 3
    )


def test_what_was_learned_since_the_last_good_look_is_taken_back(monkeypatch):
    monkeypatch.setattr(_overfitting, "_FRACTION", float("nan"))
    monkeypatch.setattr(_overfitting, "_DIFFERENCE", -2.0)
    model, heard = mlp(), []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.register_forward_pre_hook(lambda m, _: heard.append(next(m.parameters()).requires_grad))
    af.adversarial_fit(
        model,
        blobs(),
        method="fast",
        eps=0.1,
        norm="linf",
        epochs=2,
        batch_size=3,
        seed=0,
    )
    # Looks after 20 steps and at the end of each epoch of 30, all of them bad.
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    gradients = "".join("L" if learning else "a" for learning in heard[1:])
    attacks = [len(part) for part in gradients.split("L")]
    assert attacks[1:20] == [1] * 19
    assert attacks[21:30] == [2] * 9
    assert attacks[31:50] == [3] * 19
    assert attacks[51:60] == [4] * 9


def test_what_stood_the_look_is_kept():
    model, twin = mlp(), mlp()
    settings = {"eps": 0.01, "norm": "linf", "epochs": 2, "batch_size": 3, "seed": 0}
    af.adversarial_fit(model, blobs(), method="fast", **settings)
    af.adversarial_fit(twin, blobs(), steps=1, step_size=0.0125, random_start=True, **settings)
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.slow
def test_a_ball_that_is_not_learned_from_scratch_is_learned_after_a_warm_up(digits):
    train, test = digits

    def trained(**settings):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 100),
            nn.ReLU(),
            nn.Linear(100, 10),
        )
        af.adversarial_fit(model, train, eps=0.25, norm="linf", epochs=12, seed=0, **settings)
        return af.accuracy(model, test)

    with pytest.warns(UserWarning, match=r"the loss never left chance.*warmup=4"):
        scratch = trained()
    assert trained(warmup=5) > scratch + 0.2
