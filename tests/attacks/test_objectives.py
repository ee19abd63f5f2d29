"""Objectives and methods of adversarial training: closed forms, and steps taken by hand."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import advfeat as af
from advfeat import losses
from advfeat.training import Options


def blobs(count=60, classes=3):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(count) % classes
    return TensorDataset(
        0.8 * F.one_hot(y, classes) + 0.2 * torch.rand(count, classes, generator=generator), y
    )


def normed():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def assert_close_weights(model, twin):
    for name, tensor in twin.state_dict().items():
        torch.testing.assert_close(
            model.state_dict()[name], tensor, msg=lambda m, n=name: f"{n}: {m}"
        )


# --- Losses ---


def logits(count=16, classes=5, seed=0):
    return 3 * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed))


def test_divergence_is_that_of_the_two_softmaxes():
    clean, attacked = logits(seed=1), logits(seed=2)
    p, q = clean.softmax(1), attacked.softmax(1)
    torch.testing.assert_close(losses.divergence(clean, attacked), (p * (p / q).log()).sum(1))
    assert losses.divergence(clean, clean + 7).abs().max() < 1e-5


def test_divergence_stays_finite_where_a_class_is_impossible():
    found = losses.divergence(torch.tensor([[0.0, -200.0]]), torch.tensor([[0.0, -400.0]]))
    assert torch.isfinite(found).all()


def test_boosted_cross_entropy_adds_the_likeliest_wrong_class():
    z, y = logits(), torch.arange(16) % 5
    p = z.softmax(1)
    expected = []
    for row, label in zip(p, y.tolist(), strict=True):
        wrong = max(float(v) for k, v in enumerate(row) if k != label)
        expected.append(-math.log(row[label]) - math.log(max(1 - wrong, 1e-4)))
    torch.testing.assert_close(losses.boosted_cross_entropy(z, y), torch.tensor(expected))


def test_boosted_cross_entropy_of_a_sure_mistake_is_finite_with_a_finite_gradient():
    z = torch.tensor([[200.0, 0.0]], requires_grad=True)
    losses.boosted_cross_entropy(z, torch.tensor([1])).sum().backward()
    assert torch.isfinite(z.grad).all()


def test_doubted_divergence_counts_doubt_of_the_label():
    clean, attacked, y = logits(seed=1), logits(seed=2), torch.arange(16) % 5
    doubt = 1 - clean.softmax(1)[torch.arange(16), y]
    expected = losses.divergence(clean, attacked) * doubt
    torch.testing.assert_close(losses.doubted_divergence(clean, attacked, y), expected)


# --- TRADES and MART ---


def by_hand(twin, rows, objective, beta, attack, epochs=2):
    """The definition: attack a frozen copy, then one step on both batches."""
    x, y = rows
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    twin.train()
    for rate in (0.1, 0.01)[:epochs]:
        optimizer.param_groups[0]["lr"] = rate
        other = copy.deepcopy(twin).eval()
        x_adv = attack(other, x, y)
        clean, attacked = twin(x), twin(x_adv)
        if objective == "trades":
            p = clean.softmax(1)
            divergence = F.kl_div(attacked.log_softmax(1), p, reduction="batchmean")
            loss = F.cross_entropy(clean, y) + beta * divergence
        else:
            wrong = attacked.softmax(1).scatter(1, y[:, None], 0.0).amax(1)
            doubt = 1 - clean.softmax(1).gather(1, y[:, None]).squeeze(1)
            kl = F.kl_div(attacked.log_softmax(1), clean.softmax(1), reduction="none").sum(1)
            loss = F.cross_entropy(attacked, y) - (1 - wrong).log().mean()
            loss = loss + beta * (kl * doubt).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("beta", [None, 2.0])
@pytest.mark.parametrize("objective", ["trades", "mart"])
def test_objectives_are_their_definitions(objective, beta):
    model, twin, rows = normed(), normed(), blobs().tensors
    # No attack to speak of: what is trained on are two equal batches, up to rounding.
    found = af.PGD(eps=1e-7, norm="linf", steps=1, random_start=True, seed=0)
    af.adversarial_fit(model, [rows], attack=found, objective=objective, beta=beta, epochs=2)
    default = {"trades": 6.0, "mart": 5.0}[objective]
    by_hand(twin, rows, objective, default if beta is None else beta, lambda m, x, y: x)
    assert_close_weights(model, twin)


def test_mart_attacks_by_the_cross_entropy_from_beside_the_input():
    # On a linear model any start in the ball ends on the same corner.
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    twin, rows = copy.deepcopy(model), blobs().tensors
    attack = af.PGD(eps=0.1, norm="linf", steps=7, step_size=0.1)
    af.adversarial_fit(model, [rows], attack=attack, objective="mart", epochs=1)
    by_hand(twin, rows, "mart", 5.0, attack, epochs=1)
    assert_close_weights(model, twin)


class Calls:
    """Forward passes of a model while it is frozen (attacked) and while it learns."""

    def __init__(self, model):
        self.inputs, self.frozen = [], []
        watched = next(model.parameters())

        def note(_, inputs):
            self.inputs.append(inputs[0].detach().clone())
            self.frozen.append(not watched.requires_grad)

        model.register_forward_pre_hook(note)

    def attacks(self):
        return [x for x, frozen in zip(self.inputs, self.frozen, strict=True) if frozen]


@pytest.mark.parametrize("random_start", [False, True])
def test_trades_computes_the_clean_logits_once_a_step_not_once_an_attack_step(random_start):
    model, (x, y) = normed(), blobs().tensors
    calls = Calls(model)
    settings = {"eps": 0.1, "norm": "l2", "steps": 4, "random_start": random_start, "seed": 0}
    af.adversarial_fit(model, [(x, y)] * 2, objective="trades", epochs=1, **settings)
    clean = [len(seen) == len(x) and torch.equal(seen, x) for seen in calls.attacks()]
    assert sum(clean) == 2  # once in each of two steps
    # Before them a sample to count the classes, and the inspection of the model.
    assert len(clean) - clean.index(True) == 2 * (1 + 4)


def test_trades_attack_climbs_the_divergence_though_it_is_flat_at_the_input():
    model, (x, y) = normed(), blobs().tensors
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    model(x)  # statistics
    calls = Calls(model)
    af.adversarial_fit(
        model, [(x, y)], objective="trades", eps=0.2, norm="linf", epochs=1, optimizer=still, seed=0
    )
    attacked = calls.inputs[-1]
    attacks = calls.attacks()
    clean = next(n for n, seen in enumerate(attacks) if seen.shape == x.shape and (seen == x).all())
    start = attacks[clean + 1]
    assert 0 < (start - x).abs().max() < 0.01
    model.eval()
    clean = model(x).detach()
    assert (
        losses.divergence(clean, model(attacked)) > losses.divergence(clean, model(start))
    ).all()
    assert (attacked - x).abs().max() <= 0.2 + 1e-6


def test_label_smoothing_is_that_of_cross_entropy():
    model, twin, (x, y) = normed(), normed(), blobs().tensors
    af.fit(model, [(x, y)], epochs=1, options=Options(label_smoothing=0.2))
    optimizer = torch.optim.SGD(twin.train().parameters(), lr=0.1, weight_decay=5e-4)
    F.cross_entropy(twin(x), y, label_smoothing=0.2).backward()
    optimizer.step()
    assert_close_weights(model, twin)


# --- Fast ---


def test_fast_training_takes_one_step_of_a_quarter_more_than_eps_from_a_random_start():
    model, (x, y) = normed(), blobs().tensors
    calls = Calls(model)
    settings = {"eps": 0.1, "norm": "linf", "epochs": 1, "seed": 0}
    af.adversarial_fit(model, [(x, y)], method="fast", **settings)
    first = calls.frozen.index(False)
    start, learned = calls.inputs[first - 1], calls.inputs[first]
    away = (start - x).abs()
    assert away.max() <= 0.1 + 1e-6
    assert 0.04 < away.mean() < 0.06
    # 1.25 eps from anywhere in the ball is at least a quarter of eps beyond the center.
    inside = (x > 0.1) & (x < 0.9)
    moved = (learned - x).abs()[inside]
    assert ((moved > 0.025 - 1e-5) & (moved < 0.1 + 1e-6)).all()


# --- Free ---


def test_free_training_is_the_replay_of_each_batch_with_both_gradients_of_one_pass():
    model, twin, (x, y) = normed(), normed(), blobs().tensors
    batches = [(x[:30], y[:30]), (x[30:], y[30:])]
    af.adversarial_fit(
        model, batches, method="free", steps=3, eps=0.1, norm="linf", epochs=1, lr=0.05
    )
    optimizer = torch.optim.SGD(twin.train().parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    delta = torch.zeros(30, 3)
    for x_batch, y_batch in batches:
        for _ in range(3):
            leaf = (x_batch + delta).clamp(0, 1).requires_grad_()
            optimizer.zero_grad()
            F.cross_entropy(twin(leaf), y_batch).backward()
            optimizer.step()
            moved = leaf.detach() + 0.1 * leaf.grad.sign()
            delta = (moved - x_batch).clamp(-0.1, 0.1)
            delta = (x_batch + delta).clamp(0, 1) - x_batch
    assert_close_weights(model, twin)


def test_free_training_takes_a_gradient_for_each_pass_and_no_more():
    model, rows = normed(), blobs()
    calls = Calls(model)
    af.adversarial_fit(
        model, rows, method="free", eps=0.1, norm="l2", epochs=2, batch_size=30, seed=0
    )
    # A sample to count the classes, and the inspection of the model.
    assert len(calls.attacks()) <= 3
    assert len(calls.inputs) - len(calls.attacks()) == 2 * 2 * 8


# --- What does not go together ---


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"objective": "trade"}, "objective='trade': unknown"),
        ({"method": "slow"}, "method='slow': unknown"),
        ({"beta": 6.0}, "beta=6.0: the objective 'pgd' has one term"),
        ({"objective": "trades", "beta": -1.0}, "beta=-1.0: must be at least 0"),
        ({"objective": "trades", "mix": 0.5}, "mix=0.5: 'trades' trains on clean inputs"),
        ({"objective": "mart", "options": Options(label_smoothing=0.1)}, "label_smoothing=0.1"),
        ({"method": "fast", "steps": 3}, "steps=3: the method 'fast' takes one"),
        ({"method": "free", "objective": "trades"}, "method='free'"),
        ({"method": "free", "mix": 0.5}, "method='free'"),
        ({"method": "free", "options": Options(awp=0.01)}, "method='free'.*no awp"),
        ({"method": "free", "options": Options(accumulate=2)}, "method='free'.*no accumulate"),
        (
            {"method": "fast", "attack": af.PGD(eps=0.1, norm="l2"), "eps": None, "norm": None},
            "method='fast' is how examples",
        ),
        ({"batch_size": 8, "data": [blobs().tensors]}, "batch_size=8: the data come in batches"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(bad, message):
    model = normed()
    before = copy.deepcopy(model.state_dict())
    settings = {"data": blobs(), "eps": 0.1, "norm": "l2", "epochs": 1} | bad
    with pytest.raises(ValueError, match=message):
        af.adversarial_fit(model, **settings)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("ball", [{}, {"eps": 0.1, "norm": "l2"}])
def test_nan_inputs_are_refused_in_the_first_batch(ball):
    model, (x, y) = normed(), blobs().tensors
    before = copy.deepcopy(model.state_dict())
    train = af.adversarial_fit if ball else af.fit
    with pytest.raises(ValueError, match=r"inputs\[\d+\]='NaN or infinity'"):
        train(model, TensorDataset(x * torch.nan, y), epochs=1, **ball)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
