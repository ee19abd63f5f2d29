"""Settings of every stage of a study."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from torch import Tensor

from advfeat import checks
from advfeat.study._plan import PLANS, base_of
from advfeat.training import crop_flip

Settings: TypeAlias = Mapping[str, Any]


def _default_sets() -> Mapping[str, Settings]:
    names = ("D_R", "D_R control", "D_NR", "D_rand", "D_det", "D_det control")
    return {name: {} for name in names}


def _default_transfer() -> Settings:
    return {"samples": 1000, "steps": 20}


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
        For each dataset that is to be made, in order, the arguments of its construction; ``eps``
        and ``norm`` are the study's if they are not given here. By default D_R, D_NR, D_rand,
        D_det and the controls of D_R and D_det. The names are ``"D_R"``, ``"D_NR"``,
        ``"D_R from noise"``, ``"D_NR from noise"``, ``"D_rand"``, ``"D_det"``, and their
        controls: ``"D_R control"`` and ``"D_NR control"`` are the original images of the same
        samples; ``"D_rand control"`` and ``"D_det control"`` the same construction from the
        robust model; ``"D_det noise control"`` and ``"D_det moved control"`` (and of D_rand) have
        noise, or other images' perturbations, in place of each image's own. A control is
        constructed and trained on with the settings, random numbers and number of steps of its
        dataset. With ``starts=k`` D_R and D_NR have k samples for each image, and epochs are
        divided by k: the number of steps does not depend on it.
    fresh
        For datasets by name, of `advfeat.fit` for the model that learns from it, where they
        differ from ``standard``; controls have those of their dataset.
    measured
        Of `advfeat.robust_accuracy`; by default the fast ensemble in float32.
    transfer
        Of the PGD whose examples are tried on other models; ``samples`` is how many test samples
        (1000, with 20 steps, by default).
    samples
        Make datasets of the first samples of the training data only; by default of all.

    Examples
    --------
    >>> from advfeat.study import Recipe
    >>> mine = Recipe(standard={"epochs": 5}, sets={"D_det": {"steps": 10}})
    >>> mine.training("D_det"), Recipe.paper().training("D_rand")["lr"]
    ({'epochs': 5}, 0.01)
    """

    standard: Settings
    robust: Settings = field(default_factory=dict)
    sets: Mapping[str, Settings] = field(default_factory=_default_sets)
    fresh: Mapping[str, Settings] = field(default_factory=dict)
    measured: Settings = field(default_factory=dict)
    transfer: Settings = field(default_factory=_default_transfer)
    samples: int | None = None

    def __post_init__(self) -> None:
        """Check that every name is a dataset's, and that settings of a control are its own."""
        for argument, names in (("sets", self.sets), ("fresh", self.fresh)):
            for name in names:
                checks.one_of(argument, name, tuple(PLANS))
        for name in self.sets:
            plan = PLANS[name]
            if plan.method in ("noise", "moved") and plan.source not in self.sets:
                checks.fail("sets", name, f"is made of {plan.source}, which is not among the sets")
            if plan.method in ("original", "noise", "moved") and self.sets[name]:
                checks.fail("sets", {name: self.sets[name]}, "this control takes no settings")
        if self.samples is not None:
            checks.count("samples", self.samples, low=2)

    def training(self, name: str) -> dict[str, Any]:
        """Settings of the training of a model, by its name."""
        own = {**self.fresh.get(base_of(name), {}), **self.fresh.get(name, {})}
        return {**self.standard, **(self.robust if name == "robust" else own)}

    def construction(self, name: str) -> dict[str, Any]:
        """Settings of the construction of a dataset, by its name."""
        return {**self.sets.get(base_of(name), {}), **self.sets[name]}

    def starts(self, name: str) -> int:
        """How many starts each image of a dataset has, and how often its control repeats it."""
        if PLANS[name].method not in ("D_R", "D_NR", "original"):
            return 1
        starts: int = self.sets.get(base_of(name), {}).get("starts", 1)
        return starts

    def control(self, name: str) -> str | None:
        """The model that a dataset's own is compared with: trained alike on the control.

        Without a control of its own D_R, D_NR and their variants have one whose training is
        the same: another's of them, or the standard model.
        """
        own = f"{name} control"
        if own in self.sets:
            return own
        if name.startswith(("D_R", "D_NR")) and name in PLANS and base_of(name) == name:
            settings = self.training(name)
            for other in ("D_R control", "D_NR control"):
                alike = other in self.sets and self.training(other) == settings
                if alike and self.starts(other) == self.starts(name):
                    return other
            if self.samples is None and settings == self.standard and self.starts(name) == 1:
                return "standard"
        return None

    @classmethod
    def paper(cls, *, augment: Callable[[Tensor], Tensor] | None = crop_flip) -> Recipe:
        """The paper's settings for CIFAR-10 (appendix C; learning rates per dataset).

        Parameters
        ----------
        augment
            Of all trainings but those on D_det.

        Notes
        -----
        The paper gives no number of epochs: 150, with the learning rate cut by 10 after a third
        and two thirds, is this library's choice. The authors' library augments CIFAR-10 with
        colour jitter of 0.25 and rotation by up to 2 degrees besides crop and flip; pass your own
        ``augment`` for that. D_R and D_NR are trained on with the settings of the standard model,
        which is then their matched control.
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
                "D_rand control": {},
                "D_det": targeted,
                "D_det control": {},
            },
            fresh={"D_rand": {"lr": 0.01}, "D_det": {"augment": None}},
        )

    @classmethod
    def short(
        cls,
        eps: float,
        *,
        augment: Callable[[Tensor], Tensor] | None = crop_flip,
        samples: int | None = None,
    ) -> Recipe:
        """A scaled-down version: a tenth of the epochs, fewer steps, one cycle of learning rate.

        Parameters
        ----------
        eps
            The study's.
        augment
            Of all trainings but those on D_rand and D_det.
        samples
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
                "D_R control": {},
                "D_NR": inversion,
                "D_rand": targeted,
                "D_det": targeted,
                "D_det control": {},
            },
            fresh={"D_rand": {**plain, "lr": 0.02}, "D_det": plain},
            samples=samples,
        )

    def with_epochs(self, epochs: int) -> Recipe:
        """The same with so many epochs in every training: to try things out."""
        return replace(
            self,
            standard={**self.standard, "epochs": epochs},
            robust=_with_warmup({**self.robust, "epochs": epochs}),
            fresh={name: {**own, "epochs": epochs} for name, own in self.fresh.items()},
        )


def _with_warmup(robust: dict[str, Any]) -> dict[str, Any]:
    """At most a third of the epochs for the ball to grow."""
    if "warmup" in robust:
        robust["warmup"] = min(robust["warmup"], robust["epochs"] / 3)
    return robust
