"""MART (Wang et al. 2020): weighs the divergence by the model's doubt about the label."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from advfeat import checks, losses
from advfeat.attacks import PGD
from advfeat.training._batches import TrainBatch
from advfeat.training._method import Example, as_example
from advfeat.training._pgd import PGDTraining


class Mart(PGDTraining):
    """Boosted cross-entropy on attacked inputs + ``beta`` * weighted divergence."""

    starts_beside_input = True

    def __init__(self, attack: PGD, *, beta: float, **common: Any) -> None:
        super().__init__(attack, **common)
        self._beta = beta

    def example(self, model: nn.Module, batch: TrainBatch, step: int) -> Example:
        """Return clean and attacked inputs."""
        if batch.targets is not None:
            checks.fail("labels.shape", tuple(batch.targets.shape), "MART needs class indices (N,)")
        attacked = self.perturb(model, batch, step).to(batch.inputs.dtype)
        return as_example((batch.inputs, attacked), batch)

    def losses(self, logits: tuple[Tensor, ...], example: Example) -> Tensor:
        """Return both terms, for each sample."""
        clean, attacked = logits
        second = losses.doubted_divergence(clean, attacked, example.labels)
        return losses.boosted_cross_entropy(attacked, example.labels) + self._beta * second
