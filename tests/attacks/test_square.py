"""Square Attack: the laws of its search, and what it reaches where the optimum is known."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toys import NORMS, predicted, sizes

import advfeat as af
from advfeat import losses
from advfeat.attacks._square import Square, SquareState, square
from advfeat.attacks.base import prepare_batch
from advfeat.attacks.pool import attack_batch, worst_case
from advfeat.attacks.samples import Batch
from advfeat.model import attackable

SHAPE = (3, 6, 6)
EPS = {"l1": 4.0, "l2": 0.8, "linf": 0.08}


class Exact(nn.Module):
    """Logits whose bits do not depend on the batch, as those of a matrix product would."""

    def __init__(self, shape=SHAPE, classes=4, hidden=16, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        features = math.prod(shape)
        first = torch.randn(hidden, features, generator=generator) / math.sqrt(features)
        self.first = nn.Parameter(first.to(dtype))
        self.second = nn.Parameter(torch.randn(classes, hidden, generator=generator).to(dtype))

    def forward(self, x):
        found = (3 * (2 * x.flatten(1)[:, None] - 1) * self.first).sum(2).relu()
        return (found[:, None] * self.second).sum(2)


class ExactWithConvolution(Exact):
    """Its images come in channels_last."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Conv2d(3, 3, 1)


class Constant(nn.Module):
    """Never fooled, and remembers every input."""

    def __init__(self, classes=2):
        super().__init__()
        self.classes, self.seen = classes, []

    def forward(self, x):
        self.seen.append(x.clone())
        return torch.eye(self.classes)[0].expand(len(x), -1)


class Linear(nn.Module):
    """Two classes, the first by a wide margin: the search never ends early."""

    def __init__(self, shape):
        super().__init__()
        self.weight = torch.randn(math.prod(shape), generator=torch.Generator().manual_seed(2))

    def forward(self, x):
        rise = (x.flatten(1) * self.weight).sum(1)
        return torch.stack([torch.full_like(rise, 1e3), rise], 1)


def batch(count=8, shape=SHAPE, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, *shape, generator=generator, dtype=dtype)


def margins(model, x, y):
    with torch.no_grad():
        return losses.margin(model(x), y)


def rows_of(state, rows):
    return SquareState(*(field[rows] for field in state))


# --- Ball and box ---

