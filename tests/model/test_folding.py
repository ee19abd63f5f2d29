"""BatchNorm folded into convolutions: only where it is sure, and everything left as it was."""

import threading
import warnings
from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from test_model import Snapshot, Wrapped, batch, climb
from torch import nn
from torch.overrides import TorchFunctionMode

import advfeat as af
from advfeat.model import attackable, folding


@pytest.fixture(autouse=True)
def _bfloat16(monkeypatch):
    """Wherever the tests run, gradients are taken in bfloat16."""
    monkeypatch.setattr("advfeat.model.formats.supports_bfloat16", lambda device: True)


class Normalisations(TorchFunctionMode):
    """Counts the BatchNorms that are computed."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function is F.batch_norm
        return function(*args, **(kwargs or {}))


def settled(model, seed=0):
    """A model in evaluation mode whose BatchNorms scale and shift by numbers of their own."""
    generator = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            for tensor in [*m.parameters(), m.running_mean, m.running_var]:
                if tensor is not None:
                    tensor.data = torch.rand(tensor.shape, generator=generator) + 0.5
    return model.eval()


class Residual(nn.Module):
    """A ResNet's block: two pairs and a third on the shortcut."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.shortcut = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        inner = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return self.head(F.relu(inner + self.shortcut(x)).mean((2, 3)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return settled(Residual())


def pair(forward, convolution=None, norm=None, **children):
    """A model of a convolution, a BatchNorm and a head, called in some way of its own."""
    torch.manual_seed(0)
    convolution = convolution or nn.Conv2d(3, 4, 3, padding=1)
    norm = norm or nn.BatchNorm2d(4)
    children |= {"conv": convolution, "norm": norm, "head": nn.Linear(4, 5)}
    return settled(Wrapped(forward, **children))


def plainly(self, x):
    return self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))


def normalised_in_low_precision(model, inputs=None):
    """BatchNorms computed by a gradient in bfloat16, once it is known how to take it."""
    with attackable(model, precision="bfloat16") as net:
        prepared = net.prepare(batch() if inputs is None else inputs)
        net.logits_gradient(prepared, climb(len(prepared)))
        with Normalisations() as seen:
            net.logits_gradient(prepared, climb(len(prepared)))
    return seen.count


# --- What is folded ---


@pytest.mark.parametrize(
    ("convolution", "norm", "shape"),
    [
        (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), (8, 8)),
        (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), (8, 8)),
        (nn.Conv2d(4, 6, 3, padding=2, stride=2, groups=2), nn.BatchNorm2d(6), (8, 8)),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(6), (8, 8)),
        (nn.Conv2d(4, 6, 3, padding="same", dilation=2), nn.BatchNorm2d(6, eps=0.1), (8, 8)),
        (nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, affine=False), (8, 8)),
        (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (8,)),
        (nn.Conv3d(4, 6, 2), nn.BatchNorm3d(6), (4, 4, 4)),
    ],
)
def test_a_folded_pair_gives_what_the_pair_gives(convolution, norm, shape):
    model = settled(nn.Sequential(convolution, norm))
    inputs = batch(3, 4, *shape)
    forwards = folding.fold_batchnorm(model)
    with torch.no_grad(), folding.forwards_replaced(forwards), Normalisations() as seen:
        found = model(inputs)
    assert seen.count == 0
    torch.testing.assert_close(found, model(inputs).detach(), rtol=1e-5, atol=1e-5)


def test_a_gradient_in_bfloat16_computes_no_batchnorm(model):
    assert normalised_in_low_precision(model) == 0


def test_the_gradient_is_that_of_the_model(model):
    leaf = batch().requires_grad_()
    climb()(model(leaf)).sum().backward()
    with attackable(model, precision="bfloat16") as net:
        found = net.logits_gradient(net.prepare(batch()), climb()).gradient
    cosine = F.cosine_similarity(found.flatten(1), leaf.grad.flatten(1))
    assert float(cosine.min()) > 0.99


