"""The paper's questions, and those of its discussion: one function and one result a question."""

from advfeat.analysis._gaussian import Gaussian, GaussianStudy, fit_gaussian, gaussian

__all__ = [
    "Gaussian",
    "GaussianStudy",
    "fit_gaussian",
    "gaussian",
]
