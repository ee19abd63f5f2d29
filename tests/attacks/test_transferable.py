"""MI-FGSM and DI-FGSM: by hand, by torchattacks, and what they do for transfer."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset
from toys import predicted

import advfeat as af
from advfeat.attacks import DIFGSM, MIFGSM
from advfeat.attacks._transferable import _resizing_matrix
from advfeat.metrics import transfer_matrix

EPS = 16 / 255


def convolution(seed=0, size=12):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 3, stride=2), nn.Tanh(),
        nn.Flatten(), nn.Linear(8 * ((size - 1) // 2) ** 2, 4),
    ).eval()  # fmt: skip


def images(count=8, size=12):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_the_settings_are_those_of_the_paper():
    attack = MIFGSM(eps=EPS, norm="linf")
    assert (attack.steps, attack.momentum) == (10, 1.0)
    diverse = DIFGSM(eps=EPS, norm="linf")
    assert (diverse.steps, diverse.momentum, diverse.probability) == (10, 1.0, 0.5)
    # On a linear model of equal signs ten steps of eps / 10 reach the corner, nine do not.
    model, x = nn.Linear(2, 2), torch.full((1, 2), 0.5)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))
    for steps in (1, 10):
        moved = MIFGSM(eps=EPS, norm="linf", steps=steps)(model, x, torch.tensor([0]))
        assert torch.allclose(moved, x - EPS, atol=1e-6)
    limited = MIFGSM(eps=EPS, norm="linf", step_size=EPS / 20)(model, x, torch.tensor([0]))
    assert torch.allclose(limited, x - EPS / 2, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 5, 10])
@pytest.mark.parametrize("decay", [0.5, 1.0])
@pytest.mark.slow
def test_mi_fgsm_is_that_of_torchattacks(steps, decay):
    ta = pytest.importorskip("torchattacks")
    model, x = convolution(), images()
    y = predicted(model, x)
    theirs = ta.MIFGSM(model, eps=EPS, alpha=EPS / 10, steps=steps, decay=decay)(x, y)
    attack = MIFGSM(eps=EPS, norm="linf", step_size=EPS / 10, steps=steps, momentum=decay)
    # A sign is rounding where sums of gradients cancel: a pixel in ten thousand.
    same = (attack(model, x, y) - theirs).abs() < 1e-6
    assert float(same.double().mean()) > 0.9999


@pytest.mark.parametrize("targeted", [False, True])
def test_without_resizing_di_is_mi(targeted):
    model, x = convolution(), images()
    y = (predicted(model, x) + targeted) % 4
    settings = {"eps": EPS, "norm": "linf", "targeted": targeted}
    expected = MIFGSM(**settings)(model, x, y)
    assert torch.equal(DIFGSM(**settings, probability=0.0)(model, x, y), expected)
    assert torch.equal(DIFGSM(**settings, resize=1.0, seed=0)(model, x, y), expected)
    assert not torch.equal(DIFGSM(**settings, seed=0)(model, x, y), expected)


def test_copies_are_torch_s_resized_and_padded_images():
    length, count = 20, 200
    uniform = torch.rand(3, count, generator=torch.Generator().manual_seed(0))
    chosen = uniform[2] < 0.5
    matrices = _resizing_matrix(length, uniform[0], uniform[1], 0.6, chosen)
    x, sizes, places = images(1, length), set(), set()
    for number, matrix in enumerate(matrices):
        copy = matrix @ x @ matrix.mT
        if not chosen[number]:
            assert torch.equal(copy, x)
            continue
        rows = matrix[0].any(1).nonzero().flatten()
        size, first = len(rows), int(rows[0])
        expected = F.interpolate(x, (size, size), mode="bilinear", align_corners=False)
        after = length - size - first
        expected = F.pad(expected, (first, after, first, after))
        assert torch.allclose(copy, expected, atol=1e-5)
        sizes.add(size)
        places.add((size, first))
    assert sizes == set(range(12, 20))
    assert {first for size, first in places if size == 19} == {0, 1}


def test_gradients_are_those_by_the_image():
    model, x = convolution(), images()
    y = predicted(model, x)
    attack = DIFGSM(eps=EPS, norm="linf", seed=3, probability=1.0, momentum=0.0, steps=1)
    moved = attack(model, x, y)
    with af.model.attackable(model) as net:
        state = attack.init(net, af.attacks.Batch(x, y, torch.arange(len(x))))
        rows, columns = attack._resizing(state)
    leaf = x.clone().requires_grad_()
    F.cross_entropy(model(rows @ leaf @ columns.mT), y, reduction="sum").backward()
    clear = leaf.grad.abs() > 1e-6
    expected = (x + EPS * leaf.grad.sign()).clamp(0, 1)
    assert torch.allclose(moved[clear], expected[clear], atol=1e-6)


def test_copies_go_by_the_sample_not_by_the_batch():
    model, x = convolution(), images()
    y, attack = predicted(model, x), DIFGSM(eps=EPS, norm="linf", seed=0)
    whole = attack(model, x, y)
    part = attack(model, x[5:], y[5:], index=torch.arange(5, 8))
    assert torch.allclose(whole[5:], part, atol=1e-6)
    assert not torch.equal(whole, attack.with_seed(1)(model, x, y))


@pytest.mark.parametrize("returns", ["first", "best"])
def test_what_is_kept_is_judged_by_the_image(returns):
    model, x = convolution(), images(32)
    y = predicted(model, x)
    attack = DIFGSM(eps=4 * EPS, norm="linf", returns=returns, seed=0)
    with torch.no_grad():
        logits = model(attack(model, x, y))
        last = model(DIFGSM(eps=4 * EPS, norm="linf", seed=0)(model, x, y))
    if returns == "best":
        own = F.cross_entropy(logits, y, reduction="none")
        assert bool((own >= F.cross_entropy(last, y, reduction="none") - 1e-5).all())
        return
    robust = af.robust_accuracy(model, (x, y), attack=attack)
    # Successes of the attack are those of the model on what it returns.
    assert robust.count == int((logits.argmax(1) == y).sum())


def test_ranks_other_than_images_are_refused():
    with pytest.raises(ValueError, match="images"):
        DIFGSM(eps=EPS, norm="linf")(nn.Linear(5, 3), torch.rand(2, 5), torch.tensor([0, 1]))


@pytest.mark.parametrize("wrong", [{"probability": 1.2}, {"resize": 0.0}, {"resize": 2}])
def test_bad_settings_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DIFGSM(eps=EPS, norm="linf", **wrong)


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_masked_features_stay(norm):
    model, x = convolution(), images()
    y, mask = predicted(model, x), torch.zeros(3, 12, 12, dtype=torch.bool)
    mask[:, 3:9, 3:9] = True
    for kind in (MIFGSM, DIFGSM):
        moved = kind(eps=0.2, norm=norm, mask=mask, seed=0)(model, x, y)
        assert torch.equal(moved[:, ~mask], x[:, ~mask])
        assert not torch.equal(moved, x)


@pytest.mark.parametrize("returns", ["last", "best"])
def test_copies_in_a_restricted_ball_are_those_of_the_image(returns):
    model, x = convolution(), images()
    y, full = predicted(model, x), torch.ones(3, 12, 12, dtype=torch.bool)
    settings = {"norm": "l2", "returns": returns, "seed": 0}
    plain = DIFGSM(eps=0.2, **settings)(model, x, y)
    masked = DIFGSM(eps=0.2, mask=full, **settings)(model, x, y)
    scaled = DIFGSM(eps=torch.full((3, 1, 1), 0.2), **settings)(model, x, y)
    assert torch.allclose(masked, plain, atol=1e-5)
    assert torch.allclose(scaled, plain, atol=1e-5)


@pytest.mark.parametrize("name", ["mifgsm", "difgsm"])
def test_they_are_known_by_name(name):
    model, x = convolution(), images()
    robust = af.robust_accuracy(
        model, (x, predicted(model, x)), attack=name, eps=EPS, norm="linf", seed=0
    )
    assert type(robust.attacks[0]).__name__.lower() == name


def test_a_transfer_matrix_takes_them():
    models = {"a": convolution(0), "b": convolution(1)}
    x = images(24)
    data = TensorDataset(x, predicted(models["a"], x))
    for attack in (MIFGSM(eps=EPS, norm="linf"), DIFGSM(eps=EPS, norm="linf")):
        matrix = transfer_matrix(models, models, data, attack)
        assert float(matrix.fooled[0, 0]) > 0.5


def test_a_transfer_matrix_takes_their_names():
    models = {"a": convolution(0), "b": convolution(1)}
    x = images(24)
    data = TensorDataset(x, predicted(models["a"], x))
    ball = {"eps": EPS, "norm": "linf"}
    objects = {
        "mi": MIFGSM(**ball),
        "di": DIFGSM(**ball, momentum=0.0, seed=3),
        "mi-di": DIFGSM(**ball, seed=3),
    }
    found = {n: transfer_matrix(models, models, data, n, **ball, seed=3) for n in objects}
    for name, attack in objects.items():
        assert torch.equal(found[name].of_all, transfer_matrix(models, models, data, attack).of_all)
    assert not torch.equal(found["mi"].of_all, found["mi-di"].of_all)


def test_a_named_attack_may_be_targeted():
    model, x = convolution(0), images(8)
    data = TensorDataset(x, predicted(model, x))
    ball = {"eps": 0.5, "norm": "linf", "mask": torch.ones(3, 12, 12)}
    matrix = transfer_matrix(
        {"a": model}, {"a": model}, data, "mi", **ball, target_labels=lambda y: (y + 1) % 3
    )
    assert float(matrix.of_all) > float(matrix.clean_error)
