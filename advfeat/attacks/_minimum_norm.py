"""What minimum-norm attacks share: the closest input so far that fools the model, row by row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from advfeat import checks, threat
from advfeat.attacks._attack import Attack
from advfeat.threat import Bounds, Norm


@dataclass(frozen=True, kw_only=True)
class MinimumNorm(Attack):
    """An attack that looks for the smallest perturbation instead of the worst one in a ball.

    Without ``eps`` every row takes all its steps, and ``success`` says whether anything that fools
    the model was found; with it, a row is successful and finished once that lies within ``eps``.

    Its state has, beside what every attack's has: ``kept``, the closest input found that fools the
    model (in a row without one, the last iterate); ``distance`` of that input from the clean one,
    infinite without one; ``value``, its negative; and ``taken``, the row's own step count.
    """

    eps: float | None = None
    norm: Norm
    steps: int = 100
    bounds: Bounds = (0.0, 1.0)
    seed: int | torch.Generator | None = None  # for `advfeat.robust_accuracy`; nothing is random

    def __post_init__(self) -> None:
        """Refuse bad settings."""
        checks.norm(self.norm)
        checks.bounds(self.bounds)
        if self.eps is not None:
            checks.number("eps", self.eps, low=0.0)
            checks.linf_in_bounds(self.eps, self.norm, self.bounds)
        checks.count("steps", self.steps, low=1)
        checks.seed(self.seed)

    def finished(self, state: Any) -> Tensor:
        """Rows whose steps are spent, that were wrong at once, or fooled within ``eps``."""
        done: Tensor = (state.taken >= self._ticks_of(state)) | (state.distance == 0)
        return done if self.eps is None else done | state.success

    def result(self, state: Any) -> Tensor:
        """The closest input that fools the model; what is not within ``eps`` is moved there."""
        kept: Tensor = state.kept
        if self.eps is None:
            return kept
        inside = threat.project(kept, state.inputs, self.eps, self.norm, self.bounds)
        return torch.where(threat.per_sample(state.success, kept), kept, inside)

    def _ticks_of(self, state: Any) -> int:
        return self.ticks

    @staticmethod
    def _nothing_kept(inputs: Tensor) -> dict[str, Tensor]:
        """Fields of a state before anything was found."""
        distance = inputs.new_full((inputs.shape[0],), torch.inf)
        return {
            "kept": inputs,
            "distance": distance,
            "value": -distance,
            "success": torch.zeros_like(distance, dtype=torch.bool),
        }

    def _keep(self, state: Any, points: Tensor, hits: Tensor) -> Any:
        """Keep the points that fool the model and are closer than what was kept before."""
        distance = threat.size(points - state.inputs, self.norm)
        closer = hits & (distance < state.distance)
        # Until then the latest point: a failed attack returns a perturbed input.
        kept = threat.per_sample(closer | state.distance.isinf(), points)
        distance = torch.where(closer, distance, state.distance)
        return state._replace(
            kept=torch.where(kept, points, state.kept),
            distance=distance,
            value=-distance,
            success=distance.isfinite() if self.eps is None else distance <= self.eps,
        )
