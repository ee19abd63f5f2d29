"""The pool of survivors, and what every operation leaves behind: the model as it was."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

import advfeat as af
from advfeat.attacks import APGD, AutoAttack, Batch, invert
from advfeat.attacks.pool import Pool, drive, worst_case
from advfeat.model import Network, attackable

FEATURES, CLASSES = 6, 3
WANTED = ("ids", "adversarial", "success")


def curved():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(FEATURES, 12), nn.Tanh(), nn.Linear(12, CLASSES)).double()
    for parameter in net.parameters():
        parameter.data *= 3
    return net


def rows_that_are_right(model, count=40):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(count, FEATURES, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        return x, model(x).argmax(1)


def portions(x, y, size):
    ids = torch.arange(len(x)) + 100
    cut = zip(x.split(size), y.split(size), ids.split(size), strict=True)
    return [Batch(*parts) for parts in cut]


def pooled(model, attack, batches, pool_size):
    """All verdicts, in the order of their ids."""
    with attackable(model) as net:
        found = list(worst_case([attack], net, iter(batches), pool_size))
    ids, adversarial, success = gathered(found)
    order = ids.argsort()
    return ids[order], adversarial[order], success[order]


def gathered(verdicts):
    return (torch.cat([getattr(v, name) for v in verdicts]) for name in WANTED)


def attack_of(eps=0.15, norm="linf", steps=5, restarts=1):
    return af.PGD(eps=eps, norm=norm, steps=steps, restarts=restarts, returns="first", seed=3)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    count=st.integers(1, 30),
    portion=st.integers(1, 31),
    pool_size=st.integers(1, 40),
    steps=st.integers(1, 3),
    restarts=st.integers(1, 2),
)
def test_every_sample_leaves_exactly_once(count, portion, pool_size, steps, restarts):
    model = curved()
    x, y = rows_that_are_right(model, count)
    attack = attack_of(steps=steps, restarts=restarts)
    ids, adversarial, success = pooled(model, attack, portions(x, y, portion), pool_size)
    assert torch.equal(ids, torch.arange(count) + 100)
    assert adversarial.shape == x.shape
    assert success.shape == (count,)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_the_pool_size_does_not_change_a_verdict(norm):
    model = curved()
    x, y = rows_that_are_right(model)
    attack = attack_of(norm=norm, eps={"l1": 0.4, "l2": 0.2, "linf": 0.15}[norm], restarts=2)
    expected = pooled(model, attack, portions(x, y, 100), 100)
    for pool_size, portion in [(1, 7), (3, 5), (16, 40)]:
        found = pooled(model, attack, portions(x, y, portion), pool_size)
        assert torch.equal(found[2], expected[2])
        torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-9)
    assert 0 < expected[2].sum() < 40


@pytest.mark.parametrize(("norm", "order"), [("l1", 1), ("l2", 2), ("linf", np.inf)])
def test_what_counts_as_adversarial_is_adversarial(norm, order):
    model = curved()
    x, y = rows_that_are_right(model)
    attack = attack_of(norm=norm, eps={"l1": 0.4, "l2": 0.2, "linf": 0.15}[norm])
    _, adversarial, success = pooled(model, attack, portions(x, y, 9), 8)
    sizes = np.linalg.norm((adversarial - x).numpy(), order, axis=1)
    assert (sizes <= attack.eps + 1e-6).all()
    assert (sizes > 0).all()
    assert ((adversarial >= 0) & (adversarial <= 1)).all()
    with torch.no_grad():
        assert torch.equal(model(adversarial).argmax(1) != y, success)
    assert 0 < success.sum() < 40


class GradientCount:
    """Sizes of the batches that went forward with a gradient."""

    def __init__(self, model):
        self.sizes = []
        model.register_forward_hook(self.note)

    def note(self, module, inputs, output):
        if output.requires_grad:
            self.sizes.append(len(output))


def gradients_needed(model, x, y, steps, eps):
    """One for each iterate up to the first that fools; else one for every iterate."""
    with torch.no_grad():
        hits = [torch.zeros(len(x), dtype=torch.bool)]
        for k in range(1, steps + 1):
            x_adv = af.pgd(model, x, y, eps=eps, norm="linf", steps=k, step_size=eps / 3)
            hits.append(model(x_adv).argmax(1) != y)
    hits = torch.stack(hits)
    first = hits.int().argmax(0)
    return torch.where(hits.any(0), first + 1, steps + 1)


def test_a_fooled_sample_takes_no_more_gradients():
    model = curved()
    x, y = rows_that_are_right(model)
    needed = gradients_needed(model, x, y, steps=8, eps=0.15)
    counter = GradientCount(model)
    attack = af.PGD(eps=0.15, norm="linf", steps=8, step_size=0.05, returns="first")
    pooled(model, attack, portions(x, y, 10), 7)
    assert sum(counter.sizes) == needed.sum()
    assert sum(counter.sizes) < 8 * len(x)


def test_robust_accuracy_takes_no_gradient_of_samples_that_are_wrong():
    model = curved()
    x, y = rows_that_are_right(model)
    rows = TensorDataset(x, torch.where(torch.arange(40) % 2 == 0, y, (y + 1) % CLASSES))
    needed = gradients_needed(model, x[::2], y[::2], steps=8, eps=0.15)
    counter = GradientCount(model)
    attack = af.PGD(eps=0.15, norm="linf", steps=8, step_size=0.05)
    af.robust_accuracy(model, rows, attack=attack, batch_size=7)  # inspects the model
    counter.sizes.clear()
    found = af.robust_accuracy(model, rows, attack=attack, batch_size=7)
    # Three more of the samples that are robust in the end: have they a gradient at all, and does it
    # predict how the output changes?
    assert sum(counter.sizes) == needed.sum() + 3 * found.count
    assert found.standard.count == 20


def test_the_pool_is_nearly_full_while_samples_wait():
    model = curved()
    x, y = rows_that_are_right(model)
    waiting = [len(x)]

    def reading():
        for portion in portions(x, y, 5):
            waiting[0] -= len(portion.ids)
            yield portion

    counter = GradientCount(model)
    left = []
    model.register_forward_hook(lambda *_: left.append(waiting[0]))
    pooled(model, attack_of(), reading(), 8)
    sizes = [size for size, rest in zip(counter.sizes, left, strict=True) if rest > 0]
    assert len(sizes) > 3
    assert set(sizes) <= {7, 8}


def test_samples_are_read_no_sooner_than_needed():
    model = curved()
    x, y = rows_that_are_right(model)
    read = []

    def reading():
        for portion in portions(x, y, 4):
            read.append(len(portion.ids))
            yield portion

    with attackable(model) as net:
        next(iter(worst_case([attack_of(eps=0.9)], net, reading(), 6)))
    assert sum(read) == 8


def test_no_samples_give_no_verdicts():
    with attackable(curved()) as net:
        assert list(worst_case([attack_of()], net, iter([]), 4)) == []


class Close(nn.Module):
    """The two classes differ by ``gap`` at 1, where bfloat16's next number is 1.0078."""

    def __init__(self, gap):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(2))
        self.gap = gap

    def forward(self, x):
        z = nn.functional.linear(x, self.weight)
        return torch.cat([z[:, :1] * 0 + 1, z[:, :1] + 1 + self.gap], 1)


