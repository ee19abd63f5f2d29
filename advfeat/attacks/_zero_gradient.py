"""Square Attack on the samples for which a model gives no gradient at all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from advfeat import losses, threat
from advfeat.attacks._square import Square, SquareState
from advfeat.attacks.samples import Batch
from advfeat.model import Network


@dataclass(frozen=True, kw_only=True)
class SquareOnZeroGradients(Square):
    """Square Attack, run only on samples whose margin has no usable gradient at the input.

    Every other sample is finished at once, after one gradient. A stage of ensembles, whose other
    attacks cannot move where the gradient is zero (rounding, thresholds, saturated outputs).

    Examples
    --------
    >>> SquareOnZeroGradients(eps=0.1, norm="linf", queries=100).queries
    100
    """

    def init(self, net: Network, batch: Batch) -> SquareState:
        """Start the samples without a gradient; the others have spent their queries."""
        state = super().init(net, batch)
        spent, margin = evaluate_gradient(net, batch.inputs, batch.labels, self.targeted)
        return state._replace(
            step=torch.where(spent, self.max_evaluations, state.step),
            current=torch.where(
                threat.per_sample(spent, state.current), batch.inputs, state.current
            ),
            value=torch.where(spent, margin.to(state.value.dtype), state.value),
        )


def evaluate_gradient(
    net: Network, inputs: Tensor, labels: Tensor, targeted: bool = False
) -> tuple[Tensor, Tensor]:
    """Whether each sample's margin has a usable gradient, bool ``(N,)``, and the margin."""
    found = net.logits_gradient(inputs, losses.objective("margin", labels, targeted))
    entries = found.gradient.flatten(1)
    return ((entries != 0) & entries.isfinite()).any(1), found.value