SHAPES = [
    (1,),
    (2,),
    (40,),
    (3, 7),
    (5, 1, 1),
    (1, 1, 9),
    (1, 8, 8),
    (3, 6, 6),
    (2, 3, 11),
    (4, 12, 2),
    (2, 2, 3, 4),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.slow
def test_every_rank_stays_in_ball_and_box(norm, shape):
    model, x = Exact(shape), batch(5, shape)
    x[0], x[1] = 0.0, 1.0
    y = predicted(model, x)
    eps = torch.tensor([0.5, 0.0, 0.01, 0.2, 0.9])
    x_adv = square(model, x, y, eps=eps, norm=norm, queries=40, seed=0)
    assert x_adv.shape == x.shape
    assert x_adv.dtype == torch.float32
    assert (sizes(x_adv, x, norm) <= eps.numpy() + 1e-6).all()
    assert ((x_adv >= 0) & (x_adv <= 1)).all()
    assert torch.equal(x_adv[1], x[1])


@pytest.mark.parametrize("norm", NORMS)
@settings(max_examples=10, deadline=None)
@given(
    eps=st.floats(0, 1),
    p_init=st.floats(0.01, 1),
    targeted=st.booleans(),
    seed=st.integers(-(2**70), 2**70),
)
def test_results_lie_in_ball_and_box(norm, eps, **options):
    model, x = Exact(), batch(4)
    x[0], x[1] = 0.0, 1.0
    x_adv = square(model, x, torch.arange(4), eps=eps, norm=norm, queries=15, **options)
    assert (sizes(x_adv, x, norm) <= eps + 1e-6).all()
    assert ((x_adv >= 0) & (x_adv <= 1)).all()


@pytest.mark.parametrize(("norm", "eps"), [("l1", 12.0), ("l2", 1.0), ("linf", 8 / 255)])
def test_every_candidate_at_image_size_lies_in_ball_and_box(norm, eps):
    # Float32 rounding grows with the number of entries.
    model, x = Constant(), batch(4, (3, 32, 32))
    square(model, x, torch.zeros(4).long(), eps=eps, norm=norm, queries=60, seed=0)
    del model.seen[:-60]  # the inspection comes before the queries
    assert len(model.seen) == 60
    for candidate in model.seen:
        assert (sizes(candidate, x, norm) <= eps + 1e-6).all()
        assert ((candidate >= 0) & (candidate <= 1)).all()


@pytest.mark.parametrize("norm", NORMS)
def test_the_radius_is_used(norm):
    # Far from the walls, every candidate is on the sphere.
    model, x = Constant(), torch.full((3, 3, 16, 16), 0.5)
    square(model, x, torch.zeros(3).long(), eps=0.3, norm=norm, queries=60, seed=0)
    del model.seen[:-60]  # the inspection comes before the queries
    for candidate in model.seen:
        np.testing.assert_allclose(sizes(candidate, x, norm), 0.3, rtol=1e-4)


def test_other_bounds_hold():
    model, x = Exact(), 4 * batch() - 2
    x_adv = square(
        model, x, predicted(model, x), eps=3.0, norm="linf", bounds=(-2.0, 2.0), queries=20
    )
    assert x_adv.min() == -2
    assert x_adv.max() == 2


# --- What it finds ---


@pytest.mark.parametrize("shape", [(20,), (2, 9), (1, 5, 5), (3, 3, 3)], ids=str)
def test_linf_reaches_the_optimum_of_a_small_linear_model(shape):
    model, x = Linear(shape), batch(4, shape)
    x_adv = square(model, x, torch.zeros(4).long(), eps=0.4, norm="linf", queries=400, seed=0)
    best = (x + 0.4 * model.weight.view(shape).sign()).clamp(0, 1)
    torch.testing.assert_close(x_adv, best, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("norm", "shape", "share"),
    [
        # On such images the reference implementation comes to 0.8, 0.4 and 0.7 of the optimum
        # with 2000 queries.
        ("linf", (3, 10, 10), 0.7),
        ("l2", (3, 10, 10), 0.35),
        ("l1", (3, 10, 10), 0.7),
        ("l2", (40,), 0.65),
        ("l1", (40,), 0.65),
    ],
)
def test_how_near_it_comes_to_the_optimum_of_a_larger_linear_model(norm, shape, share):
    model, x = Linear(shape), torch.full((4, *shape), 0.5)
    x_adv = square(model, x, torch.zeros(4).long(), eps=0.4, norm=norm, queries=400, seed=0)
    rise = ((x_adv - x).flatten(1) * model.weight).sum(1).mean().item()
    dual = {"linf": 1, "l2": 2, "l1": np.inf}[norm]
    optimum = 0.4 * np.linalg.norm(model.weight.numpy(), dual)
    assert share * optimum <= rise <= optimum + 1e-4


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.slow
def test_it_fools_models_of_any_number_of_classes(norm, targeted, classes):
    model, x = Exact(classes=classes), batch(12)
    clean = predicted(model, x)
    y = (clean + 1) % classes if targeted else clean
    eps = 2 * EPS[norm]
    x_adv = square(model, x, y, eps=eps, norm=norm, targeted=targeted, queries=60, seed=0)
    fooled = (predicted(model, x_adv) == y) == targeted
    # A random point of the ball's surface finds far less.
    assert fooled.float().mean() >= (0.25 if targeted and classes > 3 else 0.5)
    assert (sizes(x_adv, x, norm) <= eps + 1e-6).all()


@pytest.mark.parametrize("norm", NORMS)
def test_it_finds_what_masked_gradients_hide(norm):
    class Masked(Exact):
        def forward(self, x):
            return super().forward((x * 64).round() / 64)

    model, x = Masked(), batch(12)
    y, eps = predicted(model, x), 2 * EPS[norm]
    assert torch.equal(af.pgd(model, x, y, eps=eps, norm=norm), x)
    x_adv = square(model, x, y, eps=eps, norm=norm, queries=60, seed=0)
    assert (predicted(model, x_adv) != y).float().mean() >= 0.5


def test_no_gradient_is_taken():
    class Watched(Exact):
        def forward(self, x):
            assert not torch.is_grad_enabled()
            assert not x.requires_grad
            return super().forward(x)

    attack, x = Square(eps=0.1, norm="l2", queries=5, seed=0), batch(3)
    with attackable(Watched()) as net:
        attack.run(net, attack.init(net, Batch(x, torch.arange(3), torch.arange(3))))


@pytest.mark.parametrize("norm", NORMS)
def test_success_is_what_the_model_says_of_the_result(norm):
    model, x = Exact(), batch(30)
    y = predicted(model, x)
    attack = Square(eps=EPS[norm] / 2, norm=norm, queries=40, seed=0)
    with attackable(model) as net:
        state = attack.run(net, attack.init(net, prepare_batch(net, x, y, None, (0.0, 1.0))))
    x_adv = attack.result(state)
    assert torch.equal(state.success, predicted(model, x_adv) != y)
    assert torch.equal(state.value, margins(model, x_adv, y))
    assert torch.equal(state.success, state.value > 0)
    assert attack.finished(state).all()
    assert 0 < state.success.sum() < 30
    assert (state.step[~state.success] == 40).all()
    # What failed is perturbed too.
    assert (sizes(x_adv, x, norm) > 0.5 * EPS[norm] / 2).all()


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_the_margin_never_falls_and_a_fooled_sample_stays_put(norm, targeted):
    model, x = Exact(), batch(20)
    y = (predicted(model, x) + targeted) % 4
    attack = Square(eps=EPS[norm], norm=norm, queries=40, targeted=targeted, seed=0)
    with attackable(model) as net:
        state = attack.init(net, prepare_batch(net, x, y, None, (0.0, 1.0), targeted))
        for query in range(1, 41):
            before, state = state, attack.step(net, state)
            assert (state.value >= before.value).all()
            still = attack.finished(before)
            for old, new in zip(before, state, strict=True):
                assert torch.equal(old[still], new[still])
            assert (state.step[~still] == query).all()
        assert still.any()
        assert not still.all()


def test_a_start_is_where_the_search_begins():
    model, x = Exact(), batch(4)
    start = (x + 0.05).clamp(0, 1)
    attack = Square(eps=0.02, norm="linf", queries=1, seed=0)
    with attackable(model) as net:
        rows = prepare_batch(net, x, torch.arange(4), None, (0.0, 1.0))._replace(start=start)
        result = attack.result(attack.run(net, attack.init(net, rows)))
    torch.testing.assert_close(result, (x + 0.02).clamp(0, 1))


# --- The search, watched on a model that is never fooled ---


def published_share(iteration, queries, p_init):
    """The schedule of the paper's code, written down for 10,000 iterations."""
    place = int(iteration / queries * 10_000)
    steps = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
    return p_init / 2 ** sum(place > step for step in steps)


@pytest.mark.parametrize(("height", "width"), [(20, 20), (12, 30), (1, 50)])
def test_the_window_shrinks_as_published(height, width):
    # With many channels, a pixel of the window that stays as it was is next to impossible.
    queries, model, x = 150, Constant(), torch.full((3, 24, height, width), 0.5)
    square(model, x, torch.zeros(3).long(), eps=0.1, norm="linf", queries=queries, seed=0)
    del model.seen[:-queries]  # the inspection comes before the queries
    for iteration, candidate in enumerate(model.seen[1:]):
        area = published_share(iteration, queries, 0.8) * height * width
        side = max(round(math.sqrt(area)), 1)
        for changed in (candidate != model.seen[0]).any(1):
            tall, wide = (int(changed.any(axis).sum()) for axis in (1, 0))
            assert changed.sum() == tall * wide
            if side <= min(height, width):
                assert (tall, wide) == (side, side)
            else:
                assert (tall, wide) == (min(side, height), round(area / min(side, height)))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (30,)], ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.slow
