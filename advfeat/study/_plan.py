"""Which datasets a study knows, what each is made from, and what it is compared with."""

from __future__ import annotations

from typing import NamedTuple


class Plan(NamedTuple):
    """How a dataset of a study is made.

    ``method`` is that of a construction, or of a control: ``"original"`` (the original images),
    ``"noise"`` and ``"moved"`` (see `advfeat.datasets.noise_control` and `moved_control`).
    ``source`` is the model it is constructed from, or the dataset that a noise or moved control
    is of. ``twin`` is the dataset whose settings of construction and training a control shares.
    """

    method: str
    source: str | None
    twin: str | None = None

    @property
    def is_constructed(self) -> bool:
        return self.method.startswith("D_")

    @property
    def is_targeted(self) -> bool:
        return self.method in ("D_rand", "D_det")


PLANS = {
    "D_R": Plan("D_R", "robust"),
    "D_R from noise": Plan("D_R", "robust"),
    "D_R control": Plan("original", None, "D_R"),
    "D_NR": Plan("D_NR", "standard"),
    "D_NR from noise": Plan("D_NR", "standard"),
    "D_NR control": Plan("original", None, "D_NR"),
    **{
        name: plan
        for base in ("D_rand", "D_det")
        for name, plan in {
            base: Plan(base, "standard"),
            f"{base} control": Plan(base, "robust", base),
            f"{base} noise control": Plan("noise", base, base),
            f"{base} moved control": Plan("moved", base, base),
        }.items()
    },
}


def training_stage(name: str) -> str:
    """Name of the stage that trains a model."""
    return f"train on {name}" if name in PLANS else f"train {name}"


def base_of(name: str) -> str:
    """The dataset itself, of a control; the name as it is, of anything else."""
    plan = PLANS.get(name)
    return name if plan is None or plan.twin is None else plan.twin
