"""The paper's questions, and those of its discussion: one function and one result a question."""

from advfeat.analysis._alignment import Alignment, LayerRobustness, alignment, layer_robustness
from advfeat.analysis._gaussian import Gaussian, GaussianStudy, fit_gaussian, gaussian
from advfeat.analysis._leakage import Leakage, leakage
from advfeat.analysis._mislabelled import Mislabelled, mislabelled, mistakes
from advfeat.analysis._planted import Planted, planted
from advfeat.analysis._spectrum import (
    FilteredAccuracy,
    FourierSensitivity,
    Spectrum,
    filtered_accuracy,
    fourier_sensitivity,
    spectrum,
)
from advfeat.analysis._tradeoff import (
    RobustDatasetCost,
    Tradeoff,
    robust_dataset_cost,
    tradeoff,
)
from advfeat.analysis._transfer import Transfer, just_bugs, transfer
from advfeat.analysis._usefulness import Usefulness, linear_usefulness, usefulness

__all__ = [
    "Alignment",
    "FilteredAccuracy",
    "FourierSensitivity",
    "Gaussian",
    "GaussianStudy",
    "LayerRobustness",
    "Leakage",
    "Mislabelled",
    "Planted",
    "RobustDatasetCost",
    "Spectrum",
    "Tradeoff",
    "Transfer",
    "Usefulness",
    "alignment",
    "filtered_accuracy",
    "fit_gaussian",
    "fourier_sensitivity",
    "gaussian",
    "just_bugs",
    "layer_robustness",
    "leakage",
    "linear_usefulness",
    "mislabelled",
    "mistakes",
    "planted",
    "robust_dataset_cost",
    "spectrum",
    "tradeoff",
    "transfer",
    "usefulness",
]
