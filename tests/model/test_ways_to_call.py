"""Ways in which people call the library: spellings, containers, threads, exported models."""

import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset
from toys import Changed, linear, predicted

import advfeat as af
from advfeat import attacks
from advfeat.checks import ResultWarning
from advfeat.metrics import robustness_curve, transfer_matrix

X = torch.rand(30, 12, generator=torch.Generator().manual_seed(4))


def model_and_labels(classes=4):
    model = linear(classes)
    return model, predicted(model, X)


def measured(model, data, **given):
    return float(
        af.robust_accuracy(model, data, **({"eps": 0.05, "norm": "linf", "steps": 5} | given))
    )


@pytest.mark.parametrize(
    ("norm", "meant"),
    [("Linf", "linf"), ("L-inf", "linf"), (np.inf, "linf"), ("l_inf", "linf"),
     ("L2", "l2"), (2, "l2"), ("2", "l2"), ("l2 norm", "l2"), (1, "l1"), ("L_1", "l1")],
)  # fmt: skip
def test_norms_as_people_write_them(norm, meant):
    model, y = model_and_labels()
    attack = af.PGD(eps=0.1, norm=norm)
    assert attack == af.PGD(eps=0.1, norm=meant)
    assert measured(model, (X, y), norm=norm) == measured(model, (X, y), norm=meant)


@pytest.mark.parametrize("norm", ["l0", 3, None, True, "l2inf", [2]])
def test_other_norms_are_refused(norm):
    with pytest.raises(ValueError, match="norm="):
        af.PGD(eps=0.1, norm=norm)


@pytest.mark.parametrize(
    ("given", "meant"),
    [({"alpha": 0.1}, "step_size"), ({"epsilon": 0.1}, "eps"), ({"num_steps": 3}, "steps"),
     ({"stepsize": 3}, "step_size"), ({"n_iter": 3}, "steps")],
)  # fmt: skip
@pytest.mark.parametrize("call", ["pgd", "PGD"])
def test_an_argument_of_another_library(given, meant, call):
    model, y = model_and_labels()
    arguments = (model, X, y) if call == "pgd" else ()
    with pytest.raises(TypeError, match=f"did you mean {meant}="):
        getattr(af, call)(*arguments, **({"eps": 0.1, "norm": "l2"} | given))


def test_inputs_and_labels_without_a_name():
    model, y = model_and_labels()
    with pytest.raises(TypeError, match=r"robust_accuracy\(model, \(inputs, labels\)"):
        af.robust_accuracy(model, X, y, eps=0.1, norm="l2")
    with pytest.raises(TypeError, match=r"accuracy\(model, \(inputs, labels\)"):
        af.accuracy(model, X, y)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["autoattack", "pgd", "apgd", "square"])
def test_attacks_by_name(name):
    from advfeat import attacks

    model, y = model_and_labels()
    kinds = {"autoattack": attacks.AutoAttack, "pgd": af.PGD, "apgd": attacks.APGD}
    kind = kinds.get(name, attacks.Square)
    ball = {"eps": 0.3, "norm": "linf"}  # soon all are fooled
    data = (X[:4], y[:4])
    named = af.robust_accuracy(model, data, attack=name, seed=0, **ball)
    expected = af.robust_accuracy(model, data, attack=kind(**ball), seed=0)
    assert torch.equal(named.broken_by, expected.broken_by)
    assert named.attacks == expected.attacks
    with pytest.raises(ValueError, match="did you mean 'autoattack'"):
        af.robust_accuracy(model, (X, y), attack="autoatack", **ball)


def test_pairs_and_arrays_are_data():
    model, y = model_and_labels()
    y = torch.where(torch.arange(30) % 3 == 0, (y + 1) % 4, y)
    expected = measured(model, TensorDataset(X, y))
    for data in ((X, y), [X, y], (X.numpy(), y.numpy()), [(X.numpy(), y.numpy())],
                 [{"inputs": X.numpy(), "labels": y}]):  # fmt: skip
        assert measured(model, data) == expected
        assert float(af.accuracy(model, data)) == pytest.approx(2 / 3)


