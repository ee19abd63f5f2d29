"""The Gaussian model of section 4: what robust training learns, in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from advfeat import checks, plots, seeding
from advfeat.results import Result
from advfeat.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
        signed = _signed(inputs, labels)
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
        root = _root(self.covariance)
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
        return TensorDataset(signs * self.mean + noise @ _root(self.covariance), labels)


@dataclass(frozen=True, eq=False, repr=False)
class GaussianStudy(Result):
    """What robust learning does to the Gaussian model, radius by radius; see `gaussian`.

    Attributes
    ----------
    truth
        The data.
    eps
        Radii.
    learned
        The robust parameters at each radius.
    """

    truth: Gaussian
    eps: tuple[float, ...]
    learned: tuple[Gaussian, ...]

    def _summary(self) -> str:
        return f"{len(self.truth.mean)} dimensions, {len(self.eps)} radii"

    def _content(self) -> Sequence[str | Table]:
        head = ("eps", "lambda", "accuracy", "robust accuracy", "misalignment", "worst cosine")
        return [Table(head, list(map(self._row, self.eps, self.learned)))]

    def _row(self, eps: float, learned: Gaussian) -> tuple[str, ...]:
        multiplier = self.truth.multiplier(eps) if eps else math.inf
        clean, robust = self.truth.accuracy(learned), self.truth.accuracy(learned, eps)
        numbers = (clean, robust, learned.misalignment, learned.worst_cosine)
        return f"{eps:.4g}", f"{multiplier:.4g}", *(f"{number:.4f}" for number in numbers)

    def plot(self, ax: Sequence[Axes] | None = None) -> tuple[Axes, ...]:
        """Figure 4 of the paper: samples, and both unit balls at each radius (two dimensions)."""
        if len(self.truth.mean) != 2:
            checks.fail("mean.shape", tuple(self.truth.mean.shape), "only two dimensions are drawn")
        inputs, labels = self.truth.sample(400, seed=0).tensors
        count = len(self.eps)
        panels = plots.new_panels(ax, count, 3.1 * count, 3.7, sharex=True, sharey=True)
        angle = torch.linspace(0, 2 * math.pi, 200, dtype=torch.float64)
        circle = torch.stack([angle.cos(), angle.sin()])
        blue, red, green = plots.COLORS[:3]
        for axes, eps, learned in zip(panels, self.eps, self.learned, strict=True):
            for label, name, color, marker in ((0, "y = -1", red, "x"), (1, "y = +1", blue, ".")):
                points = inputs[labels == label]
                axes.scatter(
                    points[:, 0].tolist(), points[:, 1].tolist(), s=12, marker=marker,
                    color=color, alpha=0.45, linewidths=0.8, label=name,
                )  # fmt: skip
            metric = _root(learned.covariance) @ circle
            axes.plot(*circle.tolist(), color="black", linestyle="--", label="l2 unit ball")
            axes.plot(
                *metric.tolist(), color=green, linewidth=2.2, label="learned metric's unit ball"
            )
            w = learned.classifier / learned.classifier.norm()
            axes.axline((0, 0), (float(-w[1]), float(w[0])), color="0.35", label="boundary")
            axes.annotate(
                "", xy=(2 * w).tolist(), xytext=(0, 0), arrowprops={"arrowstyle": "->", "lw": 1.8}
            )
            axes.set_title(f"eps = {eps:g}")
            axes.set_aspect("equal")
        reach = 1.05 * float(inputs.abs().max())
        for axes in panels:
            axes.set(xlim=(-reach, reach), ylim=(-reach, reach))
        handles, names = panels[0].get_legend_handles_labels()
        if ax is None:
            place: dict[str, Any] = {"loc": "outside lower center", "ncols": 5}
            plots.figure_of(panels[0]).legend(handles, names, frameon=False, **place)
        return panels


def gaussian(
    mean: Sequence[float] | Tensor,
    covariance: Sequence[float] | Sequence[Sequence[float]] | Tensor,
    *,
    eps: Sequence[float] = (0.0, 1.0, 10.0),
) -> GaussianStudy:
    """Section 4 of the paper: how robust learning changes two Gaussian classes.

    Parameters
    ----------
    mean, covariance
        Of class +1; ``(d,)`` and ``(d, d)``, or ``(d,)`` for a diagonal.
    eps
        Radii of the l2 adversary, in the units of the inputs; by default those of figure 4.

    Returns
    -------
    GaussianStudy
        The learned parameters at each radius; prints as a table, plots as figure 4.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause.

    Examples
    --------
    >>> from advfeat import analysis
    >>> print(analysis.gaussian([1.0, 1.0], [4.0, 0.25], eps=(0.0, 1.0)))
    eps  lambda  accuracy  robust accuracy  misalignment  worst cosine
    0       inf    0.9804           0.9804        4.0000        0.4706
    1    0.8313    0.9507           0.6291        1.8068        0.8474
    """
    if not isinstance(eps, Sequence) or not eps:
        checks.fail("eps", eps, "expected a list of radii: eps=[0.0, 1.0]")
    for radius in eps:
        checks.number("eps", radius, low=0.0)
    truth = Gaussian(torch.as_tensor(mean), torch.as_tensor(covariance))
    return GaussianStudy(truth, tuple(eps), tuple(truth.robust(radius) for radius in eps))


def fit_gaussian(
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float,
    steps: int = 200,
    lr: float = 0.05,
    attack_steps: int = 10,
) -> Gaussian:
    """Fit the Gaussian model by adversarial training; converges to `Gaussian.robust`.

    Every step moves the samples by gradient ascent on their negative log-likelihood, together
    within E||delta||_2^2 <= eps^2, and the parameters by Adam, down the gradient at the moved
    samples. Nothing of the closed form is used.

    Parameters
    ----------
    inputs, labels
        Samples ``(N, d)``, labels 0 (y = -1) or 1 (y = +1), as `Gaussian.sample` gives them.
    eps
        Root mean square l2 size of the perturbations.
    steps, lr
        Of Adam; the rate falls to zero along a cosine.
    attack_steps
        Steps of gradient ascent in each.

    Returns
    -------
    Gaussian
        The model that adversarial training found.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause.

    Examples
    --------
    >>> from advfeat.analysis import Gaussian, fit_gaussian
    >>> truth = Gaussian([1.0], [1.0])
    >>> fitted = fit_gaussian(*truth.sample(2000, seed=0).tensors, eps=0.5)
    >>> print(f"{fitted.covariance.item() ** 0.5:.1f}")  # 1 + eps
    1.5
    """
    checks.number("eps", eps, low=0.0)
    checks.count("steps", steps, low=1)
    checks.count("attack_steps", attack_steps, low=1)
    checks.labels(labels, inputs)
    signed = _signed(inputs, labels)
    # In units of the samples' own spread, in which Adam's steps are of a size that fits.
    unit = (signed - signed.mean(0)).square().mean().sqrt()
    signed, eps = signed / unit, eps / float(unit)
    start = signed.mean(0)
    root = torch.diag(1 / (signed - start).std(0))  # of the precision: P = root^T root
    mean, root = (part.clone().detach() for part in (start, root))
    mean.requires_grad, root.requires_grad = True, True
    optimizer = torch.optim.Adam([mean, root], lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        with torch.no_grad():
            moved = _attacked(signed, mean, root.T @ root, eps, attack_steps)
        likelihood = root.slogdet().logabsdet - ((moved - mean) @ root.T).square().sum(1).mean() / 2
        optimizer.zero_grad()
        (-likelihood).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return Gaussian(unit * mean.detach(), unit**2 * torch.linalg.inv(root.T @ root))


def _attacked(signed: Tensor, mean: Tensor, precision: Tensor, eps: float, steps: int) -> Tensor:
    """Samples moved to be least likely, all together within a root mean square of ``eps``."""
    delta = torch.zeros_like(signed)
    for _ in range(steps):
        # An infinite step of projected gradient ascent: the loss is convex, so it never falls.
        gradient = (signed + delta - mean) @ precision
        delta = eps * gradient / gradient.square().sum(1).mean().sqrt().clamp_min(1e-300)
    return signed + delta


def _signed(inputs: Tensor, labels: Tensor) -> Tensor:
    if not bool(((labels == 0) | (labels == 1)).all()):
        checks.fail("labels", int(labels.max()), "two classes: 0 (y = -1) and 1 (y = +1)")
    return (2 * labels - 1)[:, None] * inputs.to(torch.float64)


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.sqrt()) @ vectors.T
    return root


def _condition(matrix: Tensor) -> float:
    values = torch.linalg.eigvalsh(matrix)
    return float(values[-1] / values[0])
