"""What a frozen encoder offers to a linear classifier (transfer of constructed datasets)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advfeat import checks
from advfeat.analysis._features import commonest
from advfeat.loading import Data, Source
from advfeat.metrics import Accuracy
from advfeat.model import Layer, attackable, device_of
from advfeat.results import Result


@dataclass(frozen=True, eq=False, repr=False)
class LinearProbe(Result):
    """A linear classifier on frozen features; see `linear_probe`.

    Attributes
    ----------
    accuracy
        On the test data.
    chance
        Fraction of the commonest class of the test data.
    weight, bias
        Of the classifier, float64 ``(C, F)`` and ``(C,)``, on features as the encoder gives them.
    """

    accuracy: Accuracy
    chance: float
    weight: Tensor
    bias: Tensor

    @property
    def above_chance(self) -> bool:
        """Whether the whole 95% interval of ``accuracy`` lies above chance."""
        return self.accuracy.interval[0] > self.chance

    def _summary(self) -> str:
        low, high = self.accuracy.interval
        return (
            f"linear probe of {self.weight.shape[1]} features: {self.accuracy:.1%} "
            f"({low:.1%} to {high:.1%}), chance {self.chance:.1%}"
        )


def linear_probe(
    encoder: nn.Module,
    train: Data,
    test: Data,
    *,
    layer: Layer = None,
    ridge: float = 1e-3,
    batch_size: int | None = None,
) -> LinearProbe:
    """Fit a linear classifier to an encoder's frozen features, in closed form, and test it.

    Least squares onto one-hot labels with a ridge penalty. With ``train`` a constructed dataset
    (D_R, D_NR, D_det) it measures whether the features of that dataset are useful to an encoder
    that was trained in another way, as Li et al. (2023) ask of self-supervised encoders: they find
    D_NR far less useful there than D_R.

    Parameters
    ----------
    encoder
        Any module; it is not trained.
    train, test
        Data that the classifier is fitted to, and original data that it is tested on: datasets,
        loaders or lists of batches, ``(inputs, labels)``.
    layer
        The features, as ``layer`` of `advfeat.construct_robust_dataset`: by default the input of
        the Linear that is called last.
    ridge
        Ridge penalty, as a fraction of the mean variance of the features; at least 0.
    batch_size
        As in `advfeat.accuracy`.

    Returns
    -------
    LinearProbe
        Accuracy on the test data with its interval, and the classifier.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause.

    Examples
    --------
    >>> import torch
    >>> from advfeat import analysis
    >>> data = torch.utils.data.TensorDataset(torch.eye(3).repeat(4, 1), torch.arange(12) % 3)
    >>> found = analysis.linear_probe(torch.nn.Identity(), data, data, layer=lambda x: x)
    >>> float(found.accuracy), found.weight.shape
    (1.0, torch.Size([3, 3]))
    """
    checks.number("ridge", ridge, low=0.0)
    features, labels = _features(encoder, train, layer, batch_size)
    tested, true = _features(encoder, test, layer, batch_size)
    classes = int(max(labels.max(), true.max())) + 1
    mean = features.mean(0)
    centred = features - mean
    onehot = torch.nn.functional.one_hot(labels, classes).double()
    penalty = ridge * float(centred.square().sum() / features.shape[1]) + 1e-12
    gram = centred.T @ centred + penalty * torch.eye(features.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(gram, centred.T @ (onehot - onehot.mean(0))).T
    bias = onehot.mean(0) - weight @ mean
    right = (tested @ weight.T + bias).argmax(1) == true
    return LinearProbe(Accuracy.of(right), commonest(true), weight, bias)


def _features(
    encoder: nn.Module, data: Data, layer: Layer, batch_size: int | None
) -> tuple[Tensor, Tensor]:
    """Features of all samples in float64, and labels."""
    found, labels = [], []
    with attackable(encoder, layer=layer) as net:
        for batch in Source(data, batch_size).batches(device_of(encoder)):
            checks.labels(batch.labels, batch.inputs)
            found.append(net.features(net.prepare(batch.inputs)).detach().flatten(1).cpu().double())
            labels.append(batch.labels.cpu().to(torch.int64))
    features = torch.cat(found)
    broken = int((~features.isfinite()).any(1).sum())
    if broken:
        checks.fail("encoder", f"NaN or infinite features on {broken} samples", "check the layer")
    return features, torch.cat(labels)
