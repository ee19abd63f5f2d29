"""Adversarial training of Madry et al. (2018): cross-entropy on adversarial examples."""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advfeat import seeding, threat
from advfeat.attacks import PGD, Batch
from advfeat.attacks.pool import attack_batch
from advfeat.model import Network, Precision, attackable
from advfeat.training._batches import TrainBatch
from advfeat.training._method import AdversarialMethod, Example, Loss, as_example

AttackMode: TypeAlias = Literal["eval", "train"]

# Standard deviation of the start of TRADES and MART beside the input, in units of the bounds'
# width: at the input itself the divergence has no gradient. From the authors' code.
_START_NOISE = 0.001


class PGDTraining(AdversarialMethod):
    """Train on adversarial examples of the model as it is now."""

    # The divergence that TRADES and MART maximise is flat at the input.
    starts_beside_input = False

    def __init__(
        self,
        attack: PGD,
        *,
        mix: float,
        mode: AttackMode,
        precision: Precision,
        label_smoothing: float,
        loss: Loss | None,
        warmup: float,
        seed: int,
    ) -> None:
        super().__init__(attack.with_seed(seed), precision, label_smoothing, loss, warmup)
        self._mix, self._mode, self._seed = mix, mode, seed

    def example(self, model: nn.Module, batch: TrainBatch, step: int) -> Example:
        """Attack the samples that are not left clean."""
        clean = 0
        if self._mix:  # places are on the CPU: no waiting
            clean = int((batch.place < round(self._mix * batch.total)).sum())
        if clean == len(batch.labels):
            return as_example((batch.inputs,), batch)
        attacked = self.perturb(model, batch, step, clean).to(batch.inputs.dtype)
        inputs = attacked if clean == 0 else torch.cat([batch.inputs[:clean], attacked])
        return as_example((inputs,), batch)

    def perturb(self, model: nn.Module, batch: TrainBatch, step: int, clean: int = 0) -> Tensor:
        """Return adversarial inputs of the samples from ``clean`` on."""
        # Counted through all of training, so every step has new random starts.
        ids = batch.place[clean:].to(batch.inputs.device) + (step << 32)
        with attackable(model, precision=self._precision, train=self._mode == "train") as net:
            inputs = net.prepare(batch.inputs[clean:]).clamp_(*self.bounds)
            extras = {n: v[clean:] for n, v in (batch.extras or {}).items()}
            attacked = Batch(inputs, batch.labels[clean:], ids, extras=extras or None)
            targets = None if batch.targets is None else batch.targets[clean:]
            with net.given(attacked.extras):
                attack = self.step_attack(net, inputs, targets)
            if self.starts_beside_input and not attack.is_random:
                attacked = attacked._replace(start=self._start_beside(attack, attacked))
            return attack.result(attack_batch(attack, net, attacked))

    def step_attack(self, net: Network, inputs: Tensor, targets: Tensor | None) -> PGD:
        """Return the attack of this step; ``targets`` are class probabilities, if given."""
        attack = self.current_attack
        if targets is None or attack.loss != "cross_entropy":
            return attack
        return dataclasses.replace(
            attack, loss=lambda logits, _: F.cross_entropy(logits, targets, reduction="none")
        )

    def _start_beside(self, attack: PGD, batch: Batch) -> Tensor:
        keys = seeding.keys(self._seed, batch.ids)
        numbers = seeding.uniform(keys, 0, batch.inputs[0].numel()).view(batch.inputs.shape)
        scale = _START_NOISE * (self.bounds[1] - self.bounds[0])
        start = batch.inputs + scale * torch.special.ndtri(numbers).to(batch.inputs.dtype)
        return threat.project(start, batch.inputs, attack.eps, attack.norm, self.bounds)
