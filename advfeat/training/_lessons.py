"""What a step of training learns from: how its examples are made, and the loss on them."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advfeat import losses, seeding, threat
from advfeat.attacks import PGD, Batch
from advfeat.loading import Data, TrainBatch
from advfeat.metrics import Accuracy, accuracy, robust_accuracy
from advfeat.model import Precision, attackable
from advfeat.threat import Bounds

Objective: TypeAlias = Literal["pgd", "trades", "mart"]
Method: TypeAlias = Literal["pgd", "fast", "free"]
Mode: TypeAlias = Literal["eval", "train"]

# Where TRADES and MART begin beside the input: there the divergence has no gradient. Standard
# deviation in units of the box, from the authors' code.
_BESIDE = 0.001


class Example(NamedTuple):
    """What goes through the model, in one or two passes, and the labels."""

    inputs: tuple[Tensor, ...]
    labels: Tensor


class Lesson:
    """Standard training: the inputs as they are, and the cross-entropy."""

    figure = "val_accuracy"  # what the best epoch is judged by
    bounds: Bounds = (-torch.inf, torch.inf)
    rounds = 1  # updates from one batch

    def __init__(self, label_smoothing: float, precision: Precision) -> None:
        self._label_smoothing = label_smoothing
        self._precision: Precision = precision

    def begin_epoch(self) -> None:
        """Forget what is not to reach from one epoch into the next."""

    def example(self, model: nn.Module, rows: TrainBatch, step: int) -> Example:
        """What the model is to learn from these rows."""
        return Example((rows.inputs,), rows.labels)

    def loss(self, logits: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """One value for each sample."""
        return F.cross_entropy(
            logits[0], labels, reduction="none", label_smoothing=self._label_smoothing
        )

    def learned(self, example: Example) -> None:
        """Hear that the loss of an example went backward."""

    def measured(self, model: nn.Module, data: Data) -> dict[str, Accuracy]:
        """Figures of a model on validation data."""
        return {"val_accuracy": accuracy(model, data, progress=False)}

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold of the lesson."""
        return {}

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""


