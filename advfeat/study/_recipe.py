"""Settings of every stage of a study."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from torch import Tensor

from advfeat import checks
from advfeat.training import crop_flip

Settings: TypeAlias = Mapping[str, Any]

# The model that a set is made from.
SOURCES = {
    "D_R": "robust",
    "D_R from noise": "robust",
    "D_NR": "standard",
    "D_NR from noise": "standard",
    "D_rand": "standard",
    "D_rand control": "robust",
    "D_det": "standard",
    "D_det control": "robust",
}
TARGETED = ("D_rand", "D_det")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of every stage, as keyword arguments of the function that does it.

    Parameters
    ----------
    standard
        Of `advfeat.fit`, for the standard model; every other training starts from these.
    robust
        Of `advfeat.adversarial_fit`, where they differ from ``standard``.
    sets
        For each set that is to be made, in order, what its construction is given; an ``eps`` and
        a ``norm`` are the study's if none is given here. The names are ``"D_R"``, ``"D_NR"``,
        ``"D_R from noise"``, ``"D_NR from noise"``, ``"D_rand"``, ``"D_det"``, and
        ``"D_rand control"`` and ``"D_det control"``: the same from the robust model.
    fresh
        For sets by name, of `advfeat.fit` for the model that learns from the set, where they
        differ from ``standard``.
    measured
        Of `advfeat.robust_accuracy`; by default the fast ensemble in float32.
    transfer
        Of the PGD whose examples are tried on other models; ``rows`` is how many test rows.
    rows
        Make sets of the first rows of the training data only; by default of all.

    Examples
    --------
    >>> from advfeat.study import Recipe
    >>> mine = Recipe(standard={"epochs": 5}, sets={"D_det": {"steps": 10}})
    >>> mine.training("D_det"), Recipe.paper().training("D_rand")["lr"]
    ({'epochs': 5}, 0.01)
    """

    standard: Settings
    robust: Settings = field(default_factory=dict)
    sets: Mapping[str, Settings] = field(
        default_factory=lambda: {"D_R": {}, "D_NR": {}, "D_rand": {}, "D_det": {}}
    )
    fresh: Mapping[str, Settings] = field(default_factory=dict)
    measured: Settings = field(default_factory=dict)
    transfer: Settings = field(default_factory=lambda: {"rows": 1000, "steps": 20})
    rows: int | None = None

    def __post_init__(self) -> None:
        """Refuse names that no set has."""
        for argument, names in (("sets", self.sets), ("fresh", self.fresh)):
            for name in names:
                checks.one_of(argument, name, tuple(SOURCES))
        if self.rows is not None:
            checks.count("rows", self.rows, low=2)

    def training(self, name: str) -> dict[str, Any]:
        """Settings of the training of a model, by its name."""
        own = self.robust if name == "robust" else self.fresh.get(name, {})
        return {**self.standard, **own}

    @classmethod
    def paper(cls, *, augment: Callable[[Tensor], Tensor] | None = crop_flip) -> Recipe:
        """The paper's settings for CIFAR-10 (appendix C; learning rates per set).

        Parameters
        ----------
        augment
            Of all trainings but those on D_det.
        """
        inversion, noise = {"steps": 1000, "step_size": 0.1}, {"start": "noise", "steps": 10_000}
        targeted = {"steps": 100}
        return cls(
            standard={"epochs": 150, "lr": 0.1, "augment": augment},
            robust={"steps": 7},
            sets={
                "D_R": inversion,
                "D_R from noise": {**inversion, **noise},
                "D_NR": inversion,
                "D_NR from noise": {**inversion, **noise},
                "D_rand": targeted,
                "D_rand control": targeted,
                "D_det": targeted,
                "D_det control": targeted,
            },
            fresh={
                "D_rand": {"lr": 0.01},
                "D_rand control": {"lr": 0.01},
                "D_det": {"augment": None},
                "D_det control": {"augment": None},
            },
        )

    @classmethod
    def short(
        cls,
        eps: float,
        *,
        augment: Callable[[Tensor], Tensor] | None = crop_flip,
        rows: int | None = None,
    ) -> Recipe:
        """A scaled-down version: a tenth of the epochs, fewer steps, one cycle of learning rate.

        Parameters
        ----------
        eps
            The study's.
        augment
            Of all trainings but those on D_rand and D_det.
        rows
            As in `Recipe`.

        Notes
        -----
        Targeted perturbations are twice as large as the study's ``eps``: in the paper's own ball
        a small network moves too few images to their targets to learn from.
        """
        inversion = {"steps": 30, "step_size": 0.3}
        targeted = {"eps": 2 * eps, "steps": 20}
        plain = {"augment": None, "epochs": 16, "lr": 0.1}
        return cls(
            standard={"epochs": 12, "lr": 0.2, "schedule": "one_cycle", "augment": augment},
            robust={"steps": 3, "step_size": eps / 2, "epochs": 7},
            sets={
                "D_R": inversion,
                "D_NR": inversion,
                "D_rand": targeted,
                "D_det": targeted,
                "D_det control": targeted,
            },
            fresh={
                "D_rand": {**plain, "lr": 0.02},
                "D_det": plain,
                "D_det control": plain,
            },
            rows=rows,
        )

    def with_epochs(self, epochs: int) -> Recipe:
        """The same with so many epochs in every training: to try things out."""
        return replace(
            self,
            standard={**self.standard, "epochs": epochs},
            robust={**self.robust, "epochs": epochs},
            fresh={name: {**own, "epochs": epochs} for name, own in self.fresh.items()},
        )
