"""No model is special: each kind trains by every objective and method, and is left as it was."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import advfeat as af
from advfeat.training import Options


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.body = nn.Sequential(
            nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.body(x)).mean((2, 3)))


class Attention(nn.Module):
    """A transformer's block on four patches."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, stride=4)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.block(tokens)).mean(1))


class Dictionary(Residual):
    def forward(self, x):
        return {"loss": None, "logits": super().forward(x)}


class Viewing(nn.Module):
    """A view that channels_last does not allow."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 64, 3)

    def forward(self, x):
        return self.head(self.conv(x).relu().view(len(x), -1))


def sequential():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 3))


def dropping():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.Dropout(0.5), nn.Linear(16, 3))


def frozen():
    model = Residual().train()
    model.stem.requires_grad_(False)
    model.body[0].eval()
    return model


def tabular():
    return nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


MODELS = [sequential, Residual, Attention, Dictionary, Viewing, dropping, frozen, tabular]
WAYS = {
    "pgd": {"steps": 2, "random_start": True},
    "trades": {"objective": "trades", "steps": 2},
    "mart": {"objective": "mart", "steps": 2, "attack_mode": "train"},
    "fast": {"method": "fast"},
    "free": {"method": "free", "steps": 2},
    "all options": {
        "steps": 2,
        "options": Options(ema=0.5, awp=0.005, clip_norm=1.0, label_smoothing=0.1, accumulate=2),
        "validation": 0.25,
    },
}


def data(model):
    generator = torch.Generator().manual_seed(0)
    shape = (5,) if isinstance(model[0], nn.Linear) else (3, 8, 8)
    y = torch.arange(48) % 3
    x = 0.3 * torch.rand(48, *shape, generator=generator)
    x[torch.arange(48), y] += 0.6
    return TensorDataset(x, y)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_any_model_learns_and_is_left_as_it_was(make, way):
    torch.manual_seed(0)
    model = make()
    rows = data(model if isinstance(model, nn.Sequential) else [None])
    flags = [m.training for m in model.modules()]
    wanted = [p.requires_grad for p in model.parameters()]
    strides = [p.stride() for p in model.parameters()]
    still = {
        name: value.clone()
        for name, value in model.state_dict().items()
        if make is frozen and ("stem" in name or "running" in name)
    }
    history = af.adversarial_fit(
        model,
        rows,
        eps=0.05,
        norm="linf",
        epochs=4,
        batch_size=12,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.01),
        seed=0,
        **WAYS[way],
    )
    assert history.rows[-1]["loss"] < history.rows[0]["loss"]
    assert [m.training for m in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert [p.stride() for p in model.parameters()] == strides
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in still.items())


class Digits(nn.Module):
    """The classic of MNIST: its second convolution gives channels_last where weights are so."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.head = nn.Linear(4 * 64, 3)

    def forward(self, x):
        x = self.conv2(self.conv1(x).relu()).relu()
        return self.head(x.view(len(x), -1))


class Placed(nn.Module):
    """A weight of four dimensions that is no convolution's, and is viewed."""

    def __init__(self):
        super().__init__()
        self.place = nn.Parameter(torch.zeros(1, 4, 4, 4))
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        return self.head(x.flatten(1) + self.place.view(1, -1))


@pytest.mark.parametrize("options", [Options(), Options(ema=0.5)], ids=["plain", "average"])
@pytest.mark.parametrize("make", [Digits, Placed], ids=lambda make: make.__name__)
def test_a_view_that_channels_last_weights_do_not_allow(make, options):
    model, rows = make(), TensorDataset(torch.rand(24, 1, 8, 8), torch.arange(24) % 3)
    strides = [p.stride() for p in model.parameters()]
    ball = {"eps": 0.05, "norm": "linf", "steps": 2}
    af.adversarial_fit(model, rows, **ball, epochs=1, batch_size=12, options=options, seed=0)
    assert [p.stride() for p in model.parameters()] == strides


@pytest.mark.parametrize("make", [Digits, Viewing], ids=lambda make: make.__name__)
def test_a_compiled_model_that_channels_last_does_not_fit(make, monkeypatch):
    monkeypatch.setattr(torch, "compile", torch._dynamo.optimize("eager"))
    channels = 1 if make is Digits else 3
    rows = TensorDataset(torch.rand(24, channels, 8, 8), torch.arange(24) % 3)
    ball = {"eps": 0.05, "norm": "linf", "steps": 2}
    af.adversarial_fit(
        make(), rows, **ball, epochs=1, batch_size=12, options=Options(compile=True), seed=0
    )