def test_radii_and_bounds_as_tensors():
    model, y = model_and_labels()
    expected = measured(model, (X, y))
    assert measured(model, (X, y), eps=torch.tensor(0.05)) == expected
    attack = af.PGD(eps=torch.tensor(0.05), norm="l2", bounds=[torch.tensor(0.0), 1.0])
    assert attack.bounds == (0.0, 1.0)
    by_feature = af.PGD(eps=0.1, norm="l2", bounds=(torch.zeros(12), torch.ones(12)))
    scalar = af.PGD(eps=0.1, norm="l2")
    torch.testing.assert_close(by_feature(model, X, y), scalar(model, X, y))


def test_one_image_without_a_batch_axis():
    model = linear(4)
    for label in (torch.tensor(1), torch.tensor([1])):
        with pytest.raises(ValueError, match=r"inputs\[None\]"):
            af.pgd(model, torch.rand(3, 2, 2), label, eps=0.1, norm="l2")


@pytest.mark.parametrize("where", [slice(None), slice(0, 5)])
def test_nan_among_logits_is_warned_of(where):
    model, y = model_and_labels()

    def broken(z):
        z = z.clone()
        z[where] = torch.nan
        return z

    with pytest.warns(ResultWarning, match="NaN among the logits"):
        af.robust_accuracy(Changed(model, broken), (X, y), eps=0.1, norm="l2", steps=2)


@pytest.mark.parametrize("loss", [F.cross_entropy, F.multi_margin_loss])
def test_a_targeted_attack_with_ones_own_loss_goes_to_the_target(loss):
    model, y = model_and_labels()
    target = (y + 1) % 4

    def own(logits, labels):
        return loss(logits, labels, reduction="none")

    x_adv = af.pgd(model, X, target, eps=0.6, norm="linf", targeted=True, loss=own)
    assert (predicted(model, x_adv) == target).float().mean() > 0.8
    named = af.pgd(model, X, target, eps=0.6, norm="linf", targeted=True)
    if loss is F.cross_entropy:
        assert torch.equal(x_adv, named)


@pytest.mark.parametrize("scale", [1e4, 1e6])
def test_a_certain_model_loses_no_gradient(scale):
    """The direction of the cross-entropy's gradient does not depend on the scale of two logits."""
    model, y = model_and_labels(2)
    certain = Changed(model, lambda z: scale * z)
    found = af.pgd(certain, X, y, eps=0.05, norm="l2", steps=5)
    gap = (found - af.pgd(model, X, y, eps=0.05, norm="l2", steps=5)).abs().amax(1)
    assert (gap < 1e-5).float().mean() > 0.9  # the last step crosses the border by rounding
    assert measured(certain, (X, y)) == measured(model, (X, y)) < 1


