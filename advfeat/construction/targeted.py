"""D_det and D_rand: images attacked towards a class, and labelled so."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor, nn

from advfeat import checks, threat
from advfeat.attacks import PGD, Batch
from advfeat.construction.builder import build_dataset, indexed_source
from advfeat.construction.recipe import BuildOptions, DatasetRecipe
from advfeat.datasets import ConstructedDataset
from advfeat.loading import Data
from advfeat.losses import is_success
from advfeat.model import Network
from advfeat.threat import Bounds, Norm

# Targets of a batch.
Choose: TypeAlias = Callable[[Network, Batch], Tensor]


def build_targeted(
    choose: Choose,
    model: nn.Module,
    data: Data,
    *,
    method: str,
    settings: dict[str, object],
    eps: float,
    norm: Norm,
    steps: int,
    step_size: float | None,
    bounds: Bounds,
    patience: int | None,
    options: BuildOptions,
) -> ConstructedDataset:
    checks.model(model)
    checks.number("eps", eps, low=0.0, strict=True)
    attack = PGD(
        eps=eps,
        norm=norm,
        steps=steps,
        step_size=eps / 5 if step_size is None else step_size,
        targeted=True,
        patience=patience,
        bounds=bounds,
    )
    recipe = TargetedDataset(method, attack, choose, settings)
    return build_dataset(model, indexed_source(data, options), recipe, options)


class TargetedDataset(DatasetRecipe):
    """Every sample attacked towards a chosen class, and labelled so."""

    def __init__(
        self, method: str, attack: PGD, choose: Choose, settings: dict[str, object]
    ) -> None:
        self.method, self.attack = method, attack
        self._choose, self._settings, self._norm = choose, settings, attack.norm

    def settings(self, model: nn.Module) -> dict[str, object]:
        """How targets are chosen."""
        return self._settings

    def begin(self, net: Network, batch: Batch) -> Batch:
        """The targets for labels."""
        return batch._replace(labels=self._choose(net, batch))

    def describe(
        self, net: Network, batch: Batch, attacked: Batch, images: Tensor
    ) -> dict[str, Tensor]:
        """Whether the model says the target, and how far the image has moved."""
        return {
            "labels": attacked.labels,
            "source_labels": batch.labels,
            "success": is_success(net.logits(images), attacked.labels, targeted=True),
            "size": threat.size(images - batch.inputs, self._norm),
        }
