"""Robust accuracy by ensembles: strength, soundness, and what it does not depend on."""

import resource
import shutil
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import advfeat as af
from advfeat.attacks import APGD, FAB, AutoAttack, Square
from advfeat.metrics import robust_accuracy

BALLS = {"linf": (0.08, np.inf), "l2": (0.5, 2), "l1": (2.0, 1)}


def subset(digits, count=100):
    return TensorDataset(*(tensor[:count] for tensor in digits[1].tensors))


def sizes(delta, order):
    return np.linalg.norm(delta.double().flatten(1).numpy(), order, axis=1)


def assert_sound(found, model, x, y, norm):
    """Independent of the library: every broken row is in ball and box, and misclassified."""
    eps, order = BALLS[norm]
    adversarial, broken = found.adversarial, found.broken_by >= 0
    assert (sizes(adversarial - x, order) <= eps + 1e-6).all()
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    with torch.no_grad():
        clean, attacked = model(x).argmax(1) == y, model(adversarial).argmax(1) == y
    assert torch.equal(found.standard.correct, clean)
    assert torch.equal(found.broken_by == -2, ~clean)
    assert not attacked[broken].any()
    assert torch.equal(found.correct, clean & ~broken)
    assert 0 < broken.sum() < clean.sum()


# --- What is counted ---


@pytest.mark.slow
@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.filterwarnings("ignore:precision='bfloat16'")
def test_what_counts_is_in_ball_and_box_and_wrong_in_low_precision_too(standard, digits, norm):
    rows = subset(digits, 60)
    options = {"eps": BALLS[norm][0], "norm": norm, "seed": 0, "keep_inputs": True}
    found = robust_accuracy(standard, rows, **options)
    assert_sound(found, standard, *rows.tensors, norm)
    low = robust_accuracy(standard, rows, **options, precision="bfloat16")
    assert_sound(low, standard, *rows.tensors, norm)
    assert abs(found - low) <= 0.02


def test_low_precision_of_every_attack_is_settled(standard, digits, monkeypatch):
    # Whatever the processor: a model whose low precision is wrong about every tenth row.
    rows, network = subset(digits, 60), af.model.Network
    true = network._logits

    def noisy(self, inputs, low_precision):
        logits = true(self, inputs, False)
        if not low_precision:
            return logits
        return logits + 4.0 * (torch.rand(logits.shape) < 0.1)

    monkeypatch.setattr(network, "_logits", noisy)
    monkeypatch.setattr(
        "advfeat.model.network.supported_precision", lambda precision, module: precision
    )
    ball = {"eps": 0.08, "norm": "linf"}
    attacks = [
        af.PGD(**ball, steps=5),
        APGD(**ball, steps=5),
        FAB(**ball, steps=5, targets=2),
        Square(**ball, queries=20),
    ]
    for attack in attacks:
        found = robust_accuracy(
            standard, rows, attack=attack, seed=0, precision="bfloat16", keep_inputs=True
        )
        assert_sound(found, standard, *rows.tensors, "linf")


def test_the_record_says_which_attack_broke_a_sample_and_at_what_loss(standard, digits):
    rows = subset(digits)
    x, y = rows.tensors
    weak = af.FGSM(eps=0.03, norm="linf")
    strong = af.PGD(eps=0.1, norm="linf", steps=10, loss="margin")
    found = robust_accuracy(standard, rows, attack=[weak, strong], keep_inputs=True)
    alone = robust_accuracy(standard, rows, attack=weak)
    assert torch.equal(found.broken_by == 0, alone.standard.correct & ~alone.correct)
    assert {0, 1} <= set(found.broken_by.tolist())
    assert found.attacks[1].loss == "margin"
    with torch.no_grad():
        logits = standard(found.adversarial)
    margin = logits.scatter(1, y[:, None], -torch.inf).amax(1) - logits.gather(1, y[:, None])[:, 0]
    by_strong = found.broken_by == 1
    torch.testing.assert_close(found.value[by_strong], margin[by_strong])
    resisted = found.broken_by == -1
    torch.testing.assert_close(found.value[resisted], margin[resisted])
    assert (found.value[by_strong] > 0).all()
    assert (found.value[resisted] <= 0).all()
    assert torch.equal(found.value.isnan(), found.broken_by == -2)
    assert torch.equal(found.adversarial[found.broken_by == -2], x[found.broken_by == -2])


def test_adversarial_inputs_are_kept_on_request_alone(standard, digits, recwarn):
    found = robust_accuracy(standard, subset(digits, 10), eps=0.05, norm="linf", steps=2)
    assert found.adversarial is None
    assert found > 0
    assert not recwarn.list  # what is still robust was moved