@pytest.mark.slow
@pytest.mark.usefixtures("short_ensembles")
def test_clean_inputs_are_not_returned_without_a_warning():
    model, y = model_and_labels()
    constant = Changed(model, lambda z: 0 * z + F.one_hot(torch.zeros(len(z)).long(), 4))
    with pytest.warns(ResultWarning, match="exactly zero on 30 of 30 samples"):
        af.pgd(constant, X, torch.zeros_like(y), eps=0.1, norm="linf")
    with pytest.warns(ResultWarning, match="zero gradient|exactly zero"):
        af.robust_accuracy(constant, (X, 0 * y), eps=0.1, norm="linf", seed=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_entries_of_a_gradient_that_are_not_finite(bad, norm):
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            gradient = gradient.clone()
            gradient[:, 0] = bad
            return gradient

    model, y = model_and_labels()
    with pytest.warns(ResultWarning, match="NaN or infinite"):
        x_adv = af.pgd(Changed(nn.Sequential(), lambda x: model(Bad.apply(x))), X, y, eps=0.1,
                       norm=norm, steps=1)  # fmt: skip
    moved = (x_adv - X).abs()
    assert (moved[:, 1:].amax(1) > 0).all()
    assert ((moved[:, 0] > 0).float().mean() > 0.8) == (bad == bad)


def test_no_random_model_is_asked_twice_in_a_ball_of_nothing():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = linear(4)

        def forward(self, x):
            return self.model(x + 0.2 * torch.randn_like(x))

    _, y = model_and_labels()
    with pytest.warns(ResultWarning, match="random"):
        robust = af.robust_accuracy(Noisy(), (X, y), eps=0.0, norm="linf", seed=0)
    assert robust == robust.standard > 0


@pytest.mark.parametrize("noise", [0.1, 0.3])
@pytest.mark.slow
def test_the_mean_of_many_calls_of_a_random_model(noise):
    """Noise in the inputs of a linear model averages out: its mean is the model without noise."""

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = linear(4)

        def forward(self, x):
            return self.model(x + noise * torch.randn_like(x))

    model, y = model_and_labels()
    state = torch.get_rng_state()
    given = {"eps": 0.05, "norm": "linf", "steps": 5, "expectation": 200}
    robust = af.robust_accuracy(Noisy(), (X, y), **given)
    assert torch.equal(state, torch.get_rng_state())
    assert robust == af.robust_accuracy(Noisy(), (X, y), **given)
    assert robust.standard == af.accuracy(Noisy(), (X, y), expectation=200) > 0.8
    assert abs(robust - measured(model, (X, y))) <= 0.15


# --- Types of numbers ---


class Wrapper(nn.Module):
    """A parameter of one type in front of a network of another, as its maker calls it."""

    def __init__(self, scale, dtype, cast):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0, dtype=scale))
        self.model, self.cast = linear(4).to(dtype), cast

    def forward(self, x):
        return self.model((x * self.scale).to(self.cast))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scale", "dtype"),
    [(torch.float64, torch.float32), (torch.float32, torch.float64),
     (torch.float32, torch.bfloat16), (torch.float32, torch.float16),
     (torch.float16, torch.float32), (torch.float64, torch.bfloat16)],
)  # fmt: skip
def test_models_of_mixed_types(scale, dtype):
    model = Wrapper(scale, dtype, dtype).eval()
    y = predicted(model, X)
    assert af.accuracy(model, (X, y)) == 1
    robust = af.robust_accuracy(model, (X, y), eps=0.05, norm="linf", seed=0, keep_inputs=True)
    assert torch.equal(predicted(model, robust.adversarial) == y, robust.correct)
    exact = af.robust_accuracy(linear(4), (X, y), eps=0.05, norm="linf", seed=0)
    assert abs(robust - exact) <= 0.1
    assert af.construct_det_dataset(model, (X, y), eps=0.1, steps=2)[0][0].dtype == torch.float32


def test_inputs_stay_float32_where_the_model_takes_them():
    seen = []

    class Spy(Wrapper):
        def forward(self, x):
            seen.append(x.dtype)
            return super().forward(x)

    model = Spy(torch.float64, torch.float32, torch.float32)
    af.pgd(model, X, predicted(model, X), eps=0.1, norm="l2", steps=2)
    assert set(seen) == {torch.float32}


def runs_of_everything():
    model, y = model_and_labels()
    attack = af.PGD(eps=0.05, norm="l2", restarts=2, seed=1)
    return {
        "accuracy": lambda: float(af.accuracy(model, (X, y))),
        "robust": lambda: float(af.robust_accuracy(model, (X, y), eps=0.05, norm="linf", seed=0)),
        "curve": lambda: robustness_curve(model, (X, y), norm="l2").distance.tolist(),
        "transfer": lambda: transfer_matrix(
            {"a": model}, {"a": model}, (X, y), attack
        ).of_all.tolist(),
        "det": lambda: af.construct_det_dataset(model, (X, y), eps=0.1, steps=2)[3][0].tolist(),
        "pgd": lambda: attack(model, X, y).tolist(),
    }


@pytest.fixture(scope="module")
def expected():
    return {name: run() for name, run in runs_of_everything().items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "device"), [(torch.float64, "cpu"), (torch.float64, "meta"), (torch.float32, "meta")]
)
def test_default_device_and_type_do_not_matter(dtype, device, expected):
    runs = runs_of_everything()
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        assert {name: run() for name, run in runs.items()} == expected
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def test_autocast_around_the_call_does_not_matter():
    model, y = model_and_labels()
    expected = measured(model, (X, y))
    with torch.autocast("cpu", torch.bfloat16):
        assert measured(model, (X, y)) == expected