def test_no_query_is_spent_on_the_current_iterate(norm, shape):
    model, x = Constant(), torch.full((6, *shape), 0.5)
    square(model, x, torch.zeros(6).long(), eps=0.1, norm=norm, queries=100, seed=0)
    del model.seen[:-100]  # the inspection comes before the queries
    moved = [(candidate - model.seen[0]).abs() > 1e-5 for candidate in model.seen[1:]]
    assert torch.stack(moved).flatten(2).any(2).float().mean() >= (0.9 if norm == "l1" else 1.0)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(1, 7, 7), (9,)])
@pytest.mark.slow
def test_every_entry_is_tried(norm, shape):
    model, x = Constant(), torch.full((10, *shape), 0.5)
    square(model, x, torch.zeros(10).long(), eps=0.1, norm=norm, queries=100, seed=0)
    del model.seen[:-100]  # the inspection comes before the queries
    tried = sum((candidate != model.seen[0]).float() for candidate in model.seen)
    assert (tried.sum(0) > 0).all()


@pytest.mark.parametrize("norm", NORMS)
def test_no_more_queries_than_allowed_and_none_once_fooled(norm):
    model, x = Exact(), batch(20)
    y = predicted(model, x)
    rows = []
    model.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    attack = Square(eps=EPS[norm], norm=norm, queries=50, seed=0)
    with attackable(model) as net:
        state = attack_batch(attack, net, Batch(x, y, torch.arange(20)))
    assert len(rows) <= attack.max_evaluations == 50
    # A sample that is fooled leaves at once.
    assert sum(rows) == int(state.step.sum())
    easy = square(model, x, (y + 1) % 4, eps=0.0, norm=norm, queries=50)
    assert torch.equal(easy, x)
    assert rows[-1] == 20  # one query each


