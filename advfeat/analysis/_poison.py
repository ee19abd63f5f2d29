"""D_det as a poison: the same images under their original labels (Fowl et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.data import TensorDataset

from advfeat import checks, plots
from advfeat.analysis._features import commonest, stacked
from advfeat.datasets import ConstructedDataset
from advfeat.loading import Data
from advfeat.metrics import Accuracy, accuracy
from advfeat.results import Result
from advfeat.statistics import Estimate, paired_difference
from advfeat.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def poison(dataset: ConstructedDataset) -> ConstructedDataset:
    """Give targeted perturbations their original labels: the poison of Fowl et al. (2021).

    A person sees correctly labelled images. A model learns to read the target's non-robust features
    as the original class, and fails on data without perturbations.

    Parameters
    ----------
    dataset
        D_det or D_rand.

    Returns
    -------
    ConstructedDataset
        In memory: the same images, ``labels`` the original ones, ``targets`` what they were.

    Raises
    ------
    ValueError
        The dataset does not keep its original labels.

    Examples
    --------
    >>> import torch
    >>> import advfeat as af
    >>> from advfeat import analysis
    >>> data = torch.utils.data.TensorDataset(torch.rand(6, 4), torch.arange(6) % 3)
    >>> d_det = af.construct_det_dataset(torch.nn.Linear(4, 3), data, eps=0.1, steps=5)
    >>> analysis.poison(d_det).labels.tolist(), d_det.labels.tolist()
    ([0, 1, 2, 0, 1, 2], [1, 2, 0, 1, 2, 0])
    """
    original = dataset.field("source_labels")
    fields = {
        "images": dataset.images.numpy(),
        "labels": original.to(torch.int64).numpy(),
        "targets": dataset.labels.numpy(),
    }
    if "index" in dataset.fields:
        fields["index"] = dataset.field("index").numpy()
    manifest = {**dataset.manifest, "method": f"{dataset.manifest.get('method')} as a poison"}
    return ConstructedDataset(fields, manifest)


@dataclass(frozen=True, eq=False, repr=False)
class Poisoning(Result):
    """What a poison does to a training; see `poisoning`.

    Attributes
    ----------
    poisoned, clean
        Accuracy on original test data after training on the poison, and on the original images.
    before
        Fraction of test samples that the poisoned model classifies as the class before their own:
        the class whose images were moved towards theirs. High for a poison made of D_det.
    chance
        Fraction of the commonest class of the test data.
    """

    poisoned: Accuracy
    clean: Accuracy
    before: Accuracy
    chance: float

    @property
    def damage(self) -> Estimate:
        """Clean minus poisoned accuracy, with its interval."""
        return paired_difference(self.clean.correct, self.poisoned.correct)

    def _summary(self) -> str:
        return f"damage {self.damage} points; chance {self.chance:.1%}"

    def _content(self) -> Sequence[str | Table]:
        parts = {"clean": self.clean, "poisoned": self.poisoned, "class before": self.before}
        rows = [
            (name, f"{a:.1%}", f"{a.interval[0]:.1%} to {a.interval[1]:.1%}")
            for name, a in parts.items()
        ]
        return [self._summary(), Table(("", "accuracy", "95% interval"), rows)]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Both accuracies and the fraction of the class before, with intervals."""
        shown = {"clean": self.clean, "poisoned": self.poisoned, "class before": self.before}
        groups = {name: {"accuracy": value} for name, value in shown.items()}
        ax = plots.new_axes(ax)
        plots.bars(groups, chance=self.chance, ylabel="% of test samples", ax=ax)
        return ax


def poisoning(
    dataset: ConstructedDataset,
    train: Data,
    test: Data,
    *,
    learn: Callable[[Data], nn.Module],
) -> Poisoning:
    """Train on a poison and on the original images, and compare on original test data.

    Parameters
    ----------
    dataset
        D_det or D_rand of ``train``, constructed from a standard model.
    train, test
        Original data.
    learn
        ``dataset -> model``: makes a model and trains it; called twice, alike.

    Returns
    -------
    Poisoning
        Both accuracies with a paired difference, and what the poisoned model says instead.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause.

    Examples
    --------
    >>> import torch
    >>> import advfeat as af
    >>> from advfeat import analysis
    >>> data = torch.utils.data.TensorDataset(torch.eye(3), torch.arange(3))
    >>> model = torch.nn.Identity()
    >>> d_det = af.construct_det_dataset(model, data, eps=0.1, steps=5)
    >>> float(analysis.poisoning(d_det, data, data, learn=lambda data: model).damage.value)
    0.0
    """
    checks.function("learn", learn)
    tested = stacked(test, torch.device("cpu"))
    classes = int(tested.labels.max()) + 1
    before = TensorDataset(tested.inputs, (tested.labels - 1) % classes)
    poisoned, clean = learn(poison(dataset)), learn(train)
    return Poisoning(
        accuracy(poisoned, test, progress=False),
        accuracy(clean, test, progress=False),
        accuracy(poisoned, before, progress=False),
        commonest(tested.labels),
    )
