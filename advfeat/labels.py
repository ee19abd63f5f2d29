"""The labels of a dataset, as far as it keeps them apart from its samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, IterableDataset, StackDataset, Subset, TensorDataset

# What datasets keep their labels in: those of torchvision, and many of their users' own.
_ATTRIBUTES = ("labels", "targets", "_labels", "y")
# Lists of (path, class), as in ImageFolder.
_PAIRS = ("samples", "_samples", "imgs")
# What a dataset that passes samples on keeps the other dataset in.
_WRAPPED = ("dataset", "subset")
_COLUMNS = ("labels", "label", "targets", "target", "y", "fine_label")


def known_labels(dataset: Any) -> Tensor | None:
    """Return the class indices of a dataset without reading its samples, where it has them.

    A dataset may map them: where one matters, read its sample.

    Examples
    --------
    >>> data = TensorDataset(torch.rand(4, 3), torch.tensor([0, 2, 1, 2]))
    >>> known_labels(Subset(data, [1, 2]))
    tensor([2, 1])
    """
    if isinstance(dataset, Subset):
        labels = known_labels(dataset.dataset)
        return None if labels is None else labels[[int(i) for i in dataset.indices]]
    if isinstance(dataset, ConcatDataset):
        parts = [known_labels(part) for part in dataset.datasets]
        known = [part for part in parts if part is not None]
        return torch.cat(known) if len(known) == len(parts) else None
    if isinstance(dataset, (list, tuple, IterableDataset)):
        return None
    return next((v for kept in _kept(dataset) if (v := _indices(kept, dataset)) is not None), None)


def _kept(dataset: Any) -> list[Any]:
    """What may be the labels of a dataset."""
    if isinstance(dataset, TensorDataset):
        return list(dataset.tensors[1:2])
    if isinstance(dataset, StackDataset):
        parts: Any = dataset.datasets
        if isinstance(parts, Mapping):
            return [parts[name] for name in _COLUMNS if name in parts]
        return list(parts[1:2])
    found = [getattr(dataset, name, None) for name in _ATTRIBUTES]
    for name in _PAIRS:
        pairs = getattr(dataset, name, None)
        if isinstance(pairs, list) and all(isinstance(p, tuple) and len(p) == 2 for p in pairs):
            found.append([label for _, label in pairs])
    columns = getattr(dataset, "column_names", None)
    if isinstance(columns, list) and hasattr(dataset, "with_format"):  # of Hugging Face
        found += [dataset.with_format("numpy")[n][:] for n in _COLUMNS if n in columns]
    inner = [getattr(dataset, name, None) for name in _WRAPPED]
    return found + [known_labels(one) for one in inner if one is not None and one is not dataset]


def _indices(kept: Any, dataset: Any) -> Tensor | None:
    """Class indices, one for each sample, if that is what these are."""
    if kept is None:
        return None
    try:
        # Copied, for torch warns of an array that is read-only, such as a memory map.
        copied = np.array(kept) if isinstance(kept, (list, np.ndarray)) else kept
        labels = torch.as_tensor(copied, device="cpu")
        fits = labels.ndim == 1 and len(labels) == len(dataset) and labels.dtype != torch.bool
    except (TypeError, ValueError, RuntimeError):
        return None
    if not fits or labels.is_floating_point() or labels.is_complex():
        return None
    return labels.to(torch.int64)
