"""Why adversarial examples transfer (figure 3), and those that do not: "just bugs"."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from advfeat import checks, losses, plots
from advfeat.analysis._features import named_models, stacked
from advfeat.attacks import PGD, Batch
from advfeat.construction import BuildOptions, TargetedDataset, build_dataset, indexed_source
from advfeat.datasets import ConstructedDataset
from advfeat.loading import Data
from advfeat.losses import is_success
from advfeat.metrics import Accuracy, accuracy
from advfeat.model import Network, Precision, logits_of
from advfeat.progress import with_progress
from advfeat.results import Result
from advfeat.statistics import correlation_interval
from advfeat.tables import Table
from advfeat.threat import Bounds, Norm

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Construct: TypeAlias = Callable[[nn.Module, Data], ConstructedDataset]
Learn: TypeAlias = Callable[[str, ConstructedDataset], nn.Module]


_HEAD = ("architecture", "learned", "fooled", "of fooled", "of all", "clean error")


@dataclass(frozen=True, eq=False, repr=False)
class TransferPoint(Result):
    """One architecture.

    Attributes
    ----------
    name
        Of the architecture.
    learned
        Accuracy on the original test data after training on the constructed dataset.
    fooled
        Fraction that the architecture gets wrong of the test images constructed on the source,
        among those that source and architecture both classify correctly without a perturbation:
        a model that is wrong anyway is not fooled.
    of_fooled
        The same among those that the source had right and is now fooled on.
    of_all
        The same among all test images.
    clean_error
        Fraction that the architecture gets wrong of the test images as they are.
    """

    name: str
    learned: Accuracy
    fooled: Accuracy
    of_fooled: Accuracy
    of_all: Accuracy
    clean_error: Accuracy

    def _summary(self) -> str:
        return f"{self.name}, learned {self.learned:.1%}, fooled {self.fooled:.1%}"

    def _row(self) -> tuple[object, ...]:
        found = (self.learned, self.fooled, self.of_fooled, self.of_all, self.clean_error)
        # NaN where the two models have no sample right.
        return (self.name, *("none" if value != value else f"{value:.1%}" for value in found))

    def _content(self) -> Sequence[str | Table]:
        return [Table(_HEAD, [self._row()])]


@dataclass(frozen=True, eq=False, repr=False)
class Transfer(Result):
    """Learning from a constructed dataset against being fooled by transfer; see `transfer`.

    Attributes
    ----------
    points
        One for each architecture: its ``name``; ``learned``, its accuracy on the original test
        data after training on the constructed dataset; its fraction of wrong answers on the test
        images that were constructed on the source: ``fooled`` among those that both models
        classify correctly without a perturbation, ``of_fooled`` among those that the source had
        right and is now fooled on, ``of_all`` among all; and ``clean_error``, its fraction of
        wrong answers without a perturbation.
    """

    points: tuple[TransferPoint, ...]

    @property
    def correlation(self) -> float:
        """Pearson's correlation of learned accuracy and fooled rate over the architectures.

        NaN where either does not vary.
        """
        pairs = self._pairs()
        return float(torch.corrcoef(pairs.T)[0, 1]) if len(pairs) > 1 else math.nan

    @property
    def correlation_interval(self) -> tuple[float, float]:
        """95% interval of the correlation by Fisher's z; (-1, 1) below four architectures."""
        return correlation_interval(self.correlation, len(self._pairs()))

    def _pairs(self) -> Tensor:
        """Learned accuracy and fooled rate, of the architectures that have both."""
        pairs = [[float(point.learned), float(point.fooled)] for point in self.points]
        found = torch.tensor(pairs, dtype=torch.float64)
        return found[found.isfinite().all(1)]

    def _correlation_text(self) -> str:
        low, high = self.correlation_interval
        return f"correlation {self.correlation:.2f} (95% interval {low:.2f} to {high:.2f})"

    def _summary(self) -> str:
        return f"{len(self.points)} architectures, {self._correlation_text()}"

    def _content(self) -> Sequence[str | Table]:
        return [Table(_HEAD, [point._row() for point in self.points]), self._correlation_text()]

    def plot(self, ax: Axes | None = None, *, others: Mapping[str, Transfer] | None = None) -> Axes:
        """Figure 3: learned accuracy against transfer rate; other constructions as ``others``."""
        axes = plots.new_axes(ax, 7.0, 4.2)
        for (kind, found), fill in zip(
            {"": self, **(others or {})}.items(), ("full", "none", "left"), strict=False
        ):
            for point, style in zip(found.points, plots.styles(), strict=False):
                axes.plot(
                    100 * point.learned, 100 * point.fooled, linestyle="", fillstyle=fill,
                    markersize=9, color=style["color"], marker=style["marker"], clip_on=False,
                    label=f"{point.name}, {kind}" if kind else point.name,
                )  # fmt: skip
        axes.set(xlabel="accuracy learned from the constructed dataset (%)")
        axes.set(ylabel="fooled by examples of the source (%)")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set_title(self._correlation_text(), fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
        return axes


def transfer(
    source: nn.Module,
    models: Mapping[str, nn.Module],
    train: Data,
    test: Data,
    *,
    construct: Construct,
    learn: Learn,
    progress: bool | None = None,
) -> Transfer:
    """Figure 3: do architectures that learn more from D_det get fooled more by transfer?

    The source model constructs one dataset from the training data, from which every architecture
    learns anew, and one from the test data, which shows how often each trained model is fooled.

    Parameters
    ----------
    source
        The model that perturbations are made on.
    models
        One for each architecture by name, trained on the original data.
    train, test
        The original data; map-style or a loader of such.
    construct
        ``(model, data) -> ConstructedDataset``: `advfeat.construct_det_dataset` with its settings,
        or `just_bugs` with its.
    learn
        ``(name, dataset) -> model``: makes a new model of that architecture and trains it.
    progress
        As in `advfeat.robust_accuracy`.

    Returns
    -------
    Transfer
        A point for each architecture, and the correlation with its interval.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause; also where the source is fooled on no
        test image.

    Examples
    --------
    >>> import functools, torch
    >>> import advfeat as af
    >>> from advfeat import analysis
    >>> data = torch.utils.data.TensorDataset(torch.eye(3), torch.arange(3))
    >>> mine = torch.nn.Identity()
    >>> det = functools.partial(af.construct_det_dataset, eps=0.9, steps=10)
    >>> found = analysis.transfer(
    ...     mine, {"mine": mine}, data, data, construct=det, learn=lambda name, d_det: mine
    ... )
    >>> float(found.points[0].fooled), float(found.points[0].clean_error)
    (1.0, 0.0)
    """
    named = named_models(models)
    checks.model(source)
    checks.function("construct", construct)
    checks.function("learn", learn)
    made, judged = construct(source, train), construct(source, test)
    true = stacked(test, torch.device("cpu"))
    clean = accuracy(source, TensorDataset(*true), progress=False).correct.cpu()
    attacked = TensorDataset(judged.images, true.labels)
    chosen = clean & ~accuracy(source, attacked, progress=False).correct.cpu()
    if not bool(chosen.any()):
        checks.fail("construct", "no test image", "the source is fooled on none; a larger eps?")
    points = []
    for name, model in with_progress(
        named.items(), total=len(named), label="transfer", progress=progress
    ):
        right = accuracy(model, TensorDataset(*true), progress=False).correct.cpu()
        fooled = ~accuracy(model, attacked, progress=False).correct.cpu()
        learned = accuracy(learn(name, made), TensorDataset(*true), progress=False)
        rates = (fooled[clean & right], fooled[chosen], fooled, ~right)
        points.append(TransferPoint(name, learned, *(Accuracy.of(rate) for rate in rates)))
    return Transfer(tuple(points))


def just_bugs(
    model: nn.Module,
    data: Data,
    *,
    others: Sequence[nn.Module],
    eps: float = 0.5,
    norm: Norm = "l2",
    shift: int = 1,
    steps: int = 100,
    step_size: float | None = None,
    bounds: Bounds = (0.0, 1.0),
    batch_size: int | None = None,
    precision: Precision = "float32",
    progress: bool | None = None,
) -> ConstructedDataset:
    """Make adversarial examples that are bugs of one model: they should not transfer or teach.

    As D_det, but every step goes along -(grad L(f, x, t) + mean_i grad L(f_i, x, y)): towards the
    target for the model, and towards the true label for the others (Nakkiran, Distill 2019).

    Parameters
    ----------
    model
        The model f to fool.
    data
        A map-style dataset, or a loader of one.
    others
        The f_i: models trained like it from other starts. With a handful the rest still transfers.
    eps, norm, shift, steps, step_size, bounds, batch_size, precision, progress
        As in `advfeat.construct_det_dataset`.

    Returns
    -------
    ConstructedDataset
        As `advfeat.construct_det_dataset` gives; ``success`` is that of fooling ``model``.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause.

    Examples
    --------
    >>> import torch
    >>> from advfeat import analysis
    >>> data = torch.utils.data.TensorDataset(torch.rand(6, 4), torch.arange(6) % 3)
    >>> model, other = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    >>> analysis.just_bugs(model, data, others=[other], steps=5)
    ConstructedDataset(just bugs: 6 of 4; images, index, labels, source_labels, success, size)
    """
    checks.model(model)
    if not others:
        checks.fail("others", others, "expected at least one other model")
    for other in others:
        checks.model(other)
    checks.number("eps", eps, low=0.0, strict=True)
    checks.count("shift", shift, low=1)
    side_by_side = _SideBySide(model, others)

    def bugs(logits: Tensor, targets: Tensor) -> Tensor:
        own, *rest = logits.chunk(1 + len(others), 1)
        true = (targets - shift) % own.shape[1]
        kept = torch.stack([losses.cross_entropy(part, true) for part in rest]).mean(0)
        # A targeted attack descends.
        return losses.cross_entropy(own, targets) + kept

    attack = PGD(
        eps=eps, norm=norm, steps=steps, step_size=eps / 5 if step_size is None else step_size,
        targeted=True, loss=bugs, bounds=bounds,
    )  # fmt: skip

    def choose(net: Network, batch: Batch) -> Tensor:
        classes = net.class_count(batch.inputs) // (1 + len(others))
        checks.class_range(int(batch.labels.max()), classes)
        if shift % classes == 0:
            checks.fail("shift", shift, f"with {classes} classes every target equals its label")
        return (batch.labels + shift) % classes

    options = BuildOptions(batch_size, precision, progress, None, "float32")
    settings: dict[str, object] = {"shift": shift, "others": len(others), "loss": "just bugs"}
    recipe = _JustBugs("just bugs", attack, choose, settings)
    recipe.models = 1 + len(others)
    made = build_dataset(side_by_side, indexed_source(side_by_side, data, options), recipe, options)
    made.manifest["model"] = type(model).__name__
    return made


class _JustBugs(TargetedDataset):
    """Targets for the first of several models that are side by side."""

    models = 1

    def describe(
        self, net: Network, batch: Batch, attacked: Batch, images: Tensor
    ) -> dict[str, Tensor]:
        """As for any target, but success is the first model's."""
        own = net.logits(images).chunk(self.models, 1)[0]
        success = is_success(own, attacked.labels, targeted=True)
        return super().describe(net, batch, attacked, images) | {"success": success}


class _SideBySide(nn.Module):
    """Several models as one, with all their logits in a sample."""

    def __init__(self, first: nn.Module, others: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList([first, *others])

    def forward(self, inputs: Tensor) -> Tensor:
        found = [checks.logits(logits_of(part(inputs)), inputs) for part in self.parts]
        widths = {logits.shape[1] for logits in found}
        if len(widths) > 1:
            checks.fail("others", sorted(widths), "all models must have as many classes")
        return torch.cat(found, 1)
