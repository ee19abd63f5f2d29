"""The settings of adversarial training: which attack, which objective, and what goes together."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor

from advfeat import checks, seeding
from advfeat.attacks import PGD
from advfeat.attacks.base import check_attack
from advfeat.threat import Bounds, Norm
from advfeat.training import _identity as identity
from advfeat.training._free import FreeAdversarial
from advfeat.training._mart import Mart
from advfeat.training._method import TrainingMethod
from advfeat.training._pgd import AttackMode, PGDTraining
from advfeat.training._settings import TrainingSettings
from advfeat.training._trades import Trades

Objective: TypeAlias = Literal["pgd", "trades", "mart"]
Method: TypeAlias = Literal["pgd", "fast", "free"]

# Weight of the second term: 1/lambda of TRADES (Zhang et al. 2019), lambda of MART (Wang et al.
# 2020), each as in the authors' runs on CIFAR-10.
_BETA = {"trades": 6.0, "mart": 5.0}
# Gradients for each example: the paper's (appendix C); one; the replays of Shafahi et al. (2019).
_STEPS = {"pgd": 7, "fast": 1, "free": 8}
# Step size as a fraction of eps: the paper's; Wong et al. (2020); Shafahi et al. (2019).
_STEP_SIZE = {"pgd": 0.2, "fast": 1.25, "free": 1.0}


@dataclass(frozen=True, kw_only=True)
class AdversarialSettings:
    """The arguments of `adversarial_fit` that `fit` does not have, checked."""

    eps: float | None
    norm: Norm | None
    objective: Objective
    beta: float | None
    method_name: Method
    steps: int | None
    step_size: float | None
    random_start: bool
    attack: PGD | None
    attack_mode: AttackMode
    mix: float
    warmup: float
    bounds: Bounds
    settings: TrainingSettings

    def __post_init__(self) -> None:
        """Check the settings, and that they go together."""
        checks.one_of("objective", self.objective, ("pgd", "trades", "mart"))
        checks.one_of("method", self.method_name, ("pgd", "fast", "free"))
        checks.one_of("attack_mode", self.attack_mode, ("eval", "train"))
        checks.fraction("mix", self.mix)
        checks.number("warmup", self.warmup, low=0.0)
        if self.warmup >= self.settings.epochs:
            checks.fail(
                "warmup", self.warmup, f"no epoch of {self.settings.epochs} is left at full eps"
            )
        if self.attack is not None:
            check_attack(self.attack, self.eps, self.norm)
            if not isinstance(self.attack, PGD):
                raise TypeError(f"attack={self.attack!r}: training takes PGD or FGSM")
            own = self.attack
            if own.mask is not None or any(
                isinstance(value, Tensor) for value in (own.eps, *own.bounds)
            ):
                cause = "training takes a number for eps, two for bounds, and no mask"
                checks.fail("attack", type(own).__name__, cause)
        elif self.eps is None or self.norm is None:
            checks.fail(
                "eps, norm", (self.eps, self.norm), "both are needed where no attack is given"
            )
        else:
            checks.number("eps", self.eps, low=0.0, strict=True)
        self._check_objective()
        self._check_method()

    def _check_objective(self) -> None:
        objective, beta, options = self.objective, self.beta, self.settings.options
        if beta is not None:
            if objective == "pgd":
                checks.fail(
                    "beta", beta, "the objective 'pgd' has one term; 'trades' and 'mart' two"
                )
            checks.number("beta", beta, low=0.0)
        if objective != "pgd" and self.mix:
            checks.fail("mix", self.mix, f"{objective!r} trains on clean inputs anyway; set beta")
        if objective == "mart":
            if options.label_smoothing:
                checks.fail(
                    "label_smoothing", options.label_smoothing, "MART has a loss of its own"
                )
            if self.settings.loss is not None:
                checks.fail("loss", self.settings.loss, "MART has a loss of its own")

    def _check_method(self) -> None:
        method, options = self.method_name, self.settings.options
        if method != "pgd" and self.attack is not None:
            checks.fail(
                "attack", self.attack, f"method={method!r} is how examples are made; pass eps, norm"
            )
        if method == "fast" and self.steps is not None:
            checks.fail(
                "steps", self.steps, "the method 'fast' takes one step; 'pgd' takes several"
            )
        if method == "free":
            if self.objective != "pgd" or self.mix:
                checks.fail(
                    "method", method, "one pass gives both gradients: of objective 'pgd' alone"
                )
            if options.accumulate > 1 or options.awp:
                checks.fail(
                    "method", method, "one pass gives both gradients: no accumulate, no awp"
                )

    @property
    def needs_guard(self) -> bool:
        """Whether the method needs the guard against catastrophic overfitting."""
        return self.method_name == "fast"

    def training_attack(self) -> PGD:
        """The attack given, or the one that the other arguments describe."""
        if self.attack is not None:
            return self.attack
        assert self.eps is not None
        assert self.norm is not None
        method, steps, size = self.method_name, self.steps, self.step_size
        return PGD(
            eps=self.eps,
            norm=self.norm,
            steps=_STEPS[method] if steps is None else steps,
            step_size=_STEP_SIZE[method] * self.eps if size is None else size,
            random_start=self.random_start or method == "fast",
            bounds=self.bounds,
        )

    @property
    def _weight(self) -> float:
        return _BETA.get(self.objective, 0.0) if self.beta is None else self.beta

    def identity(self) -> dict[str, Any]:
        """Describe the settings, for a checkpoint to compare."""
        attack = self.training_attack()
        fields = {f.name: getattr(attack, f.name) for f in dataclasses.fields(attack)}
        fields.pop("seed", None)
        return {
            "objective": self.objective,
            "beta": self._weight,
            "method": self.method_name,
            "attack": {"class": type(attack).__name__} | identity.describe(fields),
            "attack_mode": self.attack_mode,
            "mix": self.mix,
            "warmup": self.warmup,
        }

    def method(self, settings: TrainingSettings, seed: int) -> TrainingMethod:
        """Build the method."""
        attack = self.training_attack()
        common: dict[str, Any] = {
            "precision": settings.precision,
            "label_smoothing": settings.options.label_smoothing,
            "loss": settings.loss,
            "warmup": self.warmup,
        }
        if self.method_name == "free":
            return FreeAdversarial(attack, **common)
        common |= {
            "mix": self.mix,
            "mode": self.attack_mode,
            "seed": seed if attack.seed is None else seeding.resolve(attack.seed),
        }
        if self.objective == "trades":
            return Trades(attack, beta=self._weight, **common)
        if self.objective == "mart":
            return Mart(attack, beta=self._weight, **common)
        return PGDTraining(attack, **common)
