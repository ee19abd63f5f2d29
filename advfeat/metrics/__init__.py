"""What is measured: accuracy, clean and under attack, its curve, transfer, and signs of masking."""

from advfeat.metrics._accuracy import accuracy, robust_accuracy
from advfeat.metrics._certified import CertifiedAccuracy, certified_accuracy
from advfeat.metrics._corruption_accuracy import CorruptionAccuracy, corruption_accuracy
from advfeat.metrics._curve import RobustnessCurve, robustness_curve
from advfeat.metrics._diagnose import Diagnosis, diagnose
from advfeat.metrics._outcome import Accuracy, RobustAccuracy
from advfeat.metrics._report import Report, Verdict, report
from advfeat.metrics._transfer import TransferMatrix, transfer_matrix

__all__ = [
    "Accuracy",
    "CertifiedAccuracy",
    "CorruptionAccuracy",
    "Diagnosis",
    "Report",
    "RobustAccuracy",
    "RobustnessCurve",
    "TransferMatrix",
    "Verdict",
    "accuracy",
    "certified_accuracy",
    "corruption_accuracy",
    "diagnose",
    "report",
    "robust_accuracy",
    "robustness_curve",
    "transfer_matrix",
]