def test_verdicts_are_those_of_the_model_itself_to_the_last_bit(model):
    with attackable(model, precision="bfloat16") as net:
        prepared = net.prepare(batch())
        net.logits_gradient(prepared, climb())
        with Normalisations() as seen:
            logits, features = net.logits(prepared), net.features(prepared)
        assert seen.count == 9  # of three passes, for features look for the layer first
    with attackable(model) as net:
        assert torch.equal(logits, net.logits(prepared))
        assert torch.equal(features, net.features(prepared))


def test_in_float32_nothing_is_folded(model):
    with attackable(model) as net, Normalisations() as seen:
        net.logits_gradient(net.prepare(batch()), climb())
    assert seen.count == 3


def test_a_data_parallel_wrapper_is_taken_off_before(model):
    assert normalised_in_low_precision(nn.DataParallel(model)) == 0


def test_features_are_folded_too(model):
    with attackable(model, precision="bfloat16") as net:
        prepared = net.prepare(batch())
        own = net.features(prepared)
        objective = lambda g: g.square().sum(1)  # noqa: E731
        net.features_gradient(prepared, objective)
        with Normalisations() as seen:
            found = net.features_gradient(prepared, objective).output
    assert seen.count == 0
    torch.testing.assert_close(found, own, rtol=0.05, atol=0.05)


# --- What is not ---


def skipped(self, x):
    out = self.conv(x)
    return self.head((self.norm(out) + out).mean((2, 3)))


def twice(self, x):
    self.norm(self.conv(x))
    return plainly(self, x)


def detour(self, x):
    return self.head(self.norm(F.relu(self.conv(x))).mean((2, 3)))


def also_returned(self, x):
    out = self.conv(x)
    return self.head(self.norm(out).mean((2, 3))), out


def by_data(self, x):
    out = self.conv(x)
    return self.head((self.norm(out) + (out if x.mean() > 1 else 0)).mean((2, 3)))


class Scaled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


UNSURE = {
    "output used beside": pair(skipped),
    "called twice": pair(twice),
    "something between": pair(detour),
    "output returned": pair(also_returned),
    "depends on data": pair(by_data),
    "transposed": pair(plainly, nn.ConvTranspose2d(3, 4, 3)),
    "class of the user's": pair(plainly, Scaled(3, 4, 3)),
    "parametrized": pair(
        plainly, nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3, padding=1))
    ),
    "no statistics": pair(plainly, None, nn.BatchNorm2d(4, track_running_stats=False)),
    "cannot be copied": pair(plainly),
}
UNSURE["cannot be copied"].lock = threading.Lock()


@pytest.mark.parametrize("why", UNSURE)
def test_where_it_is_not_sure_nothing_is_folded(why):
    assert folding.fold_batchnorm(UNSURE[why]) == {}
    assert normalised_in_low_precision(UNSURE[why]) > 0


def test_shared_modules_are_not_folded():
    conv = nn.Conv2d(3, 3, 3, padding=1)
    norms = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    assert folding.fold_batchnorm(settled(nn.Sequential(conv, norms[0], conv, norms[1]))) == {}
    own = nn.Conv2d(3, 3, 3)
    assert folding.fold_batchnorm(settled(nn.Sequential(conv, norms[0], own, norms[0]))) == {}


@pytest.mark.parametrize("part", ["", "conv1", "norm2", "head"])
@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"],
)
def test_a_hook_sees_what_it_always_sees(model, part, register):
    handle = getattr(model.get_submodule(part), register)(lambda *_: None)
    assert folding.fold_batchnorm(model) == {}
    handle.remove()
    assert len(folding.fold_batchnorm(model)) == 6


def test_a_forward_of_the_users_own_stays(model):
    model.conv1.forward = lambda x: torch.zeros(len(x), 4, 8, 8)
    own = model.conv1.forward
    assert normalised_in_low_precision(model) == 1
    assert model.conv1.forward is own


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_models_of_other_precision_are_not_folded(model, dtype):
    assert folding.fold_batchnorm(model.to(dtype)) == {}


def test_batch_statistics_are_never_folded(model):
    model.train()
    assert folding.fold_batchnorm(model) == {}
    with attackable(model, precision="bfloat16", train=True) as net, Normalisations() as seen:
        net.logits_gradient(net.prepare(batch()), climb())
    assert seen.count == 3


