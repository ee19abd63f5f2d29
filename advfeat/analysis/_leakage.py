"""Do robust features leak into D_rand and D_det? (Goh's comment, Distill 2019.)"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from advfeat import checks, plots, seeding, threat
from advfeat.analysis._features import Stacked, commonest, stacked
from advfeat.analysis._usefulness import DUAL, ROBUST, Usefulness, linear_usefulness
from advfeat.loading import Data
from advfeat.metrics import Accuracy
from advfeat.results import Result
from advfeat.tables import Table
from advfeat.threat import Norm

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False, repr=False)
class Leakage(Result):
    """What provably robust features alone teach about a dataset; see `leakage`.

    Attributes
    ----------
    learned
        Accuracy on original test data of a linear classifier of the robust features that was
        trained on the constructed dataset: a lower bound of what leaks. Where ``features`` is 0,
        that of the class that is commonest in the constructed dataset.
    reference
        The same features and classifier, trained on the true training data.
    chance
        Fraction of the commonest class of the test data: what a constant answer gets right.
    features
        How many features are provably robust.
    usefulness
        Of all features that were tried, one for each class, in closed form, on samples that they
        were not chosen on.
    """

    learned: Accuracy
    reference: Accuracy
    chance: float
    features: int
    usefulness: Usefulness

    @property
    def above_chance(self) -> bool:
        """Whether the whole 95% interval of ``learned`` lies above chance."""
        return self.learned.interval[0] > self.chance

    def _summary(self) -> str:
        return f"{self.learned:.1%}, chance {self.chance:.1%}, {self.features} robust features"

    def _content(self) -> Sequence[str | Table]:
        rows: list[tuple[object, ...]] = [
            (name, f"{a:.1%}", f"{a.interval[0]:.1%} to {a.interval[1]:.1%}")
            for name, a in (
                ("constructed dataset", self.learned),
                ("original data, for reference", self.reference),
            )
        ]
        rows.append(("chance", f"{self.chance:.1%}", ""))
        title = f"{self.features} provably robust linear features, trained on:"
        if not self.features:
            title = "no linear feature is robust for certain; the commonest class instead:"
        return [title, Table(("", "accuracy", "95% interval"), rows)]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Both accuracies with their intervals, and chance."""
        ax = plots.new_axes(ax, 5.0, 4.0)
        groups = {"constructed dataset": self.learned, "original data": self.reference}
        plots.bars(
            {name: {"robust linear features": value} for name, value in groups.items()},
            chance=self.chance,
            ylabel="accuracy on true test data (%)",
            ax=ax,
        )
        return ax


def leakage(
    constructed: Data,
    train: Data,
    test: Data,
    *,
    eps: float,
    norm: Norm = "l2",
    seed: int | torch.Generator | None = None,
) -> Leakage:
    """Bound from below what robust features teach a model that is trained on a constructed dataset.

    For each class the linear feature of the largest robust usefulness on one half of the training
    data is found, and kept where its robust usefulness on the other half is above 0 with all of
    its interval (see `linear_usefulness`). A linear classifier of these features alone is then
    trained on the constructed dataset and tested on original data. What it gets right above
    chance, robust features have leaked.

    Parameters
    ----------
    constructed
        D_rand or D_det: dataset, loader or list of batches.
    train, test
        The original data.
    eps, norm
        Ball of the closed form: the one the dataset was constructed in, or a larger one.
    seed
        Of the two halves and the bootstrap; None draws one number from torch's default generator.

    Returns
    -------
    Leakage
        Accuracy learned from the constructed dataset and from the original one, and chance.

    Raises
    ------
    ValueError
        No linear feature is robust at this radius, even on the samples it was chosen on; or a
        class has fewer than two samples.

    Examples
    --------
    >>> import torch
    >>> import advfeat as af
    >>> from advfeat import analysis
    >>> x, y = torch.rand(60, 4), torch.arange(60) % 2
    >>> data = torch.utils.data.TensorDataset(0.5 * x + 0.5 * y[:, None], y)
    >>> d_det = af.construct_det_dataset(torch.nn.Linear(4, 2), data, eps=0.2, steps=5)
    >>> found = analysis.leakage(d_det, data, data, eps=0.2, seed=0)
    >>> found.above_chance, found.reference > 0.9
    (False, True)
    """
    checks.number("eps", eps, low=0.0, strict=True)
    norm = checks.norm(norm)
    checks.seed(seed)
    cpu = torch.device("cpu")
    made, true, judged = (
        Stacked(samples.inputs.flatten(1).float(), samples.labels)
        for samples in (stacked(data, cpu) for data in (constructed, train, test))
    )
    classes = max(int(samples.labels.max()) for samples in (made, true, judged)) + 1
    drawn = seeding.resolve(seed)
    chosen_on, tested_on = _halves(true, drawn)
    weight = _most_robust(chosen_on, classes, eps, norm)
    found = linear_usefulness(weight, TensorDataset(*tested_on), eps=eps, norm=norm, seed=drawn)
    weight = weight[(found.kind == ROBUST).any(1)]

    def features(samples: Stacked) -> Tensor:
        scale = (true.inputs @ weight.T).std(0)
        return (samples.inputs - true.inputs.mean(0)) @ weight.T / scale

    def learned_from(samples: Stacked) -> Accuracy:
        if not len(weight):
            return Accuracy.of(judged.labels == samples.labels.bincount().argmax())
        answer = _logistic_regression(features(samples), samples.labels, classes)
        return Accuracy.of(answer(features(judged)).argmax(1) == judged.labels)

    chance = commonest(judged.labels)
    return Leakage(learned_from(made), learned_from(true), chance, len(weight), found)