@pytest.mark.parametrize("gap", [-1e-4, 1e-4])
def test_a_low_precision_verdict_is_settled_in_float32(gap):
    # At x = 0 both logits are 1 in bfloat16; in float32 the label is right or wrong by the gap.
    x, y = torch.zeros(3, 2), torch.tensor([0, 1, 0])
    module = Close(gap).requires_grad_(False)
    net = Network(module, "bfloat16")
    attack = af.PGD(eps=1e-6, norm="linf", steps=2, returns="first")
    found = list(worst_case([attack], net, [Batch(x, y, torch.arange(3))], 3))
    ids, adversarial, success = gathered(found)
    expected = module(adversarial).argmax(1) != y[ids]
    assert torch.equal(success, expected)


# --- What is left behind ---


class Messy(nn.Module):
    """Mixed flags, a frozen parameter, gradients in place, and buffers that forward changes."""

    def __init__(self, fails_at=None):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten()
        )
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(3))
        self.fails_at = fails_at
        self.train()
        self.norm.eval()
        self.head.bias.requires_grad_(False)
        for parameter in self.parameters():
            parameter.grad = torch.randn_like(parameter)

    def forward(self, x):
        self.calls += 1
        if self.fails_at is not None and self.calls >= self.fails_at:
            raise ZeroDivisionError
        z = self.head(self.norm(self.body(x)))
        self.mean = z.detach().mean(0)
        return z


