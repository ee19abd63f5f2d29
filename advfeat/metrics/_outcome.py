"""What an evaluation returns: an accuracy with its counts, outcomes and intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import Self

from advfeat import plots
from advfeat.attacks import Attack
from advfeat.results import Result, register
from advfeat.statistics import wilson_interval
from advfeat.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WRONG = -2  # in `RobustAccuracy.broken_by`: wrong on the clean input


class Accuracy(Result, float):
    """A fraction of right answers that works wherever a float does.

    Attributes
    ----------
    count, total
        Right answers and samples.
    correct
        Outcome of each sample, bool ``(total,)``, in the order of the samples.
    index
        Sample number of each sample, int64 ``(total,)``.
    interval
        95% Wilson score interval of the fraction.

    Examples
    --------
    >>> accuracy = Accuracy.of(torch.tensor([True, True, True, False]))
    >>> accuracy > 0.7
    True
    >>> accuracy
    0.7500 (3/4, 95% interval 0.3006 to 0.9544)
    """

    count: int
    total: int
    correct: Tensor
    index: Tensor

    @classmethod
    def of(cls, correct: Tensor, index: Tensor | None = None) -> Self:
        """Count outcomes, bool ``(N,)``; of none the accuracy is NaN."""
        count, total = int(correct.sum()), len(correct)
        value = cls(count / total if total else math.nan)
        value.count, value.total, value.correct = count, total, correct
        value.index = torch.arange(total, device="cpu") if index is None else index
        return value

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson score interval."""
        return wilson_interval(self.count, self.total)

    def __repr__(self) -> str:
        """Fraction, count and interval."""
        low, high = self.interval
        return (
            f"{float(self):.4f} ({self.count}/{self.total}, 95% interval {low:.4f} to {high:.4f})"
        )

    __str__ = __repr__

    def _content(self) -> Sequence[str | Table]:
        return [Table(("", "%", "samples", "95% interval"), [accuracy_row("accuracy", self)])]

    def _fields(self) -> dict[str, Any]:
        return {
            "accuracy": float(self),
            "interval": self.interval,
            "count": self.count,
            "total": self.total,
            "correct": self.correct,
            "index": self.index,
        }

    @classmethod
    def _from_fields(cls, values: dict[str, Any]) -> Self:
        return cls.of(values["correct"], values["index"])

    def plot(self, ax: Axes | None = None) -> Axes:
        """One bar with its interval."""
        ax = plots.new_axes(ax, 3.0, 3.4)
        plots.bars({"model": {"accuracy": self}}, ylabel="accuracy (%)", ax=ax)
        return ax


class RobustAccuracy(Accuracy):
    """Accuracy under attack: a sample counts if it is right on its clean and its attacked input.

    Attributes
    ----------
    standard
        Accuracy on the clean inputs, from the same pass.
    attacks
        The attacks in their order with their seeds: what to run to get this number again.
    broken_by
        Place in ``attacks`` of the one that fooled the model, int64 ``(total,)``: -1 where none
        did, -2 where the model was wrong on the clean input.
    value
        That attack's objective on its result (the last attack's where none succeeded), float32
        ``(total,)``; NaN where the model was wrong on the clean input.
    adversarial
        With ``keep_inputs``, the attacked inputs ``(total, ...)`` on the CPU, the clean ones where
        the model was wrong on them; else None.
    warnings
        Signs that the number is too high, each a sentence; a warning gives them too. Samples
        without a gradient, and many samples that only `SmoothedPGD` or `Square` broke.
    """

    standard: Accuracy
    attacks: tuple[Attack, ...]
    broken_by: Tensor
    value: Tensor
    adversarial: Tensor | None
    warnings: tuple[str, ...]

    @property
    def broken_counts(self) -> dict[str, int]:
        """Samples by what became of them: wrong without an attack, broken by each, still robust."""
        names = [attack_name(attack) for attack in self.attacks]
        names = [n if names.count(n) == 1 else f"{n} ({place})" for place, n in enumerate(names, 1)]
        counts = {"wrong without an attack": int((self.broken_by == WRONG).sum())}
        for place, name in enumerate(names):
            counts[name] = int((self.broken_by == place).sum())
        return {**counts, "still robust": self.count}

    def _content(self) -> Sequence[str | Table]:
        rows = [accuracy_row("clean", self.standard), accuracy_row("under attack", self)]
        fates = [(name, count) for name, count in self.broken_counts.items()]
        return [
            Table(("accuracy", "%", "samples", "95% interval"), rows),
            Table(("broken by", "samples"), fates),
            *(f"Warning: {text}" for text in self.warnings),
        ]

    def _fields(self) -> dict[str, Any]:
        return super()._fields() | {
            "standard": self.standard,
            "attacks": self.attacks,
            "broken_by": self.broken_by,
            "value": self.value,
            "warnings": self.warnings,
        }

    @classmethod
    def _from_fields(cls, values: dict[str, Any]) -> Self:
        found = super()._from_fields(values)
        for name in ("standard", "attacks", "broken_by", "value", "warnings"):
            setattr(found, name, values[name])
        found.adversarial = None  # the inputs are not written
        return found

    def plot(self, ax: Axes | None = None) -> Axes:
        """How many samples each attack broke, and how many are still robust."""
        counts = self.broken_counts
        ax = plots.new_axes(ax, 6.4, 0.4 * len(counts) + 1.2)
        plots.counts(ax, counts, total=self.total)
        return ax


def attack_name(attack: Attack) -> str:
    """A few words for tables: the class, its loss if it has one, and whether it is targeted."""
    parts = [type(attack).__name__]
    loss = getattr(attack, "loss", None)
    if loss is not None:
        parts.append(loss if isinstance(loss, str) else getattr(loss, "__name__", "own loss"))
    if getattr(attack, "targets", None):
        parts.append(f"{attack.targets} targets")  # type: ignore[attr-defined]
    return " ".join(parts)


def accuracy_row(name: str, found: Accuracy) -> tuple[object, ...]:
    """A line of a table: name, percent, counts, interval."""
    low, high = found.interval
    percent = f"{100 * found:.1f}" if found.total else "none"
    samples = f"{found.count}/{found.total}"
    return name, percent, samples, f"{100 * low:.1f} to {100 * high:.1f}"


register(Attack)
