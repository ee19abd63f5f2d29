"""Checks of the samples to train on: all labels before work starts, and every batch as it comes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from advfeat import checks
from advfeat.labels import known_labels
from advfeat.loading import Data, Source
from advfeat.threat import Bounds
from advfeat.unpacking import unpack

# Names a sample, of its index and its position in the batch.
Naming = Callable[[int, int], str]

# Class probabilities may sum to 1 within this.
_SUM = 1e-3


class BatchChecks:
    """Checks inputs and labels of a batch with one value read from their device."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._classes: int | None = None
        self._largest = -1  # of the labels so far
        self._columns: int | None = None  # of soft labels

    @property
    def classes(self) -> int | None:
        """Number of classes, once it is known."""
        return self._classes

    def set_classes(self, classes: int, data: Data) -> None:
        """Check all labels that can be read without reading the samples, and each batch from here.

        The batches so far are checked too.
        """
        self._classes = classes
        check_labels(data, classes)
        checks.class_range(self._largest, classes)
        if self._columns not in (None, classes):
            checks.fail("labels.shape", ("N", self._columns), f"the model has {classes} classes")

    def batch(self, inputs: Tensor, labels: Tensor, ids: Tensor, names: Naming) -> None:
        """Raise an error that names the sample, where a batch cannot be trained on."""
        if _is_plain(inputs, labels):
            found, soft = _extremes(inputs, labels), labels.is_floating_point()
            self._columns = labels.shape[1] if soft else self._columns
            if self._is_good(found, soft=soft) and self._columns in (
                None,
                self._classes or self._columns,
            ):
                self._largest = max(self._largest, int(found[3]))
                return
        self._explain(inputs, labels, ids, names)

    def _is_good(self, found: list[float], *, soft: bool) -> bool:
        low, high = self._bounds
        smallest, largest, first, last = found[:4]
        good = math.isfinite(smallest) and math.isfinite(largest)
        good &= low - checks.CLIPPED <= smallest and largest <= high + checks.CLIPPED
        good &= first >= 0 and (self._classes is None or last < self._classes)
        return good and (not soft or (found[4] >= 0 and found[5] < _SUM))

    def _explain(self, inputs: Tensor, labels: Tensor, ids: Tensor, names: Naming) -> None:
        """Check sample by sample, for the index; the whole batch first where that is malformed."""
        if not _is_plain(inputs, labels):
            checks.inputs(inputs, self._bounds)
            checks.labels(labels, inputs)
        for position, sample in enumerate(ids.tolist()):
            here, name = slice(position, position + 1), names(sample, position)
            self._explain_input(inputs, inputs[here], f"inputs{name}")
            if labels.is_floating_point():
                check_soft_label(labels[here], self._classes, f"labels{name}")
                continue
            if labels[position] < 0:
                advice = checks.negative_label_advice(labels)
                checks.fail(f"labels{name}", int(labels[position]), advice)
            if self._classes is not None:
                checks.class_range(int(labels[position]), self._classes, f"labels{name}")

    def _explain_input(self, batch: Tensor, sample: Tensor, name: str) -> None:
        try:
            checks.inputs(sample, self._bounds, name)
        except ValueError:
            # The advice goes by the range of the batch: a dark 16-bit image could be an 8-bit one.
            checks.inputs(batch, self._bounds, name)
            raise


def check_soft_label(labels: Tensor, classes: int | None, name: str) -> None:
    """Check that class probabilities are not negative, sum to 1, and are of the model's classes."""
    if classes is not None and labels.shape[1] != classes:
        checks.fail(f"{name}.shape", tuple(labels.shape), f"the model has {classes} classes")
    total = float(labels.sum())
    if not (float(labels.min()) >= 0 and abs(total - 1) < _SUM):
        checks.fail(
            name, f"sum {total:.4g}", "soft labels are class probabilities (N, C) that sum to 1"
        )


def check_labels(data: Data, classes: int | None = None) -> None:
    """Check the labels of a dataset that keeps them apart, before any sample is used."""
    dataset: Any = data.dataset if isinstance(data, DataLoader) else data
    labels = known_labels(dataset)
    if labels is None:
        return
    wrong = labels < 0 if classes is None else (labels < 0) | (labels >= classes)
    for sample in wrong.nonzero().flatten()[:1].tolist():
        # Read, for what the dataset returns may be another label than the one it keeps.
        _, found = unpack(Source(dataset).fetch([sample]))
        if found.ndim == 1 and not found.is_floating_point():
            name = f"labels[{sample}]"
            if found < 0:
                checks.fail(name, int(found), checks.negative_label_advice(labels))
            if classes is not None:
                checks.class_range(int(found), classes, name)


def _is_plain(inputs: object, labels: object) -> bool:
    """Whether a batch has the types and shapes that training takes."""
    if not (isinstance(inputs, Tensor) and isinstance(labels, Tensor)):
        return False
    if not inputs.is_floating_point() or inputs.ndim < 2 or not inputs.numel() or inputs.is_meta:
        return False
    if inputs.layout != torch.strided or inputs.is_nested:
        return False
    if labels.shape[:1] != inputs.shape[:1] or labels.device != inputs.device:
        return False
    if labels.is_floating_point():
        return labels.ndim == 2 and labels.shape[1] > 1
    return labels.ndim == 1 and labels.dtype != torch.bool and not labels.is_complex()


def _extremes(inputs: Tensor, labels: Tensor) -> list[float]:
    """Smallest and largest input and label; of soft labels also the least, and the worst sum."""
    values = [*inputs.detach().aminmax()]
    if labels.is_floating_point():
        classes = labels.argmax(1)
        worst = (labels.sum(1, dtype=torch.float32) - 1).abs().max()
        values += [*classes.aminmax(), labels.min(), worst]
    else:
        values += [*labels.aminmax()]
    if inputs.dtype in (torch.float16, torch.bfloat16):
        # These hold no label above 256 or 2048 exactly.
        values = [value.float() for value in values]
    found: list[float] = torch.stack(values).tolist()
    return found