# --- Models that were made elsewhere ---


def exported(model):
    batch = torch.export.Dim("batch")
    return torch.export.export(model, (X,), dynamic_shapes=({0: batch},)).module()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "make",
    [pytest.param(exported, marks=pytest.mark.slow), torch.jit.script,
     lambda m: torch.jit.freeze(torch.jit.script(m)), lambda m: torch.jit.trace(m, X),
     lambda m: torch.jit.optimize_for_inference(torch.jit.script(m))],
)  # fmt: skip
def test_models_that_were_exported(make):
    model, y = model_and_labels()
    made = make(nn.Sequential(model, nn.Dropout(0.5)).eval())
    assert measured(made, (X, y)) == measured(model, (X, y))
    assert af.accuracy(made, (X, y)) == 1


@pytest.mark.slow
def test_an_exported_program_is_named():
    model = linear(4).eval()
    with pytest.raises(TypeError, match=r"\.module\(\)"):
        af.accuracy(torch.export.export(model, (X,)), (X, predicted(model, X)))


def test_kept_inputs_are_contiguous():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()
    x = torch.rand(12, 1, 6, 6).repeat(1, 1, 1, 1)
    robust = af.robust_accuracy(model, (x, predicted(model, x)), eps=0.1, norm="l2", steps=2,
                                keep_inputs=True)  # fmt: skip
    assert robust.adversarial.is_contiguous()


def test_evaluation_in_a_thread_beside_training():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    y = torch.arange(30) % 4
    found, begun = [], threading.Event()

    def evaluate():
        begun.set()
        found.append(af.robust_accuracy(model, (X, y), eps=0.01, norm="l2", steps=40))

    thread = threading.Thread(target=evaluate)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    thread.start()
    begun.wait()
    steps = 0
    while thread.is_alive() or steps < 20:
        optimizer.zero_grad()
        F.cross_entropy(model(X), y).backward()
        optimizer.step()
        assert model.training
        assert all(p.requires_grad for p in model.parameters())
        steps += 1
    thread.join()
    assert len(found) == 1


class InThreads(nn.Module):
    """In one of its calls, and not in copies, runs work of another thread to its end."""

    def __init__(self, work):
        super().__init__()
        self.work = [work]

    def __deepcopy__(self, _):
        return nn.Identity()

    def forward(self, x):
        if self.work:
            thread = threading.Thread(target=self.work.pop(0))
            thread.start()
            thread.join()
        return x


@pytest.mark.parametrize("layer", [None, "2"])
@pytest.mark.parametrize("call", range(3))
def test_a_layer_that_two_threads_read_at_once(layer, call):
    torch.manual_seed(0)
    start, found = torch.rand_like(X), []

    def invert(model):
        return attacks.invert(model, X, start, layer=layer, steps=3)

    model = nn.Sequential(
        nn.Identity(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)
    )
    expected = invert(model)
    # Copied by the other thread while a hook of this one is on the layer.
    model[0] = InThreads(lambda: found.append(invert(model)))
    model[0].work[:0] = [lambda: None] * call
    assert torch.equal(invert(model), expected)
    assert torch.equal(found[0], expected)


# --- The adapter that normalises ---


@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 4, 4)])
def test_normalize_is_the_normalisation(shape):
    mean, std = torch.tensor([0.1, 0.5, 0.3]), torch.tensor([0.2, 1.0, 3.0])
    x = torch.rand(5, *shape)
    model = af.Normalize(nn.Flatten(), mean.tolist(), std.tolist())
    for c in range(3):
        part = model(x).view(5, *shape)[:, c]
        assert torch.allclose(part, (x[:, c] - mean[c]) / std[c])
    assert list(model.state_dict()) == []
    with pytest.raises(ValueError, match="channels"):
        model(torch.rand(2, 4, 3))
    with pytest.raises(ValueError, match="std"):
        af.Normalize(model, 0.0, 0.0)
