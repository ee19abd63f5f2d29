"""Checks of the samples that datasets are constructed from, which name the sample."""

from __future__ import annotations

import torch

from advfeat.attacks.samples import check_samples
from advfeat.labels import known_labels
from advfeat.loading import Source
from advfeat.threat import FeatureBounds


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
        check_samples(batch.inputs, batch.labels, batch.ids, bounds, classes)
