"""Data whose robust and non-robust features are known: a coarse and a faint one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from advfeat import checks, plots, seeding
from advfeat.results import Result
from advfeat.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Standard deviation of the noise as a fraction of the size of the pattern.
_COARSE_NOISE, _FAINT_NOISE = 0.1, 0.2


@dataclass(frozen=True, eq=False, repr=False)
class Planted(Result):
    """Data with a coarse robust and a faint non-robust feature for each class; see `planted`.

    Attributes
    ----------
    data
        Inputs float32 ``(N, 2 size)`` in [0, 1], the coarse block first, and labels.
    patterns
        The direction of each class in a block, of l2 length 1, ``(classes, size)``; orthogonal.
    sizes
        l2 length of the coarse and of the faint pattern.
    agreement
        Probability that the coarse, and that the faint pattern, is that of the label; else it is
        that of a class drawn uniformly.
    """

    data: TensorDataset
    patterns: Tensor
    sizes: tuple[float, float]
    agreement: tuple[float, float]

    _left_out = ("data",)

    def _summary(self) -> str:
        count = "" if self.data is None else f"{len(self.data)} samples, "
        return f"{count}{len(self.patterns)} classes"

    def _content(self) -> Sequence[str | Table]:
        rows = list(zip(("robust", "nonrobust"), self.sizes, self.agreement, strict=True))
        return [repr(self), Table(("feature", "l2 size", "agreement"), rows)]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Robust usefulness gamma of both features over eps, in closed form."""
        ax = plots.new_axes(ax)
        eps = torch.linspace(0, self.sizes[0], 50)
        found = [self.usefulness(float(radius)) for radius in eps]
        plots.lines(ax, eps, {name: [each[name][1] for each in found] for name in found[0]})
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set(xlabel="l2 eps", ylabel="robust usefulness gamma")
        ax.legend(frameon=False)
        ax.grid(alpha=0.3)
        return ax

    def robust(self, inputs: Tensor) -> Tensor:
        """The coarse feature of each class, ``(N, classes)``."""
        block = inputs.flatten(1)[:, : self.patterns.shape[1]]
        return (block - 0.5) @ self.patterns.T.to(block)

    def nonrobust(self, inputs: Tensor) -> Tensor:
        """The faint feature of each class, ``(N, classes)``."""
        block = inputs.flatten(1)[:, self.patterns.shape[1] :]
        return (block - 0.5) @ self.patterns.T.to(block)

    def usefulness(self, eps: float) -> dict[str, tuple[float, float]]:
        """Return rho and gamma in l2 ``eps`` of ``"robust"`` and ``"nonrobust"`` features.

        In closed form, as `usefulness` defines them; the bounds of the inputs are left out.
        """
        checks.number("eps", eps, low=0.0)
        classes = len(self.patterns)
        found = {}
        for name, size, p, noise in zip(
            ("robust", "nonrobust"),
            self.sizes,
            self.agreement,
            (_COARSE_NOISE, _FAINT_NOISE),
            strict=True,
        ):
            # Where the class and the rest weigh one half each, the pattern is there with this
            # probability.
            there = ((1 - p) * 2 / classes + p) / 2
            deviation = size * math.sqrt(there * (1 - there) + noise**2)
            rho = size * p / 2 / deviation
            found[name] = (rho, rho - eps / deviation)
        return found


def planted(
    count: int = 3000,
    classes: int = 10,
    *,
    size: int = 32,
    sizes: tuple[float, float] = (1.0, 0.1),
    agreement: tuple[float, float] = (0.75, 0.97),
    seed: int | torch.Generator | None = None,
) -> Planted:
    """Make data whose robust and non-robust features are known: a test of the science itself.

    Each input has two blocks of numbers, grey with a pattern of a class in noise. The coarse
    pattern is large and agrees with the label in three quarters of the samples; the faint one is a
    tenth as large, far smaller than a perturbation, and agrees nearly always. So in an l2 ball
    between the two sizes, 0.2 to 0.3 by default, the coarse features are robust and the faint ones
    useful and non-robust. A standard model reads the faint pattern, a robust model must not.

    Parameters
    ----------
    count, classes
        Samples, as many of each class as the count allows, and classes.
    size
        Numbers in a block, at least ``classes``.
    sizes
        l2 length of the coarse and of the faint pattern.
    agreement
        How often the coarse, and the faint pattern, is that of the label.
    seed
        Of everything random; a sample's numbers follow from the seed and its index. None draws
        one number from torch's default generator.

    Returns
    -------
    Planted
        The ``data``, and its features as functions with their usefulness in closed form.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause.

    Examples
    --------
    >>> from advfeat import analysis
    >>> world = analysis.planted(100, seed=0)
    >>> world.data.tensors[0].shape, world.robust(world.data.tensors[0]).shape
    (torch.Size([100, 64]), torch.Size([100, 10]))
    >>> (rho, gamma), (faint, fragile) = world.usefulness(eps=0.2).values()
    >>> bool(rho > gamma > 0), bool(faint > 0 > fragile)
    (True, True)
    """
    checks.count("classes", classes, low=2)
    checks.count("count", count, low=2 * classes)
    checks.count("size", size, low=classes)
    checks.seed(seed)
    for argument, pair, high in (("sizes", sizes, math.inf), ("agreement", agreement, 1.0)):
        for value in pair:
            checks.number(argument, value, low=0.0)
            if value > high:
                checks.fail(argument, pair, "expected probabilities")
    drawn = seeding.resolve(seed)
    keys = seeding.keys(drawn, torch.arange(count))
    labels = torch.arange(count) % classes
    # Cosines: orthogonal, and spread over the block so that no number leaves [0, 1].
    wave = (torch.arange(size) + 0.5) * (torch.arange(classes)[:, None] + 1) * math.pi / size
    patterns = wave.cos() / wave.cos().norm(dim=1, keepdim=True)
    blocks = []
    for place, (length, p, noise) in enumerate(
        zip(sizes, agreement, (_COARSE_NOISE, _FAINT_NOISE), strict=True)
    ):
        other = seeding.integers(keys, 3 * place, classes)
        agrees = seeding.uniform(keys, 3 * place + 1, 1).squeeze(1) < p
        normal = torch.special.ndtri(seeding.uniform(keys, 3 * place + 2, size))
        shown = patterns[torch.where(agrees, labels, other)]
        blocks.append(0.5 + length * (shown + noise * normal))
    inputs = torch.cat(blocks, 1).clamp(0.0, 1.0)
    return Planted(TensorDataset(inputs, labels), patterns, sizes, agreement)
