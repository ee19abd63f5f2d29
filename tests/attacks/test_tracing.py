"""`on_step`: what it is called with, and that it changes no result."""

import pytest
import torch
from toys import batch, curved, predicted, sizes

from advfeat import plots
from advfeat.attacks import APGD, FAB, FMN, PGD, AttackStep, SmoothedPGD, Square

ATTACKS = {
    "pgd": PGD(eps=0.2, norm="l2", steps=7),
    "pgd-first": PGD(eps=0.2, norm="linf", steps=7, returns="first"),
    "apgd": APGD(eps=0.2, norm="linf", steps=7, seed=0),
    "apgd-first": APGD(eps=0.2, norm="linf", steps=7, seed=0, returns="first"),
    "masked": PGD(eps=0.2, norm="l2", steps=7, mask=torch.arange(12) < 6),
    "fab": FAB(norm="l2", steps=4, targets=2),
    "fmn": FMN(norm="linf", steps=7),
    "smoothed": SmoothedPGD(eps=0.2, norm="l2", steps=7, seed=0),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_callback_changes_no_result(name):
    model, x = curved(), batch(6)
    y, steps = predicted(model, x), []
    found = ATTACKS[name](model, x, y, on_step=steps.append)
    assert torch.allclose(found, ATTACKS[name](model, x, y), atol=1e-9)
    assert [step.step for step in steps] == list(range(len(steps)))
    assert len(steps) >= 1
    for step in steps:
        assert isinstance(step, AttackStep)
        assert all(value.shape == (6,) for value in step[1:])


def test_the_values_are_those_of_the_iterates():
    model, x = curved(), batch(6)
    y, steps = predicted(model, x), []
    PGD(eps=0.3, norm="l2", steps=5)(model, x, y, on_step=steps.append)
    assert (steps[0].distance == 0).all()
    assert not steps[0].success.any()
    for number in (1, 4):
        point = PGD(eps=0.3, norm="l2", steps=number, step_size=0.15)(model, x, y)
        assert torch.allclose(steps[number].distance, torch.as_tensor(sizes(point, x, "l2")))
        leaf = point.clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(model(leaf), y, reduction="none")
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        assert torch.allclose(steps[number].loss, loss.detach(), atol=1e-6)
        assert torch.allclose(steps[number].gradient_norm, gradient.norm(dim=1), atol=1e-6)
        assert torch.equal(steps[number].success, predicted(model, point) != y)


def test_an_attack_without_gradients_raises_an_error():
    model, x = curved(), batch(6)
    with pytest.raises(ValueError, match="on_step"):
        Square(eps=0.1, norm="linf", seed=0)(
            model, x, predicted(model, x), on_step=lambda step: None
        )


def test_the_plot_draws_the_means():
    pytest.importorskip("matplotlib")
    model, x = curved(), batch(6)
    steps = []
    PGD(eps=0.3, norm="l2", steps=5)(model, x, predicted(model, x), on_step=steps.append)
    axes = plots.attack_steps(steps).axes
    drawn = [line.get_ydata()[-1] for axis in axes for line in axis.lines]
    last = steps[-1]
    expected = [last.loss, last.gradient_norm, 100 * last.success.double(), last.distance]
    assert drawn == pytest.approx([float(value.mean()) for value in expected])
    with pytest.raises(ValueError, match="steps"):
        plots.attack_steps([])


def test_what_is_no_function_raises_an_error():
    with pytest.raises(TypeError, match="on_step=3"):
        PGD(eps=0.1, norm="linf")(
            torch.nn.Linear(4, 3), torch.rand(2, 4), torch.tensor([0, 1]), on_step=3
        )
