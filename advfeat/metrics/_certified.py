"""Certified accuracy in l2 by randomized smoothing (Cohen et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from advfeat import checks, plots, seeding
from advfeat.attacks import Batch
from advfeat.attacks.base import prepare_batch
from advfeat.loading import Data, Source
from advfeat.metrics._outcome import Accuracy
from advfeat.model import Network, attackable, device_of
from advfeat.progress import with_progress
from advfeat.results import Result
from advfeat.statistics import binomial_test
from advfeat.suggestions import suggests
from advfeat.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ABSTAINED = -1
# A warning is given where more than this fraction of the samples has no certificate.
_MANY_ABSTAINED = 0.5


@dataclass(frozen=True, eq=False, repr=False)
class CertifiedAccuracy(Result):
    """Prediction of the smoothed classifier on each sample, and the l2 radius where it is constant.

    Attributes
    ----------
    prediction
        Class of the smoothed classifier, int64 ``(total,)``; -1 where it abstains.
    radius
        No input closer than this in l2 has another prediction, with probability at least
        ``1 - alpha`` for each sample; ``(total,)``, 0 where it abstains.
    correct
        Whether the prediction is the label, bool ``(total,)``.
    index
        Sample number of each sample, int64 ``(total,)``.
    sigma
        Standard deviation of the noise.
    n0, n, alpha
        Noisy inputs to choose the class and to count its votes, and the error probability.
    """

    prediction: Tensor
    radius: Tensor
    correct: Tensor
    index: Tensor
    sigma: float
    n0: int
    n: int
    alpha: float

    @property
    def distance(self) -> Tensor:
        """Certified distance of each sample, ``(total,)``: 0 where it is wrong or abstains.

        A lower bound of what `advfeat.metrics.robustness_curve` measures on the smoothed classifier
        from above; `advfeat.plots.robustness_curves` draws both.
        """
        return torch.where(self.correct, self.radius, 0.0)

    @property
    def abstained(self) -> int:
        """Number of samples without a prediction."""
        return int((self.prediction == ABSTAINED).sum())

    def at(self, eps: float) -> Accuracy:
        """Certified accuracy at one radius: the fraction correct and certified beyond ``eps``."""
        checks.number("eps", eps, low=0.0)
        return Accuracy.of(self.distance > eps, self.index)

    def table(self, eps: Sequence[float]) -> list[dict[str, float]]:
        """Certified accuracy at several radii."""
        return [{"eps": radius, "certified_accuracy": float(self.at(radius))} for radius in eps]

    def curve(self) -> tuple[Tensor, Tensor]:
        """Radii where certified accuracy falls, in order from 0, and its value from each on."""
        radii: Tensor = torch.unique(torch.cat([torch.zeros(1), self.distance]))
        return radii, torch.stack([(self.distance > r).double().mean() for r in radii])

    @property
    def median(self) -> float:
        """Median certified distance."""
        return float(self.distance.median())

    def _summary(self) -> str:
        return (
            f"{len(self.correct)} samples, sigma {self.sigma:g}, certified at 0: "
            f"{float(self.at(0.0)):.4f}, median radius {self.median:.4g} in l2"
        )

    def _content(self) -> Sequence[str | Table]:
        radii = [self.sigma * step / 2 for step in range(7)]
        rows = [(f"{r:g}", self.at(r)) for r in radii]
        return [
            f"{len(self.correct)} samples, {self.abstained} abstained; sigma {self.sigma:g}, n0 "
            f"{self.n0}, n {self.n}, alpha {self.alpha:g}",
            Table(("l2 radius", "certified accuracy"), rows),
        ]

    def plot(self, ax: Axes | None = None, *, empirical: Any = None) -> Axes:
        """Certified accuracy over the radius.

        Parameters
        ----------
        ax
            Axes to draw into; by default those of a new figure.
        empirical
            Also drawn: a `RobustnessCurve` of the same smoothed classifier, or distances.

        Returns
        -------
        matplotlib.axes.Axes
        """
        ax = plots.new_axes(ax)
        shown = {"certified": self} | ({} if empirical is None else {"under attack": empirical})
        plots.robustness_curves(shown, norm="l2", ax=ax)
        return ax


@suggests
@checks.warns_once()
@torch.no_grad()
def certified_accuracy(
    model: nn.Module,
    data: Data,
    *,
    sigma: float,
    n0: int = 100,
    n: int = 100_000,
    alpha: float = 0.001,
    batch_size: int | None = None,
    seed: int | torch.Generator | None = 0,
    progress: bool | None = None,
) -> CertifiedAccuracy:
    """Certify the smoothed classifier of a model: the class it gives most often under noise.

    For each sample, ``n0`` noisy copies choose a class, and of ``n`` further ones those that the
    model gives that class are counted. The one-sided Clopper-Pearson bound p of its probability
    certifies the radius ``sigma * Phi^-1(p)``; with p of at most one half it abstains (Cohen et
    al. 2019, algorithm CERTIFY). What is certified is the smoothed classifier, not the model
    itself. Noise is added to the inputs as they are, and not clipped to their bounds.

    Parameters
    ----------
    model
        Any module that returns class logits; one that was trained with noise of this size, for
        another is seldom constant under it.
    data
        As in `accuracy`. Few samples are usual: each takes ``n0 + n`` forward passes.
    sigma
        Standard deviation of the noise, in the units of the inputs. The paper uses 0.25, 0.5 and 1
        for inputs in [0, 1].
    n0, n
        Noisy inputs to choose the class and to count its votes; defaults are the paper's. No radius
        is above ``sigma * Phi^-1(alpha ** (1 / n))``: 3.8 sigma for the default, 3.2 sigma for
        10,000.
    alpha
        Probability that a certificate is wrong, for each sample; default the paper's.
    batch_size
        Noisy inputs to a forward pass; by default the loader's own; for a dataset 128, up to
        1024 on a GPU.
    seed
        Of the noise; a sample's noise depends on it and the sample's index.
    progress
        As in `accuracy`.

    Returns
    -------
    CertifiedAccuracy
        Predictions and radii, with ``.at(eps)``, ``.curve()`` and ``.plot()``.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause, before any work is done.

    Warns
    -----
    ResultWarning
        Where most samples have no certificate.

    Examples
    --------
    >>> import torch
    >>> from advfeat.metrics import certified_accuracy
    >>> data = torch.utils.data.TensorDataset(torch.eye(3), torch.tensor([0, 1, 0]))
    >>> certified = certified_accuracy(torch.nn.Identity(), data, sigma=0.25, n=1000)
    >>> certified.at(0.0).count, certified.prediction.tolist()
    (2, [0, 1, 2])
    """
    checks.number("sigma", sigma, low=0.0, strict=True)
    checks.count("n0", n0, low=1)
    checks.count("n", n, low=1)
    checks.number("alpha", alpha, low=0.0, strict=True)
    if alpha >= 1:
        checks.fail("alpha", alpha, "a probability below 1, such as 0.001")
    if alpha ** (1 / n) <= 0.5:
        least = math.floor(math.log(alpha) / math.log(0.5)) + 1
        checks.fail("n", n, f"alpha={alpha:g} certifies nothing with fewer than {least}")
    checks.seed(seed)
    checks.model(model)
    source = Source(data, batch_size, device_of(model))
    votes = _Votes(seeding.resolve(seed), float(sigma), source.batch_size)
    found: list[tuple[int, float, bool, int]] = []
    batches = with_progress(
        source.batches(device_of(model)),
        total=source.batch_count,
        label="certified accuracy",
        progress=progress,
    )
    with attackable(model, purpose="predictions") as net:
        for samples in batches:
            everywhere = (-math.inf, math.inf)
            batch = prepare_batch(
                net, samples.inputs, samples.labels, samples.ids, everywhere, extras=samples.entries
            )
            with net.given(batch.extras):
                for place, label in enumerate(batch.labels.tolist()):
                    chosen, p = votes.certify(net, batch, place, n0, n, alpha)
                    radius = sigma * NormalDist().inv_cdf(p) if p > 0.5 else 0.0
                    chosen = chosen if radius > 0 else ABSTAINED
                    found.append((chosen, radius, chosen == label, int(batch.ids[place])))
    predictions, radii, correct, index = zip(*found, strict=True)
    result = CertifiedAccuracy(
        torch.tensor(predictions, device="cpu"),
        torch.tensor(radii, dtype=torch.float64, device="cpu"),
        torch.tensor(correct, device="cpu"),
        torch.tensor(index, device="cpu"),
        sigma=float(sigma),
        n0=n0,
        n=n,
        alpha=float(alpha),
    )
    if result.abstained > _MANY_ABSTAINED * len(found):
        checks.warn(
            f"certified accuracy: {result.abstained} of {len(found)} samples have no class that "
            f"the model gives in most of the noise of sigma={sigma:g}; train the model with such "
            "noise, or pass a smaller sigma",
            topic="abstained",
        )
    return result


class _Votes:
    """Counts what a model predicts on noisy copies of a sample."""

    def __init__(self, seed: int, sigma: float, batch_size: int) -> None:
        self._seed, self._sigma, self._batch_size = seed, sigma, batch_size

    def certify(
        self, net: Network, batch: Batch, place: int, n0: int, n: int, alpha: float
    ) -> tuple[int, float]:
        """Class of a sample of the batch, and the lower bound of its probability."""
        chosen = int(self._count(net, batch, place, 0, n0)[:-1].argmax())
        count = int(self._count(net, batch, place, n0, n)[chosen])
        return chosen, lower_bound(count, n, alpha)

    def _count(self, net: Network, batch: Batch, place: int, first: int, number: int) -> Tensor:
        """Votes for each class ``(C + 1,)``, from copies ``first`` on; the last are for none."""
        inputs, ids = batch.inputs[place : place + 1], batch.ids[place : place + 1]
        classes = net.class_count(batch.inputs)
        key, votes = seeding.keys(self._seed, ids), ids.new_zeros(classes + 1)
        for begin in range(first, first + number, self._batch_size):
            end = min(begin + self._batch_size, first + number)
            draws = torch.arange(begin, end, device=ids.device)
            uniform = seeding.uniform(key.expand(len(draws)), draws, inputs.numel())
            noise = torch.special.ndtri(uniform).view(-1, *inputs.shape[1:])
            with net.selected(torch.full_like(draws, place)):
                logits = net.logits(inputs + self._sigma * noise)
            # NaN among the logits is no class at all.
            predicted = logits.argmax(1).where(~logits.isnan().any(1), classes)
            votes += torch.bincount(predicted, minlength=classes + 1)
        return votes


def lower_bound(count: int, total: int, alpha: float) -> float:
    """One-sided Clopper-Pearson lower bound of a probability, with confidence ``1 - alpha``."""
    if count == 0:
        return 0.0
    low, high = 0.0, count / total
    for _ in range(60):
        middle = (low + high) / 2
        if binomial_test(count, total, middle) < alpha:
            low = middle
        else:
            high = middle
    return low  # the probability of so many votes is below alpha for it
