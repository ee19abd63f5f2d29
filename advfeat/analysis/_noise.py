"""Learning from perturbations on noise: images that show nothing (Kumano et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.data import TensorDataset

from advfeat import checks, seeding
from advfeat.datasets import ConstructedDataset
from advfeat.nonrobust import construct_det_dataset
from advfeat.threat import Bounds, Norm


def noise_perturbations(
    model: nn.Module,
    count: int,
    shape: Sequence[int],
    *,
    classes: int,
    eps: float,
    norm: Norm,
    steps: int = 100,
    bounds: Bounds = (0.0, 1.0),
    seed: int | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> ConstructedDataset:
    """Perturb images of uniform noise towards classes, and label them so.

    Nothing in the images but the perturbation agrees with the label. Kumano et al. (2024) show that
    classifiers learn from such data, and prove for wide two-layer networks that their decisions
    become those of ``model``. Train a fresh model on it and test on original data.

    Parameters
    ----------
    model
        The perturbations are made on it; usually a standard model.
    count, shape
        Images, and the shape of one: ``(3, 32, 32)``.
    classes
        How many; each is the label of as many images, up to one.
    eps, norm, steps, bounds
        Of the targeted PGD; noise is uniform within the bounds.
    seed
        Of the noise: an image follows from the seed and its index. None draws one number.
    batch_size, progress
        As in `advfeat.construct_det_dataset`.

    Returns
    -------
    ConstructedDataset
        ``images``, ``labels`` (the targets), ``success``, ``size`` and ``index``;
        ``source_labels`` mean nothing.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause.

    Examples
    --------
    >>> import torch
    >>> from advfeat import analysis
    >>> made = analysis.noise_perturbations(
    ...     torch.nn.Linear(6, 3), 9, (6,), classes=3, eps=0.5, norm="l2", steps=5, seed=0
    ... )
    >>> made.images.shape, made.labels.bincount()
    (torch.Size([9, 6]), tensor([3, 3, 3]))
    """
    checks.count("count", count, low=1)
    checks.count("classes", classes, low=2)
    checks.bounds(bounds)
    checks.seed(seed)
    for size in shape:
        checks.count("shape", size, low=1)
    keys = seeding.keys(seeding.resolve(seed), torch.arange(count))
    low, high = bounds
    images = low + (high - low) * seeding.uniform(keys, 0, int(torch.Size(shape).numel()))
    # The class that D_det aims at comes after the label.
    before = (torch.arange(count) - 1) % classes
    data = TensorDataset(images.float().clamp(low, high).view(count, *shape), before)
    return construct_det_dataset(
        model, data, eps=eps, norm=norm, steps=steps, bounds=bounds, batch_size=batch_size,
        progress=progress,
    )  # fmt: skip
