"""Batches of samples as (nested) NamedTuples of tensors whose first axis is the sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from advfeat import checks
from advfeat.threat import FeatureBounds


class Batch(NamedTuple):
    """What an attack starts from: checked, detached, float32 at least, within the bounds.

    Attributes
    ----------
    inputs
        ``(N, ...)``.
    labels
        ``(N,)`` int64, true labels or targets.
    ids
        ``(N,)`` int64, each sample's own number: its random numbers follow from it.
    start
        ``(N, ...)`` first iterate; None where that is the inputs.
    extras
        Further arguments of the model's forward by name, ``(N, ...)`` each; None without any.
    box
        ``(N, 2, ...)`` lowest and highest values of every sample, equal where a feature is fixed;
        None where all have the attack's bounds.
    """

    inputs: Tensor
    labels: Tensor
    ids: Tensor
    start: Tensor | None = None
    extras: Mapping[str, Tensor] | None = None
    box: Tensor | None = None

    @property
    def state_box(self) -> Tensor:
        """The own bounds as states hold them: ``(N, 0)`` for None."""
        return self.inputs.new_empty(len(self.ids), 0) if self.box is None else self.box


def select_samples(samples: Any, chosen: Tensor | slice) -> Any:
    """These samples of a batch or state: of a tensor, and of tuples and mappings of such."""
    if samples is None:
        return None
    if isinstance(samples, Tensor):
        return samples[chosen]
    if isinstance(samples, Mapping):
        return {name: select_samples(field, chosen) for name, field in samples.items()}
    return _rebuilt(samples, [select_samples(field, chosen) for field in samples])


def concat_samples(*parts: Any) -> Any:
    """The samples of several batches or states of one type, in this order."""
    first = parts[0]
    if first is None or len(parts) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, Mapping):
        return {name: concat_samples(*(part[name] for part in parts)) for name in first}
    return _rebuilt(first, [concat_samples(*fields) for fields in zip(*parts, strict=True)])


def _rebuilt(like: Any, fields: list[Any]) -> Any:
    """A tuple of the same type: a NamedTuple takes its fields one by one."""
    return type(like)(*fields) if hasattr(like, "_fields") else tuple(fields)


def sample_shapes(batch: Batch) -> tuple[torch.Size, ...]:
    """Shapes of a sample and its further arguments: samples of others cannot share a batch."""
    return tuple(field.shape[1:] for field in (batch.inputs, *(batch.extras or {}).values()))


def sample_count(samples: Any) -> int:
    """Number of samples: the length of the first tensor."""
    if isinstance(samples, Tensor):
        return len(samples)
    fields = samples.values() if isinstance(samples, Mapping) else samples
    return sample_count(next(field for field in fields if field is not None))


def check_samples(
    inputs: Tensor,
    labels: Tensor,
    index: Tensor,
    bounds: FeatureBounds,
    classes: int | None,
    label_name: str = "labels",
) -> None:
    """Check a batch; of a bad value, name the first sample that has one."""
    try:
        checks.inputs(inputs, bounds)
        _check_labels(labels, inputs, classes, label_name)
    except ValueError:
        fits = isinstance(index, Tensor) and labels.shape == index.shape == inputs.shape[:1]
        if fits and inputs.ndim > 1 and inputs.numel():
            for place, number in enumerate(index.tolist()):
                one = slice(place, place + 1)
                try:
                    checks.inputs(inputs[one], bounds)
                except ValueError:
                    # The advice goes by the range of the batch.
                    checks.inputs(inputs, bounds, f"inputs[{number}]")
                _check_labels(labels[one], inputs[one], classes, f"{label_name}[{number}]")
        raise


def _check_labels(labels: Tensor, inputs: Tensor, classes: int | None, name: str) -> None:
    checks.labels(labels, inputs, name)
    if classes is not None:
        checks.class_range(int(labels.max()), classes, name)
