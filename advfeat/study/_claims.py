"""The paper's claims, each with the paired differences that speak for or against it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeAlias

from torch import Tensor

from advfeat.results import Result
from advfeat.statistics import Estimate, mean_outcome, paired_difference
from advfeat.tables import Format, Table, render

Verdict: TypeAlias = Literal["confirmed", "not confirmed", "undecided"]


class Outcomes(NamedTuple):
    """Of the models of one name, ``(S, N)`` bool: a seed to a line, a sample to a column."""

    standard: Tensor
    robust: Mapping[float, Tensor]
    shifted: Tensor


@dataclass(frozen=True, repr=False)
class Evidence(Result):
    """A difference that is above 0 if the claim is true.

    Attributes
    ----------
    text
        What is compared.
    difference
        `advfeat.statistics.Estimate` of it.
    opposite
        What is true if the difference is below ``against``, as a sentence without its full stop.
    context
        A sentence with what the difference is to be seen beside, for where it is not above 0.
    against
        A difference below this speaks against the claim. It is 0, but for comparisons with chance:
        a model that guesses is less accurate than one that always answers the commonest class, but
        not less than one that always answers the rarest.
    """

    text: str
    difference: Estimate
    opposite: str = ""
    context: str = ""
    against: float = 0.0

    def _summary(self) -> str:
        return f"{self.text}: {self.difference}, {self.verdict}"

    @property
    def verdict(self) -> Verdict:
        """By the interval: above 0, below ``against``, or neither."""
        low, high = self.difference.interval
        if low > 0:
            return "confirmed"
        return "not confirmed" if high < self.against else "undecided"

    @property
    def note(self) -> str | None:
        """A sentence with the number, where the evidence does not confirm the claim."""
        if self.verdict == "confirmed":
            return None
        if self.verdict == "undecided" and self.difference.sign < 0:
            return (
                f"Undecided: {self.text} is {self.difference} points: not above chance, and no "
                f"less than a model that guesses may have. {self.context}".strip()
            )
        if self.verdict == "undecided":
            return (
                f"Undecided: {self.text} is {self.difference} points, an interval that contains 0. "
                f"{self.context}More test samples tell more, and so do more seeds: seeds=3."
            )
        return f"{self.opposite}: {self.text} is {self.difference} points. {self.context}".strip()


@dataclass(frozen=True, repr=False)
class Claim(Result):
    """A claim of the paper, and what was measured of it.

    Attributes
    ----------
    text
        The claim.
    evidence
        Differences that are all above 0 if it is true: each with its ``text``, its ``difference``
        (an `advfeat.statistics.Estimate`) and its ``verdict``.
    """

    text: str
    evidence: tuple[Evidence, ...]

    def _summary(self) -> str:
        return f"{self.text}: {self.verdict}"

    def _content(self) -> Sequence[str | Table]:
        return [claims_as_table((self,))]

    @property
    def verdict(self) -> Verdict:
        """Confirmed if all evidence confirms it, not confirmed if any is against it."""
        verdicts = {each.verdict for each in self.evidence}
        if "not confirmed" in verdicts:
            return "not confirmed"
        return "undecided" if "undecided" in verdicts else "confirmed"


def claims_as_table(claims: tuple[Claim, ...]) -> Table:
    """A line for each piece of evidence, with the verdict on the claim in its first."""
    rows = [
        (
            claim.text if not place else "",
            claim.verdict if not place else "",
            evidence.text,
            str(evidence.difference),
        )
        for claim in claims
        for place, evidence in enumerate(claim.evidence)
    ]
    return Table(("claim", "verdict", "evidence", "points (95% interval)"), rows)


def claims_table(claims: tuple[Claim, ...], format: Format = "text") -> str:
    """All claims, written."""
    return render([claims_as_table(claims)], format)


def judge(
    measured: Mapping[str, Outcomes],
    *,
    norm: str,
    chance: float,
    rarest: float,
    control: Callable[[str], str | None],
) -> tuple[Claim, ...]:
    """Compare the models that a study measured; claims without measurements are left out.

    The robust model is compared at the radius where it is furthest above the standard one.
    Models that learned from D_R, D_NR and their controls are compared where the standard model
    keeps nearest to half of its accuracy: they are not much more robust than it, and where all are
    right, or none, no difference is seen. Both radii are chosen on these two models alone.
    ``chance`` and ``rarest`` are what always answering the commonest and the rarest class gets
    right.
    """
    if not {"standard", "robust"} <= measured.keys():
        return ()
    judge = _Judge(measured, norm, chance, rarest, control, _widest(measured), _halfway(measured))
    found = (Claim(text, tuple(evidence)) for text, evidence in judge.claims())
    return tuple(claim for claim in found if claim.evidence)


def _widest(measured: Mapping[str, Outcomes]) -> float | None:
    def gap(radius: float) -> float:
        robust, standard = (measured[n].robust[radius] for n in ("robust", "standard"))
        return float(robust.double().mean() - standard.double().mean())

    return max(measured["robust"].robust, key=gap, default=None)


def _halfway(measured: Mapping[str, Outcomes]) -> float | None:
    robust = measured["standard"].robust
    half = float(measured["standard"].standard.double().mean()) / 2
    return min(
        robust, key=lambda radius: abs(float(robust[radius].double().mean()) - half), default=None
    )


@dataclass(frozen=True)
class _Judge:
    measured: Mapping[str, Outcomes]
    norm: str
    chance: float
    rarest: float
    control: Callable[[str], str | None]
    widest: float | None
    halfway: float | None

    def claims(self) -> Iterator[tuple[str, Iterator[Evidence]]]:
        yield (
            "adversarial training makes a model robust",
            self._robuster("robust", "standard", self.widest),
        )
        for name in ("D_R", "D_R from noise"):
            control = self.control(name)
            yield (
                f"{name}: robust features suffice for robust accuracy",
                _chain(self._robuster(name, control, self.halfway), self._above_chance(name)),
            )
        for name in ("D_NR", "D_NR from noise"):
            robust = name.replace("D_NR", "D_R")
            yield (
                f"{name}: accurate and less robust than {robust}",
                _chain(self._above_chance(name), self._robuster(robust, name, self.halfway)),
            )
        for name in ("D_rand", "D_det"):
            control = self.control(name)
            against = "" if name == "D_rand" else ", even against robust ones"
            parts = [self._above_chance(name), self._more_accurate(name, control)]
            if name == "D_det":
                parts.append(self._not_shifted(name, f"{name}, original - shifted labels", 1))
            yield f"{name}: non-robust features generalise{against}", _chain(*parts)
        yield (
            "a robust model has few non-robust features to construct with",
            self._not_shifted("D_det control", "D_det control, shifted - original labels", -1),
        )

    def _robuster(self, name: str, other: str | None, at: float | None) -> Iterator[Evidence]:
        if self._both(name, other) and at is not None:
            first, second = (self.measured[n].robust[at] for n in (name, other or ""))
            text = f"{name} - {other}, {self.norm} {at:g}"
            opposite = f"{name} is less robust than {other}"
            context = self._passed_on(name, other or "", at) if name.startswith("D_R") else ""
            yield Evidence(text, paired_difference(first, second), opposite, context)

    def _passed_on(self, name: str, other: str, at: float) -> str:
        """How much there was to pass on, and how much of it D_R does."""
        robust, own, control = (
            100 * float(self.measured[each].robust[at].double().mean())
            for each in ("robust", name, other)
        )
        passed = f"{own - control:+.1f}" if own > control else "none"
        return (
            f"The robust model is {robust - control:+.1f} points above {other} there, and {name} "
            f"passes on {passed} of them: with few training samples or starts, or an unfinished "
            "inversion, little of it is left in the images. "
        )

    def _more_accurate(self, name: str, other: str | None) -> Iterator[Evidence]:
        if self._both(name, other):
            first, second = (self.measured[n].standard for n in (name, other or ""))
            text, opposite = f"{name} - {other}, accuracy", f"{other} teaches more than {name}"
            context = self._as_shown(name, other or "") if name == "D_det" else ""
            yield Evidence(text, paired_difference(first, second), opposite, context)

    def _as_shown(self, name: str, other: str) -> str:
        """That both learned the labels of what images show, where both did."""
        both = [self.measured[each] for each in (name, other)]
        shifted = [float(each.shifted.double().mean()) for each in both]
        if any(
            float(each.standard.double().mean()) >= fraction
            for each, fraction in zip(both, shifted, strict=True)
        ):
            return ""
        return (
            f"The models of {name} and of {other} predict shifted labels for {shifted[0]:.1%} and "
            f"{shifted[1]:.1%} of the samples: both learned more from what the images show than "
            "from the perturbations. "
        )

    def _not_shifted(self, name: str, text: str, sign: int) -> Iterator[Evidence]:
        if name in self.measured:
            first, second = (self.measured[name].standard, self.measured[name].shifted)[::sign]
            more = ("shifted", "original")[::sign]
            opposite = (
                f"The model of {name} predicts {more[0]} labels more often than {more[1]} ones"
            )
            yield Evidence(text, paired_difference(first, second), opposite)

    def _above_chance(self, name: str) -> Iterator[Evidence]:
        if name in self.measured:
            found = mean_outcome(self.measured[name].standard)
            low, high = found.interval
            shifted = replace(
                found,
                value=found.value - self.chance,
                interval=(low - self.chance, high - self.chance),
            )
            text, opposite = f"{name} - chance ({self.chance:.1%}), accuracy", f"{name} misleads"
            yield Evidence(text, shifted, opposite, against=self.rarest - self.chance)

    def _both(self, name: str, other: str | None) -> bool:
        return name in self.measured and other in self.measured


def _chain(*parts: Iterator[Evidence]) -> Iterator[Evidence]:
    for part in parts:
        yield from part
