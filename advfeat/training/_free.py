"""Free adversarial training (Shafahi et al. 2019): one backward pass gives both gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from advfeat import threat
from advfeat.attacks import PGD
from advfeat.model import Precision
from advfeat.training._batches import TrainBatch
from advfeat.training._method import AdversarialMethod, Example, Loss, as_example


class FreeAdversarial(AdversarialMethod):
    """Train on each batch several times; each pass moves weights and inputs at once.

    The perturbation passes from batch to batch. It starts at zero in each epoch, so that a run can
    resume at an epoch.
    """

    def __init__(
        self,
        attack: PGD,
        *,
        precision: Precision,
        label_smoothing: float,
        loss: Loss | None,
        warmup: float,
    ) -> None:
        super().__init__(attack, precision, label_smoothing, loss, warmup)
        self.updates_per_batch = attack.steps
        self._delta: Tensor | None = None
        self._clean = torch.empty(0)

    def begin_epoch(self) -> None:
        """Start at the inputs."""
        self._delta = None

    def example(self, model: nn.Module, batch: TrainBatch, step: int) -> Example:
        """Return the batch with the perturbation so far."""
        self._clean = batch.inputs
        moved = batch.inputs.detach().clone()
        if self._delta is not None and len(self._delta) >= len(moved):
            moved = self._project(moved + self._delta[: len(moved)].to(moved.device))
        moved.requires_grad = True
        return as_example((moved,), batch)

    @torch.no_grad()
    def after_backward(self, example: Example) -> None:
        """Take a step of the attack along the input gradient of the pass that trained."""
        (inputs,) = example.inputs
        assert inputs.grad is not None
        direction = threat.steepest(inputs.grad, self.attack.norm)
        step_size = self.current_attack.step_size
        assert step_size is not None
        moved = inputs + step_size * direction
        self._delta = self._project(moved) - self._clean

    def _project(self, points: Tensor) -> Tensor:
        attack = self.current_attack
        return threat.project(points, self._clean, attack.eps, attack.norm, self.bounds)

    def state_dict(self) -> dict[str, Any]:
        """Return the perturbation."""
        return {"delta": self._delta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a perturbation."""
        self._delta = state["delta"]