# --- What a result depends on, and what it does not ---


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [Exact, ExactWithConvolution])
@pytest.mark.parametrize("norm", NORMS)
def test_a_sample_does_not_depend_on_its_batch(norm, model_type):
    model, x = model_type(), batch(8)
    y = predicted(model, x)
    ids = torch.tensor([5, 0, 91, 7, 3, 2**40, 12, 4])
    attack = Square(eps=EPS[norm] / 2, norm=norm, queries=30, seed=3)
    whole = attack(model, x, y, index=ids)
    for size in (1, 3):
        rows = zip(x.split(size), y.split(size), ids.split(size), strict=True)
        parts = torch.cat([attack(model, a, b, index=c) for a, b, c in rows])
        assert torch.equal(parts, whole)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(attack(model, x[order], y[order], index=ids[order]), whole[order])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.slow
def test_the_pool_does_not_matter(norm):
    model, x = Exact(), batch(20)
    y = predicted(model, x)
    attack = Square(eps=EPS[norm] / 2, norm=norm, queries=30, seed=3).stop_at_success()
    whole = attack(model, x, y)
    for pool in (3, 50):
        with attackable(model) as net:
            rows = prepare_batch(net, x, y, None, (0.0, 1.0))
            verdicts = list(worst_case([attack], net, [rows], pool))
        order = torch.cat([v.ids for v in verdicts]).argsort()
        assert torch.equal(torch.cat([v.adversarial for v in verdicts])[order], whole)
        success = torch.cat([v.success for v in verdicts])[order]
        assert torch.equal(success, predicted(model, whole) != y)
    assert success.any()
    assert not success.all()