def test_a_list_is_the_worst_case_of_its_attacks(standard, digits):
    rows = subset(digits)
    attacks = [
        af.PGD(eps=0.06, norm="linf", steps=3),
        af.PGD(eps=0.06, norm="linf", steps=8, loss="dlr"),
        Square(eps=0.06, norm="linf", queries=50, seed=1),
    ]
    each = [robust_accuracy(standard, rows, attack=attack).correct for attack in attacks]
    found = robust_accuracy(standard, rows, attack=attacks)
    assert torch.equal(found.correct, each[0] & each[1] & each[2])
    assert len({tuple(correct.tolist()) for correct in each}) > 1


# --- What it does not depend on ---


class Shuffled(Dataset):
    def __init__(self, rows, order):
        self.rows, self.order = rows, order

    def __len__(self):
        return len(self.order)

    def __getitem__(self, place):
        return self.rows[self.order[place]]


@pytest.mark.slow
def test_an_ensembles_verdict_does_not_depend_on_pool_or_batches(standard, digits):
    rows = subset(digits, 60)
    ensemble = [
        af.PGD(eps=0.06, norm="linf", steps=1, step_size=0.02),
        APGD(eps=0.06, norm="linf", steps=6, loss="dlr", targets=3),
        FAB(eps=0.06, norm="linf", steps=5, targets=2),
        Square(eps=0.06, norm="linf", queries=30),
    ]
    options = {"attack": ensemble, "seed": 4, "keep_inputs": True}
    expected = robust_accuracy(standard, rows, **options, batch_size=60)
    for size in (3, 25):
        found = robust_accuracy(standard, rows, **options, batch_size=size)
        assert torch.equal(found.broken_by, expected.broken_by)
        torch.testing.assert_close(found.adversarial, expected.adversarial, rtol=0, atol=1e-4)
    shuffling = DataLoader(rows, batch_size=13, shuffle=True)
    found = robust_accuracy(standard, shuffling, **options)
    assert torch.equal(found.broken_by[found.index.argsort()], expected.broken_by)
    assert set(expected.broken_by.tolist()) >= {-2, -1, 0, 1}


@pytest.mark.slow
@pytest.mark.usefixtures("short_ensembles")
def test_the_same_seed_gives_the_same_result_and_another_another(standard, digits):
    rows = subset(digits, 40)
    attack = AutoAttack(eps=0.06, norm="linf", version="fast")

    def found(seed):
        return robust_accuracy(standard, rows, attack=attack, seed=seed, keep_inputs=True)

    first = found(0)
    assert torch.equal(found(0).adversarial, first.adversarial)
    assert not torch.equal(found(1).adversarial, first.adversarial)
    again = robust_accuracy(standard, rows, attack=first.attacks, keep_inputs=True)
    assert torch.equal(again.adversarial, first.adversarial)


@pytest.mark.slow
@pytest.mark.usefixtures("short_ensembles")
def test_an_ensembles_own_seed_is_that_of_the_call(standard, digits):
    rows = subset(digits, 40)
    ball = {"eps": 0.06, "norm": "linf", "version": "fast"}
    inside, outside, other = (
        robust_accuracy(
            standard, rows, attack=AutoAttack(**ball, **own), seed=seed, keep_inputs=True
        )
        for own, seed in (({"seed": 3}, None), ({}, 3), ({}, 4))
    )
    assert torch.equal(inside.adversarial, outside.adversarial)
    assert not torch.equal(inside.adversarial, other.adversarial)


