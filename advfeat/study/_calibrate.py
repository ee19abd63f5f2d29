"""Choose the settings of a study on held-out training samples, before the expensive stages."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from advfeat import checks, seeding
from advfeat.datasets import ConstructedDataset
from advfeat.loading import Data
from advfeat.metrics import accuracy
from advfeat.model import Precision
from advfeat.progress import Meter
from advfeat.statistics import Estimate, paired_difference
from advfeat.study._advice import (
    GOOD_SUCCESS,
    LEARNED,
    LEAST_ACCURACY,
    LEAST_GAP,
    LEAST_SUCCESS,
    MOST_CONTROL_SUCCESS,
    MOST_DISTANCE,
    still_learning,
)
from advfeat.study._calibration import Calibration
from advfeat.study._data import constant_accuracies, dataset_of
from advfeat.study._pilot import (
    BATCH,
    MOMENTUM,
    MOST_STEPS,
    RATE,
    STEPS,
    STILL,
    Pilot,
    Reached,
    epochs_for,
    serving,
)
from advfeat.tables import table
from advfeat.threat import Bounds, Norm

_RADII = (0.25, 0.375, 0.5, 0.75, 1.0, 1.25, 1.5)  # of evaluation, as multiples of eps
_TARGETED = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)  # of targeted perturbations
_LENGTHS = (20, 40, 80, 160, 320)  # steps of inversion
_GOOD_DISTANCE, _STEP = 0.10, 0.05
_MANY = 20_000  # training samples from which one start for each image is enough
_WORTHWHILE = 0.02  # accuracy that a smaller ball, or a lower rate, must gain
_LOWER, _HIGHER = 0.3, 3.0  # other rates, as multiples
_LEARNED = 0.5  # of the standard accuracy: a robust model below it has not learned at all
_ACCURATE = 0.9  # a standard model for which no lower rate is tried


def calibrate(
    make_model: Callable[[], nn.Module],
    train: Data,
    *,
    eps: float,
    norm: Norm,
    bounds: Bounds = (0.0, 1.0),
    seed: int | torch.Generator | None = None,
    precision: Precision = "float32",
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Calibration:
    """Choose a study's settings on held-out training samples, and give the reasons.

    A standard and a robust model are trained on at most 5,000 training samples. On 500 held-out
    samples it measures: whether the robust model is accurate enough to be a control (otherwise
    its learning rate, then its ball is made smaller); at which radius it is most robust compared
    with the standard model; with which radius targeted perturbations succeed on the standard model
    and not on the robust one; how many steps an inversion needs; and, on at most 1,000 samples,
    how much better D_R and D_det are than their controls. `run` does this for ``recipe="auto"``.

    Parameters
    ----------
    make_model, train, eps, norm, bounds, seed, precision, device, progress
        As in `run`.

    Returns
    -------
    Calibration
        ``recipe()`` and ``at`` are for `run`; printed, everything that was measured.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause, before any work is done.

    Examples
    --------
    >>> import torch
    >>> from advfeat import study
    >>> y = torch.arange(60) % 3
    >>> noise = torch.rand(60, 6, generator=torch.Generator().manual_seed(0))
    >>> inputs = 0.1 * noise + 0.9 * torch.eye(3).repeat(1, 2)[y]
    >>> data = torch.utils.data.TensorDataset(inputs, y)
    >>> found = study.calibrate(lambda: torch.nn.Linear(6, 3), data, eps=0.1, norm="l2", seed=0)
    >>> recipe = found.recipe()
    >>> sorted(recipe.sets["D_R"]), 0.1 in found.at
    (['momentum', 'starts', 'step_size', 'steps'], True)
    """
    checks.number("eps", eps, low=0.0, strict=True)
    norm = checks.norm(norm)
    checks.bounds(bounds)
    checks.one_of("precision", precision, checks.PRECISIONS)
    checks.seed(seed)
    pilot = Pilot(make_model, dataset_of("train", train), norm, bounds, seeding.resolve(seed))
    pilot.precision, pilot.device, pilot.progress = precision, device, progress
    return _Choice(pilot, eps).calibration()


class _Choice:
    """The rule: from what the pilot measures to settings, with a reason for each."""

    def __init__(self, pilot: Pilot, eps: float) -> None:
        self.pilot, self.eps = pilot, eps
        self.reasons: list[str] = []
        self.warnings: list[str] = []
        self.tables: dict[str, str] = {}

    def calibration(self) -> Calibration:
        """Choose one setting after the other."""
        pilot, began = self.pilot, time.perf_counter()
        with Meter(pilot.progress, "calibrate") as meter:
            meter.stage("standard and robust model")
            standard, lr = self._standard_model()
            robust, train_eps, robust_lr = self._robust_model(standard, lr)
            choices: dict[str, Any] = {
                "lr": lr, "robust_lr": robust_lr, "eps": train_eps, "images": pilot.is_images
            }  # fmt: skip
            meter.stage("radii")
            widest, halfway = self._radii(standard, robust)
            choices["at"] = sorted({halfway, widest, self.eps})
            meter.stage("targeted perturbations")
            choices["targeted_eps"], choices["targeted_lr"] = self._targeted(standard, robust, lr)
            meter.stage("inversions")
            choices.update(self._inversions(standard, robust))
            choices["epochs"] = epochs_for(pilot.count, pilot.study_steps)
            choices["robust_epochs"] = epochs_for(pilot.count, STEPS)
            choices["taught_epochs"] = epochs_for(pilot.count, pilot.taught_steps)
            choices["starts"] = 1 if pilot.count >= _MANY else 4
            meter.stage("trial of D_R")
            self._try_inverted(robust, halfway, choices)
        self.reasons += [
            f"epochs {choices['epochs']}: {pilot.study_steps} steps of {BATCH} samples; "
            f"{choices['robust_epochs']} of adversarial training, {choices['taught_epochs']} on "
            "D_rand and D_det",
            f"{choices['starts']} starts for each image of D_R and D_NR, at equal steps: "
            f"{pilot.count} training samples",
        ]
        seconds = time.perf_counter() - began
        return Calibration(choices, tuple(self.reasons), tuple(self.warnings), self.tables, seconds)

    def _accuracy(self, model: nn.Module) -> float:
        return float(accuracy(model, self.pilot.held_out, progress=False))

    def _standard_model(self) -> tuple[nn.Module, float]:
        """Learn at the usual rate; at a lower one where that is more accurate."""
        lr = RATE
        model, loss = self.pilot.standard()
        reached = self._accuracy(model)
        for lower in (_LOWER * RATE, _LOWER**2 * RATE):
            if reached >= _ACCURATE:
                break
            other, other_loss = self.pilot.standard(lower)
            found = self._accuracy(other)
            if found < reached + _WORTHWHILE:
                break
            model, loss, lr, reached = other, other_loss, lower, found
        self.reasons.append(f"learning rate {lr:g}: {reached:.1%} accurate, held out")
        before = math.inf
        while LEARNED < loss < STILL * before and self.pilot.steps < MOST_STEPS:
            self.pilot.steps *= 2
            before = loss
            model, loss = self.pilot.standard(lr)
        self.reasons.append(
            f"{self.pilot.steps} steps of training: the standard model's loss is then {loss:.2g} "
            f"(steps are doubled from {STEPS} until it is {LEARNED:g} or hardly falls, up to "
            f"{MOST_STEPS})"
        )
        if loss > LEARNED:
            self.warnings.append(still_learning("the standard model", loss))
        return model, lr

    def _robust_model(self, standard: nn.Module, lr: float) -> tuple[nn.Module, float, float]:
        """Train so that the model stays accurate: at a lower rate or in a smaller ball, if needed.

        Either only if that helps.
        """
        pilot, eps, least = self.pilot, self.eps, self._accuracy(standard)
        robust = pilot.robust(eps, lr)
        reached = self._accuracy(robust)
        if reached < _LEARNED * least:
            other = pilot.robust(eps, _LOWER * lr)
            found = self._accuracy(other)
            if found >= reached + _WORTHWHILE:
                robust, lr, reached = other, _LOWER * lr, found
        for smaller in (0.7 * self.eps, 0.5 * self.eps):
            if reached >= LEAST_ACCURACY * least:
                break
            other = pilot.robust(smaller, lr)
            found = self._accuracy(other)
            if found < reached + _WORTHWHILE:
                break
            robust, eps, reached = other, smaller, found
        text = f"held out, the robust model is {reached:.1%} accurate, the standard one {least:.1%}"
        self.reasons.append(f"train in {pilot.norm} {eps:.3g} at a rate of {lr:g}: {text}")
        if reached < LEAST_ACCURACY * least:
            self.warnings.append(
                f"In {pilot.norm} {eps:.3g} {text}: below {LEAST_ACCURACY:.0%} of it, and a "
                "smaller ball did not help enough. A weak source is a control for the wrong reason."
            )
        return robust, eps, lr

    def _radii(self, standard: nn.Module, robust: nn.Module) -> tuple[float, float]:
        """Where the robust model is furthest above the standard one, and where D_R is compared."""
        radii = [float(f"{self.eps * factor:.3g}") for factor in _RADII]
        curves = [self.pilot.curve(model, radii) for model in (standard, robust)]
        gaps = [high - low for low, high in zip(*curves, strict=True)]
        gap, widest = max(zip(gaps, radii, strict=True))
        half = self._accuracy(standard) / 2
        kept, halfway = min(zip(curves[0], radii, strict=True), key=lambda one: abs(one[0] - half))
        self.tables["Robust accuracy, held out"] = table(
            (self.pilot.norm, "standard", "robust", "gap"),
            [
                (f"{r:g}", f"{low:.1%}", f"{high:.1%}", f"{high - low:+.1%}")
                for r, low, high in zip(radii, *curves, strict=True)
            ],
        )
        self.reasons.append(
            f"report at {self.pilot.norm} {widest:g}, where the robust model is {100 * gap:+.0f} "
            f"points above the standard one, and compare D_R at {halfway:g}, where the standard "
            f"one keeps {kept:.0%}: beyond it few samples can tell D_R from its control"
        )
        if gap < LEAST_GAP:
            self.warnings.append(
                f"Nowhere is the robust model {100 * LEAST_GAP:.0f} points above the standard one: "
                f"at most {100 * gap:+.1f}, at {self.pilot.norm} {widest:g}. These data, with this "
                "model and eps, lack the gap that the paper builds on; D_R can hardly be more "
                "robust than its control."
            )
        return widest, halfway

    def _targeted(self, standard: nn.Module, robust: nn.Module, lr: float) -> tuple[float, float]:
        """The radius, and the learning rate, with which D_det teaches most beyond its control."""
        found: list[Reached] = []
        for factor in _TARGETED:
            radius = float(f"{self.eps * factor:.3g}")
            if self.pilot.norm == "linf" and radius > self.pilot.bounds[1] - self.pilot.bounds[0]:
                break
            rates = [self.pilot.success(model, radius) for model in (standard, robust)]
            found.append(Reached(radius, *rates))
            if rates[1] > 2 * MOST_CONTROL_SUCCESS:
                break
        made = {radius: self.pilot.targeted(standard, robust, radius) for radius in serving(found)}
        taught = {
            radius: [self.pilot.taught(each, lr) for each in both] for radius, both in made.items()
        }
        trials = {radius: paired_difference(both[0], both[1]) for radius, both in taught.items()}
        radius = max(trials, key=lambda radius: trials[radius].value)
        self.tables["Targets reached, held out, and D_det - D_det control in a trial"] = table(
            (self.pilot.norm, "standard", "robust", "trial"),
            [(f"{r:g}", f"{on:.1%}", f"{off:.1%}", str(trials.get(r, ""))) for r, on, off in found],
        )
        _, on, off = next(each for each in found if each.radius == radius)
        text = f"{on:.0%} reach their target on the standard model and {off:.0%} on the robust one"
        self.reasons.append(f"targeted perturbations in {self.pilot.norm} {radius:g}: {text}")
        best = f", the best of {len(trials)} radii" if len(trials) > 1 else ""
        self._report_trial("D_det", trials[radius], f"accuracy, {self.pilot.tried} samples{best}")
        lr = self._targeted_rate(taught[radius][0], made[radius][0], lr, trials[radius])
        if on < GOOD_SUCCESS or off > MOST_CONTROL_SUCCESS:
            weak = "can hardly teach" if on < LEAST_SUCCESS else "may teach less than they could"
            self.warnings.append(
                f"At no radius do {GOOD_SUCCESS:.0%} of the perturbations reach their target on "
                f"the standard model and at most {MOST_CONTROL_SUCCESS:.0%} on the robust one. "
                f"With the one chosen, {self.pilot.norm} {radius:g}, {text}. D_rand and D_det "
                f"{weak}."
            )
        return radius, lr

    def _targeted_rate(
        self, taught: Tensor, made: ConstructedDataset, lr: float, trial: Estimate
    ) -> float:
        """A higher rate on D_det, if that teaches more, and more than a constant answer."""
        slow = float(taught.double().mean())
        fast = float(self.pilot.taught(made, _HIGHER * lr).double().mean())
        text = f"it teaches {slow:.1%} at a rate of {lr:g} and {fast:.1%} at {_HIGHER * lr:g}"
        constant = constant_accuracies(self.pilot.held_out)[1]
        if fast >= max(slow, constant) + _WORTHWHILE:
            lr *= _HIGHER
        self.reasons.append(
            f"learning rate on D_det {lr:g}: {text} (a constant answer has {constant:.1%})"
        )
        if not trial.sign and max(slow, fast) <= constant:
            self.warnings.append(
                f"In the trial D_det taught {max(slow, fast):.1%}, no more than a constant answer "
                f"has ({constant:.1%}), and no more than its control: a model learns from the "
                "images rather than from their perturbations. The study may find the same."
            )
        return lr

    def _inversions(self, standard: nn.Module, robust: nn.Module) -> dict[str, Any]:
        """As many steps as bring each model's activations near: D_R's the robust one's, D_NR's."""
        images = self.pilot.images.flatten(1)
        apart = float((images - images.roll(1, 0)).norm(dim=1).mean())
        step_size = float(f"{_STEP * apart:.2g}")
        found = {
            name: self._lengths(model, step_size)
            for name, model in (("robust", robust), ("standard", standard))
        }
        self.tables["Distance of activations left by an inversion, held out"] = table(
            ("model", "steps", "of", "left"),
            [
                (name, str(steps), f"{size:g}", f"{left:.1%}")
                for name, tried in found.items()
                for steps, size, left in tried
            ],
        )
        best = [min(tried, key=lambda each: each[2]) for tried in found.values()]
        (steps, step_size, left), (others, other_size, other_left) = best
        self.reasons.append(
            f"inversions of {steps} steps of {step_size:g} on the robust model, for D_R, and of "
            f"{others} of {other_size:g} on the standard one, for D_NR (images lie {apart:.3g} "
            f"apart), momentum {MOMENTUM:g}: they leave {left:.0%} and {other_left:.0%} of the "
            "distance of activations"
        )
        if left > MOST_DISTANCE:
            self.warnings.append(
                f"After {steps} steps {left:.0%} of the distance of the robust model's "
                f"activations is left, more than {MOST_DISTANCE:.0%}: D_R will hold much of its "
                "starts. Give more steps, or another layer."
            )
        return {
            "steps": steps,
            "step_size": step_size,
            "standard_steps": others,
            "standard_step_size": other_size,
        }

    def _lengths(self, model: nn.Module, step_size: float) -> list[tuple[int, float, float]]:
        """Steps, their size, and the distance left; none is near enough below 10 to 15%."""
        found: list[tuple[int, float, float]] = []
        for steps in _LENGTHS:
            found.append((steps, step_size, self.pilot.distance(model, steps, step_size)))
            if found[-1][2] <= _GOOD_DISTANCE:
                break
            if len(found) > 1 and found[-1][2] > 0.9 * found[-2][2]:
                step_size = float(f"{step_size / 2:.2g}")  # steps of fixed length swing back
        return found

    def _try_inverted(self, robust: nn.Module, radius: float, choices: dict[str, Any]) -> None:
        """Try D_R on few samples: how much more robust it makes a model than its control."""
        pilot = self.pilot
        inversion = {name: choices[name] for name in ("steps", "step_size", "starts")}
        count, found = pilot.try_inverted(
            robust, choices["lr"], radius, momentum=MOMENTUM, **inversion
        )
        what = f"robust accuracy, {pilot.norm} {radius:g}, {count} samples"
        self._report_trial("D_R", found, what)

    def _report_trial(self, name: str, found: Estimate, what: str) -> None:
        text = f"{name} - {name} control, {what}: {found}"
        self.reasons.append(f"trial: {text}")
        if found.sign < 0:
            self.warnings.append(
                f"In the trial the control is above {name}. {text}. With these data and this "
                "model the whole study may end so too."
            )
