"""Models that are inspected before work: a warning for each doubt, and none for healthy models."""

import random
import re
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset
from toys import Changed, batch, curved, linear, predicted

import advfeat as af
from advfeat.checks import ResultWarning
from advfeat.metrics import robustness_curve, transfer_matrix

X = batch(24, dtype=torch.float32)


class Function(nn.Module):
    """A linear model whose inputs and logits go through functions."""

    def __init__(self, before=lambda x: x, after=lambda z: z):
        super().__init__()
        self.model, self.before, self.after = linear(4), before, after

    def forward(self, x):
        return self.after(self.model(self.before(x)))


class BatchStatistics(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(12, 8), norm, nn.Linear(8, 4)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


def flip(x):
    return x.flip(1) if random.random() < 0.5 else x


def numpy_noise(x):
    return x + torch.from_numpy(0.1 * np.random.randn(*x.shape)).to(x)  # noqa: NPY002


class Stateful(nn.Module):
    """Noise in every third call, or in one of five by a generator of its own."""

    def __init__(self, own_generator):
        super().__init__()
        self.model, self.calls = nn.Linear(12, 4), 0
        self.generator = torch.Generator().manual_seed(1) if own_generator else None

    def forward(self, x):
        self.calls += 1
        noisy = self.calls % 3 == 0
        if self.generator is not None:
            noisy = torch.rand((), generator=self.generator) < 0.2
        return self.model(x) + noisy * torch.rand(4, generator=self.generator)


class ZeroBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros_like(gradient)


def zero_in_most(x):
    often = (torch.arange(len(x)) % 4 > 0)[:, None]
    return torch.where(often, ZeroBackward.apply(x), x)


DOUBTS = {
    "softmax": (Function(after=lambda z: z.softmax(1)), "probabilities"),
    "softmax in percent": (Function(after=lambda z: 100 * z.softmax(1)), "probabilities"),
    "softmax averaged": (
        Function(after=lambda z: (z.softmax(1) + (2 * z).softmax(1)) / 2),
        "probabilities",
    ),
    "sigmoid": (Function(after=torch.sigmoid), "probabilities"),
    "tanh moved to [0, 1]": (Function(after=lambda z: (z.tanh() + 1) / 2), "probabilities"),
    "exp(log_softmax)": (Function(after=lambda z: z.log_softmax(1).exp()), "probabilities"),
    "softmax in bfloat16": (
        Function(after=lambda z: z.bfloat16().softmax(1)),
        "probabilities",
    ),
    "noise": (Function(before=lambda x: x + 0.05 * torch.randn_like(x)), "random"),
    "dropout always on": (Function(before=lambda x: F.dropout(x, 0.2)), "random"),
    "random flip of Python": (Function(before=flip), "random"),
    "noise of NumPy": (Function(before=numpy_noise), "random"),
    "noise in the logits": (Function(after=lambda z: z + torch.rand_like(z)), "random"),
    "another answer in every third call": (Stateful(False), "random"),
    "noise of its own generator, now and then": (Stateful(True), "random"),
    "BatchNorm without statistics": (
        BatchStatistics(nn.BatchNorm1d(8, track_running_stats=False)),
        "other samples",
    ),
    "centred on the batch": (Function(before=lambda x: x - x.mean(0)), "other samples"),
    "softmax over the batch": (Function(after=lambda z: 5 * z.softmax(0)), "other samples"),
    "square root at zero": (
        Function(before=lambda x: (x - X.amin()).clamp_min(0).sqrt()),
        "infinite",
    ),
    "norm of nothing": (
        Function(before=lambda x: x + 0 * (x[:, :1] * 0).norm(dim=1, keepdim=True).sqrt()),
        "NaN",
    ),
    "layer without backward": (Function(before=zero_in_most), "zero"),
    "quantised": (Function(before=lambda x: torch.round(8 * x) / 8), "zero"),
    "offset of 1e5": (Function(after=lambda z: z + 1e5), "rounding"),
    "features and logits": (
        Function(after=lambda z: (torch.cat([z, z, z], 1), z)),
        r"\(N, 12\) and \(N, 4\)",
    ),
    "detached": (Function(before=lambda x: x.detach()), "no gradient"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DOUBTS)
def test_what_is_doubtful_is_warned_of_by_every_call(name, monkeypatch):
    monkeypatch.setattr("advfeat.metrics._curve._ROUNDS", 1)
    model, message = DOUBTS[name]
    with torch.no_grad():
        y = model.model(X).argmax(1) if isinstance(model, Function) else model.eval()(X).argmax(1)
    data = TensorDataset(X, y)
    calls = {
        "pgd": lambda: af.pgd(model, X, y, eps=0.1, norm="linf", steps=2),
        "robust_accuracy": lambda: af.robust_accuracy(
            model, data, eps=0.1, norm="linf", steps=2, batch_size=24
        ),
        "curve": lambda: robustness_curve(model, data, norm="l2", batch_size=24),
        "transfer": lambda: transfer_matrix(
            {"a": model}, {"a": model}, data, af.PGD(eps=0.1, norm="linf", steps=2), batch_size=8
        ),
        "construction": lambda: af.construct_det_dataset(model, data, eps=0.1, norm="l2", steps=2),
    }
    if name not in ("softmax", "noise", "layer without backward"):
        del calls["curve"]  # a second each
    if name == "BatchNorm without statistics":
        del calls["construction"]  # fails on the first sample alone, and says so
    for call, run in calls.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
        texts = [str(w.message) for w in caught if issubclass(w.category, ResultWarning)]
        found = [text for text in texts if re.search(message, text)]
        assert len(found) == 1, (call, texts)
        assert all(w.filename == __file__ for w in caught if w.category is ResultWarning)


@pytest.mark.parametrize("name", ["noise", "BatchNorm without statistics", "features and logits"])
def test_accuracy_warns_of_what_changes_clean_predictions(name):
    model, message = DOUBTS[name]
    with pytest.warns(ResultWarning, match=message):
        af.accuracy(model, TensorDataset(X, torch.zeros(24, dtype=torch.int64)))


@pytest.mark.parametrize(
    ("low", "bounds"), [(0.3, (0.0, 255.0)), (0.0, (0.0, 255.0)), (0.2, (-128, 127))]
)
def test_data_that_use_a_sliver_of_the_bounds(low, bounds):
    model = linear(4)
    x = low + (1 - 2 * low) * X
    with pytest.warns(ResultWarning, match="eps may be in units"):
        af.pgd(model, x, predicted(model, x), eps=8, norm="linf", bounds=bounds)


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.body, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.body(self.patches(x).flatten(2).mT).mean(1))


def convolutional(*norms):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), norms[0], nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Dropout(0.3), nn.Linear(8, 5),
    )  # fmt: skip


