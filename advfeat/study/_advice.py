"""What a study's numbers say about its own settings: sentences with the number and a remedy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from advfeat.study._plan import PLANS

# A robust source below this fraction of the standard accuracy is a poor control.
LEAST_ACCURACY = 0.9
# Robust minus standard accuracy, at the radius where it is widest.
LEAST_GAP = 0.3
# Success of targeted perturbations on the standard and on the robust source.
GOOD_SUCCESS, LEAST_SUCCESS, MOST_CONTROL_SUCCESS = 0.95, 0.6, 0.2
# Distance of activations after an inversion, as a fraction of that at its start.
MOST_DISTANCE = 0.15
# Training loss of a model that has learned its samples.
LEARNED = 0.01


def advise(
    accuracy: Mapping[str, float],
    gaps: Mapping[float, float],
    made: Mapping[str, Mapping[str, float]],
    norm: str,
) -> list[str]:
    """Name what these data or settings lack, from means over seeds.

    Parameters
    ----------
    accuracy
        Of each model.
    gaps
        Robust accuracy of the robust model minus that of the standard one, at each radius.
    made
        For each dataset the means over its samples.
    norm
        Of the radii.
    """
    return [*_about_models(accuracy, gaps, norm), *_about_datasets(made)]


def still_learning(name: str, loss: float) -> str:
    """Say that a model has not learned its samples, and what follows for D_R."""
    return (
        f"The training loss of {name} is {loss:.2g} at the end, above {LEARNED:g}. A model that "
        "has not learned its samples yet is more robust than it will be, and D_R has less to gain "
        "over it: give more epochs, if they lower the loss."
    )


def _about_models(
    accuracy: Mapping[str, float], gaps: Mapping[float, float], norm: str
) -> Iterator[str]:
    if {"standard", "robust"} <= accuracy.keys():
        standard, robust = accuracy["standard"], accuracy["robust"]
        if robust < LEAST_ACCURACY * standard:
            yield (
                f"The robust model is {robust:.1%} accurate, the standard one {standard:.1%}. A "
                "robust source this much weaker is a control for the wrong reason: train it in a "
                "smaller ball (eps) or longer."
            )
    if gaps:
        radius = max(gaps, key=lambda r: gaps[r])
        if gaps[radius] < LEAST_GAP:
            yield (
                f"The robust model is at no radius {100 * LEAST_GAP:.0f} points above the standard "
                f"one: the widest gap is {100 * gaps[radius]:+.1f} points at {norm} {radius:g}. "
                "With these data and settings there is little robustness that D_R could pass on; "
                "train in a larger ball (eps), or report at other radii (at)."
            )


def _about_datasets(made: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    for name, means in made.items():
        plan = PLANS[name]
        if plan.is_targeted and plan.source == "standard":
            success = means["success"]
            if success < GOOD_SUCCESS:
                strength = "far too" if success < LEAST_SUCCESS else "rather"
                yield (
                    f"{name}: {success:.1%} of the samples reach their target on the standard "
                    f"model, {strength} few to learn from. A larger eps or more steps reach "
                    "more, and more of them on the robust model too."
                )
        elif plan.is_targeted and means["success"] > MOST_CONTROL_SUCCESS:
            yield (
                f"{name}: {means['success']:.1%} of the samples reach their target on the robust "
                "model. In so large a ball robust features change too; lower the eps of "
                f"{plan.twin}, or train the robust model in a larger one."
            )
        if "distance" in means and means["distance_before"] > 0:
            left = means["distance"] / means["distance_before"]
            if left > MOST_DISTANCE:
                yield (
                    f"{name}: {left:.0%} of the distance of activations is left at the end of the "
                    "inversion, so images still hold much of their start; take more steps "
                    "(fewer are needed with momentum=0.6)."
                )


def widest_gaps(robust: Mapping[str, Sequence[Mapping[float, float]]]) -> dict[float, float]:
    """Mean robust accuracy of the robust model minus the standard one's, at each radius."""
    if not {"standard", "robust"} <= robust.keys():
        return {}

    def mean(name: str, radius: float) -> float:
        return sum(each[radius] for each in robust[name]) / len(robust[name])

    return {r: mean("robust", r) - mean("standard", r) for r in robust["robust"][0]}
