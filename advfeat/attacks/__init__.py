"""Attacks: each a frozen dataclass of settings and a plain function beside it."""

from advfeat.attacks._apgd import APGD, apgd
from advfeat.attacks._attack import Attack, Batch, checked_batch
from advfeat.attacks._inversion import Inversion, invert
from advfeat.attacks._pgd import FGSM, PGD, fgsm, pgd

__all__ = [
    "APGD",
    "FGSM",
    "PGD",
    "Attack",
    "Batch",
    "Inversion",
    "apgd",
    "checked_batch",
    "fgsm",
    "invert",
    "pgd",
]