@pytest.mark.slow
def test_a_hundred_thousand_samples_pass_a_pool_of_512_in_bounded_memory():
    class Endlessly(Dataset):
        """Samples that exist while they are looked at."""

        def __init__(self, count):
            self.count = count

        def __len__(self):
            return self.count

        def __getitems__(self, rows):
            generator = torch.Generator().manual_seed(rows[0])
            # 4 kB a row: 100,000 of them would be 400 MB.
            x = torch.rand(len(rows), 1024, generator=generator)
            return list(zip(x, torch.zeros(len(rows), dtype=torch.int64).unbind(), strict=True))

        def __getitem__(self, row):
            return self.__getitems__([row])[0]

    torch.manual_seed(0)
    model = nn.Linear(1024, 2)
    model.bias.data = torch.tensor([0.3, 0.0])

    def run(count):
        loader = DataLoader(Endlessly(count), batch_size=512)
        return robust_accuracy(model, loader, eps=0.002, norm="linf", steps=2)

    run(2000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = run(100_000)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert found.total == 100_000
    assert 0 < found < found.standard
    assert grown < 60  # MB


# --- Strength ---


def robust_models(standard, robust):
    return {"standard": standard, "robust": robust}


@pytest.mark.slow
@pytest.mark.parametrize("which", ["standard", "robust"])
@pytest.mark.parametrize("norm", BALLS)
def test_fast_is_as_strong_as_standard(standard, robust, digits, which, norm, recwarn):
    model, rows = robust_models(standard, robust)[which], subset(digits, 40)
    eps = BALLS[norm][0]
    fast = robust_accuracy(model, rows, eps=eps, norm=norm, seed=0)
    assert which == "standard" or not (fast.warnings or recwarn.list)  # of a sound model
    # The whole budgets are too long for a test: tests/benchmarks/bench_strength.py has them.
    full = AutoAttack(eps=eps, norm=norm).attacks[:2]
    full = [*full, Square(eps=eps, norm=norm, queries=300)]
    slow = robust_accuracy(model, rows, attack=full, seed=0)
    assert abs(fast - slow) <= 1 / 40 + 1e-9
    assert 0 < slow < slow.standard


class Far(nn.Module):
    """The only class that can be reached is the least likely one, against the loss's gradient."""

    def forward(self, x):
        mean = x.flatten(1).mean(1, keepdim=True)
        return torch.cat([10 * mean, torch.ones(len(x), 8), 62 * mean - 40], dim=1)


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.3), ("l2", 2.4), ("l1", 19.2)])
def test_fast_reaches_the_least_likely_class(norm, eps):
    rows = TensorDataset(torch.full((8, 1, 8, 8), 0.5), torch.zeros(8, dtype=torch.int64))
    assert robust_accuracy(Far(), rows, eps=eps, norm=norm, seed=0) == 0
    assert robust_accuracy(Far(), rows, eps=0.5 * eps, norm=norm, seed=0) == 1
    untargeted = APGD(eps=eps, norm=norm, steps=50, loss="margin", restarts=5)
    assert norm == "l1" or robust_accuracy(Far(), rows, attack=untargeted, seed=0) == 1


@pytest.mark.slow
def test_it_is_no_weaker_than_pgd(robust, digits):
    rows = subset(digits, 80)
    fast = robust_accuracy(robust, rows, eps=0.1, norm="linf", seed=0)
    pgd = robust_accuracy(robust, rows, eps=0.1, norm="linf", steps=50)
    assert fast <= pgd
    assert fast < robust_accuracy(robust, rows, eps=0.05, norm="linf", seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.parametrize("version", ["fast", "standard"])
def test_few_classes(classes, norm, version):
    # A linear model's optimum is known: with two classes that of the one margin.
    torch.manual_seed(0)
    model = nn.Linear(6, classes).double()
    x = torch.rand(20, 6, dtype=torch.float64)
    with torch.no_grad():
        y = model(x).argmax(1)
        logits = model(x)
    dual = {"linf": 1, "l2": 2, "l1": np.inf}[norm]
    others = torch.arange(classes)[None].expand(20, -1)
    gaps = logits.gather(1, y[:, None]) - logits
    steepness = torch.linalg.vector_norm(model.weight[y][:, None] - model.weight, dual, dim=2)
    distance = torch.where(others == y[:, None], torch.inf, gaps / steepness.clamp_min(1e-12))
    distance = distance.amin(1).detach()
    eps = float(distance.sort().values[9:11].mean())
    attack = AutoAttack(eps=eps, norm=norm, version=version, bounds=(-50.0, 50.0))
    attacks = [a if not isinstance(a, Square) else Square(**{**vars(a), "queries": 20})
               for a in attack.attacks]  # fmt: skip
    found = robust_accuracy(model, TensorDataset(x, y), attack=attacks, seed=0)
    assert torch.equal(found.correct, distance > eps)


# --- Compilation ---


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
def test_a_compiled_model_gives_the_same_verdicts(standard, digits):
    rows = subset(digits, 40)
    options = {"eps": 0.06, "norm": "linf", "steps": 3, "batch_size": 16}
    expected = robust_accuracy(standard, rows, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "compile=True")  # it must not fall back here
        found = robust_accuracy(standard, rows, **options, compile=True)
    assert torch.equal(found.correct, expected.correct)


def test_without_a_compiler_it_warns_and_goes_on(standard, digits, monkeypatch):
    class BrokenError(RuntimeError):
        __module__ = "torch._inductor.exc"

    def compiled(module, **options):
        def fail(*_):
            raise BrokenError("no C++ compiler")

        return fail

    monkeypatch.setattr(torch, "compile", compiled)
    rows = subset(digits, 20)
    options = {"eps": 0.06, "norm": "linf", "steps": 2}
    with pytest.warns(UserWarning, match="compile=True: continues without"):
        found = robust_accuracy(standard, rows, **options, compile=True)
    assert torch.equal(found.correct, robust_accuracy(standard, rows, **options).correct)