@pytest.mark.parametrize("norm", NORMS)
def test_samples_at_different_stages_go_on_as_if_alone(norm):
    model, x = Exact(), batch(9)
    y = predicted(model, x)
    attack = Square(eps=EPS[norm] / 3, norm=norm, queries=25, seed=1)
    with attackable(model) as net:
        start = attack.init(net, prepare_batch(net, x, y, None, (0.0, 1.0)))
        alone = attack.run(net, start)
        parts = []
        for place, ahead in enumerate((0, 4, 17)):
            part = rows_of(start, slice(3 * place, 3 * place + 3))
            for _ in range(ahead):
                part = attack.step(net, part)
            parts.append(part)
        mixed = SquareState(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
        assert len(mixed.step.unique()) >= 3
        for _ in range(attack.max_evaluations):
            mixed = attack.step(net, mixed)
    for one, other in zip(mixed, alone, strict=True):
        assert torch.equal(one, other)


def test_float64_inputs_stay_float64():
    model, x = Exact(dtype=torch.float64), batch(5, dtype=torch.float64)
    for norm in NORMS:
        x_adv = square(model, x, torch.arange(5) % 4, eps=0.1, norm=norm, queries=10, seed=0)
        assert x_adv.dtype == torch.float64
        assert (sizes(x_adv, x, norm) <= 0.1 + 1e-12).all()


@pytest.mark.parametrize("norm", NORMS)
def test_the_same_seed_gives_the_same_result_and_another_seed_another(norm):
    model, x = Exact(), batch()
    y = predicted(model, x)

    def attack(seed):
        return square(model, x, y, eps=EPS[norm] / 4, norm=norm, queries=10, seed=seed)

    assert torch.equal(attack(3), attack(3))
    assert not torch.equal(attack(3), attack(4))


def test_without_a_seed_torch_manual_seed_governs():
    model, x = Exact(), batch()
    y = predicted(model, x)

    def attack():
        return square(model, x, y, eps=0.01, norm="linf", queries=5)

    torch.manual_seed(0)
    first, second = attack(), attack()
    torch.manual_seed(0)
    assert torch.equal(attack(), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("norm", NORMS)
def test_the_global_random_state_and_the_inputs_are_untouched(norm):
    model, x = Exact(), batch()
    y, before = predicted(model, x), x.clone()
    state = torch.get_rng_state()
    square(model, x, y, eps=EPS[norm], norm=norm, queries=5, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, before)


@pytest.mark.parametrize("norm", NORMS)
def test_one_eps_a_sample_equals_separate_calls(norm):
    model, x = Exact(), batch(3)
    y = predicted(model, x)
    eps = torch.tensor([0.0, 0.05, 0.2])
    together = Square(eps=eps, norm=norm, queries=20, seed=1)(model, x, y)
    for row in range(3):
        attack = Square(eps=float(eps[row]), norm=norm, queries=20, seed=1)
        alone = attack(model, x[row : row + 1], y[row : row + 1], index=torch.tensor([row]))
        assert torch.equal(together[row : row + 1], alone)


@pytest.mark.parametrize("norm", NORMS)
def test_robust_accuracy_counts_the_samples_it_does_not_fool(norm):
    model, x = Exact(), batch(20)
    y = predicted(model, x)
    attack = Square(eps=EPS[norm] / 2, norm=norm, queries=30, seed=3)
    resisted = predicted(model, attack(model, x, y)) == y
    rows = torch.utils.data.TensorDataset(x, y)
    found = af.robust_accuracy(model, rows, attack=attack, batch_size=6)
    assert torch.equal(found.correct, resisted)
    assert 0 < found.count < 20


# --- Bad settings ---


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"norm": "l3"}, "norm='l3'"),
        ({"eps": -1.0}, "eps"),
        ({"eps": 8.0, "norm": "linf"}, "8/255"),
        ({"eps": torch.ones(3)}, r"eps.shape=\(3,\)"),
        ({"queries": 0}, "queries=0"),
        ({"p_init": 0.0}, "p_init=0.0"),
        ({"p_init": 80.0}, "p_init=80.0"),
        ({"bounds": (1.0, 0.0)}, "bounds"),
    ],
)
def test_bad_settings_are_refused(bad, message):
    settings = {"eps": 0.1, "norm": "l2"} | bad
    with pytest.raises(ValueError, match=message):
        square(Exact(), batch(4), torch.arange(4), **settings)


@pytest.mark.parametrize("bad", [{"queries": 10.0}, {"seed": 0.5}, {"eps": "8"}, {"p_init": None}])
def test_settings_of_another_type_are_refused(bad):
    with pytest.raises(TypeError, match=next(iter(bad))):
        Square(**({"eps": 0.1, "norm": "l2"} | bad))
