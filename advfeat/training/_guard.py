"""Fast adversarial training's guard against catastrophic overfitting."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from advfeat.attacks import PGD
from advfeat.loading import TrainBatch
from advfeat.model import attackable
from advfeat.training._lessons import Adversarial
from advfeat.training._ranks import Ranks

# Steps between two looks. Collapse takes a few dozen steps, and a look costs what six steps do.
EVERY = 20
# Collapse: PGD leaves less than this share of what the training attack leaves ...
_SHARE = 0.5
# ... and the difference is more than a batch's chance.
_DIFFERENCE = 0.1
# Of the attack that tells, PGD as strong as the evaluation of Wong et al. needs to show collapse.
_STEPS = 10


class Guard:
    """Looks whether a model has learned to fool the one-step attack alone, and takes that back.

    Wong et al. (2020) found that fast training fails all at once: within a few dozen steps the
    accuracy under PGD falls to zero, while that under FGSM rises. So on a batch of every 20
    steps, and the last one of an epoch, both are measured. When PGD leaves less than half of what
    FGSM leaves, weights and optimiser go back to the last look that was good, and from there on
    the training attack has one step more, of ``2 * eps / steps``: they can cross the ball from any
    start. No validation data is used.
    """

    def __init__(
        self,
        lesson: Adversarial,
        ranks: Ranks,
        snapshot: Callable[[], dict[str, Any]],
        restore: Callable[[dict[str, Any]], None],
    ) -> None:
        self._lesson, self._ranks = lesson, ranks
        self._snapshot, self._restore = snapshot, restore
        self._good = copy.deepcopy(snapshot())

    def look(self, model: nn.Module, rows: TrainBatch, step: int) -> None:
        """Keep what was learned since the last look, or take it back and add a step."""
        one, many = self._standing(model, rows, step)
        if one - many <= _DIFFERENCE or many >= _SHARE * one:
            self._good = copy.deepcopy(self._snapshot())
            return
        self._restore(copy.deepcopy(self._good))
        self.set_steps(self._lesson.attack.steps + 1)

    def set_steps(self, steps: int) -> None:
        """Give the training attack more steps than one."""
        attack = self._lesson.attack
        size = 2 * float(attack.eps) / steps
        self._lesson.attack = dataclasses.replace(attack, steps=steps, step_size=size)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold of the guard."""
        return {"steps": self._lesson.attack.steps, "good": self._good}

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        if state["steps"] > 1:
            self.set_steps(state["steps"])
        self._good = state["good"]

    def _standing(self, model: nn.Module, rows: TrainBatch, step: int) -> tuple[float, float]:
        """Share of a batch that is right under the training attack, and under PGD."""
        training = self._lesson.attack
        strong = PGD(eps=training.eps, norm=training.norm, steps=_STEPS, bounds=training.bounds)
        attacked = (
            self._lesson.attacked(model, rows, step),
            strong(model, rows.inputs, rows.labels),
        )
        with attackable(model) as net:
            right = [(net.logits(inputs).argmax(1) == rows.labels).sum() for inputs in attacked]
        counts = torch.stack([*right, torch.full_like(right[0], len(rows.labels))])
        one, many, total = self._ranks.summed(counts).tolist()
        return one / total, many / total
