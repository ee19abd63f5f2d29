"""Inputs and labels of a batch, whatever a loader makes of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from advfeat import checks

_INPUT_KEYS = (
    *("inputs", "input", "images", "image", "pixel_values", "img", "x", "data"),
    *("inputs_embeds", "input_values", "input_features"),
)
# Types that hardly any operation of torch takes.
_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
_LABEL_KEYS = ("labels", "label", "targets", "target", "y", "fine_label")


def unpack(batch: object) -> tuple[Tensor, Tensor]:
    """Find inputs and labels in a batch: a tuple with any extra items, or a mapping."""
    if isinstance(batch, Mapping):
        inputs, labels = (
            next((batch[key] for key in keys if key in batch), None)
            for keys in (_INPUT_KEYS, _LABEL_KEYS)
        )
        if inputs is None or labels is None:
            checks.fail(
                "batch keys",
                sorted(map(str, batch)),
                f"expected one of {_INPUT_KEYS} and one of {_LABEL_KEYS}",
            )
    elif isinstance(batch, (tuple, list)) and len(batch) >= 2:
        inputs, labels = batch[0], batch[1]
    else:
        kind = type(batch).__name__
        if isinstance(batch, (tuple, list)):
            kind += f" of {len(batch)}, without labels"
        raise TypeError(f"data: a batch is a {kind}; expected (inputs, labels, ...) or a mapping")
    inputs, labels = _as_tensor(inputs), _as_tensor(labels)
    if isinstance(labels, Tensor) and labels.dtype in _UNSIGNED:
        labels = labels.to(torch.int64)
    if isinstance(inputs, Tensor) and isinstance(labels, Tensor):
        return inputs, labels
    raise TypeError(_no_tensors(inputs, labels))


def entries_of(batch: object) -> dict[str, Any]:
    """Entries of a mapping but the labels, which a model may take by name; the inputs as None."""
    if not isinstance(batch, Mapping):
        return {}
    own = next(key for key in _INPUT_KEYS if key in batch)
    others = {k: v for k, v in batch.items() if isinstance(k, str) and k not in _LABEL_KEYS}
    return others | {own: None}


def _as_tensor(value: Any) -> Any:
    """A NumPy array as a tensor, anything else as it is."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
        return value
    if not value.dtype.isnative or min(value.strides, default=0) < 0:
        value = np.array(value, value.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(value)


def as_dataset(data: Any) -> Any:
    """A pair of tensors or arrays, inputs and labels, as a dataset; other data as they are."""
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        return data
    inputs, labels = map(_as_tensor, data)
    is_pair = isinstance(inputs, Tensor) and isinstance(labels, Tensor)
    if not is_pair or labels.ndim != 1 or inputs.shape[:1] != labels.shape:
        return data
    return TensorDataset(inputs, labels)


def _no_tensors(inputs: object, labels: object) -> str:
    """What is wrong with a batch whose inputs or labels are no tensors, and what to do."""
    name, value = ("labels", labels) if isinstance(inputs, Tensor) else ("inputs", inputs)
    found = f"data: {name} of a batch are {type(value).__name__}; expected a tensor. "
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    if name == "labels" and isinstance(first, str):
        return found + "Number the classes: classes.index(label), with classes = sorted(names)"
    if isinstance(first, (int, np.integer)) and not isinstance(value, (list, tuple)):
        return found + (
            "A list of samples? It is read as a list of batches: wrap it in a loader, "
            "DataLoader(samples, batch_size=128)"
        )
    if name == "labels":
        return found + "Have the dataset return an integer, or collate_fn a tensor"
    return found + "For images, add a transform that makes tensors"
