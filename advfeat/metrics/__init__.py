"""What is measured: accuracy, clean and under attack, its curve, transfer, and signs of masking."""

from advfeat.metrics._accuracy import accuracy, robust_accuracy
from advfeat.metrics._certified import CertifiedAccuracy, certified_accuracy
from advfeat.metrics._curve import RobustnessCurve, robustness_curve
from advfeat.metrics._diagnose import Diagnosis, diagnose
from advfeat.metrics._outcome import Accuracy, RobustAccuracy
from advfeat.metrics._transfer import TransferMatrix, transfer_matrix

__all__ = [
    "Accuracy",
    "CertifiedAccuracy",
    "Diagnosis",
    "RobustAccuracy",
    "RobustnessCurve",
    "TransferMatrix",
    "accuracy",
    "certified_accuracy",
    "diagnose",
    "robust_accuracy",
    "robustness_curve",
    "transfer_matrix",
]