@pytest.mark.parametrize("layer", ["conv1", "shortcut.0", "norm1"])
def test_a_layer_inside_a_pair_is_seen_as_it_is(model, layer):
    with attackable(model, precision="bfloat16", layer=layer) as net:
        prepared = net.prepare(batch())
        found = net.features_gradient(prepared, lambda g: g.square().sum(1)).output
        torch.testing.assert_close(found, net.features(prepared), rtol=0.05, atol=0.05)


def test_a_pair_that_is_changed_later_is_looked_at_again(model):
    assert len(folding.fold_batchnorm(model)) == 6
    model.norm1 = nn.Identity()
    assert len(folding.fold_batchnorm(model)) == 4
    assert normalised_in_low_precision(model) == 0


def test_what_the_model_does_otherwise_later_is_found_by_its_output():
    def switched(self, x):
        return skipped(self, x) if self.beside else plainly(self, x)

    model = pair(switched)
    model.beside = False
    assert normalised_in_low_precision(model) == 0
    model.beside = True
    assert normalised_in_low_precision(model) == 1


# --- Everything is left as it was ---


def test_looking_leaves_the_model_bit_for_bit(model):
    before, keys = Snapshot(model), [set(vars(m)) for m in model.modules()]
    with attackable(model, precision="bfloat16") as net:
        net.logits_gradient(net.prepare(batch()), climb())
        net.features_gradient(net.prepare(batch()), lambda g: g.sum(1))
    before.assert_unchanged()
    assert [set(vars(m)) for m in model.modules()] == keys


def test_an_exception_inside_leaves_the_forwards_as_they_were():
    def fail(self, x):
        out = plainly(self, x)
        if self.failing:
            raise ValueError("inside")
        return out

    model = pair(fail)
    model.failing = False
    with attackable(model, precision="bfloat16") as net:
        prepared = net.prepare(batch())
        net.logits_gradient(prepared, climb())
        model.failing = True
        with pytest.raises(ValueError, match="inside"):
            net.logits_gradient(prepared, climb())
        assert not any("forward" in vars(m) for m in model.modules())


def test_looks_may_be_nested(model):
    with ExitStack() as stack:
        first, second = (
            stack.enter_context(attackable(model, precision=precision))
            for precision in ("bfloat16", "bfloat16")
        )
        prepared = first.prepare(batch())
        one = first.logits_gradient(prepared, climb())
        other = second.logits_gradient(prepared, climb())
        assert torch.equal(one.gradient, other.gradient)
        assert torch.equal(first.logits(prepared), second.logits(prepared))
    assert not any("forward" in vars(m) for m in model.modules())


def test_no_proxy_is_left_in_a_model_that_keeps_its_activations():
    def keep(self, x):
        self.seen.append(self.norm(x))
        self.last = self.seen[-1]
        return self.head(self.last.mean((2, 3)))

    model = pair(keep, None, nn.BatchNorm2d(3))
    model.head, model.seen = nn.Linear(3, 5), []
    folding.fold_batchnorm(model)
    assert model.seen == []
    assert not hasattr(model, "last")


def test_a_model_with_noise_is_not_folded_and_costs_no_random_numbers():
    def noisy(self, x):
        return plainly(self, x + 0.5 * torch.rand(x.shape))

    models = [pair(noisy), pair(lambda self, x: noisy(self, x))]
    models[1].eval()
    states = []
    for model, precision in zip(models, ["float32", "bfloat16"], strict=True):
        torch.manual_seed(1)
        with attackable(model, precision=precision) as net:
            net.logits_gradient(net.prepare(batch()), climb())
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_training_in_bfloat16_attacks_the_folded_model(model):
    inputs = batch(8)
    data = torch.utils.data.TensorDataset(inputs, torch.arange(8) % 5)
    with Normalisations() as seen, warnings.catch_warnings():
        af.adversarial_fit(
            model, data, eps=0.1, norm="l2", steps=9, epochs=1, batch_size=8, seed=0,
            precision="bfloat16", progress=False,
        )  # fmt: skip
    # Three in each pass of the step itself, of the number of classes, of the check of the folding,
    # and of the two passes of the inspection: none in the nine steps of the attack.
    assert seen.count == 15