def _halves(samples: Stacked, seed: int) -> tuple[Stacked, Stacked]:
    """Two halves of the samples at random, with half of each class."""
    if int(samples.labels.bincount().min()) < 2:
        checks.fail("train", "a class of fewer than two samples", "one half chooses, one tests")
    order = torch.randperm(len(samples.labels), generator=seeding.generator(seed))
    order = order[samples.labels[order].argsort(stable=True)]
    first, second = (
        Stacked(samples.inputs[half], samples.labels[half]) for half in (order[::2], order[1::2])
    )
    return first, second


def _most_robust(samples: Stacked, classes: int, eps: float, norm: Norm) -> Tensor:
    """For each class the linear feature of the largest robust usefulness, ``(C, d)``.

    Maximises (a^T m - eps ||a||_*) / std(a^T x), with m half the difference of the means of the
    class and of the rest, from the direction in which the numerator is largest.
    """
    own = F.one_hot(samples.labels, classes).float()
    if not bool((own.any(0) & ~own.all(0)).all()):
        checks.fail("train", "a class without samples", "every class needs samples of its own")
    weights = (own / own.sum(0) + (1 - own) / (1 - own).sum(0)) / 2  # (N, C), each column adds to 1
    half_gap = ((2 * own - 1) * weights).T @ samples.inputs
    # The largest a^T m - eps ||a||_* of features of length 1 is ||m|| - eps.
    if not bool((threat.size(half_gap, norm) > eps).any()):
        checks.fail("eps", eps, "no linear feature is robust here: class means are too close")
    weight = nn.Parameter(threat.steepest(half_gap, norm))

    def loss() -> Tensor:
        optimizer.zero_grad()
        values = samples.inputs @ weight.T
        variance = (weights * (values - (weights * values).sum(0)).square()).sum(0)
        gain = (weight * half_gap).sum(1) - eps * threat.size(weight, DUAL[norm])
        value = -(gain / variance.sqrt().clamp_min(1e-12)).sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer = _full_batch([weight])
    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weight.detach()


def _full_batch(parameters: Iterable[Tensor]) -> torch.optim.LBFGS:
    return torch.optim.LBFGS(parameters, max_iter=200, line_search_fn="strong_wolfe")


def _logistic_regression(features: Tensor, labels: Tensor, classes: int) -> nn.Linear:
    """Fit a linear classifier to the optimum (with a touch of weight decay, so there is one)."""
    answer = nn.Linear(features.shape[1], classes)
    nn.init.zeros_(answer.weight)
    nn.init.zeros_(answer.bias)
    optimizer = _full_batch(answer.parameters())

    def loss() -> Tensor:
        optimizer.zero_grad()
        decay = 1e-4 * answer.weight.square().sum()
        value = F.cross_entropy(answer(features), labels) + decay
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return answer
