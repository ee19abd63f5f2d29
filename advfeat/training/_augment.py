"""Augmentation of image batches on their own device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from advfeat import checks


def crop_flip(images: Tensor, padding: int = 4) -> Tensor:
    """Random crop after zero padding, and random horizontal flip, each image its own way.

    Made for ``augment=``: one gather for the whole batch, on its device. Random numbers are
    torch's own.

    Parameters
    ----------
    images
        Shape ``(N, C, H, W)``.
    padding
        Pixels on each side; 4 is the paper's for CIFAR-10. For another one, or to crop or flip
        alone: ``augment=lambda x: crop_flip(x, 2)``, ``crop_flip(x, 0)`` flips alone.

    Returns
    -------
    Tensor
        Shape, dtype and device of ``images``.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause.

    Examples
    --------
    >>> import torch
    >>> crop_flip(torch.rand(8, 3, 32, 32)).shape
    torch.Size([8, 3, 32, 32])
    """
    if not isinstance(images, Tensor) or images.ndim != 4:
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        checks.fail("images", shape, "expected images (N, C, H, W)")
    checks.count("padding", padding, low=0)
    count, _, height, width = images.shape
    device = images.device

    def shifts() -> Tensor:
        return torch.randint(2 * padding + 1, (count, 1), device=device)

    rows = shifts() + torch.arange(height, device=device)
    columns = shifts() + torch.arange(width, device=device)
    flipped = torch.rand(count, 1, device=device) < 0.5
    columns = torch.where(flipped, columns.flip(1), columns)
    padded = F.pad(images, (padding,) * 4).movedim(1, 3)
    samples = torch.arange(count, device=device)[:, None, None]
    return padded[samples, rows[:, :, None], columns[:, None, :]].movedim(3, 1)
