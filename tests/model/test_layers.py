"""Where activations are read: the layer that gives the logits, values before in-place changes."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import advfeat as af
from advfeat.attacks import invert
from advfeat.model import attackable


class Block(nn.Module):
    """A convolution, then something in place."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.conv = kind, nn.Conv2d(1, 4, 3)
        self.fc = nn.Linear(4 * 4, 3)

    def forward(self, x):
        x = self.conv(x)
        if self.kind == "relu":
            x = F.relu(x, inplace=True)
        elif self.kind == "sum":
            x += 1.0
        else:
            x.clamp_(0.1, 0.2)
        return self.fc(x.flatten(1))


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["relu", "sum", "clamp"])
def test_features_are_the_values_at_the_layer_whatever_follows_in_place(kind, compiled):
    torch.manual_seed(0)
    model, x = Block(kind), torch.rand(5, 1, 4, 4)
    expected = F.conv2d(x, model.conv.weight, model.conv.bias).flatten(1)
    assert expected.min() < 0
    with attackable(model, layer="conv", compile=compiled) as net:
        torch.testing.assert_close(net.features(x), expected)
        gradient = net.features_gradient(x, lambda f: f.sum(1)).gradient
    leaf = x.clone().requires_grad_()
    F.conv2d(leaf, model.conv.weight, model.conv.bias).sum().backward()
    torch.testing.assert_close(gradient, leaf.grad)


# --- The layer that is found ---


