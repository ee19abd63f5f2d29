"""Two small trainings, and what is measured of them on held-out training samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from advfeat import checks, nonrobust, robustify, seeding
from advfeat.loading import Source
from advfeat.metrics import robustness_curve
from advfeat.model import Precision
from advfeat.study._data import made_model
from advfeat.threat import Bounds, Norm
from advfeat.training import adversarial_fit, fit

# Samples: of the pilot, held out of it, attacked for radii, inverted.
_PILOT, _HELD_OUT, _ATTACKED, _INVERTED = 2000, 500, 200, 64
STEPS, BATCH = 300, 128  # of a training, at the least
MOMENTUM = 0.6  # of inversions


class Pilot:
    """Two small trainings and what is measured on held-out samples."""

    precision: Precision
    device: torch.device | str | None
    progress: bool | None

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        train: Dataset[Any],
        norm: Norm,
        bounds: Bounds,
        seed: int,
    ) -> None:
        self.make_model, self.norm, self.bounds, self.seed = make_model, norm, bounds, seed
        self.count = len(train)  # type: ignore[arg-type]
        if self.count < 8:
            checks.fail("train", self.count, "at least eight samples are needed")
        order = torch.randperm(self.count, generator=seeding.generator(seed)).tolist()
        held_out = min(_HELD_OUT, self.count // 4)
        self.held_out = Subset(train, order[:held_out])
        self.train = Subset(train, order[held_out : held_out + _PILOT])
        source = Source(self.held_out)
        self.images = source.rows(source.indices, torch.device("cpu")).inputs.float()
        self.is_images = self.images.ndim == 4 and min(self.images.shape[-2:]) >= 4

    def fitted(self, eps: float | None) -> nn.Module:
        """A standard model, or one trained in a ball."""
        device = torch.device("cpu" if self.device is None else self.device)
        with seeding.default_generators(self.seed, 0, device):
            model = made_model(self.make_model)
        model = model if self.device is None else model.to(self.device)
        settings: dict[str, Any] = {
            "epochs": epochs_for(len(self.train)),
            "batch_size": BATCH,
            "lr": 0.1,
            "schedule": "one_cycle",
            "augment": shift_batch if self.is_images else None,
            "seed": self.seed,
            "precision": self.precision,
            "progress": self.progress,
        }
        if eps is None:
            fit(model, self.train, **settings)
        else:
            adversarial_fit(
                model, self.train, eps=eps, norm=self.norm, steps=3, step_size=eps / 2,
                bounds=self.bounds, **settings,
            )  # fmt: skip
        return model

    def curve(self, model: nn.Module, radii: Sequence[float]) -> list[float]:
        """Robust accuracy at each radius, from one run of a minimum-norm attack."""
        found = robustness_curve(
            model, self.held_out, norm=self.norm, bounds=self.bounds, progress=False
        )
        return [float(found.at(radius)) for radius in radii]

    def success(self, model: nn.Module, eps: float) -> float:
        """How many targeted perturbations reach the next class."""
        some = Subset(self.held_out, range(min(_ATTACKED, len(self.held_out))))
        made = nonrobust.construct_det_dataset(
            model, some, eps=eps, norm=self.norm, steps=20, bounds=self.bounds, progress=False
        )
        return float(made.field("success").double().mean())

    def distance(self, model: nn.Module, steps: int, step_size: float) -> float:
        """What an inversion leaves of the distance of activations."""
        some = Subset(self.held_out, range(min(_INVERTED, len(self.held_out))))
        made = robustify.construct_robust_dataset(
            model, some, steps=steps, step_size=step_size, momentum=MOMENTUM, bounds=self.bounds,
            seed=self.seed, progress=False,
        )  # fmt: skip
        before, after = (made.field(n).double().mean() for n in ("distance_before", "distance"))
        return float(after / before.clamp_min(1e-12))


def epochs_for(count: int) -> int:
    """Epochs that make enough steps; twelve at the least."""
    return max(12, math.ceil(STEPS / math.ceil(count / BATCH)))


def shift_batch(images: Tensor) -> Tensor:
    """Shift a batch of images by at most a sixteenth of their size, all alike."""
    margin = max(1, round(min(images.shape[-2:]) / 16))
    down, across = torch.randint(0, 2 * margin + 1, (2,)).tolist()
    height, width = images.shape[-2:]
    padded = F.pad(images, (margin,) * 4, mode="replicate")
    return padded[..., down : down + height, across : across + width]
