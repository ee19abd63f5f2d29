"""What a report holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from advfeat.metrics._curve import RobustnessCurve
from advfeat.metrics._diagnose import Diagnosis
from advfeat.metrics._outcome import Accuracy, RobustAccuracy
from advfeat.metrics._report._examples import Example
from advfeat.metrics._report._provenance import radius_of
from advfeat.metrics._report._verdict import Verdict
from advfeat.metrics._transfer import TransferMatrix
from advfeat.results import Result
from advfeat.threat import Bounds, Norm

_SHOWN_CLASSES = 10  # of each end, where there are more than twice as many


@dataclass(frozen=True, eq=False, repr=False)
class ClassAccuracy(Result):
    """Clean and robust accuracy of one class."""

    name: str
    clean: Accuracy
    robust: Accuracy

    def _summary(self) -> str:
        return f"{self.name}, {self.clean:.1%} clean, {self.robust:.1%} under attack"

    def row(self) -> list[str]:
        """A line of a table: name, samples, percentages, interval of the robust accuracy."""
        low, high = self.robust.interval
        interval = f"{100 * low:.0f} to {100 * high:.0f}"
        percentages = [f"{100 * self.clean:.1f}", f"{100 * self.robust:.1f}"]
        return [self.name, str(self.robust.total), *percentages, interval]


@dataclass(frozen=True, eq=False, repr=False)
class ReportFields(Result):
    """The fields of a `Report`, which describes them."""

    verdict: Verdict
    clean: Accuracy
    robust: RobustAccuracy
    curve: RobustnessCurve | None
    diagnosis: Diagnosis | None
    transfer: TransferMatrix | None
    classes: tuple[ClassAccuracy, ...]
    examples: tuple[Example, ...]
    eps: float | Tensor
    norm: Norm
    bounds: Bounds
    ball: str
    chance: float
    left_out: tuple[str, ...]
    seconds: Mapping[str, float]
    provenance: Mapping[str, Any]
    paper: str
    citations: tuple[str, ...]
    class_names: tuple[str, ...] | None = None

    @property
    def title(self) -> str:
        """Of the page."""
        size = self.provenance["parameters"]
        name = f"{self.provenance['model']} ({size:,} parameters)"
        return f"How robust is {name} in {self.ball}?"

    @property
    def radius(self) -> float:
        """The radius in the units of the curve: 1 where there is one for each feature."""
        return radius_of(self.eps)

    def class_name(self, label: int) -> str:
        """Name of a class, or its number."""
        names = self.class_names
        return names[label] if names is not None and 0 <= label < len(names) else str(label)

    def shown_classes(self) -> tuple[ClassAccuracy, ...]:
        """All classes; of very many, those of the lowest and of the highest robust accuracy."""
        if len(self.classes) <= 2 * _SHOWN_CLASSES:
            return self.classes
        ordered = sorted(self.classes, key=lambda each: float(each.robust))
        return (*ordered[:_SHOWN_CLASSES], *ordered[-_SHOWN_CLASSES:])
