"""Masks, and eps and bounds by feature: closed forms on linear models, and what may not move."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from toys import NORMS, curved, predicted

import advfeat as af
from advfeat import threat
from advfeat.attacks import (
    APGD,
    DIFGSM,
    FAB,
    FGSM,
    FMN,
    MIFGSM,
    PGD,
    AutoAttack,
    MinimumPGD,
    SmoothedPGD,
    Square,
)
from advfeat.attacks.samples import Batch
from advfeat.metrics import robustness_curve

SHAPE = (3, 2, 2)
FEATURES = 12
COUNT = 4
EPS = {"l1": 1.5, "l2": 0.6, "linf": 0.2}


def randoms(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


INPUTS = randoms(COUNT, *SHAPE, seed=1)
WEIGHT = torch.randn(FEATURES, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
# Every second feature, and channels of different scales.
MASK = (torch.arange(FEATURES) % 3 != 1).view(SHAPE)
MASKS = torch.stack([(torch.arange(FEATURES) % (2 + n % 3) != 1).view(SHAPE) for n in range(COUNT)])
CHANNELS = torch.tensor([0.5, 1.0, 0.25], dtype=torch.float64).view(3, 1, 1)
LOW = torch.linspace(-0.3, 0.0, FEATURES, dtype=torch.float64).view(SHAPE)
HIGH = torch.tensor([1.0, 1.5, 1.02], dtype=torch.float64).view(3, 1, 1)


# The short form has one norm of what takes long.
L2_QUICK = [n if n == "l2" else pytest.param(n, marks=pytest.mark.slow) for n in NORMS]


class Linear(nn.Module):
    """Logits 8 and 8 + weight . x - offset, whose size tells what is rounded in them."""

    def __init__(self, offset=10.0):
        super().__init__()
        self.weight = nn.Parameter(WEIGHT.clone())
        self.offset = offset

    def forward(self, x):
        z = x.flatten(1) @ self.weight - self.offset
        return torch.stack([torch.full_like(z, 8.0), 8.0 + z], 1)


def best_gain(norm, eps, low, high, radius=1.0):
    """Largest growth of weight . delta with ||delta / eps|| <= radius and low <= delta <= high."""
    eps = np.broadcast_to(eps, low.shape)
    room = np.where(WEIGHT.numpy() > 0, high, -low)
    pull = np.abs(WEIGHT.numpy())
    if norm == "linf":
        return (pull * np.minimum(radius * eps, room)).sum(1)
    if norm == "l1":
        gains = []
        for r, e in zip(room, eps, strict=True):
            left, gain = radius, 0.0
            for i in np.argsort(-pull * e):
                move = min(r[i], left * e[i])
                gain += pull[i] * move
                left -= move / e[i] if e[i] else 0.0
            gains.append(gain)
        return np.array(gains)
    lowest, highest = np.zeros(len(room)), np.full(len(room), 1e6)
    for _ in range(200):  # of the multiplier
        middle = (lowest + highest) / 2
        delta = np.minimum(middle[:, None] * pull * eps**2, room)
        inside = np.sqrt(((delta / np.where(eps, eps, 1)) ** 2).sum(1)) <= radius
        lowest, highest = np.where(inside, middle, lowest), np.where(inside, highest, middle)
    return (pull * np.minimum(lowest[:, None] * pull * eps**2, room)).sum(1)


CASES = {
    "mask": {"mask": MASK},
    "masks": {"mask": MASKS},
    "channels": {"eps": CHANNELS},
    "bounds": {"bounds": (LOW, HIGH)},
    "all": {"eps": CHANNELS, "mask": MASKS.float(), "bounds": (LOW, HIGH)},
}


def settings_of(case, norm):
    """Arguments of an attack, and eps, low and high of the closed form, ``(N, d)``."""
    own = dict(CASES[case])
    eps = own.get("eps", torch.ones(1)) * EPS[norm]
    own["eps"] = eps if "eps" in own else EPS[norm]
    low, high = own.get("bounds", (torch.zeros(1), torch.ones(1)))
    free = own.get("mask", torch.ones(1)) != 0
    ends = [((end - INPUTS) * free).flatten(1).numpy() for end in (low, high)]
    flat = np.broadcast_to((eps * free * torch.ones_like(INPUTS)).flatten(1).numpy(), ends[0].shape)
    return own, flat, *ends


def gain_of(x_adv):
    return ((x_adv - INPUTS).flatten(1) @ WEIGHT).numpy()


def check_inside(x_adv, norm, eps, low, high, radius=1.0):
    delta = (x_adv - INPUTS).flatten(1).numpy()
    assert (delta[eps == 0] == 0).all()
    assert (delta >= low - 1e-9).all()
    assert (delta <= high + 1e-9).all()
    relative = delta / np.where(eps, eps, 1)
    order = {"l1": 1, "l2": 2, "linf": np.inf}[norm]
    assert (np.linalg.norm(relative, order, axis=1) <= radius * (1 + 1e-6)).all()


def random_pgd(**settings):
    size = 0.1 if isinstance(settings["eps"], torch.Tensor) else 0.1 * settings["eps"]
    return PGD(**settings, steps=80, step_size=size, restarts=2, returns="best", seed=0)


def transferable(kind, **settings):
    # The paper's steps add up to the radius: too short a way along the faces of the bounds in l2.
    size = 0.05 if isinstance(settings["eps"], torch.Tensor) else 0.05 * settings["eps"]
    return kind(**settings, steps=100, step_size=size)


ATTACKS = {
    "mi": lambda **s: transferable(MIFGSM, **s),
    "di": lambda **s: transferable(partial(DIFGSM, probability=0.0, seed=0), **s),
    "autoattack": lambda **s: AutoAttack(**s, version="fast", seed=0),
    "pgd": lambda **s: PGD(**s, steps=60),
    "pgd-random": random_pgd,
    "pgd-momentum": lambda **s: PGD(**s, steps=60, momentum=0.5),
    "fgsm": lambda **s: FGSM(**s),
    "apgd": lambda **s: APGD(**s, seed=0),
    "smoothed": lambda **s: SmoothedPGD(**s, scales=(6.0, 0.0), seed=0),
    "square": lambda **s: Square(**s, queries=250, seed=0),
}
# Of the optimum, where it is not 1%, in plain balls neither: one step ends at the first face, and
# Square in l1 and l2 moves windows of an image, in which every pixel has its part of a pattern.
REACHED = {("fgsm", "l1"): 0.0, ("fgsm", "l2"): 0.75}
REACHED_ON_AVERAGE = {("square", "l1"): 0.25, ("square", "l2"): 0.55}


def quick_or_slow(attacks, quick):
    """Attacks by case; the short form has `quick` in all cases, and most in the case "all"."""
    for attack in attacks:
        # An ensemble hands on what it is given, and its attacks are in every case themselves.
        for case in ["all"] if attack == "autoattack" else CASES:
            marks = (
                ()
                if (case == "all" and attack not in ("square", "autoattack")) or attack in quick
                else pytest.mark.slow
            )
            name = attack if isinstance(attack, str) else attack.__name__
            yield pytest.param(attack, case, id=f"{name}-{case}", marks=marks)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("name", "case"), list(quick_or_slow(ATTACKS, ("pgd", "fgsm"))))
def test_attacks_in_a_ball_reach_the_optimum_of_a_linear_model(name, case, norm):
    own, eps, low, high = settings_of(case, norm)
    model, labels = Linear(), torch.zeros(COUNT, dtype=torch.int64)
    found = ATTACKS[name](**own, norm=norm)(model, INPUTS, labels)
    assert found.dtype == torch.float64
    check_inside(found, norm, eps, low, high)
    gain, best = gain_of(found), best_gain(norm, eps, low, high)
    assert (gain <= best * (1 + 1e-6)).all()
    if (name, norm) in REACHED_ON_AVERAGE:
        assert (gain / best).mean() > REACHED_ON_AVERAGE[name, norm]
    else:
        assert (gain > REACHED.get((name, norm), 0.99) * best).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", [FGSM, MIFGSM])
@pytest.mark.parametrize("own", [{"mask": MASKS}, {"eps": CHANNELS}], ids=["masks", "channels"])
def test_short_attacks_are_exact_where_no_bound_is_near(kind, own, norm):
    x, radius = torch.full_like(INPUTS, 0.5), 0.2
    eps = own.get("eps", torch.ones(1)) * radius
    found = kind(**{"eps": radius, **own, **({"eps": eps} if "eps" in own else {})}, norm=norm)(
        Linear(), x, torch.zeros(COUNT, dtype=torch.int64)
    )
    free = own.get("mask", torch.ones(1)) * torch.ones_like(x)
    room = 0.5 * free.flatten(1).numpy()
    best = best_gain(norm, (eps * free).flatten(1).numpy(), -room, room)
    gain = ((found - x).flatten(1) @ WEIGHT).numpy()
    assert np.allclose(gain, best, rtol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", [FGSM, MIFGSM])
def test_a_short_attack_in_a_masked_ball_is_that_of_the_free_features(kind, norm):
    """At the faces of the bounds as well, where few steps are not the optimum in any ball."""
    free, labels = MASK.flatten(), torch.zeros(COUNT, dtype=torch.int64)
    masked = kind(eps=EPS[norm], norm=norm, mask=MASK)(Linear(), INPUTS, labels)
    part = Linear()
    part.weight = nn.Parameter(WEIGHT[free])
    alone = kind(eps=EPS[norm], norm=norm)(part, INPUTS.flatten(1)[:, free], labels)
    torch.testing.assert_close(masked.flatten(1)[:, free], alone, rtol=0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("case", ["mask", "scales"])
def test_square_comes_near_the_optimum_on_columns(case, norm):
    # Its windows of three columns with a fixed pattern end at 0.7 to 0.9 of it in l1 and l2,
    # however many the queries (300 here; as far with 5,000).
    x = randoms(COUNT, FEATURES, seed=0)
    scale = 0.5 + randoms(FEATURES, seed=5)
    own = {"mask": MASK.flatten()} if case == "mask" else {"eps": scale[None] * EPS[norm]}
    found = Square(**{"eps": EPS[norm], **own}, norm=norm, queries=300, seed=0)(
        Linear(100.0), x, torch.zeros(COUNT, dtype=torch.int64)
    )
    free = own.get("mask", torch.ones(FEATURES)) != 0
    eps = (own.get("eps", torch.full((1, FEATURES), EPS[norm])) * free).expand(COUNT, -1).numpy()
    best = best_gain(norm, eps, (-x * free).numpy(), ((1 - x) * free).numpy())
    gain = ((found - x) @ WEIGHT).numpy()
    assert (gain <= best * (1 + 1e-6)).all()
    assert (gain >= (0.99 if norm == "linf" else 0.6) * best).all()


@pytest.mark.parametrize("norm", L2_QUICK)
@pytest.mark.parametrize(("kind", "case"), list(quick_or_slow([FAB, FMN, MinimumPGD], ())))
def test_minimum_norm_attacks_reach_the_nearest_point_of_a_linear_model(kind, case, norm):
    own, eps, low, high = settings_of(case, norm)
    # Above the radius that the attack is given, one that needs half of it.
    needed = best_gain(norm, eps, low, high, radius=0.5)
    labels = torch.zeros(COUNT, dtype=torch.int64)
    scale = own.pop("eps")
    scale = scale if isinstance(scale, torch.Tensor) else torch.full(SHAPE, scale)
    attack = kind(
        **own, norm=norm, steps=150, scale=scale, **({"seed": 0} if kind is MinimumPGD else {})
    )
    for n in (0, 3):
        one = slice(n, n + 1)
        start = float(INPUTS[n].flatten() @ WEIGHT)
        found = attack(Linear(start + needed[n]), INPUTS[one], labels[one], index=torch.tensor([n]))
        delta = (found - INPUTS[one]).flatten(1).numpy()
        assert (delta[0][eps[n] == 0] == 0).all()
        assert predicted(Linear(start + needed[n]), found) == 1
        order = {"l1": 1, "l2": 2, "linf": np.inf}[norm]
        distance = np.linalg.norm(delta[0] / np.where(eps[n], eps[n], 1), order)
        assert 0.5 * (1 - 1e-4) <= distance <= 0.5 * 1.01


@pytest.mark.parametrize("norm", NORMS)
def test_a_minimum_norm_attack_with_eps_by_feature_stays_in_the_ball(norm):
    own, eps, low, high = settings_of("all", norm)
    labels = torch.zeros(COUNT, dtype=torch.int64)
    for kind in (FAB, FMN, MinimumPGD):
        found = kind(**own, norm=norm, steps=20)(Linear(), INPUTS, labels)
        check_inside(found, norm, eps, low, high)


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("version", ["fast", "standard"])
@pytest.mark.usefixtures("short_ensembles")
def test_nothing_outside_the_mask_moves_in_the_pool(version, norm):
    model, count = curved(), 6
    x = randoms(count, *SHAPE, seed=3)
    masks = torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(4)) < 0.5
    masks[:, 0, 0, 0] = True
    data = TensorDataset(x, predicted(model, x))
    eps = CHANNELS * EPS[norm] * (2.5 if norm == "linf" else 1.0)
    settings = {"eps": eps, "norm": norm, "mask": masks, "version": version}
    found = af.robust_accuracy(
        model, data, attack=AutoAttack(**settings, seed=0), batch_size=4, keep_inputs=True
    )
    assert 0 < found.count < count
    delta = found.adversarial - x
    assert (delta[~masks] == 0).all()
    assert (delta[masks] != 0).any()
    assert (threat.weighted_size(delta, norm, eps) <= 1 + 1e-6).all()
    wrong = predicted(model, found.adversarial) != data.tensors[1]
    assert torch.equal(wrong, found.broken_by >= 0)
    # In one call on the batch too.
    again = AutoAttack(**settings, seed=0)(model, x, data.tensors[1])
    assert (again[~masks] == x[~masks]).all()
    assert (predicted(model, again) != data.tensors[1]).sum() == wrong.sum()


@pytest.mark.slow
@pytest.mark.usefixtures("short_ensembles")
def test_robust_accuracy_takes_mask_eps_and_bounds_themselves():
    model = curved()
    x = randoms(10, *SHAPE, seed=3)
    data = TensorDataset(x, predicted(model, x))
    ball = {"eps": CHANNELS * 0.3, "norm": "linf", "bounds": (LOW, HIGH), "mask": MASK}
    found = af.robust_accuracy(model, data, **ball, seed=0, keep_inputs=True)
    same = af.robust_accuracy(model, data, attack=AutoAttack(**ball, version="fast"), seed=0)
    assert torch.equal(found.broken_by, same.broken_by)
    assert (found.adversarial[:, ~MASK] == x[:, ~MASK]).all()
    free = af.robust_accuracy(model, data, **{**ball, "mask": None}, seed=0)
    assert free.count < found.count
    short = af.robust_accuracy(model, data, **ball, steps=10)
    assert short.count >= found.count


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_the_curve_measures_in_multiples_of_the_scale(norm):
    own, eps, low, high = settings_of("all", norm)
    needed = best_gain(norm, eps, low, high, radius=0.5)
    # As one model for all: each sample's logit is moved by what it needs.
    starts = (INPUTS.flatten(1) @ WEIGHT).numpy() + needed
    offset = float(np.median(starts))
    data = TensorDataset(INPUTS, torch.zeros(COUNT, dtype=torch.int64))
    curve = robustness_curve(
        Linear(offset), data, norm=norm, mask=own["mask"], bounds=own["bounds"], scale=own["eps"]
    )
    assert torch.equal(curve.scale, own["eps"])
    assert repr(curve).endswith("in multiples of scale)")
    start = (INPUTS.flatten(1) @ WEIGHT).numpy()
    for n, distance in enumerate(curve.distance.tolist()):
        if start[n] > offset:
            assert distance == 0
        elif np.isfinite(distance):
            one = slice(n, n + 1)
            reached = best_gain_of_one(norm, eps[one], low[one], high[one], distance)
            assert reached >= offset - start[n] - 1e-4
            closer = best_gain_of_one(norm, eps[one], low[one], high[one], 0.99 * distance)
            assert closer <= offset - start[n] + 1e-4
    assert curve.distance.isfinite().any()


def best_gain_of_one(norm, eps, low, high, radius):
    return best_gain(norm, eps, low, high, radius)[0]


def test_constructions_leave_what_is_masked_alone():
    model = curved()
    x = randoms(10, *SHAPE, seed=5)
    data = TensorDataset(x, predicted(model, x))
    settings = {"eps": CHANNELS, "norm": "l2", "mask": MASK, "steps": 20}
    for make in (af.construct_det_dataset, af.construct_rand_dataset):
        made = make(model, data, **settings)
        assert (made.images[:, ~MASK] == x[:, ~MASK]).all()
        size = threat.weighted_size(made.images - x, "l2", CHANNELS)
        assert (size <= 1 + 1e-6).all()
        assert torch.allclose(made.field("size").double(), size)
        assert "sha256" in made.manifest["settings"]["mask"]


def test_inverted_datasets_stay_in_bounds_by_feature():
    model = curved(dtype=torch.float32)
    x = randoms(8, *SHAPE, seed=6).float() * 0.5
    data = TensorDataset(x, predicted(model, x))
    high = HIGH.float() / 2
    for start in ("images", "noise"):
        made = af.construct_robust_dataset(
            model, data, layer="1", bounds=(torch.zeros(1), high), start=start, steps=10, seed=0
        )
        assert (made.images <= high).all()
        assert made.bounds == (0.0, float(high.max()))
    with pytest.raises(ValueError, match="dtype"):
        af.construct_robust_dataset(
            model, data, layer="1", bounds=(0.0, high), steps=1, dtype="uint8"
        )


@pytest.mark.parametrize("norm", NORMS)
def test_a_random_start_is_uniform_in_the_ball_of_the_free_features(norm):
    count = 4000
    x = torch.full((count, 6), 0.5, dtype=torch.float64)
    mask = torch.tensor([True, False, True, False, False, False])
    model = nn.Linear(6, 2).double()
    nn.init.zeros_(model.weight)  # no gradient: the start is the result
    attack = PGD(eps=0.3, norm=norm, mask=mask, steps=1, random_start=True, seed=0)
    delta = (attack(model, x, torch.zeros(count, dtype=torch.int64)) - x)[:, mask] / 0.3
    order = {"l1": 1, "l2": 2, "linf": np.inf}[norm]
    radius = np.linalg.norm(delta.numpy(), order, axis=1)
    # In two dimensions the fraction within half the radius is a quarter.
    assert abs((radius < 0.5).mean() - 0.25) < 0.03
    assert radius.max() <= 1 + 1e-9


def test_a_full_mask_and_equal_radii_change_nothing():
    model = curved()
    x = randoms(12, *SHAPE, seed=7)
    y = predicted(model, x)
    for norm in NORMS:
        plain = PGD(eps=EPS[norm], norm=norm, steps=20)(model, x, y)
        masked = PGD(eps=EPS[norm], norm=norm, steps=20, mask=torch.ones(SHAPE))(model, x, y)
        equal = PGD(eps=torch.full(SHAPE, EPS[norm]), norm=norm, steps=20)(model, x, y)
        assert torch.allclose(plain, masked, atol=1e-9)
        assert torch.allclose(plain, equal, atol=1e-6)


def test_a_sample_of_the_masked_pool_is_that_of_a_call_by_itself():
    model = curved()
    x = randoms(9, *SHAPE, seed=8)
    y = predicted(model, x)
    masks = torch.rand(9, *SHAPE, generator=torch.Generator().manual_seed(9)) < 0.6
    masks[:, 0] = True
    attack = APGD(eps=0.2, norm="linf", mask=masks, steps=20, returns="first", seed=0)
    whole = attack(model, x, y)
    for n in range(9):
        alone = attack(model, x[n : n + 1], y[n : n + 1], index=torch.tensor([n]))
        assert torch.allclose(alone[0], whole[n], atol=1e-9)


@pytest.mark.parametrize("kind", [PGD, FMN])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask": torch.zeros(SHAPE)}, "mask.*no feature may change"),
        ({"mask": torch.full(SHAPE, 0.5)}, "mask.*0 or 1"),
        ({"mask": torch.ones(3, 2)}, "mask.shape"),
        ({"mask": torch.ones(2, *SHAPE)}, "mask.shape.*one for each sample"),
        ({"eps": torch.tensor([0.1, 0.2, 0.3])}, "eps.shape"),
        ({"eps": torch.zeros(SHAPE)}, "none of its features may change"),
        ({"eps": -CHANNELS}, "eps.*at least 0"),
        ({"eps": CHANNELS / 0}, "eps.*finite"),
        ({"eps": torch.full(SHAPE, 8.0), "norm": "linf"}, "8/255"),
        ({"bounds": (HIGH, LOW)}, "reversed"),
        ({"bounds": (0.0, HIGH / 10)}, "inputs.*outside its bounds"),
        ({"bounds": (torch.zeros(5), 1.0)}, "bounds.shape"),
        ({"bounds": (HIGH, HIGH)}, "bounds.*no feature may change"),
        ({"mask": MASK, "eps": (~MASK).float()}, "none of its features may change"),
    ],
)
def test_bad_restrictions_raise_an_error_that_names_the_argument(kind, settings, message):
    def attack():
        made = kind(**{"eps": 0.1, "norm": "l2", **settings})
        made(curved(), INPUTS, torch.zeros(COUNT, dtype=torch.int64))

    with pytest.raises(ValueError, match=message):
        attack()


def test_an_ambiguous_eps_raises_an_error():
    model, x = nn.Linear(4, 3), torch.rand(4, 4)
    with pytest.raises(ValueError, match=r"eps\[None\] for features"):
        PGD(eps=torch.full((4,), 0.1), norm="l2")(model, x, torch.zeros(4, dtype=torch.int64))
    for eps in (torch.full((1, 4), 0.1), torch.full((4, 1), 0.1)):
        PGD(eps=eps, norm="l2")(model, x, torch.zeros(4, dtype=torch.int64))


def test_a_tensor_without_values_raises_an_error():
    for name in ("mask", "eps"):
        settings = {"eps": 0.1, name: torch.ones(SHAPE, device="meta")}
        with pytest.raises(ValueError, match=f"{name}.*no values"):
            PGD(norm="l2", **settings)


def test_a_mask_of_another_type_raises_an_error():
    with pytest.raises(TypeError, match="mask"):
        PGD(eps=0.1, norm="l2", mask=[True, False])
    with pytest.raises(TypeError, match="scale"):
        FMN(norm="l2", scale=2.0)
    with pytest.raises(ValueError, match="eps, scale"):
        FMN(norm="l2", eps=CHANNELS, scale=CHANNELS)
    data = TensorDataset(INPUTS, torch.zeros(COUNT, dtype=torch.int64))
    masked = PGD(eps=0.1, norm="l2", mask=MASK)
    with pytest.raises(ValueError, match="the attack has its own"):
        af.robust_accuracy(Linear(), data, attack=PGD(eps=0.1, norm="l2"), mask=MASK)
    with pytest.raises(ValueError, match="training takes"):
        af.adversarial_fit(curved(), data, attack=masked, epochs=1)


def test_a_first_state_without_the_mask_raises_an_error():
    labels = torch.zeros(COUNT, dtype=torch.int64)
    batch = Batch(INPUTS, labels, torch.arange(COUNT))
    with af.attacks.base.attackable(curved()) as net, pytest.raises(TypeError, match="restricted"):
        PGD(eps=0.1, norm="l2", mask=MASK).init(net, batch)
