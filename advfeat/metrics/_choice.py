"""Which attacks `advfeat.robust_accuracy` runs, by its arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from advfeat import checks
from advfeat.attacks import APGD, DIFGSM, FAB, FGSM, FMN, MIFGSM, PGD, Attack, AutoAttack, Square
from advfeat.attacks.base import check_attack
from advfeat.attacks.ensemble import seed_attacks
from advfeat.attacks.settings import own_bounds, own_mask
from advfeat.threat import FeatureBounds, Norm, same_bounds


def choose_attacks(
    attack: Attack | AutoAttack | Sequence[Attack | AutoAttack] | str | None,
    eps: float | Tensor | None,
    norm: Norm | None,
    steps: int | None,
    bounds: FeatureBounds,
    seed: int | torch.Generator | None,
    mask: Tensor | None = None,
) -> tuple[Attack, ...]:
    """Single attacks, each until a sample is fooled, and with a seed if it is random."""
    checks.seed(seed)
    listed: Sequence[Attack | AutoAttack]
    if isinstance(attack, str):
        listed = [named_attack(attack, eps, norm, steps, bounds, mask)]
    elif attack is None:
        listed = [_default(eps, norm, steps, bounds, mask)]
    else:
        listed = attack if isinstance(attack, (list, tuple)) else [attack]  # type: ignore[list-item]
        for one in listed:
            if not isinstance(one, AutoAttack):
                check_attack(one, None, None)
        own_ball(eps, norm, steps, mask)
    flat: list[Attack] = []
    for one in listed:
        if isinstance(one, AutoAttack):
            # Its own seed is for all its attacks.
            if one.targeted:
                checks.fail("attack", one, "targeted, but the data give labels and no targets")
            flat += one.attacks if one.seed is None else seed_attacks(one.attacks, one.seed)
        else:
            flat.append(one)
    if not flat:
        checks.fail("attack", attack, "no attack at all; for clean inputs use advfeat.accuracy")
    if not all(same_bounds(one.bounds, flat[0].bounds) for one in flat):
        checks.fail("attack", attack, "the attacks have different bounds")
    own_bounds(bounds, flat[0].bounds)
    return seed_attacks([one.stop_at_success() for one in flat], seed)


def own_ball(
    eps: float | Tensor | None, norm: Norm | None, steps: int | None, mask: Tensor | None
) -> None:
    """Raise an error for settings beside an attack object, which has its own."""
    if not (eps is None and norm is None and steps is None):
        cause = "the attack has its own; pass one or the other"
        checks.fail("eps, norm, steps", (eps, norm, steps), cause)
    own_mask(mask)


def named_attack(
    name: str,
    eps: float | Tensor | None,
    norm: Norm | None,
    steps: int | None,
    bounds: FeatureBounds,
    mask: Tensor | None,
    targeted: bool = False,
) -> Attack | AutoAttack:
    """The attack of a name, with its default settings."""
    kinds: dict[str, Callable[..., Attack | AutoAttack]] = {
        "autoattack": partial(AutoAttack, version="standard"),
        "fast": partial(AutoAttack, version="fast"),
        "pgd": PGD,
        "fgsm": FGSM,
        "apgd": APGD,
        "fab": FAB,
        "fmn": FMN,
        "square": Square,
        "mifgsm": MIFGSM,
        "difgsm": DIFGSM,
        "mi": MIFGSM,
        "di": partial(DIFGSM, momentum=0.0),
        "mi-di": DIFGSM,
    }
    checks.one_of("attack", name, tuple(kinds))
    if eps is None or norm is None:
        checks.fail("eps, norm", (eps, norm), "both are needed where the attack is a name")
    settings: dict[str, Any] = {"eps": eps, "norm": norm, "bounds": bounds, "mask": mask}
    settings |= {"targeted": True} if targeted else {}
    return kinds[name](**settings, **({} if steps is None else {"steps": steps}))


def _default(
    eps: float | Tensor | None,
    norm: Norm | None,
    steps: int | None,
    bounds: FeatureBounds,
    mask: Tensor | None,
) -> Attack | AutoAttack:
    if eps is None or norm is None:
        checks.fail("eps, norm", (eps, norm), "both are needed where no attack is given")
    if steps is None:
        return AutoAttack(eps=eps, norm=norm, version="fast", bounds=bounds, mask=mask)
    return PGD(eps=eps, norm=norm, steps=steps, bounds=bounds, mask=mask)
