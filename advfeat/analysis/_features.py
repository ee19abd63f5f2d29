"""What several questions need: features attacked as if they were logits, samples in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from advfeat import checks, seeding, threat
from advfeat.attacks import PGD, Batch
from advfeat.attacks.base import prepare_batch
from advfeat.attacks.pool import attack_batch
from advfeat.loading import Data, Source
from advfeat.model import Network, device_of
from advfeat.threat import Bounds, Norm


class _Features:
    """A network whose layer stands where an attack looks for logits."""

    def __init__(self, net: Network) -> None:
        self.logits = net.features
        self.logits_gradient = net.features_gradient
        self.given = net.given
        self.selected = net.selected


class Stacked(NamedTuple):
    """All samples of a dataset, in order."""

    inputs: Tensor  # (N, ...)
    labels: Tensor  # (N,) int64


def attack_features(net: Network, batch: Batch, pgd: PGD) -> Tensor:
    """Climb a loss of the features ``(N, F)`` and the batch's labels; the best iterates."""
    view = cast(Network, _Features(net))
    return pgd.result(attack_batch(pgd, view, batch))


def feature_attack(
    eps: float, norm: Norm, steps: int, bounds: Bounds, loss: Callable[[Tensor, Tensor], Tensor]
) -> PGD:
    """PGD for a loss of features: long steps, of which the best iterate is returned."""
    checks.number("eps", eps, low=0.0, strict=True)
    return PGD(
        eps=eps, norm=norm, steps=steps, step_size=eps / 4, bounds=bounds, loss=loss, returns="best"
    )  # fmt: skip


def stacked(data: Data, device: torch.device, batch_size: int | None = None) -> Stacked:
    """Read all samples into memory."""
    found = list(Source(data, batch_size).batches(device))
    inputs = torch.cat([batch.inputs for batch in found])
    labels = torch.cat([batch.labels for batch in found])
    checks.labels(labels, inputs)
    broken = (~inputs.flatten(1).isfinite()).any(1)
    if bool(broken.any()):
        first = int(broken.nonzero()[0])
        checks.fail("data", f"NaN or infinite in sample {first}", "remove or repair such samples")
    return Stacked(inputs, labels.to(torch.int64))


def commonest(labels: Tensor) -> float:
    """Fraction of the commonest class: what a constant answer gets right."""
    return int(labels.bincount().max()) / len(labels)


def batches(
    net: Network, model: nn.Module, data: Data, bounds: Bounds, batch_size: int | None = None
) -> list[Batch]:
    """All samples as an attack takes them: checked, float32 at least, within the bounds."""
    source = Source(data, batch_size)
    return [
        prepare_batch(net, found.inputs, found.labels, found.ids, bounds, extras=found.entries)
        for found in source.batches(device_of(model))
    ]


def nearby(batch: Batch, draws: int, eps: float, norm: Norm, seed: int) -> Iterator[Tensor]:
    """The batch's inputs moved to random points of the ball, by the seed and the sample's index."""
    keys, width = seeding.keys(seed, batch.ids), batch.inputs[0].numel()
    for draw in range(draws):
        delta = threat.point_in_ball(seeding.uniform(keys, draw, width + 1), eps, norm)
        yield batch.inputs + delta.view(batch.inputs.shape).to(batch.inputs.dtype)


def named_models(models: object) -> dict[str, nn.Module]:
    """Check that models have names."""
    if not isinstance(models, Mapping) or not models:
        raise TypeError(
            f"models: expected models by name, {{'standard': model}}, got {type(models).__name__}"
        )
    for model in models.values():
        checks.model(model)
    return {str(name): model for name, model in models.items()}
