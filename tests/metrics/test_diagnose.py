"""Planted traps are found, each by the check that is meant for it; a sound model has none."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from toys import Changed

from advfeat.metrics import diagnose, robust_accuracy

BALL = {"eps": 0.1, "norm": "linf"}


class Front(nn.Module):
    """A model behind a layer that changes its input."""

    def __init__(self, model, change):
        super().__init__()
        self.model, self.change = model, change

    def forward(self, x):
        return self.model(self.change(x))


def noisy(x):
    return x + 0.05 * torch.randn_like(x)


def rows(digits, count=150):
    return TensorDataset(*(tensor[:count] for tensor in digits[1].tensors))


def diagnosis(model, digits, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return diagnose(
            model, rows(digits), **(BALL | {"samples": 60, "queries": 300, "seed": 0} | options)
        )


TRAPS = {
    "quantize": (lambda m: Front(m, lambda x: torch.round(4 * x) / 4), "zero_gradients"),
    "signs": (lambda m: Front(m, lambda x: (torch.sign(x - 0.4) + 1) / 2), "zero_gradients"),
    "detached": (lambda m: Front(m, torch.detach), "zero_gradients"),
    "random": (lambda m: Front(m, noisy), "random_predictions"),
    "random and cold": (
        lambda m: Changed(Front(m, noisy), lambda z: 1e-5 * z),
        "random_predictions",
    ),
    "high frequency": (
        lambda m: Front(m, lambda x: x + 0.004 * torch.sin(1500 * x)),
        "misleading_gradients",
    ),
    "a side way": (
        lambda m: Front(m, lambda x: x.detach() + 1e-6 * x),
        "misleading_gradients",
    ),
    # An answer that depends on the rows beside a row.
    "entangled": (lambda m: Changed(m, lambda z: z - 0.5 * z.mean(0)), "random_predictions"),
}


@pytest.mark.slow
def test_saturated_logits_are_no_trap(standard, digits):
    # The cross-entropy keeps its direction where the softmax rounds to 1.
    everywhere = {"eps": 1.0, "queries": 5}  # the attacks, which are not asked, end soon there
    plain, saturated = (
        diagnosis(model.eval(), digits, **everywhere)["zero_gradients"].value
        for model in (standard, Changed(standard, lambda z: 1000 * z))
    )
    assert saturated <= plain + 0.02


@pytest.mark.slow
@pytest.mark.usefixtures("short_boundary_search")
def test_infinite_slopes_are_suspicious(standard, digits):
    # The root of a black pixel has an infinite slope: only its entry is lost, not the sample.
    model = Front(standard, lambda x: x.sqrt().square()).eval()
    assert diagnosis(model, digits).suspicious


@pytest.mark.slow
@pytest.mark.usefixtures("short_boundary_search")
@pytest.mark.parametrize("trap", TRAPS)
def test_a_planted_trap_is_found(standard, digits, trap):
    plant, name = TRAPS[trap]
    found = diagnosis(plant(standard).eval(), digits)
    assert name in found.suspicious
    assert found[name].value > 0.3
    assert "WARNING" in str(found)
    if trap in ("quantize", "detached"):  # without gradients random search wins
        assert {"black_box_wins", "large_eps_resists"} <= set(found.suspicious)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_sound_robust_model_has_no_finding(robust, digits, norm):
    eps = {"linf": 0.1, "l2": 0.5, "l1": 2.0}[norm]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = diagnose(robust, rows(digits), eps=eps, norm=norm, samples=80, seed=0)
    assert found.suspicious == ()
    assert "WARNING" not in str(found)


@pytest.mark.slow
def test_a_sound_standard_model_has_no_finding(standard, digits):
    assert diagnosis(standard, digits, eps=0.05).suspicious == ()


@pytest.mark.slow
@pytest.mark.usefixtures("short_boundary_search")
def test_it_warns_with_what_to_do(standard, digits):
    trap = TRAPS["detached"][0](standard)
    with pytest.warns(UserWarning, match=r"(?s)less robust.*BPDA"):
        diagnose(trap, rows(digits, 40), **BALL, samples=20, queries=20, seed=0)


@pytest.mark.slow
def test_the_trap_would_have_fooled_robust_accuracy(standard, digits):
    # What the checks are for: a number that is too high.
    trap = TRAPS["detached"][0](standard)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        masked = robust_accuracy(trap, rows(digits), **BALL, steps=10)
    true = robust_accuracy(standard, rows(digits), **BALL, steps=10)
    assert masked == masked.standard > true + 0.3


class Rugged(nn.Module):
    """Two classes with a boundary behind many local optima."""

    def forward(self, x):
        lead = (0.3 * torch.sin(120 * x) + x - 0.5).sum(1) - 1.28
        return torch.stack([-lead, lead], 1)


def test_steps_that_still_help_are_a_finding():
    torch.manual_seed(0)
    model, x = Rugged(), 0.3 + 0.4 * torch.rand(80, 8)
    rugged = TensorDataset(x, model(x).argmax(1))
    with pytest.warns(UserWarning, match="more steps and restarts"):
        found = diagnose(model, rugged, **BALL, samples=60, queries=50, seed=0)
    assert "more_steps_help" in found.suspicious


@pytest.mark.slow
@pytest.mark.usefixtures("short_boundary_search")
def test_the_random_state_and_the_model_are_left_alone(standard, digits):
    before, state = torch.get_rng_state(), standard.training
    diagnosis(standard, digits, queries=5, samples=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert standard.training == state


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"eps": 0.0}, ValueError, "eps"),
        ({"eps": 8}, ValueError, "eps"),
        ({"norm": "l3"}, ValueError, "norm"),
        ({"samples": 0}, ValueError, "samples"),
        ({"queries": 0}, ValueError, "queries"),
        ({"seed": "0"}, TypeError, "seed"),
        ({"bounds": (1.0, 0.0)}, ValueError, "bounds"),
    ],
)
def test_bad_input_is_refused(standard, digits, change, error, name):
    with pytest.raises(error, match=name):
        diagnose(standard, rows(digits), **(BALL | change))


def test_a_model_that_is_wrong_everywhere_is_refused(standard, digits):
    x, _ = rows(digits, 20).tensors
    with torch.no_grad():
        wrong = (standard(x).argmax(1) + 1) % 10
    with pytest.raises(ValueError, match="right on none"):
        diagnose(standard, TensorDataset(x, wrong), **BALL)


class Two(nn.Module):
    """Two classes, by the first features; the third has a gradient that rounding hides."""

    def forward(self, x):
        x = x.flatten(1)
        hidden = torch.round(8 * x[:, 2]) / 8
        return torch.stack([x[:, 0] + 0.5 * hidden, x[:, 1]], 1)


@pytest.mark.parametrize(("free", "zero"), [((0, 3), 0.0), ((2, 3), 1.0)])
def test_gradients_are_those_by_the_features_of_the_mask(free, zero):
    x = torch.rand(40, 4, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(x, Two()(x).argmax(1))
    mask = torch.zeros(4, dtype=torch.bool)
    mask[list(free)] = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ball = {"eps": 0.05 * torch.ones(4), "norm": "linf", "samples": 40, "queries": 50}
        found = diagnose(Two(), data, **ball, mask=mask, seed=0)
        same = diagnose(Two(), data, **{**ball, "eps": 0.05 * mask.float()}, seed=0)
    assert found["zero_gradients"].value == zero
    assert ("misleading_gradients" in found.suspicious) == bool(zero)
    assert same["zero_gradients"].value == zero
