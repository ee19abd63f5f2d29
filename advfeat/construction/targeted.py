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
from advfeat.threat import FeatureBounds, Norm

# Targets of a batch.
Choose: TypeAlias = Callable[[Network, Batch], Tensor]


def build_targeted(
    choose: Choose,
    model: nn.Module,
    data: Data,
    *,
    method: str,
    settings: dict[str, object],
    eps: float | Tensor,
    norm: Norm,
    steps: int,
    step_size: float | None,
    bounds: FeatureBounds,
    mask: Tensor | None,
    patience: int | None,
    options: BuildOptions,
) -> ConstructedDataset:
    checks.model(model)
    if not isinstance(eps, Tensor):
        checks.number("eps", eps, low=0.0, strict=True)
        own_step = eps / 5
    else:  # by feature: steps are in multiples of it
        own_step = 1 / 5
    attack = PGD(
        eps=eps,
        norm=norm,
        steps=steps,
        step_size=own_step if step_size is None else step_size,
        targeted=True,
        patience=patience,
        bounds=bounds,
        mask=mask,
    )
    recipe = TargetedDataset(method, attack, choose, settings)
    return build_dataset(model, indexed_source(model, data, options), recipe, options)


class TargetedDataset(DatasetRecipe):
    """Every sample attacked towards a chosen class, and labelled so."""

    attack: PGD

    def __init__(
        self, method: str, attack: PGD, choose: Choose, settings: dict[str, object]
    ) -> None:
        self.method, self.attack = method, attack
        self._choose, self._settings = choose, settings

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
        delta, norm, eps = images - batch.inputs, self.attack.norm, self.attack.eps
        if isinstance(eps, Tensor):
            size = threat.weighted_size(delta, norm, eps)
        else:
            size = threat.size(delta, norm)
        return {
            "labels": attacked.labels,
            "source_labels": batch.labels,
            "success": is_success(net.logits(images), attacked.labels, targeted=True),
            "size": size,
        }
