"""Section 4 radius by radius, and the same solution learned by adversarial training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from advfeat import checks, plots
from advfeat.analysis._gaussian import Gaussian, matrix_root, signed_inputs
from advfeat.results import Result
from advfeat.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
            metric = matrix_root(learned.covariance) @ circle
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
    """Show how robust learning changes two Gaussian classes (section 4 of the paper).

    Class +1 is N(mean, covariance), class -1 is N(-mean, covariance). Everything is computed in
    closed form, in float64.

    Parameters
    ----------
    mean, covariance
        Mean of class +1, ``(d,)``, and the covariance of both, ``(d, d)``, symmetric and positive
        definite, or its diagonal, ``(d,)``.
    eps
        Radii of the l2 adversary, at least 0, in the units of the inputs; by default those of the
        paper's figure 4.

    Returns
    -------
    GaussianStudy
        The learned parameters at each radius; prints as a table, plots as figure 4.

    Raises
    ------
    ValueError
        Shapes do not fit, the covariance is not symmetric and positive definite, or ``eps`` is
        empty or negative.
    TypeError
        A radius is not a number.

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
        Samples ``(N, d)`` and labels int64 ``(N,)``, 0 (y = -1) or 1 (y = +1), as
        `Gaussian.sample` returns them.
    eps
        Root mean square of the l2 norms of the perturbations, at least 0.
    steps, lr
        Number of Adam steps and their learning rate, which falls to zero along a cosine.
    attack_steps
        Number of gradient ascent steps in each Adam step.

    Returns
    -------
    Gaussian
        Mean and covariance that adversarial training found.

    Raises
    ------
    ValueError
        A label is not 0 or 1, ``eps`` is negative, or ``steps`` or ``attack_steps`` is below 1.
    TypeError
        A number is of another type.

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
    signed = signed_inputs(inputs, labels)
    constant = (signed == signed[:1]).all(0).nonzero().flatten()
    if len(constant):
        checks.fail("inputs", f"{len(signed)} samples", f"feature {int(constant[0])} is constant")
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
