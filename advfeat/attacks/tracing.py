"""What an attack does at each step, for a callback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from advfeat import checks, threat
from advfeat.attacks.samples import Batch
from advfeat.losses import is_success
from advfeat.model import Evaluation, Network
from advfeat.threat import Norm


class AttackStep(NamedTuple):
    """What `on_step` is called with: each tensor ``(N,)``, on the device of the inputs.

    Of the point at which the step takes its gradient; for a sample that is finished, of the last
    such point. `SmoothedPGD` and `MinimumPGD` take gradients at noisy points.

    Attributes
    ----------
    step
        Steps taken before, from 0.
    loss
        The objective that is maximized.
    gradient_norm
        l2 norm of its gradient by the inputs.
    success
        Whether the model is fooled there, bool.
    distance
        From the clean input, in the attack's norm.
    """

    step: int
    loss: Tensor
    gradient_norm: Tensor
    success: Tensor
    distance: Tensor


OnStep = Callable[[AttackStep], object]


class _Recorder(Network):
    """A network that keeps the first gradient of each step."""

    def __init__(self, net: Network) -> None:
        self._net = net
        self.first: tuple[Tensor, Evaluation] | None = None

    def __getattr__(self, name: str) -> Any:
        """Everything else is the network's."""
        return getattr(self._net, name)

    def logits_gradient(
        self,
        inputs: Tensor,
        objective: Callable[[Tensor], Tensor],
        straight_through: bool = False,
    ) -> Evaluation:
        """Gradient of the network, which is kept."""
        found = self._net.logits_gradient(inputs, objective, straight_through)
        if self.first is None:
            self.first = inputs, found
        return found


def run_traced(
    attack: Any, net: Network, batch: Batch, norm: Norm, targeted: bool, on_step: OnStep
) -> Any:
    """Attack one batch and return its last state; call ``on_step`` after every step."""
    with net.given(batch.extras):
        state = attack.init(net, batch)
        before: AttackStep | None = None
        for number in range(attack.evaluations(state)):
            done = attack.finished(state)
            if bool(done.all()):
                break
            recorder = _Recorder(net)
            stepped = attack.step(recorder, state)
            if recorder.first is None:
                checks.fail("on_step", "a callable", "this attack takes no gradient in its steps")
            points, found = recorder.first
            seen = AttackStep(
                number,
                found.value,
                threat.size(found.gradient, "l2"),
                is_success(found.output, batch.labels, targeted),
                threat.size(points - batch.inputs, norm),
            )
            # A finished sample stays as it is, as where it leaves the pool.
            before = seen if before is None else _kept(done, before, seen)
            state = _kept(done, state, stepped)
            on_step(before)
    return state


def _kept(done: Tensor, old: Any, new: Any) -> Any:
    """The old values of finished samples, the new ones of the others."""
    if isinstance(new, Tensor):
        return torch.where(done.view(-1, *(1,) * (new.ndim - 1)), old, new)
    if isinstance(new, tuple):
        return type(new)(*(_kept(done, *pair) for pair in zip(old, new, strict=True)))
    return new
