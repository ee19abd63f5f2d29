"""Attacks: each a frozen dataclass of settings and a plain function for it."""

from advfeat.attacks._apgd import APGD, apgd
from advfeat.attacks._fab import FAB, fab
from advfeat.attacks._fmn import FMN, fmn
from advfeat.attacks._minimum_pgd import MinimumPGD, minimum_pgd
from advfeat.attacks._pgd import FGSM, PGD, fgsm, pgd
from advfeat.attacks._smoothed import SmoothedPGD, smoothed_pgd
from advfeat.attacks._square import Square, square
from advfeat.attacks._transferable import DIFGSM, MIFGSM
from advfeat.attacks.base import Attack
from advfeat.attacks.inversion import invert
from advfeat.attacks.samples import Batch
from advfeat.attacks.tracing import AttackStep
from advfeat.model import Network

# Above the single attacks, which it is made of.
from advfeat.attacks.ensemble import AutoAttack  # isort: skip

__all__ = [
    "APGD",
    "DIFGSM",
    "FAB",
    "FGSM",
    "FMN",
    "MIFGSM",
    "PGD",
    "Attack",
    "AttackStep",
    "AutoAttack",
    "Batch",
    "MinimumPGD",
    "Network",
    "SmoothedPGD",
    "Square",
    "apgd",
    "fab",
    "fgsm",
    "fmn",
    "invert",
    "minimum_pgd",
    "pgd",
    "smoothed_pgd",
    "square",
]
