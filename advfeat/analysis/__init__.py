"""The paper's questions, and those of its discussion: one function and one result a question."""

from advfeat.analysis._alignment import Alignment, LayerRobustness, alignment, layer_robustness
from advfeat.analysis._fourier import (
    FilteredAccuracy,
    FourierSensitivity,
    filtered_accuracy,
    fourier_sensitivity,
)
from advfeat.analysis._gaussian import Gaussian
from advfeat.analysis._gaussian_study import GaussianStudy, fit_gaussian, gaussian
from advfeat.analysis._leakage import Leakage, leakage
from advfeat.analysis._matrix import AccuracyMatrix
from advfeat.analysis._mislabelled import Mislabelled, mislabelled, mistakes
from advfeat.analysis._noise import noise_perturbations
from advfeat.analysis._planted import Planted, planted
from advfeat.analysis._poison import Poisoning, poison, poisoning
from advfeat.analysis._probe import LinearProbe, linear_probe
from advfeat.analysis._robustified import robustified_accuracy
from advfeat.analysis._saliency import GradientMeasures, gradient_measures
from advfeat.analysis._spectrum import Spectrum, spectrum
from advfeat.analysis._strong import AttackGap, attack_gap, purify
from advfeat.analysis._superposition import Superposition, superposition
from advfeat.analysis._targeted_transfer import targeted_transfer
from advfeat.analysis._tradeoff import (
    RobustDatasetCost,
    Tradeoff,
    robust_dataset_cost,
    tradeoff,
)
from advfeat.analysis._transfer import Transfer, just_bugs, transfer
from advfeat.analysis._usefulness import Usefulness, linear_usefulness, usefulness

__all__ = [
    "AccuracyMatrix",
    "Alignment",
    "AttackGap",
    "FilteredAccuracy",
    "FourierSensitivity",
    "Gaussian",
    "GaussianStudy",
    "GradientMeasures",
    "LayerRobustness",
    "Leakage",
    "LinearProbe",
    "Mislabelled",
    "Planted",
    "Poisoning",
    "RobustDatasetCost",
    "Spectrum",
    "Superposition",
    "Tradeoff",
    "Transfer",
    "Usefulness",
    "alignment",
    "attack_gap",
    "filtered_accuracy",
    "fit_gaussian",
    "fourier_sensitivity",
    "gaussian",
    "gradient_measures",
    "just_bugs",
    "layer_robustness",
    "leakage",
    "linear_probe",
    "linear_usefulness",
    "mislabelled",
    "mistakes",
    "noise_perturbations",
    "planted",
    "poison",
    "poisoning",
    "purify",
    "robust_dataset_cost",
    "robustified_accuracy",
    "spectrum",
    "superposition",
    "targeted_transfer",
    "tradeoff",
    "transfer",
    "usefulness",
]
