"""Fast adversarial training's guard against catastrophic overfitting."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from advfeat.attacks import PGD
from advfeat.distributed import Process
from advfeat.model import attackable
from advfeat.training._batches import TrainBatch
from advfeat.training._pgd import PGDTraining

# Steps between two checks. Collapse takes a few dozen steps, and a check costs what six steps do.
EVERY = 20
# Collapse: PGD leaves less than this fraction of what the training attack leaves ...
_FRACTION = 0.5
# ... and the difference is more than a batch's chance.
_DIFFERENCE = 0.1
# Of the attack that tells, PGD as strong as the evaluation of Wong et al. needs to show collapse.
_STEPS = 10


class OverfittingGuard:
    """Checks whether a model has learned to fool the one-step attack alone, and undoes that.

    Wong et al. (2020) found that fast training fails all at once: within a few dozen steps the
    accuracy under PGD falls to zero, while that under FGSM rises. So on a batch of every 20
    steps, and the last one of an epoch, both are measured. When PGD leaves less than half of what
    FGSM leaves, weights and optimiser go back to the last check that was good, and from there on
    the training attack has one step more, of ``2 * eps / steps``: they can cross the ball from any
    start. No validation data is used.
    """

    def __init__(
        self,
        method: PGDTraining,
        process: Process,
        snapshot: Callable[[], dict[str, Any]],
        restore: Callable[[dict[str, Any]], None],
    ) -> None:
        self._method, self._process = method, process
        self._snapshot, self._restore = snapshot, restore
        self._good = copy.deepcopy(snapshot())

    def check(self, model: nn.Module, batch: TrainBatch, step: int) -> None:
        """Keep what was learned since the last check, or undo it and add a step."""
        one, many = self._accuracies(model, batch, step)
        if one - many <= _DIFFERENCE or many >= _FRACTION * one:
            self._good = copy.deepcopy(self._snapshot())
            return
        self._restore(copy.deepcopy(self._good))
        self._set_steps(self._method.attack.steps + 1)

    def _set_steps(self, steps: int) -> None:
        """Give the training attack more steps than one."""
        attack = self._method.attack
        size = 2 * float(attack.eps) / steps
        self._method.attack = dataclasses.replace(attack, steps=steps, step_size=size)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold of the guard."""
        return {"steps": self._method.attack.steps, "good": self._good}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        if state["steps"] > 1:
            self._set_steps(state["steps"])
        self._good = state["good"]

    def _accuracies(self, model: nn.Module, batch: TrainBatch, step: int) -> tuple[float, float]:
        """Fraction of a batch that is right under the training attack, and under PGD."""
        training = self._method.current_attack
        strong = PGD(eps=training.eps, norm=training.norm, steps=_STEPS, bounds=training.bounds)
        attacked = (
            self._method.perturb(model, batch, step),
            strong(model, batch.inputs, batch.labels, extras=batch.extras),
        )
        with attackable(model) as net, net.given(batch.extras):
            right = [(net.logits(inputs).argmax(1) == batch.labels).sum() for inputs in attacked]
        counts = torch.stack([*right, torch.full_like(right[0], len(batch.labels))])
        one, many, total = self._process.all_reduce_sum(counts * (not batch.idle)).tolist()
        return one / total, many / total
