"""What calibration chose, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from advfeat import checks
from advfeat.results import Result
from advfeat.study._pilot import MOMENTUM, shift_batch, warmup_for
from advfeat.study._recipe import Recipe
from advfeat.tables import Table

_CHOICES = {
    "lr", "robust_lr", "eps", "images", "at", "targeted_eps", "targeted_lr", "steps", "step_size",
    "standard_steps", "standard_step_size", "epochs", "robust_epochs", "taught_epochs", "starts",
}  # fmt: skip


def of_another_version(choices: Mapping[str, Any]) -> str:
    """Say that another version of advfeat made a calibration; empty if this one did."""
    names = ", ".join(sorted(choices.keys() ^ _CHOICES))
    return names and f"made by another version of advfeat, which chose other settings ({names})"


@dataclass(frozen=True, repr=False)
class Calibration(Result):
    """What `calibrate` chose, and why.

    Attributes
    ----------
    choices
        The settings chosen, plain numbers by name.
    reasons
        One sentence for each choice, with the number behind it.
    warnings
        Where these data, or this model, lack what the paper found: the number and what it means.
    tables
        What was measured, by its title.
    seconds
        How long it took.
    """

    choices: Mapping[str, Any]
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]
    tables: Mapping[str, str]
    seconds: float

    @property
    def at(self) -> tuple[float, ...]:
        """Radii to report at."""
        return tuple(self.choices["at"])

    def recipe(self, *, samples: int | None = None) -> Recipe:
        """The study's settings.

        Parameters
        ----------
        samples
            As in `Recipe`.

        Raises
        ------
        ValueError
            If another version of advfeat chose other settings.
        """
        c = self.choices
        if text := of_another_version(c):
            checks.fail("choices", sorted(c), f"{text}. Calibrate again")
        inversion = {"momentum": MOMENTUM, "starts": c["starts"]}
        on_robust = {"steps": c["steps"], "step_size": c["step_size"]}
        on_standard = {"steps": c["standard_steps"], "step_size": c["standard_step_size"]}
        targeted = {"eps": c["targeted_eps"], "steps": 20}
        light = {"augment": shift_batch if c["images"] else None, "epochs": c["epochs"]}
        return Recipe(
            standard={"lr": c["lr"], "schedule": "one_cycle", **light},
            robust={
                "eps": c["eps"],
                "steps": 3,
                "step_size": c["eps"] / 2,
                "lr": c["robust_lr"],
                "epochs": c["robust_epochs"],
                "warmup": warmup_for(c["robust_epochs"]),
            },
            sets={
                "D_R": {**on_robust, **inversion},
                "D_R control": {},
                "D_NR": {**on_standard, **inversion},
                "D_rand": targeted,
                "D_rand control": {},
                "D_det": targeted,
                "D_det control": {},
            },
            fresh={
                "D_rand": {"lr": c["lr"] / 5, "epochs": c["taught_epochs"]},
                "D_det": {"lr": c["targeted_lr"], "epochs": c["taught_epochs"]},
            },
            samples=samples,
        )

    def _summary(self) -> str:
        return f"{len(self.choices)} settings chosen, {len(self.warnings)} warnings"

    def __str__(self) -> str:
        """What was measured, what was chosen and why, and what these data lack."""
        parts = [f"{title}\n{text}" for title, text in self.tables.items()]
        parts.append("\n".join(f"- {text}" for text in self.reasons))
        parts += [f"Warning: {text}" for text in self.warnings]
        return "\n\n".join(parts)

    def _content(self) -> Sequence[str | Table]:
        choices = [(name, str(value)) for name, value in self.choices.items()]
        warnings = [f"Warning: {text}" for text in self.warnings]
        return [Table(("setting", "chosen"), choices), *self.reasons, *warnings]
