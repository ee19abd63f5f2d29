"""The Gaussian model of section 4: what robust training learns, in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from advfeat import checks, seeding
from advfeat.results import Result


@dataclass(frozen=True, eq=False, repr=False)
class Gaussian(Result):
    """Two classes y in {-1, +1}, equally likely, with x ~ N(y mean, covariance); float64.

    The truth, or what a learner makes of it: robust parameters are another `Gaussian`.

    Parameters
    ----------
    mean
        ``(d,)``, the mean of class +1.
    covariance
        ``(d, d)``, symmetric and positive definite; or ``(d,)``, its diagonal.

    Raises
    ------
    ValueError
        Shapes that do not fit, or a covariance that is not positive definite.

    Examples
    --------
    >>> from advfeat.analysis import Gaussian
    >>> truth = Gaussian([1.0, 0.5], [1.0, 0.01])
    >>> robust = truth.robust(eps=0.5)
    >>> print(f"{truth.accuracy(truth):.3f} {truth.accuracy(robust):.3f}")
    1.000 0.983
    >>> print(f"{truth.accuracy(truth, eps=0.5):.3f} {truth.accuracy(robust, eps=0.5):.3f}")
    0.577 0.809
    """

    mean: Tensor
    covariance: Tensor

    def __post_init__(self) -> None:
        """Check that this is a Gaussian."""
        mean = torch.as_tensor(self.mean, dtype=torch.float64)
        covariance = torch.as_tensor(self.covariance, dtype=torch.float64)
        if mean.ndim != 1 or len(mean) == 0:
            checks.fail("mean.shape", tuple(mean.shape), "expected (d,)")
        if covariance.shape == mean.shape:
            covariance = torch.diag(covariance)
        if covariance.shape != (len(mean), len(mean)):
            checks.fail(
                "covariance.shape", tuple(covariance.shape), f"expected ({len(mean)}, {len(mean)})"
            )
        if not torch.allclose(covariance, covariance.T, rtol=1e-9):
            checks.fail("covariance", "not symmetric", "expected E[(x - m)(x - m)^T]")
        smallest = float(torch.linalg.eigvalsh(covariance)[0])
        if not smallest > 0:
            checks.fail("covariance", smallest, "its smallest eigenvalue must be above 0")
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "covariance", covariance)

    def _summary(self) -> str:
        return f"{len(self.mean)} dimensions"

    @classmethod
    def of(cls, inputs: Tensor, labels: Tensor) -> Gaussian:
        """Maximum likelihood: mean and covariance of y x, for labels 0 (y = -1) and 1 (y = +1)."""
        signed = signed_inputs(inputs, labels)
        centred = signed - signed.mean(0)
        return cls(signed.mean(0), centred.T @ centred / len(centred))

    @property
    def classifier(self) -> Tensor:
        """The w of the most likely label sign(w^T x): covariance^-1 mean, ``(d,)``."""
        solution: Tensor = torch.linalg.solve(self.covariance, self.mean)
        return solution

    @property
    def misalignment(self) -> float:
        """How unequally far the l2 ball reaches in the Mahalanobis metric: longest / shortest.

        The square root of the covariance's condition number. 1: the two metrics are aligned.
        """
        return math.sqrt(_condition(self.covariance))

    @property
    def worst_cosine(self) -> float:
        """Smallest cosine, over all means, of the mean and the input gradient (theorem 3).

        The gradient goes along covariance^-1 mean, so it is 2 sqrt(k) / (1 + k) with the condition
        number k.
        """
        condition = _condition(self.covariance)
        return 2 * math.sqrt(condition) / (1 + condition)

    def robust(self, eps: float) -> Gaussian:
        """What robust maximum likelihood learns (theorem 2): this mean, a wider covariance.

        The adversary moves every x by some delta, on average within ``eps``:
        E||delta||_2^2 <= eps^2, the form of the budget for which the solution is closed. The
        covariance it gives lies ``eps`` from the true one in the 2-Wasserstein distance. It is
        the likelihood that is robust: accuracy under attack mostly rises, but need not.
        """
        if eps == 0:
            return self
        return self.robust_at(self.multiplier(eps))

    def robust_at(self, multiplier: float) -> Gaussian:
        """The robust parameters for a Lagrange multiplier lambda in place of a radius.

        The covariance is S/2 + I/lambda + sqrt(S/lambda + S^2/4).
        """
        checks.number("multiplier", multiplier, low=0.0, strict=True)
        values, vectors = torch.linalg.eigh(self.covariance)
        root = (values.sqrt() + (values + 4 / multiplier).sqrt()) / 2
        return Gaussian(self.mean, (vectors * root.square()) @ vectors.T)

    def multiplier(self, eps: float) -> float:
        """lambda(eps), by bisection of eps^2 = sum_i (sqrt(s_r,i) - sqrt(s_i))^2 in 1/lambda."""
        checks.number("eps", eps, low=0.0, strict=True)
        root = torch.linalg.eigvalsh(self.covariance).sqrt()

        def radius(inverse: float) -> float:
            # sqrt(s_r) - sqrt(s), without the cancellation.
            return float((2 * inverse / ((root**2 + 4 * inverse).sqrt() + root)).norm())

        low, high = 0.0, eps * eps
        while radius(high) < eps:
            low, high = high, 2 * high
        while low < (middle := (low + high) / 2) < high:
            low, high = (middle, high) if radius(middle) < eps else (low, middle)
        return 1 / high

    def accuracy(self, learner: Gaussian | Tensor, eps: float = 0.0) -> float:
        """Accuracy of a learner's classifier on these data, under l2 attacks of size ``eps``.

        For w it is Phi((w^T mean - eps ||w||_2) / sqrt(w^T covariance w)).
        """
        checks.number("eps", eps, low=0.0)
        w = learner.classifier if isinstance(learner, Gaussian) else learner.to(torch.float64)
        margin = w @ self.mean - eps * w.norm()
        return float(torch.special.ndtr(margin / (w @ self.covariance @ w).sqrt()))

    def distance(self, other: Gaussian) -> float:
        """2-Wasserstein distance of N(mean, covariance) to another's."""
        root = matrix_root(self.covariance)
        cross = torch.linalg.eigvalsh(root @ other.covariance @ root).clamp_min(0).sqrt().sum()
        traces = self.covariance.trace() + other.covariance.trace()
        square = (self.mean - other.mean).square().sum() + traces - 2 * cross
        return float(square.clamp_min(0).sqrt())

    def adversarial_gap(self, penalty: float, *, doubled: bool = False) -> float:
        """How much an adversary adds to the expected negative log-likelihood (theorem 1).

        It maximises the likelihood's loss minus ``penalty`` ||delta||_2^2; the penalty itself is
        not in the gap.

        Parameters
        ----------
        penalty
            The paper's C; above 1 / (2 smallest eigenvalue), or above 1 / (smallest eigenvalue)
            with ``doubled``.
        doubled
            Count twice the negative log-likelihood, as the formula printed in the paper does:
            tr[(I + (C S - I)^-1)^2] - d. Without it, half of the same with 2 C.
        """
        checks.number("penalty", penalty, low=0.0, strict=True)
        values = torch.linalg.eigvalsh(self.covariance)
        excess = (penalty if doubled else 2 * penalty) * values - 1
        if not bool((excess > 0).all()):
            checks.fail("penalty", penalty, "too small: the adversary would go to infinity")
        gap = float(((1 + 1 / excess).square() - 1).sum())
        return gap if doubled else gap / 2

    def sample(self, count: int, *, seed: int | torch.Generator | None = None) -> TensorDataset:
        """Draw a dataset: inputs float64 ``(count, d)``, labels 0 (y = -1) and 1 (y = +1)."""
        checks.count("count", count, low=1)
        checks.seed(seed)
        generator = seeding.generator(seeding.resolve(seed))
        labels = torch.randint(2, (count,), generator=generator)
        noise = torch.randn(count, len(self.mean), generator=generator, dtype=torch.float64)
        signs = (2 * labels - 1)[:, None]
        return TensorDataset(signs * self.mean + noise @ matrix_root(self.covariance), labels)


def signed_inputs(inputs: Tensor, labels: Tensor) -> Tensor:
    if not bool(((labels == 0) | (labels == 1)).all()):
        checks.fail("labels", int(labels.max()), "two classes: 0 (y = -1) and 1 (y = +1)")
    return (2 * labels - 1)[:, None] * inputs.to(torch.float64)


def matrix_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.sqrt()) @ vectors.T
    return root


def _condition(matrix: Tensor) -> float:
    values = torch.linalg.eigvalsh(matrix)
    return float(values[-1] / values[0])
