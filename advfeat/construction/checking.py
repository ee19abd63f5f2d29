"""Checks of the samples that datasets are constructed from, which name the sample."""

from __future__ import annotations

import torch
from torch import Tensor

from advfeat import checks
from advfeat.labels import known_labels
from advfeat.loading import Source
from advfeat.threat import FeatureBounds


def check_samples(
    inputs: Tensor, labels: Tensor, indices: list[int], bounds: FeatureBounds, classes: int | None
) -> None:
    """Check a batch on the host; of a bad one, name the first bad sample."""
    try:
        _check(inputs, labels, bounds, classes, "")
    except ValueError:
        for place, index in enumerate(indices):
            one = slice(place, place + 1)
            _check(inputs[one], labels[one], bounds, classes, f"sample {index}: ")
        raise


def check_known_labels(source: Source, bounds: FeatureBounds, classes: int) -> None:
    """Check all labels before any work, where a dataset has them without reading its samples."""
    labels = known_labels(source.dataset)
    if labels is None:
        return
    labels = labels[torch.tensor(source.indices, device="cpu")]
    for place in ((labels < 0) | (labels >= classes)).nonzero().flatten()[:1].tolist():
        # Read, for a dataset may return another label than the one it keeps.
        index = source.indices[place]
        batch = source.samples([index], torch.device("cpu"))
        check_samples(batch.inputs, batch.labels, [index], bounds, classes)


def _check(
    inputs: Tensor, labels: Tensor, bounds: FeatureBounds, classes: int | None, name: str
) -> None:
    checks.inputs(inputs, bounds, f"{name}inputs")
    checks.labels(labels, inputs, f"{name}labels")
    if classes is not None:
        checks.class_range(int(labels.max()), classes, f"{name}labels")
