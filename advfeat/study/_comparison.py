"""Two studies side by side: which models differ, on the same test samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from advfeat import checks
from advfeat.results import Result
from advfeat.statistics import Estimate, paired_difference
from advfeat.study._findings import Findings, measured_by_all, outcomes
from advfeat.tables import Table


@dataclass(frozen=True, repr=False)
class Comparison(Result):
    """How the models of one study differ from those of another.

    Attributes
    ----------
    differences
        For each model that both studies have measured, for ``"accuracy"`` and each radius that
        both have, an `advfeat.statistics.Estimate` of the first minus the second.
    """

    differences: dict[str, dict[str, Estimate]]

    def _summary(self) -> str:
        found = [each for columns in self.differences.values() for each in columns.values()]
        differ = sum(each.sign != 0 for each in found)
        return f"{len(self.differences)} models, {differ} of {len(found)} differences without 0"

    def _content(self) -> Sequence[str | Table]:
        head = ["trained on", *next(iter(self.differences.values()))]
        body = [[name, *map(str, columns.values())] for name, columns in self.differences.items()]
        return [Table(head, body), "First minus second, points, with 95% intervals."]


def compare(first: Findings, second: Findings) -> Comparison:
    """Differences on the same test samples; an error where these differ."""
    if first.settings["test"] != second.settings["test"]:
        checks.fail("other", "a study of other test data", "differences are of the same samples")
    if first.work.norm != second.work.norm:
        checks.fail("other", f"a study in {second.work.norm}", f"this one is in {first.work.norm}")
    if len(first.runs) != len(second.runs):
        cause = f"this one has {len(first.runs)}: a seed is paired with a seed"
        checks.fail("other", f"a study of {len(second.runs)} seeds", cause)
    ours, theirs = (outcomes(measured_by_all(found.runs)) for found in (first, second))
    radii = [r for r in first.work.at if r in second.work.at]
    differences = {
        name: {
            "accuracy": paired_difference(own.standard, theirs[name].standard),
            **{
                f"{first.work.norm} {radius:g}": paired_difference(
                    own.robust[radius], theirs[name].robust[radius]
                )
                for radius in radii
            },
        }
        for name, own in ours.items()
        if name in theirs
    }
    if not differences:
        checks.fail("other", list(theirs), "both studies have measured no model of the same name")
    return Comparison(differences)
