"""CIFAR-10 and two small ResNets on it, for the benchmarks; trained once and kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from resnet import SmallResNet
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import advfeat as af
from advfeat.training import crop_flip

EPS = 8 / 255
IMAGES, BATCH = 20_000, 128


def read(path: Path, part: str, count: int) -> tuple[Tensor, Tensor]:
    with np.load(path) as file:
        images = torch.from_numpy(file[f"x_{part}"][:count]).permute(0, 3, 1, 2).contiguous()
        return images.float() / 255, torch.from_numpy(file[f"y_{part}"][:count]).long()


def test_images(path: Path, count: int) -> tuple[Tensor, Tensor]:
    return read(path, "test", count)


def standard_model(path: Path, cache: Path) -> nn.Module:
    return _kept(cache / "standard.pt", path, epochs=8, robust=False)


def robust_model(path: Path, cache: Path) -> nn.Module:
    return _kept(cache / "robust.pt", path, epochs=8, robust=True)


def _kept(file: Path, path: Path, epochs: int, robust: bool) -> nn.Module:
    torch.manual_seed(0)
    model = SmallResNet()
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model.eval()
    data = TensorDataset(*read(path, "train", IMAGES))
    options = {
        "epochs": epochs,
        "batch_size": BATCH,
        "augment": crop_flip,
        "seed": 0,
        "schedule": "one_cycle",
        "precision": "bfloat16",
    }
    if robust:
        ball = {"eps": EPS, "norm": "linf", "steps": 2, "step_size": EPS, "random_start": True}
        af.adversarial_fit(model, data, **ball, **options)
    else:
        af.fit(model, data, **options)
    torch.save(model.state_dict(), file)
    return model.eval()
