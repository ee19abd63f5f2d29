"""Signs in an evaluation's own results that gradients are masked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from advfeat import losses
from advfeat.attacks import Attack, MinimumPGD, SmoothedPGD, Square, pool
from advfeat.attacks.base import can_move
from advfeat.attacks.misleading import check_gradients, reached_size
from advfeat.losses import LossName, Objective
from advfeat.model import Network
from advfeat.threat import FeatureBounds

# Samples that only smoothed gradients or random search broke: below this fraction of what the
# gradient attacks left, and below this number, sound models have some too.
_LATE_FRACTION, _LATE_NUMBER = 0.05, 3


# Sound models have none with misleading gradients; so many robust samples are checked for it.
_MISLED_FRACTION, _CHECKED = 0.1, 256


class BadGradients:
    """Counts robust samples whose gradient is zero, or predicts no change of the output.

    Parameters
    ----------
    attacks
        Those of the evaluation; where none follows gradients, nothing is counted.
    """

    def __init__(self, attacks: Sequence[Attack]) -> None:
        # A smoothed attack that cannot move is as blind as any.
        moving = [a for a in attacks if not isinstance(a, Square) and can_move(a)]
        self._loss: LossName | Objective | None = None
        if moving:
            self._loss = getattr(moving[-1], "loss", "margin")
        self.zero, self.misleading, self.checked = 0, 0, 0

    def add(self, net: Network, verdict: pool.Verdict, bounds: FeatureBounds) -> None:
        """Evaluate the gradient of robust samples at their inputs and where the attack ended."""
        robust = verdict.attack == pool.ROBUST
        if self._loss is None or not bool(robust.any()):
            return
        objective = losses.objective(self._loss, verdict.labels[robust], targeted=False)
        flat = torch.ones_like(robust[robust])
        for points in (verdict.inputs[robust], verdict.adversarial[robust]):
            with net.given(verdict.extras), net.selected(robust):
                gradient = net.logits_gradient(points, objective).gradient.flatten(1)
            flat &= ~((gradient != 0) & gradient.isfinite()).any(1)
        self.zero += int(flat.sum())
        if self.checked >= _CHECKED:
            return
        inputs, labels = verdict.inputs[robust], verdict.labels[robust]
        size = reached_size(inputs, verdict.adversarial[robust])
        with net.given(verdict.extras), net.selected(robust):
            found = check_gradients(net, inputs, labels, size, bounds)
        self.checked += len(labels)
        self.misleading += int((found.misled & ~flat).sum())


def masking_signs(
    attacks: Sequence[Attack], broken_by: Tensor, zero: int, misleading: int, checked: int
) -> dict[str, str]:
    """What suggests that the number is too high, a sentence for each topic.

    Parameters
    ----------
    attacks, broken_by
        As in `RobustAccuracy`.
    zero, misleading, checked
        Robust samples without a gradient, with one that does not predict changes, and of how many.
    """
    signs: dict[str, str] = {}
    if zero:
        signs["zero gradient"] = (
            f"{zero} robust samples have a zero gradient at the input and where the attack ended "
            "(rounding, thresholds, detached or saturated outputs): gradient attacks cannot move "
            "there. Use loss='margin' or 'dlr' where logits are large, AutoAttack("
            "version='strong'), or attack the model without the layer that has no gradient"
        )
    robust = int((broken_by == pool.ROBUST).sum())
    if misleading >= _LATE_NUMBER and misleading > _MISLED_FRACTION * checked:
        signs["misleading gradient"] = (
            f"the gradients of {misleading} of {checked} robust samples do not predict how the "
            "output changes nearby (rounding, winners-take-all, high-frequency layers, own "
            "backward passes): gradient attacks are lost there. Use AutoAttack(version='strong') "
            "or Square with many queries, or attack the model without that layer"
        )
    late = [n for n, attack in enumerate(attacks) if _is_late(attack)]
    if 0 < len(late) < len(attacks):
        broken = int(torch.isin(broken_by, torch.tensor(late)).sum())
        left = broken + robust
        if broken >= _LATE_NUMBER and broken > _LATE_FRACTION * left:
            signs["masked gradients"] = (
                f"{broken} of {left} samples that were robust to gradient attacks were broken by "
                "smoothed gradients or random search: gradients are masked, so plain PGD or APGD "
                "overestimate robustness. Use AutoAttack(version='strong'), and see "
                "advfeat.metrics.diagnose"
            )
    return signs


def _is_late(attack: Attack) -> bool:
    """Whether it goes by something else than the model's own gradients."""
    noisy = isinstance(attack, MinimumPGD) and attack.is_random
    return noisy or isinstance(attack, (SmoothedPGD, Square))
