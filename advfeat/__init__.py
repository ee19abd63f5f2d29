"""Adversarial examples are features: attack, train, split datasets, measure, for any module.

The names here are the ones used most; the rest is in `advfeat.attacks`, `advfeat.metrics`,
`advfeat.training`, `advfeat.robustify`, `advfeat.nonrobust`, `advfeat.datasets`, `advfeat.datasets`
and `advfeat.datasets`.
"""

from advfeat._version import __version__ as __version__
from advfeat.attacks import FGSM, PGD, fgsm, pgd
from advfeat.datasets import ConstructedDataset
from advfeat.metrics import accuracy, robust_accuracy
from advfeat.model import Normalize
from advfeat.nonrobust import (
    construct_det_dataset,
    construct_nonrobust_dataset,
    construct_rand_dataset,
)
from advfeat.robustify import construct_robust_dataset
from advfeat.training import adversarial_fit, fit

__all__ = [
    "FGSM",
    "PGD",
    "ConstructedDataset",
    "Normalize",
    "accuracy",
    "adversarial_fit",
    "construct_det_dataset",
    "construct_nonrobust_dataset",
    "construct_rand_dataset",
    "construct_robust_dataset",
    "fgsm",
    "fit",
    "pgd",
    "robust_accuracy",
]