class Adversarial(Lesson):
    """Examples made by an attack; the losses of Madry et al., TRADES and MART."""

    figure = "val_robust_accuracy"

    def __init__(
        self,
        attack: PGD,
        objective: Objective,
        *,
        beta: float,
        mix: float,
        mode: Mode,
        label_smoothing: float,
        precision: Precision,
        seed: int,
    ) -> None:
        super().__init__(label_smoothing, precision)
        self.attack, self._objective = attack.with_seed(seed), objective
        self._beta, self._mix, self._mode, self._seed = beta, mix, mode, seed
        self.bounds = attack.bounds

    def example(self, model: nn.Module, rows: TrainBatch, step: int) -> Example:
        """Attack the rows that are not left clean; TRADES and MART train on both."""
        clean = int((rows.place < round(self._mix * rows.total)).sum())
        if clean == len(rows.labels):
            return Example((rows.inputs,), rows.labels)
        attacked = self.attacked(model, rows, step, clean).to(rows.inputs.dtype)
        if self._objective == "pgd":
            inputs = attacked if clean == 0 else torch.cat([rows.inputs[:clean], attacked])
            return Example((inputs,), rows.labels)
        return Example((rows.inputs, attacked), rows.labels)

    def attacked(self, model: nn.Module, rows: TrainBatch, step: int, clean: int = 0) -> Tensor:
        """Adversarial inputs of the rows from ``clean`` on."""
        # Numbered through all of training: every step's random starts are new.
        ids = rows.place[clean:].to(rows.inputs.device) + (step << 32)
        train = self._mode == "train"
        with attackable(model, precision=self._precision, train=train) as net:
            inputs = net.prepare(rows.inputs[clean:]).clamp_(*self.bounds)
            batch, attack = Batch(inputs, rows.labels[clean:], ids), self.attack
            if self._objective == "trades":
                # Once for all steps of the attack.
                certain = net.logits(inputs)
                attack = dataclasses.replace(
                    attack, loss=lambda logits, _: losses.divergence(certain, logits)
                )
            if self._objective != "pgd" and not attack.is_random:
                batch = batch._replace(start=self._beside(batch))
            return attack.result(attack.run(net, attack.init(net, batch)))

    def _beside(self, batch: Batch) -> Tensor:
        attack, keys = self.attack, seeding.keys(self._seed, batch.ids)
        numbers = seeding.uniform(keys, 0, batch.inputs[0].numel()).view(batch.inputs.shape)
        scale = _BESIDE * (self.bounds[1] - self.bounds[0])
        start = batch.inputs + scale * torch.special.ndtri(numbers).to(batch.inputs.dtype)
        return threat.project(start, batch.inputs, attack.eps, attack.norm, self.bounds)

    def loss(self, logits: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """The objective's loss: of one pass on examples, or of two, clean and attacked."""
        if self._objective == "pgd":
            return super().loss(logits, labels)
        clean, attacked = logits
        if self._objective == "trades":
            return super().loss(logits, labels) + self._beta * losses.divergence(clean, attacked)
        second = losses.doubted_divergence(clean, attacked, labels)
        return losses.boosted_cross_entropy(attacked, labels) + self._beta * second

    def measured(self, model: nn.Module, data: Data) -> dict[str, Accuracy]:
        """Accuracy, and robust accuracy by PGD-20 in the same ball."""
        return _robustness(model, data, self.attack, self._precision)


class Free(Lesson):
    """Each batch several times, each pass giving the gradient of weights and inputs at once.

    Shafahi et al. (2019). The perturbation goes on from batch to batch; it begins at zero in each
    epoch, so that a run can be resumed at one.
    """

    figure = "val_robust_accuracy"

    def __init__(self, attack: PGD, label_smoothing: float, precision: Precision) -> None:
        super().__init__(label_smoothing, precision)
        self._attack = attack
        self.bounds, self.rounds = attack.bounds, attack.steps
        self._delta: Tensor | None = None
        self._clean = torch.empty(0)

    def begin_epoch(self) -> None:
        """Begin at the inputs."""
        self._delta = None

    def example(self, model: nn.Module, rows: TrainBatch, step: int) -> Example:
        """The batch, perturbed by what was learned so far."""
        self._clean = rows.inputs
        moved = rows.inputs.detach().clone()
        if self._delta is not None and len(self._delta) >= len(moved):
            moved = self._projected(moved + self._delta[: len(moved)].to(moved.device))
        moved.requires_grad = True
        return Example((moved,), rows.labels)

    @torch.no_grad()
    def learned(self, example: Example) -> None:
        """Climb along the input gradient of the pass that trained the weights."""
        (inputs,) = example.inputs
        assert inputs.grad is not None
        direction = threat.steepest(inputs.grad, self._attack.norm)
        assert self._attack.step_size is not None
        moved = inputs + self._attack.step_size * direction
        self._delta = self._projected(moved) - self._clean

    def _projected(self, points: Tensor) -> Tensor:
        attack = self._attack
        return threat.project(points, self._clean, attack.eps, attack.norm, self.bounds)

    def measured(self, model: nn.Module, data: Data) -> dict[str, Accuracy]:
        """Accuracy, and robust accuracy by PGD-20 in the same ball."""
        return _robustness(model, data, self._attack, self._precision)

    def state(self) -> dict[str, Any]:
        """The perturbation."""
        return {"delta": self._delta}

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from a perturbation."""
        self._delta = state["delta"]


def _robustness(
    model: nn.Module, data: Data, attack: PGD, precision: Precision
) -> dict[str, Accuracy]:
    twenty = PGD(eps=attack.eps, norm=attack.norm, steps=20, bounds=attack.bounds)
    robust = robust_accuracy(model, data, attack=twenty, precision=precision, progress=False)
    return {"val_accuracy": robust.standard, "val_robust_accuracy": robust}
