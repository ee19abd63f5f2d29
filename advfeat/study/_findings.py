"""What one run of a study found, and the same of several seeds together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from advfeat import checks
from advfeat.datasets import ConstructedDataset
from advfeat.metrics import Accuracy, TransferMatrix
from advfeat.study._advice import LEARNED, advise, still_learning, widest_gaps
from advfeat.study._calibration import Calibration
from advfeat.study._claims import Claim, Outcomes, Verdict, judge
from advfeat.study._data import constant_accuracies, from_text
from advfeat.study._plan import PLANS
from advfeat.study._work import TRANSFER, Work
from advfeat.training import History


@dataclass(frozen=True, eq=False)
class Measured:
    """How a model does on original test data.

    Attributes
    ----------
    standard
        Accuracy on clean inputs.
    robust
        Robust accuracy at each radius.
    shifted
        Fraction of samples that the model classifies as the class after their own. For a model
        that learned from D_det, what robust features have taught it.
    """

    standard: Accuracy
    robust: dict[float, Accuracy]
    shifted: Accuracy


class Run:
    """What a study found with one seed, of the stages that are done; attributes as of `Study`."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.settings: dict[str, Any] = work.identity
        records = {name: work.stages.record(name) for name in work.order()}
        done = {name: record for name, record in records.items() if record is not None}
        self.seconds: dict[str, float] = {name: each["seconds"] for name, each in done.items()}
        found = {name: each["result"] for name, each in done.items()}
        self.measured: dict[str, Measured] = {
            name: self._measured(found[f"measure {name}"])
            for name in work.names
            if f"measure {name}" in found
        }
        self.histories = {
            name.removeprefix("train ").removeprefix("on "): History(epochs)
            for name, epochs in found.items()
            if name.startswith("train ")
        }
        self.made: dict[str, dict[str, float]] = {
            name: found[f"make {name}"] for name in work.made_names if f"make {name}" in found
        }
        self.transfer: TransferMatrix | None = None
        if "transfer" in found:
            tensors = {name: torch.tensor(found["transfer"][name]) for name in TRANSFER}
            self.transfer = TransferMatrix(("standard", "robust"), tuple(work.names), **tensors)
        self.leakage: dict[str, Accuracy | None] = {
            name: from_text(each["learned"]) if "learned" in each else None
            for name, each in found.get("leakage", {}).items()
        }

    def model(self, name: str) -> nn.Module:
        """A trained model; read from the folder, or trained now where it is not there."""
        checks.one_of("name", name, tuple(self.work.names))
        return self.work.model(name)

    def dataset(self, name: str) -> ConstructedDataset:
        """A dataset; opened in the folder, or made now where it is not there."""
        checks.one_of("name", name, tuple(self.work.made_names))
        return self.work.dataset(name)

    def _measured(self, found: dict[str, str]) -> Measured:
        robust = {radius: from_text(found[f"{radius:g}"]) for radius in self.work.at}
        return Measured(from_text(found["accuracy"]), robust, from_text(found["shifted"]))


class Spread(float):
    """The mean of several values, with their range as its ``interval``."""

    interval: tuple[float, float]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        mean = cls(sum(values) / len(values))
        mean.interval = min(values), max(values)
        return mean


def measured_by_all(runs: Sequence[Run]) -> dict[str, list[Measured]]:
    """For each model that every run has measured, its measurements."""
    return {
        name: [run.measured[name] for run in runs]
        for name in runs[0].measured
        if all(name in run.measured for run in runs)
    }


def outcomes(measured: Mapping[str, list[Measured]]) -> dict[str, Outcomes]:
    """Outcomes of each model, a sample for each seed."""

    def stacked(accuracies: list[Accuracy]) -> Tensor:
        return torch.stack([each.correct for each in accuracies])

    return {
        name: Outcomes(
            stacked([each.standard for each in found]),
            {
                radius: stacked([each.robust[radius] for each in found])
                for radius in found[0].robust
            },
            stacked([each.shifted for each in found]),
        )
        for name, found in measured.items()
    }


def percent(values: Sequence[float]) -> str:
    """The mean in percent, of several values with the lowest and highest."""
    mean = 100 * sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.1f}"
    return f"{mean:.1f} ({100 * min(values):.1f} to {100 * max(values):.1f})"