def snapshot(model):
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    gradients = {name: p.grad for name, p in model.named_parameters()}
    plain = {
        "training": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "objects": [id(t) for t in (*tensors.values(), *gradients.values())],
        "grad mode": torch.is_grad_enabled(),
        "python": random.getstate(),
    }
    arrays = [t.detach().clone() for t in (*tensors.values(), *gradients.values())]
    arrays += [torch.get_rng_state(), torch.from_numpy(np.random.get_state()[1].astype(np.int64))]  # noqa: NPY002
    return plain, arrays


def pictures():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(6, 1, 4, 4, generator=generator), torch.arange(6) % 3


def dataset():
    return TensorDataset(*pictures())


OPERATIONS = {
    "pgd": lambda m: af.pgd(m, *pictures(), eps=0.1, norm="l2", restarts=2, seed=0, steps=2),
    "fgsm": lambda m: af.fgsm(m, *pictures(), eps=0.1, norm="linf", random_start=True, seed=0),
    "invert": lambda m: invert(m, pictures()[0], pictures()[0].flip(0), steps=3),
    "accuracy": lambda m: af.accuracy(m, dataset(), batch_size=2),
    "robust_accuracy": lambda m: af.robust_accuracy(
        m, dataset(), eps=0.1, norm="l2", seed=0, batch_size=2
    ),
    "D_R": lambda m: af.construct_robust_dataset(m, dataset(), steps=2, seed=0, batch_size=2),
    "D_NR": lambda m: af.construct_nonrobust_dataset(
        m, dataset(), steps=2, seed=0, batch_size=2, start="noise", layer="body"
    ),
    "D_det": lambda m: af.construct_det_dataset(m, dataset(), steps=2, batch_size=2),
    "D_rand": lambda m: af.construct_rand_dataset(m, dataset(), steps=2, seed=0, batch_size=2),
}


