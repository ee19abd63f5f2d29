"""What the numbers mean, in plain words, with two traffic lights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from advfeat.metrics._curve import RobustnessCurve
from advfeat.metrics._diagnose import Diagnosis, Finding
from advfeat.metrics._outcome import Accuracy, RobustAccuracy
from advfeat.results import Result
from advfeat.tables import Table

Light: TypeAlias = Literal["green", "yellow", "red"]
ORDER: tuple[Light, ...] = ("green", "yellow", "red")
# Of the samples that are right without an attack, how many are still right under it.
_ROBUST, _PARTLY = 0.5, 0.1
_FEW = 100  # samples below which an interval is wider than about 20 points
_FEW_CHECKED = 32  # samples below which a sign of 5% may have been missed
_DISAGREEMENT = 0.02  # samples that the curve's attacks broke and the evaluation's did not
_WORDS = {
    "robustness": {"green": "robust", "yellow": "partly robust", "red": "not robust"},
    "reliability": {"green": "reliable", "yellow": "warning", "red": "do not report"},
}
# Checks after which a number means nothing.
_FATAL = ("random_predictions", "large_eps_resists")


@dataclass(frozen=True, repr=False)
class Verdict(Result):
    """Two lights, each with its reasons.

    Attributes
    ----------
    robustness
        ``"green"`` where at least half of the samples that are right without an attack are right
        under it, ``"red"`` where at most a tenth is, else ``"yellow"``.
    reliability
        Whether the number is to be trusted: ``"yellow"`` and ``"red"`` where something speaks
        against it.
    summary
        The result in one or two sentences.
    reasons
        ``(light, sentence)`` for everything that was found.
    unconfirmed
        Whether ``robustness`` would be green if the number were reliable.
    """

    robustness: Light
    reliability: Light
    summary: str
    reasons: tuple[tuple[Light, str], ...]
    unconfirmed: bool = False

    @property
    def light(self) -> Light:
        """The worse of the two."""
        return max(self.robustness, self.reliability, key=ORDER.index)

    def word(self, which: str) -> str:
        """What the light of ``"robustness"`` or ``"reliability"`` says."""
        if which == "robustness" and self.unconfirmed:
            return "robust, but unconfirmed"
        return _WORDS[which][getattr(self, which)]

    def _summary(self) -> str:
        return f"{self.word('robustness')}; {self.word('reliability')}"

    def _content(self) -> Sequence[str | Table]:
        lights = [
            f"Robustness: {self.word('robustness').upper()} ({self.robustness})",
            f"Reliability of the number: {self.word('reliability').upper()} ({self.reliability})",
        ]
        marks = {"green": "  ok", "yellow": "  ! ", "red": "  x "}
        return [*lights, self.summary, *(f"{marks[light]} {text}" for light, text in self.reasons)]


def judge(
    clean: Accuracy,
    robust: RobustAccuracy,
    curve: RobustnessCurve | None,
    diagnosis: Diagnosis | None,
    *,
    eps: float,
    ball: str,
    chance: float,
    warnings: Sequence[str],
    ensemble: bool,
) -> Verdict:
    """Turn numbers into a verdict.

    Parameters
    ----------
    clean, robust, curve, diagnosis
        What was measured; None where it was left out.
    eps, ball
        The radius in the units of the curve, and norm and radius in words.
    chance
        Fraction of the commonest class.
    warnings
        What the evaluation warned of.
    ensemble
        Whether several attacks were run.
    """
    standard = robust.standard
    kept = robust.count / standard.count if standard.count else 0.0
    robustness: Light = "red"
    if kept >= _ROBUST:
        robustness = "green"
    elif kept > _PARTLY:
        robustness = "yellow"
    reasons = [
        *_of_models(clean, robust, chance),
        *_of_checks(diagnosis),
        *_of_attacks(robust, curve, eps, ensemble),
        *(("yellow", text) for text in dict.fromkeys((*robust.warnings, *warnings))),
    ]
    reasons.sort(key=lambda reason: -ORDER.index(reason[0]))
    trusted: Light = max((light for light, _ in reasons), key=ORDER.index, default=ORDER[0])
    unconfirmed = robustness == "green" and trusted != "green"
    robustness = "yellow" if unconfirmed else robustness
    low, high = robust.interval
    summary = (
        f"Under attack in {ball}, {100 * robust:.1f}% of the samples are classified correctly "
        f"(95% interval {100 * low:.1f} to {100 * high:.1f}, {robust.total} samples), of "
        f"{100 * standard:.1f}% without an attack"
    )
    summary += f": {100 * kept:.0f}% of what was right stays right." if standard.count else "."
    if trusted != "green":
        summary += " The true number may be lower: see the reasons below."
    return Verdict(robustness, trusted, summary, tuple(reasons), unconfirmed)


def _of_models(
    clean: Accuracy, robust: RobustAccuracy, chance: float
) -> Iterator[tuple[Light, str]]:
    constant = f"the commonest class alone is right on {100 * chance:.1f}%"
    if clean.interval[0] <= chance:
        text = f"Without an attack the model is right on {100 * clean:.1f}% of samples; {constant}."
        advice = "Is it trained, are these its labels, and is the normalisation inside the model?"
        yield "red", f"{text} {advice}"
    elif robust.interval[1] < chance:
        yield "green", f"Under attack a constant answer would do better: {constant}."
    if robust.total < _FEW:
        yield "yellow", f"Only {robust.total} samples were attacked: the interval is wide."


def _of_checks(diagnosis: Diagnosis | None) -> Iterator[tuple[Light, str]]:
    if diagnosis is None:
        yield "yellow", "Whether gradients are masked was not checked: a larger budget does so."
        return
    for name in diagnosis.suspicious:
        finding = diagnosis[name]
        fatal = name in _FATAL or (name == "zero_gradients" and finding.value > 0.5)
        yield "red" if fatal else "yellow", f"{name}: {finding_text(finding)}"
    if not diagnosis.suspicious:
        text = f"None of {len(diagnosis.findings)} checks for masked gradients found any"
        count = diagnosis.samples
        if count is None or count >= _FEW_CHECKED:
            yield "green", f"{text}."
        else:
            of = f"{count} sample{'s' * (count != 1)}"
            yield "yellow", f"{text}, but only on {of}: a larger budget checks more."


def _of_attacks(
    robust: RobustAccuracy, curve: RobustnessCurve | None, eps: float, ensemble: bool
) -> Iterator[tuple[Light, str]]:
    if not ensemble:
        text = "One attack was run, so the number is no more than an upper bound"
        yield "yellow", f"{text}: leave attack= out, and raise budget=, for an ensemble."
    if curve is None:
        return
    robust_of = dict(zip(robust.index.tolist(), robust.correct.tolist(), strict=True))
    pairs = [
        (distance <= eps, robust_of[number])
        for number, distance in zip(curve.index.tolist(), curve.distance.tolist(), strict=True)
        if number in robust_of
    ]
    missed = sum(broken and held for broken, held in pairs)
    if missed > max(1, _DISAGREEMENT * len(pairs)):
        text = f"The attacks of the curve broke {missed} of {len(pairs)} samples inside the ball"
        yield "yellow", f"{text} that the evaluation counts as robust: trust the lower of the two."
    elif pairs:
        text = "Two kinds of attacks agree: those of the evaluation and those of the curve"
        yield "green", f"{text}, on {len(pairs)} samples."


def finding_text(finding: Finding) -> str:
    """The fraction, its limit, what it is of, and what to do where it is above the limit."""
    text = f"{finding.value:.1%} (limit {finding.limit:.0%}) are {finding.meaning}."
    if finding.suspicious:
        text += f" {finding.advice[:1].upper()}{finding.advice[1:]}."
    return text