def trained(model, x, scale=1.0):
    """A confident model: the last weights are large."""
    with torch.no_grad():
        list(model.parameters())[-2].mul_(scale)
    return model, x


def linear_with(change):
    return lambda: (Changed(curved(4, torch.float32), change), torch.rand(16, 12))


# Made when a test asks: tracing and averaging import much of torch.
HEALTHY = {
    "linear": lambda: (linear(4), torch.rand(16, 12)),
    "two classes": lambda: (linear(2), torch.rand(16, 12)),
    "mlp": lambda: (curved(4, torch.float32), torch.rand(16, 12)),
    "confident": lambda: trained(curved(4, torch.float32), torch.rand(16, 12), 30.0),
    "BatchNorm": lambda: (convolutional(nn.BatchNorm2d(8)), torch.rand(16, 3, 8, 8)),
    "GroupNorm": lambda: (convolutional(nn.GroupNorm(2, 8)), torch.rand(16, 3, 8, 8)),
    "InstanceNorm": lambda: (convolutional(nn.InstanceNorm2d(8)), torch.rand(16, 3, 8, 8)),
    "LSTM": lambda: (Sequence(), torch.rand(16, 5, 4)),
    "transformer": lambda: (Transformer(), torch.rand(16, 3, 8, 8)),
    "log_softmax": linear_with(lambda z: z.log_softmax(1)),
    "tanh": linear_with(torch.tanh),
    "positive": linear_with(F.softplus),
    "class ruled out": linear_with(lambda z: torch.cat([z, z[:, :1] - torch.inf], 1)),
    "identity of one-hot": lambda: (nn.Sequential(nn.Identity()), torch.eye(16)),
    "identity": lambda: (nn.Identity(), torch.rand(16, 12)),
    "averaged weights": lambda: (
        torch.optim.swa_utils.AveragedModel(linear(4)),
        torch.rand(16, 12),
    ),
    "dictionary": linear_with(lambda z: {"logits": z}),
    "one more item": linear_with(lambda z: (z, z.sum())),
    "script": lambda: (torch.jit.trace(linear(4), torch.rand(16, 12)), torch.rand(16, 12)),
    "in place": lambda: (
        Changed(nn.Sequential(nn.ReLU(inplace=True), linear(4)), lambda z: z),
        torch.rand(16, 12),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_models_are_silent(name, dtype):
    torch.manual_seed(0)
    model, x = HEALTHY[name]()
    if name == "script" and dtype != torch.float32:
        pytest.skip("its types are traced")
    model = model.to(dtype).eval()
    with torch.no_grad():
        out = model(x.to(dtype))
        y = out["logits"] if isinstance(out, dict) else out[0] if isinstance(out, tuple) else out
        y = y.argmax(1)
    data = TensorDataset(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clean = af.accuracy(model, data)
        robust = af.robust_accuracy(model, data, eps=0.05, norm="linf", steps=2)
        af.pgd(model, x, y, eps=0.05, norm="linf", steps=2)
    assert robust <= robust.standard == clean


def test_inspection_leaves_random_states_and_inputs_alone():
    model = Function(before=numpy_noise, after=lambda z: z + torch.rand_like(z))
    x = X.clone()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    from advfeat.model import attackable

    with pytest.warns(ResultWarning, match="random"), attackable(model) as net:
        net.inspect(x, (0.0, 1.0))
    assert torch.equal(x, X)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()  # noqa: NPY002


def test_inspection_costs_two_forward_passes():
    from advfeat.model import attackable

    sizes = []  # not in the model, which would be inspected for what its counter does
    model = Function(before=lambda x: sizes.append(len(x)) or x)
    with attackable(model) as net:
        net.inspect(X, (0.0, 1.0))
        net.inspect(X, (0.0, 1.0))
    assert sum(sizes) == 2 * len(X)


@pytest.mark.slow
@pytest.mark.parametrize(
    "after", [lambda z: z.softmax(1), torch.sigmoid, lambda z: 100 * z.softmax(1)]
)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_robust_accuracy_of_probabilities_is_that_of_the_logits(after, scale):
    """Exactly so for softmax; a sigmoid rounded to 1 has lost its gradient."""
    torch.manual_seed(3)
    plain = nn.Linear(12, 4)
    plain.weight.data *= scale
    plain.bias.data *= scale
    if after is torch.sigmoid and scale > 1:
        pytest.skip("rounded to 0 and 1")
    x = torch.rand(64, 12)
    data = TensorDataset(x, predicted(plain, x))
    exact = af.robust_accuracy(plain, data, eps=0.03, norm="linf", seed=0)
    with pytest.warns(ResultWarning, match="logits"):
        found = af.robust_accuracy(Changed(plain, after), data, eps=0.03, norm="linf", seed=0)
    assert abs(found - exact) <= 0.01
    assert 0.05 < exact < 0.95


def scaling(x):
    return x.mul_(2.0).sub_(0.5)


def by_numpy(x):
    x.detach().numpy()[...] *= 1.5
    return x


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", [torch.relu_, scaling, lambda x: F.hardtanh_(x, 0.2, 0.8), by_numpy]
)
@pytest.mark.parametrize("attack", ["pgd", "robust_accuracy", "square", "fmn"])
@pytest.mark.usefixtures("short_ensembles")
def test_a_model_that_writes_to_its_inputs(change, attack):
    from advfeat.attacks import Square, fmn

    model = Function(before=change)
    safe = Function(before=lambda x: change(x.clone()))
    y = predicted(safe, X)
    x = X.clone()
    runs = {
        "pgd": lambda m: af.pgd(m, x, y, eps=0.1, norm="linf", steps=3),
        "robust_accuracy": lambda m: torch.tensor(
            af.robust_accuracy(m, TensorDataset(x, y), eps=0.05, norm="linf", seed=0)
        ),
        "square": lambda m: Square(eps=0.1, norm="linf", queries=20, seed=0)(m, x, y),
        "fmn": lambda m: fmn(m, x, y, norm="l2", steps=5),
    }
    assert torch.equal(runs[attack](model), runs[attack](safe))
    assert torch.equal(x, X)


FALSE_ALARMS = {
    "constant": lambda z: 0 * z + torch.tensor([1.0, 0.0, 0.0, 0.0]),
    "tanh of positive": lambda z: (z - z.amin() + 0.1).tanh(),
    "hardtanh of positive": lambda z: F.hardtanh(0.1 + (z - z.amin()) / 20),
    "bounded above 1": lambda z: z.clamp(0, 6) / 10,
    "linear layer on probabilities": lambda z: 0.3 + z.sigmoid() @ torch.eye(4) / 4,
}


@pytest.mark.parametrize("name", FALSE_ALARMS)
def test_scores_between_0_and_1_are_no_probabilities(name):
    model = Function(after=FALSE_ALARMS[name])
    with torch.no_grad():
        out = model(X)
    assert ((out >= 0) & (out <= 1)).all()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        af.pgd(model, X, out.argmax(1), eps=0.01, norm="linf", steps=1)
    assert not [w for w in caught if "probabilities" in str(w.message)]


def test_saturated_probabilities_of_one_class_are_recognised():
    model = Function(after=lambda z: (z + torch.tensor([500.0, 0, 0, 0])).softmax(1))
    with pytest.warns(ResultWarning, match="probabilities"):
        af.pgd(model, X, torch.zeros(24, dtype=torch.int64), eps=0.01, norm="linf", steps=1)


class Alternating(nn.Module):
    def __init__(self):
        super().__init__()
        self.model, self.calls = linear(4), 0

    def forward(self, x):
        self.calls += 1
        return self.model(x) * (-1) ** self.calls


def test_a_model_that_alternates_is_not_said_to_depend_on_its_batch():
    with pytest.warns(ResultWarning, match="two calls on the same inputs differ"):
        af.accuracy(Alternating(), TensorDataset(X, torch.zeros(24, dtype=torch.int64)))


@pytest.mark.parametrize(
    ("model", "cause"),
    [
        (nn.LazyLinear(3), "not initialised"),
        (nn.Linear(12, 3, device="meta"), "without values"),
    ],
)
def test_models_without_weights(model, cause):
    with pytest.raises(ValueError, match=rf"model='weight': .*{cause}"):
        af.accuracy(model, TensorDataset(X, torch.zeros(24, dtype=torch.int64)))
