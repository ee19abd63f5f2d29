"""Adversarial attacks, robust training and robust / non-robust datasets for any PyTorch model.

Evaluate a trained model
    report              everything to know about its robustness, with a verdict, as a page
    accuracy            a number with its count and interval
    robust_accuracy     the same under attack
    metrics             the curve over all eps, transfer, signs of masked gradients

Attack
    pgd, fgsm           a batch, inside your own training loop
    PGD, FGSM           the same as objects, to hand to other functions
    attacks             APGD, FAB, FMN, Square, AutoAttack and others

Train
    fit                 standard training
    adversarial_fit     robust training
    Normalize           a model with its normalisation inside, so that inputs are in [0, 1]
    training            what training returns, rarely used settings, augmentation

Split a dataset into robust and non-robust features
    construct_robust_dataset       D_R
    construct_nonrobust_dataset    D_NR
    construct_det_dataset          D_det
    construct_rand_dataset         D_rand
    ConstructedDataset             what these return; ConstructedDataset.open(folder)
    datasets                       inspection, controls, exchange with other formats

Understand
    study               the whole paper in one call
    analysis            one function for each question of the paper and of its discussion
    statistics          intervals and tests
    plots               figures of several results together

Run in several processes
    distributed         `on_one_rank`, for what one process does alone under torchrun

``help(advfeat.report)`` and so on have arguments, returns and an example.
"""

import importlib
from types import ModuleType

from advfeat._version import __version__ as __version__
from advfeat.attacks import FGSM, PGD, fgsm, pgd
from advfeat.datasets import ConstructedDataset
from advfeat.metrics import accuracy, report, robust_accuracy
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
    "report",
    "robust_accuracy",
]

# Imported when they are first asked for: advfeat.study needs no import of its own.
_PACKAGES = (
    "analysis",
    "attacks",
    "datasets",
    "distributed",
    "metrics",
    "plots",
    "statistics",
    "study",
    "training",
)


def __getattr__(name: str) -> ModuleType:
    if name in _PACKAGES:
        return importlib.import_module(f"advfeat.{name}")
    hint = "" if name.startswith("_") else _elsewhere(name)
    raise AttributeError(f"module 'advfeat' has no attribute {name!r}{hint}")


def _elsewhere(name: str) -> str:
    """Where in the packages a name is, for the error."""
    for package in _PACKAGES:
        if name in getattr(importlib.import_module(f"advfeat.{package}"), "__all__", ()):
            return f"; it is advfeat.{package}.{name}"
    return ""


def __dir__() -> list[str]:
    return sorted([*__all__, *_PACKAGES, "__version__"])