@dataclass(frozen=True, eq=False)
class Findings:
    """What all runs of a study found together."""

    runs: tuple[Run, ...]
    calibration: Calibration | None = None

    @property
    def work(self) -> Work:
        """Of the first run; the others differ in their seed."""
        return self.runs[0].work

    @property
    def seeds(self) -> list[int]:
        """Of all runs."""
        return [run.settings["seed"] for run in self.runs]

    @property
    def settings(self) -> dict[str, Any]:
        """Of the first run; of several, with the seeds of all."""
        first = self.runs[0].settings
        return first if len(self.runs) == 1 else {**first, "seed": self.seeds}

    @property
    def seconds(self) -> dict[str, float]:
        """Of calibration, and of every stage over all runs."""
        names = dict.fromkeys(name for run in self.runs for name in run.seconds)
        stages = {name: sum(run.seconds.get(name, 0.0) for run in self.runs) for name in names}
        before = {} if self.calibration is None else {"calibrate": self.calibration.seconds}
        return {**before, **stages}

    @cached_property
    def chance(self) -> float:
        """Fraction of the commonest class of the test data: what a constant answer gets right."""
        return self._constant[1]

    @cached_property
    def _constant(self) -> tuple[float, float]:
        return constant_accuracies(self.work.test)

    @cached_property
    def claims(self) -> tuple[Claim, ...]:
        """The paper's claims, each with its evidence and a verdict.

        Every ``difference`` is on the same test samples. With one seed its interval speaks of new
        test samples for these very models; with several also of newly trained models.
        """
        return judge(
            outcomes(measured_by_all(self.runs)),
            norm=self.work.norm,
            chance=self.chance,
            rarest=self._constant[0],
            control=self.work.recipe.control,
        )

    @property
    def notes(self) -> list[str]:
        """Where the claims are not confirmed, and what data or settings lack, with numbers."""
        measured = measured_by_all(self.runs)
        robust = {name: [each.robust for each in found] for name, found in measured.items()}
        accuracy = {
            name: float(Spread.of([each.standard for each in found]))
            for name, found in measured.items()
        }
        said = [each.note for claim in self.claims for each in claim.evidence]
        gained = any("confirmed" in self._gain(name) for name in ("D_R", "D_R from noise"))
        gaps = {} if gained else widest_gaps(robust)
        lacking = advise(accuracy, gaps, self.means(), self.work.norm)
        return [*(text for text in said if text is not None), *self._unlearned(), *lacking]

    def _gain(self, name: str) -> set[Verdict]:
        """Whether the model of D_R is more robust than its control; empty if not measured."""
        start = f"{name} - {self.work.recipe.control(name)},"
        evidence = (each for claim in self.claims for each in claim.evidence)
        return {each.verdict for each in evidence if each.text.startswith(start)}

    def _unlearned(self) -> Iterator[str]:
        """That the control of D_R still learns its samples, where D_R is not above it."""
        control, settings = self.work.recipe.control("D_R"), self.work.recipe.training("D_R")
        doubted = bool(self._gain("D_R") - {"confirmed"})
        # Another loss, or one of smoothed labels, has another size when it is learned.
        if control is None or not doubted or settings.keys() & {"loss", "options"}:
            return
        losses = [run.histories[control].rows[-1]["loss"] for run in self.runs]
        loss = sum(losses) / len(losses)
        if loss > LEARNED:
            yield still_learning(control, loss)

    def fractions(self) -> dict[str, dict[str, list[Accuracy]]]:
        """The table: for each model, by the names of the columns, the accuracy of each seed."""
        return {
            name: {
                column: list(values)
                for column, values in zip(
                    self.columns(),
                    zip(*((m.standard, *m.robust.values(), m.shifted) for m in found), strict=True),
                    strict=True,
                )
            }
            for name, found in measured_by_all(self.runs).items()
        }

    def columns(self) -> list[str]:
        """Of the table."""
        radii = [f"{self.work.norm} {radius:g}" for radius in self.work.at]
        return ["accuracy", *radii, "shifted labels"]

    def means(self) -> dict[str, dict[str, float]]:
        """Of every dataset that all runs have made, the means over samples and seeds."""
        return {
            name: {
                key: sum(run.made[name][key] for run in self.runs) / len(self.runs) for key in means
            }
            for name, means in self.runs[0].made.items()
            if all(name in run.made for run in self.runs)
        }

    def about_intervals(self) -> str:
        """What the claims' intervals speak of."""
        if len(self.runs) == 1:
            return (
                "One training of each model: intervals speak of new test samples for these models, "
                "not of newly trained ones. For those run several seeds: seeds=3."
            )
        return (
            f"{len(self.runs)} trainings of each model: intervals include the variation between "
            "test samples and between trainings."
        )

    def made_lines(self) -> Iterator[tuple[str, str]]:
        """What each dataset's samples say on average, as sentences."""
        for name, means in self.means().items():
            plan = PLANS[name]
            if plan.is_targeted:
                yield name, f"{means['success']:.1%} of samples are classified as their target"
            elif plan.is_constructed:
                yield (
                    name,
                    f"activations of the {plan.source} model: distance {means['distance']:.3g}, "
                    f"{means['distance_before']:.3g} at the start",
                )
            else:
                yield name, f"{plan.method} control of {plan.source}"
