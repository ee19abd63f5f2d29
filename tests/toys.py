"""Small models and batches that the tests of the attacks share."""

import importlib

import numpy as np
import pytest
import torch
from torch import nn

NORMS = ("l1", "l2", "linf")
ORDER = {"l1": 1, "l2": 2, "linf": np.inf}
DUAL = {"l1": np.inf, "l2": 2, "linf": 1}
WIDE = (-100.0, 100.0)
FEATURES = 12
SHAPES = [(12,), (3, 4), (3, 2, 2)]


def linear(classes=2, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(FEATURES, classes, dtype=dtype))


def curved(classes=4, dtype=torch.float64):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, classes)
    ).to(dtype)
    for parameter in net.parameters():
        parameter.data *= 3
    return net


def batch(count=8, shape=(FEATURES,), dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, *shape, generator=generator, dtype=dtype)


def ends_and_stays(attack, net, state):
    """Every row is finished before 20 steps, and where it was after one more."""
    for _ in range(20):
        state = attack.step(net, state)
    assert attack.finished(state).all()
    assert (state.step < 20).all()
    again = attack.step(net, state)
    assert torch.equal(again.current, state.current)
    assert torch.equal(again.step, state.step)


def predicted(model, x):
    with torch.no_grad():
        return model(x).argmax(1)


def sizes(x_adv, x, norm):
    delta = (x_adv.double() - x.double()).flatten(1).numpy()
    return np.linalg.norm(delta, ORDER[norm], axis=1)


class Changed(nn.Module):
    """A model whose logits go through a function."""

    def __init__(self, model, change):
        super().__init__()
        self.model, self.change = model, change

    def forward(self, x):
        return self.change(self.model(x))


def masked(model):
    """Rule out one more class by a logit of minus infinity."""
    return Changed(model, lambda z: torch.cat([z, torch.full_like(z[:, :1], -torch.inf)], 1))


def adv_lib(attack):
    """A module of adv_lib.attacks, or skip: it is not on every machine (docs/contributing.md)."""
    try:
        return importlib.import_module(f"adv_lib.attacks.{attack}")
    except (
        ImportError,
        RuntimeError,
    ) as error:  # a RuntimeError from a torchvision that is not torch's
        pytest.skip(f"adv_lib does not import: {error}")
