"""TRADES (Zhang et al. 2019): cross-entropy on clean inputs plus a divergence under attack."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from advfeat import losses
from advfeat.attacks import PGD
from advfeat.model import Network
from advfeat.training._batches import TrainBatch
from advfeat.training._method import Example, as_example
from advfeat.training._pgd import PGDTraining


class Trades(PGDTraining):
    """Clean loss + ``beta`` * KL(clean prediction || attacked prediction)."""

    starts_beside_input = True

    def __init__(self, attack: PGD, *, beta: float, **common: Any) -> None:
        super().__init__(attack, **common)
        self._beta = beta

    def example(self, model: nn.Module, batch: TrainBatch, step: int) -> Example:
        """Return clean and attacked inputs."""
        attacked = self.perturb(model, batch, step).to(batch.inputs.dtype)
        return as_example((batch.inputs, attacked), batch)

    def step_attack(self, net: Network, inputs: Tensor, targets: Tensor | None) -> PGD:
        """Maximise the divergence from the clean logits, which are computed once."""
        clean = net.logits(inputs)
        return dataclasses.replace(
            self.current_attack, loss=lambda logits, _: losses.divergence(clean, logits)
        )

    def losses(self, logits: tuple[Tensor, ...], example: Example) -> Tensor:
        """Return both terms, for each sample."""
        clean, attacked = logits
        return super().losses(logits, example) + self._beta * losses.divergence(clean, attacked)
