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
        ``eps -> model``: makes a model and trains it, by `advfeat.adversarial_fit` (by
        `advfeat.fit` where eps is 0).
    test
        Test data.
    eps
        Radii of training, 0 for standard training.
    attack
        What every model is attacked with, the same for all: ``PGD(eps=0.5, norm="l2", steps=20)``.
    progress
        As in `advfeat.robust_accuracy`.

    Returns
    -------
    Tradeoff
        Accuracy and robust accuracy for each radius of training.

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
    """What D_R is for: make it once, then train any model on it in the standard way.

    Parameters
    ----------
    train, test
        The original data.
    fit_standard, fit_adversarial
        ``data -> model``: make a model and train it so.
    attack
        What every model is attacked with.
    construct
        ``(robust model, data) -> dataset``; by default `advfeat.construct_robust_dataset`.
    progress
        As in `advfeat.robust_accuracy`.

    Returns
    -------
    RobustDatasetCost
        Accuracy, robust accuracy and seconds of each way of training.

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
