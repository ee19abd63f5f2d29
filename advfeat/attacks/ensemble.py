"""Ensembles of attacks: a sample is robust if none of them fools the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

from advfeat import checks, seeding
from advfeat.attacks._apgd import APGD
from advfeat.attacks._fab import FAB
from advfeat.attacks._minimum_pgd import MinimumPGD, MinimumPGDOnMaskedGradients
from advfeat.attacks._smoothed import SmoothedPGD
from advfeat.attacks._square import Square
from advfeat.attacks.base import Attack, prepare_batch
from advfeat.attacks.misleading import SquareBeyondGradients, SquareOnMisleadingGradients
from advfeat.attacks.pool import worst_case
from advfeat.attacks.samples import select_samples
from advfeat.attacks.settings import canonical
from advfeat.losses import is_success
from advfeat.model import Precision, attackable
from advfeat.threat import FeatureBounds, Norm

# How the smoothed stage of "fast" was chosen is in docs/benchmarks.md: noise of each run, and the
# ratio above which a sample gets all runs. In l1 a step reaches less of what the gradient predicts.
_SCALES = (6.0, 6.0, 9.0, 4.0, 6.0, 6.0, 9.0, 6.0, 6.0, 9.0)
_MASKING_RATIO, _MASKING_RATIO_L1 = 1.2, 0.6
_QUERIES = 2000  # of Square, where there is no gradient or it is misleading


@dataclass(frozen=True, kw_only=True)
class AutoAttack:
    """Ensembles in the manner of AutoAttack (Croce and Hein 2020), as an attack object.

    Parameters
    ----------
    eps, norm
        The ball, in the units of the inputs; ``eps`` is a float, or a tensor that broadcasts
        against one sample, as in `advfeat.pgd`.
    version
        ``"fast"``, the default of `advfeat.robust_accuracy`: short runs of APGD away from the label
        and towards 9 classes, with restarts; Square where the gradient is zero or does not predict
        how the output changes; `SmoothedPGD`, in l1 after `MinimumPGD`, which lower the result
        where gradients are masked; and in linf Square where random search improves on the point
        that they reach.
        Its result is an upper
        bound, on masked networks often below that of ``"standard"`` at a tenth of the cost.
        ``"standard"``: the published ensemble, for numbers that compare with papers. APGD on the
        cross-entropy, APGD towards 9 classes on the DLR loss, FAB towards 9 classes, Square with
        5000 queries; in l1 5 targets and 5 restarts of APGD. It can be too high where gradients
        are masked.
        ``"strong"``: the stages of both, then longer runs of `SmoothedPGD`, with and without
        straight-through gradients, and restarts of `MinimumPGD`: never above either, at more than
        their cost.
    bounds, mask, targeted
        As in `advfeat.pgd`. Towards a target there is one class to aim at, so that stages towards
        several classes become runs towards that one.
    seed
        Of all random numbers; None draws one number from torch's default generator at each call.

    Examples
    --------
    >>> [type(attack).__name__ for attack in AutoAttack(eps=8 / 255, norm="linf").attacks]
    ['APGD', 'APGD', 'FAB', 'Square']
    """

    eps: float | Tensor
    norm: Norm
    version: Literal["fast", "standard", "strong"] = "standard"
    bounds: FeatureBounds = (0.0, 1.0)
    mask: Tensor | None = None
    targeted: bool = False
    seed: int | torch.Generator | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        canonical(self)
        checks.one_of("version", self.version, ("fast", "standard", "strong"))
        checks.seed(self.seed)
        _ = self.attacks

    @property
    def attacks(self) -> tuple[Attack, ...]:
        """The attacks in their order, each until a sample is fooled."""
        if self.version == "fast":
            return self._fast()
        if self.version == "standard":
            return self._standard()
        return (*self._fast(), *self._standard(), *self._long_smoothed())

    @property
    def _ball(self) -> dict[str, Any]:
        names = ("eps", "norm", "bounds", "mask", "targeted")
        return {name: getattr(self, name) for name in names}

    def _towards(self, count: int) -> int:
        """Classes that a stage aims at; a targeted attack has its own."""
        return 0 if self.targeted else count

    def _fast(self) -> tuple[Attack, ...]:
        # What a long run leaves, several short ones from other starts break sooner. In a large
        # ball even the unlikeliest class can be the one that is reached.
        ball = self._ball
        if self.norm == "l1":
            # Which optimum a run ends in is chance in l1: it takes more starts. Noise on the way
            # to the closest point finds more than noise in the whole ball there, the more so from
            # more starts.
            return (
                APGD(**ball, steps=30, returns="first"),
                APGD(
                    **ball,
                    steps=20,
                    loss="dlr",
                    targets=self._towards(9),
                    restarts=3,
                    returns="first",
                ),
                APGD(**ball, steps=30, loss="margin", restarts=8, returns="first"),
                APGD(**ball, steps=30, loss="dlr", restarts=4, returns="first"),
                APGD(**ball, steps=60, restarts=4, returns="first"),
                SquareOnMisleadingGradients(**ball, queries=_QUERIES),
                MinimumPGDOnMaskedGradients(**ball),
                self._smoothed(steps=120, scales=_SCALES[:3], masking_ratio=_MASKING_RATIO_L1),
            )
        # In linf gradients can lead away from what random search finds.
        beyond = (SquareBeyondGradients(**ball, queries=5000),) if self.norm == "linf" else ()
        return (
            APGD(**ball, steps=10, returns="first"),
            APGD(**ball, steps=15, loss="dlr", targets=self._towards(9), returns="first"),
            APGD(**ball, steps=25, loss="margin", restarts=3, returns="first"),
            APGD(**ball, steps=25, returns="first"),
            SquareOnMisleadingGradients(**ball, queries=_QUERIES),
            self._smoothed(steps=80, scales=_SCALES, masking_ratio=_MASKING_RATIO),
            *beyond,
        )

    def _standard(self) -> tuple[Attack, ...]:
        ball = self._ball
        targets, restarts = (5, 5) if self.norm == "l1" else (9, 1)
        return (
            APGD(**ball, loss="cross_entropy", restarts=restarts, returns="first"),
            APGD(**ball, loss="dlr", targets=self._towards(targets), returns="first"),
            FAB(**ball, targets=targets).stop_at_success(),
            Square(**ball, queries=5000),
        )

    def _long_smoothed(self) -> tuple[Attack, ...]:
        return (
            self._smoothed(steps=200, scales=_SCALES[:5]),
            self._smoothed(steps=200, scales=_SCALES[:5], loss="cross_entropy"),
            self._smoothed(steps=120, scales=(6.0, 1.0, 0.0), straight_through="always"),
            MinimumPGD(**self._ball, restarts=16, targets=9),
        )

    def _smoothed(self, **settings: Any) -> SmoothedPGD:
        return SmoothedPGD(**self._ball, returns="first", **settings)

    @property
    def is_random(self) -> bool:
        """Whether the result depends on the seed: it does."""
        return True

    def with_seed(self, seed: int) -> Self:
        """The same ensemble with this seed."""
        return replace(self, seed=seed)

    def __call__(
        self,
        model: nn.Module,
        inputs: Tensor,
        labels: Tensor,
        *,
        index: Tensor | None = None,
        precision: Precision = "float32",
        expectation: int = 1,
        extras: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Attack one batch; the result of the last attack where none succeeds.

        Returns
        -------
        Tensor
            Shape of ``inputs``, float32 (float64 for float64 inputs), detached.
        """
        attacks = seed_attacks(self.attacks, self.seed)
        with attackable(model, precision=precision, expectation=expectation) as net:
            net.expect_extras(extras)
            batch = prepare_batch(net, inputs, labels, index, self.bounds, self.targeted, extras)
            adversarial = batch.inputs.clone()
            with net.given(batch.extras):
                wrong = is_success(net.logits(batch.inputs), batch.labels, self.targeted)
            right = (~wrong).nonzero().squeeze(1)
            batches = [select_samples(batch, right)] if len(right) else []
            for verdict in worst_case(attacks, net, batches, max(1, len(right))):
                adversarial[right[verdict.place]] = verdict.adversarial
        return adversarial.contiguous()


def seed_attacks(
    attacks: Sequence[Attack], seed: int | torch.Generator | None
) -> tuple[Attack, ...]:
    """Fix the seed of every attack: its own if it has one, else a number drawn from ``seed``."""
    open_ = [attack.is_random and getattr(attack, "seed", None) is None for attack in attacks]
    root = seeding.resolve(seed) if any(open_) else 0
    return tuple(
        attack.with_seed(seeding.derive(root, place)) if free else _fixed(attack)
        for place, (attack, free) in enumerate(zip(attacks, open_, strict=True))
    )


def _fixed(attack: Attack) -> Attack:
    """The same attack, its generator exchanged for a number drawn from it."""
    if not attack.is_random:
        return attack
    return attack.with_seed(seeding.resolve(getattr(attack, "seed")))  # noqa: B009
