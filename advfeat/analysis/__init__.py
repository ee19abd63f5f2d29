"""The paper's questions, and those of its discussion: one function and one result a question."""

from advfeat.analysis._gaussian import Gaussian, GaussianStudy, fit_gaussian, gaussian
from advfeat.analysis._usefulness import Usefulness, linear_usefulness, usefulness

__all__ = [
    "Gaussian",
    "GaussianStudy",
    "Usefulness",
    "fit_gaussian",
    "gaussian",
    "linear_usefulness",
    "usefulness",
]