def assert_same(found, expected):
    assert found[0] == expected[0]
    for a, b in zip(found[1], expected[1], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_model_and_the_random_state_are_left_as_they_were(operation):
    model = Messy()
    before = snapshot(model)
    OPERATIONS[operation](model)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("call", [1, 2, 3])
def test_the_model_is_left_as_it_was_by_a_failure_too(operation, call):
    model = Messy(fails_at=call)
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        OPERATIONS[operation](model)
    assert_same(snapshot(model), before)


def test_an_attack_in_training_mode_restores_statistics_too():
    model = Messy()
    before = snapshot(model)
    attack = af.PGD(eps=0.1, norm="l2", steps=2)
    attack(model, *pictures(), train=True)
    found = snapshot(model)
    assert found[0] == before[0]
    # All but torch's random state, which dropout draws from.
    for a, b in zip(found[1][:-2], before[1][:-2], strict=True):
        assert torch.equal(a, b)


def test_training_mode_is_another_attack():
    x, y = pictures()
    attack = af.PGD(eps=0.5, norm="l2", steps=2)
    assert not torch.equal(attack(Messy(), x, y, train=True), attack(Messy(), x, y))


def test_a_graph_that_the_user_holds_survives_an_attack():
    model, twin = Messy(), Messy()
    x, y = pictures()
    torch.manual_seed(3)
    loss = nn.functional.cross_entropy(model(x), y)
    af.pgd(model, x, y, eps=0.1, norm="l2", steps=2)
    loss.backward()
    torch.manual_seed(3)
    nn.functional.cross_entropy(twin(x), y).backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


# --- What a driver may cost ---


class SampleCount(nn.Module):
    """Counts the samples that go through a model, forward and with a gradient."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.samples = 0

    def forward(self, x):
        self.samples += len(x)
        return self.module(x)


def fragile(classes=10, features=16):
    """A linear model that any attack fools at once."""
    torch.manual_seed(0)
    return nn.Linear(features, classes)


def labelled(model, count, features=16, seed=0):
    x = torch.rand(count, features, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return x, model(x).argmax(1)


@pytest.mark.parametrize("version", ["fast", "standard"])
def test_an_ensemble_of_a_batch_costs_what_robust_accuracy_costs(version):
    # A19: all samples are fooled at once, and no later attack is to see any of them.
    model = fragile()
    x, y = labelled(model, 50)
    attack = AutoAttack(eps=0.5, norm="linf", version=version, seed=0)
    counted = SampleCount(model)
    attack(counted, x, y)  # the model is inspected at its first call
    counted.samples = 0
    assert (model(attack(counted, x, y)).argmax(1) != y).all()
    of_batch, counted.samples = counted.samples, 0
    af.robust_accuracy(counted, TensorDataset(x, y), attack=attack)
    assert of_batch <= counted.samples


@pytest.mark.slow
def test_an_ensemble_of_a_batch_agrees_with_robust_accuracy():
    model = fragile()
    x, y = labelled(model, 60)
    attack = AutoAttack(eps=0.02, norm="linf", version="fast", seed=0)
    robust = af.robust_accuracy(model, TensorDataset(x, y), attack=attack, keep_inputs=True)
    adversarial = attack(model, x, y)
    assert 0 < robust.count < 60
    assert torch.equal(model(adversarial).argmax(1) == y, robust.correct)
    fooled = ~robust.correct
    torch.testing.assert_close(adversarial[fooled], robust.adversarial[fooled])


def test_duplicate_indices_in_a_batch_do_not_mix_samples():
    model = fragile()
    x, y = labelled(model, 8)
    attack = AutoAttack(eps=0.03, norm="linf", version="fast", seed=0)
    same = attack(model, x, y, index=torch.zeros(8, dtype=torch.int64))
    assert ((same - x).abs() <= 0.03 + 1e-6).all()


@pytest.mark.parametrize("classes", [3, 4])
def test_rounds_towards_classes_that_do_not_exist_are_not_taken(classes):
    # A20: 9 targets asked for, and classes - 1 to aim at.
    model = SampleCount(fragile(classes))
    x, y = labelled(model.module, 5)
    attack = APGD(eps=1e-4, norm="linf", steps=20, targets=9, loss="margin", seed=0)
    attack(model, x, y)  # the model is inspected at its first call
    model.samples = 0
    attack(model, x, y)
    # One forward pass finds the likely classes, and each round evaluates its start too.
    assert model.samples <= 5 * (1 + (classes - 1) * 21)


def test_memory_does_not_grow_with_samples_that_are_fooled():
    # A21: what the first attack fools waits for nobody.
    model = fragile()
    x, y = labelled(model, 400)
    read = []

    def reading():
        for part in portions(x, y, 20):
            read.append(len(part.ids))
            yield part

    attacks = [attack_of(eps=0.9), attack_of(eps=0.9)]
    waiting = []
    with attackable(model) as net:
        given = 0
        for verdict in worst_case(attacks, net, reading(), 20):
            given += len(verdict.ids)
            waiting.append(sum(read) - given)
    assert given == 400
    assert max(waiting) <= 3 * 20


def test_one_large_batch_is_not_copied_for_every_sample_that_leaves():
    # A22: the queue hands out views of a batch, so that its cost is linear in any batching.
    model = fragile()
    x, y = labelled(model, 300)
    (whole,) = portions(x, y, 300)
    begun = []

    def begin(batch):
        begun.append(batch.inputs)
        return batch, attack_of().init(net, batch)

    with attackable(model) as net:
        pool = Pool(attack_of(), net, 16, begin)
        left = [kept.ids for kept, _ in drive(pool, [whole])]
    assert torch.equal(torch.cat(left).sort().values, whole.ids)
    storage = whole.inputs.untyped_storage().data_ptr()
    assert all(part.untyped_storage().data_ptr() == storage for part in begun)
