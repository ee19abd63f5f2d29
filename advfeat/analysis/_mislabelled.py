"""Learning from a model's mistakes alone (Wallace's comment, Distill 2019)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from advfeat import checks, plots
from advfeat.analysis._features import commonest, stacked
from advfeat.datasets import ConstructedDataset
from advfeat.loading import Data, Source
from advfeat.metrics import Accuracy, accuracy
from advfeat.model import attackable, device_of
from advfeat.results import Result
from advfeat.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False, repr=False)
class Mislabelled(Result):
    """What a model learned from another's mistakes; see `mislabelled`.

    Attributes
    ----------
    learned
        Accuracy on the test data, true labels.
    teacher
        Accuracy of the model that made the mistakes, on the same.
    mistakes
        The dataset that was learned from; every label is wrong. None where the result was read
        from JSON, which has no images.
    chance
        Fraction of the commonest class of the test data: what a constant answer gets right.
    """

    learned: Accuracy
    teacher: Accuracy
    mistakes: ConstructedDataset | None
    chance: float

    _left_out = ("mistakes",)

    @property
    def above_chance(self) -> bool:
        """Whether the whole 95% interval of ``learned`` lies above chance."""
        return self.learned.interval[0] > self.chance

    def _summary(self) -> str:
        return f"{self.learned:.1%}, chance {self.chance:.1%}"

    def _content(self) -> Sequence[str | Table]:
        rows: list[tuple[object, ...]] = [
            (name, f"{a:.1%}", f"{a.interval[0]:.1%} to {a.interval[1]:.1%}")
            for name, a in (("learned from mistakes", self.learned), ("their maker", self.teacher))
        ]
        count = "" if self.mistakes is None else f"{len(self.mistakes)} "
        title = f"{count}images, all labelled wrongly; chance {self.chance:.1%}"
        return [title, Table(("", "accuracy", "95% interval"), rows)]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Both accuracies with their intervals, and chance."""
        ax = plots.new_axes(ax, 5.0, 4.0)
        plots.bars(
            {
                "learned from\nits mistakes": {"accuracy": self.learned},
                "their maker": {"accuracy": self.teacher},
            },
            chance=self.chance,
            ylabel="accuracy on true test data (%)",
            ax=ax,
        )
        return ax


def mistakes(model: nn.Module, data: Data, *, batch_size: int | None = None) -> ConstructedDataset:
    """Keep the samples that a model gets wrong, labelled as it says: every label is wrong.

    Parameters
    ----------
    model
        Any module; one that was stopped early makes enough mistakes.
    data
        A dataset, a loader or a list of batches.

    Returns
    -------
    ConstructedDataset
        ``images``, ``labels`` (the model's), ``index`` and ``source_labels`` (the true ones).

    Raises
    ------
    ValueError
        The model makes no mistake on these data.

    Examples
    --------
    >>> import torch
    >>> from advfeat import analysis
    >>> data = torch.utils.data.TensorDataset(torch.eye(3), torch.tensor([0, 2, 2]))
    >>> analysis.mistakes(torch.nn.Identity(), data).labels
    tensor([1])
    """
    kept: dict[str, list[torch.Tensor]] = {
        name: [] for name in ("images", "labels", "index", "source_labels")
    }
    with attackable(model) as net:
        for samples in Source(data, batch_size).batches(device_of(model)):
            checks.labels(samples.labels, samples.inputs)
            with net.given(net.choose_extras(samples.entries, samples.inputs)):
                said = net.logits(samples.inputs).argmax(1)
            wrong = said != samples.labels
            found = (samples.inputs.float(), said, samples.ids, samples.labels)
            for name, values in zip(kept, found, strict=True):
                kept[name].append(values[wrong].cpu())
    fields = {name: torch.cat(values).numpy() for name, values in kept.items()}
    if len(fields["labels"]) == 0:
        checks.fail("data", type(data).__name__, "the model makes no mistake here; train it less")
    return ConstructedDataset(fields, {"method": "mistakes", "model": type(model).__name__})


def mislabelled(
    model: nn.Module,
    train: Data,
    test: Data,
    *,
    learn: Callable[[ConstructedDataset], nn.Module],
    progress: bool | None = None,
) -> Mislabelled:
    """Train on a model's mistakes alone: images whose labels are all wrong.

    What the fresh model gets right on the test data it cannot have from the labels: it has the
    features that the first one used. Reported for CIFAR-10: 49.7%, from 18,768 images.

    Parameters
    ----------
    model
        Makes the mistakes; usually stopped after an epoch or two.
    train, test
        The original data.
    learn
        ``dataset -> model``: makes a model and trains it on the mistakes.
    progress
        As in `advfeat.robust_accuracy`.

    Returns
    -------
    Mislabelled
        Accuracy after learning from the mistakes, with its interval.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause.

    Examples
    --------
    >>> import torch
    >>> from advfeat import analysis
    >>> data = torch.utils.data.TensorDataset(torch.eye(3), torch.tensor([0, 2, 2]))
    >>> found = analysis.mislabelled(
    ...     torch.nn.Identity(), data, data, learn=lambda wrong: torch.nn.Identity()
    ... )
    >>> len(found.mistakes), round(found.learned, 2)
    (1, 0.67)
    """
    checks.function("learn", learn)
    wrong = mistakes(model, train)
    chance = commonest(stacked(test, torch.device("cpu")).labels)
    learned = accuracy(learn(wrong), test, progress=progress)
    return Mislabelled(learned, accuracy(model, test, progress=progress), wrong, chance)
