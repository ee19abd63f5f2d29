"""The stages of a report, the most important first, each on as many samples as time allows."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from advfeat.attacks import APGD, PGD, Attack, Batch
from advfeat.attacks.base import prepare_batch
from advfeat.attacks.pool import attack_batch
from advfeat.attacks.restricted import restricted
from advfeat.loading import Source
from advfeat.metrics._accuracy import accuracy, robust_accuracy
from advfeat.metrics._curve import RobustnessCurve, robustness_curve
from advfeat.metrics._diagnose import Diagnosis, diagnose
from advfeat.metrics._outcome import Accuracy, RobustAccuracy
from advfeat.metrics._report._budget import Budget, Cost, Work
from advfeat.metrics._report._samples import Drawn
from advfeat.metrics._transfer import TransferMatrix, transfer_matrix
from advfeat.model import Network, attackable, device_of
from advfeat.progress import Meter

# Of each stage, about: calls of the model, and gradients that a sample costs at most.
_FAST, _DIAGNOSE, _CURVE, _TRANSFER = (
    Work(600, 600),
    Work(1400, 700),
    Work(1000, 1000),
    Work(30, 30),
)
_FEWEST = 8  # a stage on fewer samples says nothing
_LARGEST = 256  # samples of the first part: the next ones know how long it took
_CHECKED = 128  # samples of diagnose and transfer
_PROBE, _PROBED = 3, (4, 32)  # steps and samples of the attack that is timed
_SLOW = 0.05  # seconds of a gradient after which a larger batch is not tried
_SHORT = 20  # steps of PGD where there is no time for more


@dataclass
class Contents:
    """What was measured; None where there was no time, or nothing to measure on."""

    clean: Accuracy
    robust: RobustAccuracy
    labels: dict[int, int]
    diagnosis: Diagnosis | None = None
    transfer: TransferMatrix | None = None
    curve: RobustnessCurve | None = None
    ensemble: bool = True
    warnings: list[str] = field(default_factory=list)

    @property
    def chance(self) -> float:
        """Fraction of the commonest class."""
        return max(Counter(self.labels.values()).values()) / len(self.labels)


@dataclass
class Stages:
    """Arguments of `report`, and a method for each stage."""

    model: nn.Module
    drawn: Drawn
    budget: Budget
    meter: Meter
    ball: dict[str, Any]  # eps, norm, bounds, mask
    attacks: tuple[Attack, ...]
    is_default: bool  # the ensemble may be replaced where there is no time for it
    seed: int
    expectation: int
    others: Mapping[str, nn.Module]

    def run(self) -> Contents:
        """All stages."""
        heard: list[str] = []
        with _recorded(heard):
            clean = self._clean()
            robust, ensemble = self._robust()
            labels = self.drawn.labels(clean.total)
            contents = Contents(clean, robust, labels, ensemble=ensemble, warnings=heard)
            if not robust.standard.count:
                text = "the model is right on no sample that could be attacked"
                self.budget.left_out.append(f"signs of masked gradients, transfer, curve: {text}")
                return contents
            contents.diagnosis = self._diagnosis()
            if self.others:
                contents.transfer = self._transfer()
            contents.curve = self._curve()
        return contents

    def _clean(self) -> Accuracy:
        def part(start: int, stop: int) -> Accuracy:
            found = accuracy(
                self.model,
                self.drawn.part(start, stop),
                expectation=self.expectation,
                progress=False,
            )
            self.meter.update(stop - start)
            return found

        count = len(self.drawn)
        self.meter.stage("clean accuracy", count, self.budget.left)
        parts, _ = self.budget.parts(
            "clean accuracy", count, part, fraction=0.15, first=64, required=True
        )
        return _joined(parts)

    def _robust(self) -> tuple[RobustAccuracy, bool]:
        settings: dict[str, Any] = {"seed": self.seed, "expectation": self.expectation}
        attack: dict[str, Any] = {"attack": list(self.attacks), "bounds": self.ball["bounds"]}
        self._cost = self._measured_cost()
        limit, first = 0.5 * self.budget.left, 64
        affordable = self._cost.affordable(limit, _FAST)
        ensemble = True
        if self.is_default and affordable < _FEWEST:
            attack = {**self.ball, "steps": _SHORT}
            first, ensemble = _FEWEST, False
            self.budget.left_out.append(
                f"the ensemble of attacks: there was time for PGD with {_SHORT} steps only"
            )
        else:
            # Half of what is affordable at once: on small models one large part takes as long as
            # a small one.
            first = max(_FEWEST, min(first, affordable), min(_LARGEST, affordable // 2))

        def part(start: int, stop: int) -> RobustAccuracy:
            found = robust_accuracy(
                self.model, self.drawn.part(start, stop), **attack, **settings,
                keep_inputs=True, progress=False,
            )  # fmt: skip
            self.meter.update(stop - start)
            return found

        count = len(self.drawn)
        self.meter.stage("robust accuracy", count, self.budget.left)
        parts, _ = self.budget.parts(
            "robust accuracy", count, part, fraction=0.5, first=first, required=True
        )
        robust = _joined_robust(parts)
        return robust, ensemble and len(robust.attacks) > 1

    def _measured_cost(self) -> Cost:
        """How long a step of an attack takes, about."""
        attack = restricted(PGD(**self.ball, steps=_PROBE, seed=self.seed))
        found: list[tuple[int, float]] = []
        with attackable(self.model, purpose=None, expectation=self.expectation) as net:
            for count in _PROBED:
                batch = self._first_batch(net, count)
                # The first call warms up. The others differ by whatever else the machine does.
                took = [_timed(lambda: attack_batch(attack, net, batch)) for _ in range(3)]  # noqa: B023
                found.append((len(batch.ids), min(took[1:]) / (_PROBE + 1)))
                if found[0][1] > _SLOW * found[0][0]:
                    break
        return Cost.of(*found)

    def _first_batch(self, net: Network, count: int) -> Batch:
        part = next(iter(Source(self.drawn.part(0, count)).batches(device_of(self.model))))
        fields = (part.inputs, part.labels, part.ids, self.ball["bounds"])
        return prepare_batch(net, *fields, extras=part.entries)

    def _correct_cost(self, stage: str, work: Work, samples: int) -> None:
        """Let a stage that took longer than planned make the next ones smaller."""
        late = self.budget.spent[stage] / self._cost.seconds(work, samples)
        self._cost = self._cost.times(max(1.0, late))

    def _diagnosis(self) -> Diagnosis | None:
        self.meter.stage("signs of masked gradients")
        affordable = self._cost.affordable(0.45 * self.budget.left, _DIAGNOSE)
        count = min(_CHECKED, len(self.drawn), affordable)
        whole = min(_CHECKED, len(self.drawn))
        if count < min(_FEWEST, whole):
            self.budget.left_out.append("signs of masked gradients: all of it")
            return None
        if count < whole:
            self.budget.left_out.append(f"signs of masked gradients: {count} of {whole} samples")

        def run(start: int, stop: int) -> Diagnosis | None:
            try:
                return diagnose(
                    self.model, self.drawn.part(0, count), samples=count, seed=self.seed,
                    **self.ball, progress=False,
                )  # fmt: skip
            except ValueError as error:
                self.budget.left_out.append(f"signs of masked gradients: {error}")
                return None

        (found,), _ = self.budget.parts("signs of masked gradients", 1, run, required=True)
        self._correct_cost("signs of masked gradients", _DIAGNOSE, count)
        return found

    def _transfer(self) -> TransferMatrix | None:
        models = {"this model": self.model, **self.others}
        attack = APGD(**self.ball, steps=25, seed=self.seed)
        affordable = self._cost.affordable(0.4 * self.budget.left / len(models), _TRANSFER)
        whole = min(_CHECKED, len(self.drawn))
        count = min(whole, affordable)
        self.meter.stage("transfer")
        if count < min(_FEWEST, whole):
            self.budget.left_out.append("transfer: all of it")
            return None

        def run(start: int, stop: int) -> TransferMatrix:
            part = self.drawn.part(0, count)
            return transfer_matrix(models, models, part, attack, progress=False)

        (found,), _ = self.budget.parts("transfer", 1, run, required=True)
        return found

    def _curve(self) -> RobustnessCurve | None:
        eps = self.ball["eps"]
        settings = {name: self.ball[name] for name in ("norm", "bounds", "mask")}
        if isinstance(eps, Tensor):
            settings["scale"] = eps
        affordable = self._cost.affordable(0.8 * self.budget.left, _CURVE)

        def part(start: int, stop: int) -> RobustnessCurve:
            found = robustness_curve(
                self.model,
                self.drawn.part(start, stop),
                **settings,
                seed=self.seed,
                progress=False,
            )
            self.meter.update(stop - start)
            return found

        count = len(self.drawn)
        self.meter.stage("robustness curve", count, self.budget.left)
        if affordable < _FEWEST and count > affordable:
            self.budget.left_out.append("robustness curve: all of it")
            return None
        first = min(64, affordable)
        parts, done = self.budget.parts("robustness curve", count, part, fraction=0.8, first=first)
        if not done:
            return None
        index = torch.cat([each.index for each in parts])
        order = index.argsort()
        distance = torch.cat([each.distance for each in parts])
        return RobustnessCurve(distance[order], index[order], parts[0].norm, parts[0].scale)


def _timed(call: Callable[[], object]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


@contextmanager
def _recorded(heard: list[str]) -> Iterator[None]:
    """Keep warnings for the report; a sentence that differs in its numbers alone is kept once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    known: set[str] = set()
    for warning in caught:
        text = str(warning.message)
        plain = "".join(letter for letter in text if not letter.isdigit())
        # These two are in the report by themselves.
        own = text.startswith("robust accuracy ") or "less robust than it looks" in text
        if issubclass(warning.category, UserWarning) and plain not in known and not own:
            heard.append(text)
        known.add(plain)


def _joined(parts: Sequence[Accuracy]) -> Accuracy:
    index = torch.cat([part.index for part in parts])
    order = index.argsort()
    return Accuracy.of(torch.cat([part.correct for part in parts])[order], index[order])


def _joined_robust(parts: Sequence[RobustAccuracy]) -> RobustAccuracy:
    """One result of several, in the order of the samples' numbers."""
    index = torch.cat([part.index for part in parts])
    order = index.argsort()

    def field_of(name: str) -> Tensor:
        found: Tensor = torch.cat([getattr(part, name) for part in parts])[order]
        return found

    robust = RobustAccuracy.of(field_of("correct"), index[order])
    robust.standard = _joined([part.standard for part in parts])
    robust.attacks = parts[0].attacks
    robust.broken_by, robust.value = field_of("broken_by"), field_of("value")
    robust.adversarial = field_of("adversarial")
    topics: dict[str, str] = {}
    for part in parts:
        for text in part.warnings:  # the last part is the largest
            topics["".join(letter for letter in text if not letter.isdigit())] = text
    robust.warnings = tuple(topics.values())
    return robust