class Bottleneck(nn.Module):
    """Logits first, then another Linear: an auxiliary head, or a gate."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.body, self.gate = nn.Linear(6, 8), nn.Linear(8, 2)
        self.back, self.head = nn.Linear(2, 8), nn.Linear(8, 3)
        self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 3, bias=False)

    def forward(self, x):
        h = torch.relu(self.body(x))
        if self.kind == "auxiliary":
            return self.head(h), self.gate(h)
        if self.kind == "temperature":
            logits = self.head(h) / 2
            self.gate(h)
            return logits
        if self.kind == "adapter":  # as LoRA computes a head
            return self.head(h) + self.up(self.down(h))
        if self.kind == "functional":
            h = h + self.back(self.gate(h))
            return F.linear(h, self.head.weight)
        return self.head(h + self.back(self.gate(h)))


@pytest.mark.parametrize("kind", ["auxiliary", "temperature", "gate"])
def test_the_layer_is_the_one_that_feeds_the_logits(kind):
    torch.manual_seed(0)
    model = Bottleneck(kind)
    data = TensorDataset(torch.rand(8, 6), torch.arange(8) % 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = af.construct_robust_dataset(model, data, steps=2, seed=0)
    assert made.manifest["layer"] == {"module": "head", "side": "input", "width": 8}


@pytest.mark.parametrize(
    ("kind", "name", "width"), [("adapter", "head", 8), ("functional", "back", 2)]
)
def test_a_layer_that_may_not_fit_is_warned_of(kind, name, width):
    data = TensorDataset(torch.rand(8, 6), torch.arange(8) % 3)
    with pytest.warns(UserWarning, match=f"'{name}'.* is used. Name the layer") as caught:
        made = af.construct_robust_dataset(Bottleneck(kind), data, steps=2, seed=0)
    assert len(caught) == 1
    assert made.manifest["layer"] == {"module": name, "side": "input", "width": width}


def test_a_linear_that_is_called_again_is_taken_at_the_call_that_gives_the_logits():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.Linear(3, 3)

        def forward(self, x):
            logits = self.cell(torch.tanh(self.cell(x)))
            self.cell(logits)
            return logits

    model, x = Recurrent(), torch.rand(4, 3)
    with attackable(model) as net, torch.no_grad():
        torch.testing.assert_close(net.features(x), torch.tanh(model.cell(x)))


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ("body", {"module": "body", "side": "output", "width": 8}),
        (lambda x: x[:, :4] * 2, {"function": "<lambda>", "width": 4}),
    ],
)
def test_a_layer_that_is_given_is_recorded_too(layer, expected, tmp_path):
    data = TensorDataset(torch.rand(8, 6), torch.arange(8) % 3)
    out = tmp_path / "set"
    af.construct_robust_dataset(Bottleneck("gate"), data, layer=layer, steps=1, seed=0, out=out)
    assert af.ConstructedDataset.open(out).manifest["layer"] == expected


# --- Straight through the last ReLU ---


class Relus(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.module = kind, nn.ReLU(inplace=kind == "module in place")
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3)

    def relu(self, x):
        return {
            "module": self.module,
            "module in place": self.module,
            "function": F.relu,
            "torch": torch.relu,
            "method": lambda v: v.relu(),
            "in place": lambda v: v.relu_(),
        }[self.kind](x)

    def forward(self, x):
        return self.head(self.relu(self.second(self.relu(self.first(x)))))


@pytest.mark.parametrize(
    "kind", ["module", "module in place", "function", "torch", "method", "in place"]
)
def test_gradients_pass_the_last_relu_and_no_other(kind):
    torch.manual_seed(0)
    model, x = Relus(kind), torch.rand(5, 6)
    w1, w2 = model.first.weight, model.second.weight
    active = (model.first(x) > 0).float()
    expected = ((torch.ones(7) @ w2) * active) @ w1
    with attackable(model, straight_through=True) as net:
        found = net.features_gradient(x, lambda f: f.sum(1))
        values = net.features(x)
    torch.testing.assert_close(found.gradient, expected.detach())
    with attackable(model) as net:
        assert torch.equal(values, net.features(x))
        assert torch.equal(found.output, values)
        dead = net.features_gradient(x, lambda f: f.sum(1)).gradient
    assert not torch.allclose(dead, found.gradient)


def test_inversion_wakes_units_that_are_not_active():
    """One unit, off at the start: its gradient is zero unless it passes the ReLU."""
    model = nn.Sequential(nn.Linear(2, 1, bias=True), nn.ReLU(), nn.Linear(1, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0]]))
        model[0].bias.fill_(-0.5)
    goal, start = torch.tensor([[0.9, 0.5]]), torch.tensor([[0.1, 0.5]])
    stuck = invert(model, goal, start, steps=20, step_size=0.05)
    assert torch.equal(stuck, start)
    found = invert(model, goal, start, steps=20, step_size=0.05, straight_through=True)
    torch.testing.assert_close(found, goal, atol=0.051, rtol=0)


@pytest.mark.parametrize("method", [af.construct_robust_dataset, af.construct_nonrobust_dataset])
def test_constructions_go_straight_through_and_record_it(method):
    torch.manual_seed(0)
    data = TensorDataset(torch.rand(8, 6), torch.arange(8) % 3)
    model = Relus("module")
    with torch.no_grad():  # every unit is active on about half of the data
        model.second.bias -= model.second(torch.relu(model.first(data.tensors[0]))).mean(0)
    made = method(model, data, steps=5, seed=0, straight_through=True)
    plain = method(model, data, steps=5, seed=0)
    assert made.manifest["settings"]["straight_through"] is True
    assert "straight_through" not in plain.manifest["settings"]
    start = data.tensors[0][made.field("start_index")]
    other = invert(model, data.tensors[0], start, steps=5, straight_through=True)
    torch.testing.assert_close(made.images, other)
    assert not torch.allclose(made.images, plain.images)


def test_straight_through_is_refused_where_it_means_nothing():
    model, x = nn.Linear(6, 3), torch.rand(4, 6)
    with pytest.raises(ValueError, match="no ReLU"):
        invert(model, x, x.flip(0), steps=1, straight_through=True)
    data = TensorDataset(x, torch.arange(4) % 3)
    with pytest.raises(ValueError, match="not with compile=True"):
        af.construct_robust_dataset(Relus("torch"), data, straight_through=True, compile=True)
