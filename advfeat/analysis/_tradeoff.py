"""What robustness costs: accuracy over the radius of training, and D_R against training anew."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from advfeat import checks, plots
from advfeat.attacks import PGD
from advfeat.datasets import ConstructedDataset
from advfeat.loading import Data
from advfeat.metrics import RobustAccuracy, robust_accuracy
from advfeat.progress import Meter, with_progress
from advfeat.results import Result
from advfeat.robustify import construct_robust_dataset
from advfeat.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes


T = TypeVar("T")


@dataclass(frozen=True, eq=False, repr=False)
class Tradeoff(Result):
    """Accuracy and robust accuracy over the radius of training; see `tradeoff`.

    Attributes
    ----------
    eps
        Radii of training.
    robust
        Robust accuracy of each model, and of ``standard``.
    seconds
        What each training took.
    """

    eps: tuple[float, ...]
    robust: tuple[RobustAccuracy, ...]
    seconds: tuple[float, ...]

    def _summary(self) -> str:
        return f"{len(self.eps)} radii up to {max(self.eps):g}"

    def _content(self) -> Sequence[str | Table]:
        rows: list[tuple[object, ...]] = [
            (f"{eps:g}", f"{found.standard:.1%}", f"{found:.1%}", f"{seconds:.1f}")
            for eps, found, seconds in zip(self.eps, self.robust, self.seconds, strict=True)
        ]
        return [Table(("training eps", "accuracy", "robust accuracy", "seconds"), rows)]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Both accuracies over the radius."""
        axes = plots.new_axes(ax)
        series = {
            "accuracy": [100 * found.standard for found in self.robust],
            "robust accuracy": [100 * found for found in self.robust],
        }
        plots.lines(axes, self.eps, series)
        axes.set(xlabel="eps of training", ylabel="% of test images", ylim=(0, 102))
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
        return axes


def tradeoff(
    learn: Callable[[float], nn.Module],
    test: Data,
    *,
    eps: Sequence[float],
    attack: PGD,
    progress: bool | None = None,
) -> Tradeoff:
    """Train at several radii, and measure what accuracy pays for robust accuracy.

    Parameters
    ----------
    learn
        A function of the radius that makes a model, trains it and returns it: with
        `advfeat.adversarial_fit`, or with `advfeat.fit` if the radius is 0.
    test
        Test data: a dataset, a loader or a list of batches.
    eps
        Radii of training, at least 0, in the units of the inputs; 0 is standard training.
    attack
        The attack that measures every model, such as ``PGD(eps=0.5, norm="l2", steps=20)``. Its
        radius is the same for all models.
    progress
        As in `advfeat.robust_accuracy`.

    Returns
    -------
    Tradeoff
        ``robust``: a `advfeat.metrics.RobustAccuracy` for each radius, with the clean accuracy as
        ``standard``; and ``seconds`` of each training.

    Raises
    ------
    ValueError
        ``eps`` is empty or has a negative radius.
    TypeError
        ``learn`` returns no module, or ``attack`` is no attack.

    Examples
    --------
    >>> import torch
    >>> import advfeat as af
    >>> from advfeat import analysis
    >>> data = torch.utils.data.TensorDataset(torch.rand(20, 4), torch.arange(20) % 2)
    >>> def learn(eps):
    ...     model = torch.nn.Linear(4, 2)
    ...     af.adversarial_fit(model, data, eps=eps, norm="l2", epochs=1)
    ...     return model
    >>> found = analysis.tradeoff(learn, data, eps=[0.1, 0.5], attack=af.PGD(eps=0.1, norm="l2"))
    >>> len(found.robust)
    2
    """
    checks.function("learn", learn)
    if not isinstance(eps, Sequence) or not eps:
        checks.fail("eps", eps, "expected a list of radii: eps=[0.0, 0.5]")
    for radius in eps:
        checks.number("eps", radius, low=0.0)
    found, seconds = [], []
    for radius in with_progress(eps, total=len(eps), label="tradeoff", progress=progress):
        began = time.perf_counter()
        model = learn(radius)
        seconds.append(time.perf_counter() - began)
        found.append(robust_accuracy(model, test, attack=attack, progress=progress))
    return Tradeoff(tuple(eps), tuple(found), tuple(seconds))


