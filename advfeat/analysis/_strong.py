"""Is what D_R teaches robust under a strong attack? And D_R with its starts averaged out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from advfeat import checks, plots, seeding
from advfeat.analysis._features import named_models
from advfeat.attacks import AutoAttack
from advfeat.datasets import ConstructedDataset
from advfeat.loading import Data
from advfeat.metrics import Accuracy, robust_accuracy
from advfeat.results import Result
from advfeat.statistics import Estimate, paired_difference
from advfeat.tables import Table
from advfeat.threat import Bounds, Norm

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False, repr=False)
class AttackGap(Result):
    """Robust accuracy under a weak and a strong attack; see `attack_gap`.

    Attributes
    ----------
    weak, strong
        Of each model, by PGD, and by PGD and AutoAttack together.
    """

    weak: Mapping[str, Accuracy]
    strong: Mapping[str, Accuracy]

    def gap(self, model: str) -> Estimate:
        """What PGD overstates: the paired difference, never below 0."""
        checks.one_of("model", model, tuple(self.weak))
        return paired_difference(self.weak[model].correct, self.strong[model].correct)

    def _summary(self) -> str:
        return ", ".join(f"{name} {weak:.1%}" for name, weak in self.strong.items())

    def _content(self) -> Sequence[str | Table]:
        rows = [
            (name, f"{weak:.1%}", f"{self.strong[name]:.1%}", str(self.gap(name)))
            for name, weak in self.weak.items()
        ]
        return [Table(("model", "PGD", "AutoAttack", "gap (95% interval)"), rows)]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Two bars for each model."""
        groups = {
            name: {"PGD": weak, "AutoAttack": self.strong[name]} for name, weak in self.weak.items()
        }
        ax = plots.new_axes(ax)
        plots.bars(groups, ylabel="robust accuracy (%)", ax=ax)
        return ax


def attack_gap(
    models: Mapping[str, nn.Module],
    data: Data,
    *,
    eps: float,
    norm: Norm,
    steps: int = 20,
    version: Literal["fast", "standard", "strong"] = "fast",
    bounds: Bounds = (0.0, 1.0),
    seed: int | None = None,
    progress: bool | None = None,
) -> AttackGap:
    """Measure models by PGD and by AutoAttack: how much of the robustness is the attack's failure.

    Li et al. (2023) find that a model of D_R is largely non-robust under AutoAttack where PGD says
    otherwise. Pass the models of D_R and of its control: both lose to a stronger attack.

    Parameters
    ----------
    models
        By name: ``{"D_R": model, "D_R control": other}``.
    data
        Original test data.
    eps, norm, bounds
        The ball.
    steps
        Of the weak attack, PGD.
    version
        Of `advfeat.attacks.AutoAttack`; it attacks what PGD leaves.
    seed
        Of the attacks; None draws one number.
    progress
        As in `advfeat.robust_accuracy`.

    Returns
    -------
    AttackGap
        Both robust accuracies of each model, and their paired difference.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause.

    Examples
    --------
    >>> import torch
    >>> from advfeat import analysis
    >>> data = torch.utils.data.TensorDataset(torch.eye(3), torch.arange(3))
    >>> found = analysis.attack_gap({"mine": torch.nn.Identity()}, data, eps=0.1, norm="l2", seed=0)
    >>> float(found.weak["mine"]), float(found.strong["mine"])
    (1.0, 1.0)
    """
    named = named_models(models)
    checks.seed(seed)
    seed = seeding.resolve(seed)
    checks.count("steps", steps, low=1)
    attack = AutoAttack(eps=eps, norm=norm, version=version, bounds=bounds, seed=seed)
    weak, strong = {}, {}
    for name, model in named.items():
        weak[name] = robust_accuracy(
            model, data, eps=eps, norm=norm, steps=steps, bounds=bounds, progress=progress
        )
        found = robust_accuracy(model, data, attack=attack, progress=progress)
        strong[name] = Accuracy.of(weak[name].correct & found.correct)
    return AttackGap(weak, strong)


def purify(dataset: ConstructedDataset) -> ConstructedDataset:
    """Average the images of each sample's starts: what they have in common is left.

    An inversion leaves in an image what its start had in directions that the source model does not
    read. Over k starts these average out, to a variance of 1 / k for a linear model; what the model
    reads is the same in all of them and stays. One way to a purer D_R, this library's own: of a
    model that is not linear the mean need not have the activations of its parts. Train on both.

    Parameters
    ----------
    dataset
        D_R or D_NR constructed with ``starts=k``, k at least 2.

    Returns
    -------
    ConstructedDataset
        In memory, one image for each sample: ``images``, ``labels`` and ``index``.

    Raises
    ------
    ValueError
        The dataset has one start for each sample.

    Examples
    --------
    >>> import torch
    >>> import advfeat as af
    >>> from advfeat import analysis
    >>> data = torch.utils.data.TensorDataset(torch.rand(8, 6), torch.arange(8) % 3)
    >>> d_r = af.construct_robust_dataset(torch.nn.Linear(6, 3), data, starts=3, steps=5, seed=0)
    >>> len(d_r), len(analysis.purify(d_r))
    (24, 8)
    """
    index, place = torch.unique(dataset.field("index"), return_inverse=True)
    counts = torch.bincount(place)
    if int(counts.min()) < 2:
        checks.fail("dataset", "one start for each sample", "construct it with starts=4")
    images, labels = dataset.images, dataset.labels
    sums = torch.zeros(len(index), *images.shape[1:]).index_add_(0, place, images.float())
    means = sums / counts.view(-1, *(1,) * (images.ndim - 1))
    own = torch.zeros(len(index), dtype=torch.int64).scatter_(0, place, labels)
    fields = {"images": means.numpy(), "labels": own.numpy(), "index": index.numpy()}
    manifest = {**dataset.manifest, "method": f"{dataset.manifest.get('method')} purified"}
    return ConstructedDataset(fields, manifest)
