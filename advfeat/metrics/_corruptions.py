"""Common corruptions with the constants of CIFAR-10-C and ImageNet-C (Hendrycks et al. 2019)."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from advfeat import checks, seeding

Constants: TypeAlias = Literal["cifar10", "imagenet"]

SEVERITIES = 5


class Corruption(NamedTuple):
    """What it does to images in [0, 1], and how much at each severity."""

    # of (images, constant, keys of the samples, draw)
    apply: Callable[[Tensor, float, Tensor, int], Tensor]
    cifar10: tuple[float, ...]
    imagenet: tuple[float, ...]
    images_only: bool = True

    def constant(self, constants: Constants, severity: int) -> float:
        """Strength at a severity from 1 to 5."""
        of_all: tuple[float, ...] = getattr(self, constants)
        return of_all[severity - 1]


def _normal(images: Tensor, keys: Tensor, draw: int) -> Tensor:
    uniform = seeding.uniform(keys, draw, images[0].numel())
    normal: Tensor = torch.special.ndtri(uniform).view(images.shape)
    return normal


def gaussian_noise(images: Tensor, sigma: float, keys: Tensor, draw: int) -> Tensor:
    """Add normal noise."""
    return images + sigma * _normal(images, keys, draw)


def speckle_noise(images: Tensor, sigma: float, keys: Tensor, draw: int) -> Tensor:
    """Add normal noise in proportion to the pixel."""
    return images + sigma * images * _normal(images, keys, draw)


def impulse_noise(images: Tensor, amount: float, keys: Tensor, draw: int) -> Tensor:
    """Set that fraction of the values to 0 or 1."""
    uniform = seeding.uniform(keys, draw, images[0].numel()).view(images.shape)
    salt = (uniform < amount / 2).to(images.dtype)
    return torch.where(uniform < amount, salt, images)


def gaussian_blur(images: Tensor, sigma: float, keys: Tensor, draw: int) -> Tensor:
    """Blur by a Gaussian of so many pixels; pixels at the edge are repeated beyond it."""
    radius = int(4 * sigma + 0.5)
    places = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    weights = torch.exp(-0.5 * (places / sigma).square())
    weights = weights / weights.sum()
    channels = images.shape[1]
    for axis in (2, 3):
        shape, pad = [1, 1, 1, 1], [0, 0, 0, 0]
        shape[axis] = len(weights)
        pad[2 * (3 - axis)] = pad[2 * (3 - axis) + 1] = radius
        kernel = weights.view(shape).expand(channels, *shape[1:])
        images = F.conv2d(F.pad(images, pad, mode="replicate"), kernel, groups=channels)
    return images


def contrast(images: Tensor, factor: float, keys: Tensor, draw: int) -> Tensor:
    """Shrink each channel towards its mean."""
    means = images.mean((2, 3), keepdim=True)
    return (images - means) * factor + means


def brightness(images: Tensor, shift: float, keys: Tensor, draw: int) -> Tensor:
    """Raise the value (of hue, saturation, value) of every pixel; of a grey one the pixel."""
    value = images.amax(1, keepdim=True)
    raised = (value + shift).clamp_max(1.0)
    return torch.where(value > 0, images * (raised / value.clamp_min(1e-12)), raised)


def jpeg_compression(images: Tensor, quality: float, keys: Tensor, draw: int) -> Tensor:
    """Write and read JPEG files of that quality (Pillow); values are rounded to 8 bits."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("jpeg_compression needs Pillow: pip install 'advfeat[images]'") from error
    if images.shape[1] not in (1, 3):
        checks.fail("inputs.shape", tuple(images.shape), "JPEG has 1 or 3 channels")
    levels = (255 * images).round().to(torch.uint8).movedim(1, -1).cpu().numpy()
    found = []
    for picture in levels:
        file = io.BytesIO()
        Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture).save(
            file, "JPEG", quality=int(quality)
        )
        with Image.open(file) as read:
            found.append(np.array(read).reshape(picture.shape))
    pixels = torch.from_numpy(np.stack(found)).movedim(-1, 1)
    return (pixels.to(images.dtype) / 255).to(images.device)


CORRUPTIONS = {
    "gaussian_noise": Corruption(
        gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38), False
    ),
    "impulse_noise": Corruption(
        impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27), False
    ),
    "speckle_noise": Corruption(
        speckle_noise, (0.06, 0.1, 0.12, 0.16, 0.2), (0.15, 0.2, 0.35, 0.45, 0.6), False
    ),
    "gaussian_blur": Corruption(gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0), (1, 2, 3, 4, 6)),
    "contrast": Corruption(contrast, (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "brightness": Corruption(brightness, (0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "jpeg_compression": Corruption(jpeg_compression, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
}


def corrupted(
    images: Tensor, name: str, severity: int, constants: Constants, keys: Tensor
) -> Tensor:
    """Corrupt images in [0, 1]; the result lies there too.

    Random numbers follow from the samples' keys, the corruption and the severity.
    """
    corruption = CORRUPTIONS[name]
    draw = (SEVERITIES + 1) * list(CORRUPTIONS).index(name) + severity
    strength = corruption.constant(constants, severity)
    return corruption.apply(images, strength, keys, draw).clamp(0.0, 1.0)


def available(shape: tuple[int, ...]) -> tuple[str, ...]:
    """Names of those that fit inputs of this shape, JPEG only where Pillow is installed."""
    found = [name for name, c in CORRUPTIONS.items() if len(shape) == 4 or not c.images_only]
    jpeg = importlib.util.find_spec("PIL") is not None and shape[1] in (1, 3)
    return tuple(name for name in found if jpeg or name != "jpeg_compression")