@dataclass(frozen=True, eq=False, repr=False)
class RobustDatasetCost(Result):
    """What D_R costs and gives, beside standard and adversarial training.

    Attributes
    ----------
    standard, adversarial, from_robust_dataset
        Robust accuracy of each model, and of ``standard``.
    seconds
        Of the same three, and of ``"construction"``.
    """

    standard: RobustAccuracy
    adversarial: RobustAccuracy
    from_robust_dataset: RobustAccuracy
    seconds: dict[str, float]

    @property
    def break_even(self) -> float:
        """Number of further models after which D_R has cost less time than training each anew.

        Infinite where standard training on D_R takes as long as adversarial training.
        """
        saved = self.seconds["adversarial"] - self.seconds["from_robust_dataset"]
        return self.seconds["construction"] / saved if saved > 0 else math.inf

    def _rows(self) -> dict[str, tuple[RobustAccuracy, float]]:
        return {
            "standard training": (self.standard, self.seconds["standard"]),
            "adversarial training": (self.adversarial, self.seconds["adversarial"]),
            "standard training on D_R": (
                self.from_robust_dataset,
                self.seconds["from_robust_dataset"],
            ),
        }

    def _summary(self) -> str:
        return f"paid back after {self.break_even:.1f} models"

    def _content(self) -> Sequence[str | Table]:
        rows: list[tuple[object, ...]] = [
            (name, f"{found.standard:.1%}", f"{found:.1%}", f"{seconds:.1f}")
            for name, (found, seconds) in self._rows().items()
        ]
        rows.append(("construction of D_R, once", "", "", f"{self.seconds['construction']:.1f}"))
        return [
            Table(("", "accuracy", "robust accuracy", "seconds"), rows),
            f"construction is paid back after {self.break_even:.1f} models",
        ]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Accuracies of the three models."""
        ax = plots.new_axes(ax, 5.3, 4.0)
        plots.bars(
            {
                name.replace(" training", "\ntraining"): {
                    "accuracy": found.standard,
                    "robust accuracy": found,
                }
                for name, (found, _) in self._rows().items()
            },
            ax=ax,
        )
        return ax


def robust_dataset_cost(
    train: Data,
    test: Data,
    *,
    fit_standard: Callable[[Data], nn.Module],
    fit_adversarial: Callable[[Data], nn.Module],
    attack: PGD,
    construct: Callable[[nn.Module, Data], ConstructedDataset] = construct_robust_dataset,
    progress: bool | None = None,
) -> RobustDatasetCost:
    """Compare D_R with adversarial training: robust accuracy and training time.

    Three models are trained: in the standard way, adversarially, and in the standard way on the D_R
    constructed from the adversarially trained one. D_R is constructed once, and any number of
    models can be trained on it at the cost of standard training.

    Parameters
    ----------
    train, test
        The original data; ``train`` is a map-style dataset, or a loader of one.
    fit_standard, fit_adversarial
        Functions of a dataset that make a model, train it and return it, with `advfeat.fit` and
        with `advfeat.adversarial_fit`.
    attack
        The attack that measures every model, such as ``PGD(eps=0.5, norm="l2", steps=20)``.
    construct
        A function of the robust model and the data that returns a dataset; by default
        `advfeat.construct_robust_dataset` with its defaults.
    progress
        As in `advfeat.robust_accuracy`.

    Returns
    -------
    RobustDatasetCost
        A `advfeat.metrics.RobustAccuracy` of each of the three models, and ``seconds`` of the
        trainings and of the construction.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause.

    Examples
    --------
    >>> import torch
    >>> import advfeat as af
    >>> from advfeat import analysis
    >>> data = torch.utils.data.TensorDataset(torch.rand(20, 4), torch.arange(20) % 2)
    >>> mine = torch.nn.Linear(4, 2)
    >>> found = analysis.robust_dataset_cost(
    ...     data, data, fit_standard=lambda data: mine, fit_adversarial=lambda data: mine,
    ...     attack=af.PGD(eps=0.1, norm="l2"),
    ... )
    >>> sorted(found.seconds)
    ['adversarial', 'construction', 'from_robust_dataset', 'standard']
    """
    for name, value in (("fit_standard", fit_standard), ("fit_adversarial", fit_adversarial)):
        checks.function(name, value)
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], T]) -> T:
        meter.stage(name)
        began = time.perf_counter()
        result = work()
        seconds[name] = time.perf_counter() - began
        return result

    def measured(model: nn.Module) -> RobustAccuracy:
        return robust_accuracy(model, test, attack=attack, progress=progress)

    with Meter(progress, "robust dataset cost") as meter:
        standard = timed("standard", lambda: fit_standard(train))
        robust = timed("adversarial", lambda: fit_adversarial(train))
        made = timed("construction", lambda: construct(robust, train))
        fresh = timed("from_robust_dataset", lambda: fit_standard(made))
        meter.stage("evaluation")
        return RobustDatasetCost(measured(standard), measured(robust), measured(fresh), seconds)
