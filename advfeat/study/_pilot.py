"""Two small trainings, and what is measured of them on held-out training samples."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, Subset

from advfeat import checks, nonrobust, robustify, seeding
from advfeat.datasets import ConstructedDataset
from advfeat.loading import Source
from advfeat.metrics import RobustAccuracy, accuracy, robust_accuracy
from advfeat.model import Precision
from advfeat.statistics import Estimate, paired_difference
from advfeat.study._advice import MOST_CONTROL_SUCCESS
from advfeat.study._data import ModelMaker
from advfeat.threat import Bounds, Norm
from advfeat.training import adversarial_fit, fit

# Samples: of the pilot, held out of it, attacked for radii, inverted.
# Few samples and steps leave a standard model more robust than the study's own will be, and every
# radius is then chosen too small.
_PILOT, _HELD_OUT, _ATTACKED, _INVERTED = 5_000, 500, 200, 64
BATCH = 128
# Steps of a training, and the most of a standard model and on D_R, D_NR and their controls: while
# these still learn their samples, they are more robust than they will be.
STEPS, MOST_STEPS = 300, 2400
STILL = 0.9  # a loss that twice the steps do not lower to this fraction is as low as it gets
MOMENTUM = 0.6  # of inversions
RATE = 0.1  # of learning, the highest tried
# Gradients of inversions in a trial of D_R, and samples of it: a bound on its cost.
_GRADIENTS, _TRIED = 100_000, (100, 1000)


class Reached(NamedTuple):
    """How many targeted perturbations reach their target on either model."""

    radius: float
    standard: float
    robust: float


def serving(found: Sequence[Reached]) -> list[float]:
    """Up to four radii to try D_det in, in order.

    Of those in which few targets are reached on the robust model: that of the widest gap, the next
    one, and the largest. And that of the widest gap of all. In a small ball D_det learns from few
    samples, in a large one robust features change too, and success alone does not say which costs
    more.
    """

    def gap(each: Reached) -> float:
        return each.standard - each.robust

    small = [each for each in found if each.robust <= MOST_CONTROL_SUCCESS] or found[:1]
    best, widest = max(small, key=gap), max(found, key=gap)
    following = found[min(found.index(best) + 1, len(found) - 1)]
    return sorted({best.radius, following.radius, small[-1].radius, widest.radius})


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
        self._new_model = ModelMaker(make_model)
        self.norm, self.bounds, self.seed = norm, bounds, seed
        self.steps = STEPS  # of a standard model, and on D_R and its control
        self.count = len(train)  # type: ignore[arg-type]
        if self.count < 8:
            checks.fail("train", self.count, "at least eight samples are needed")
        order = torch.randperm(self.count, generator=seeding.generator(seed)).tolist()
        held_out = min(_HELD_OUT, self.count // 4)
        self.held_out = Subset(train, order[:held_out])
        self.train = Subset(train, order[held_out : held_out + _PILOT])
        source = Source(self.held_out)
        self.images = source.samples(source.indices, torch.device("cpu")).inputs.float()
        self.is_images = self.images.ndim == 4 and min(self.images.shape[-2:]) >= 4

    @property
    def study_steps(self) -> int:
        """The same for the study: as many passes over its samples, up to twice the steps."""
        return round(self.steps * min(2.0, self.count / len(self.train)))

    @property
    def tried(self) -> int:
        """Samples of a trial of D_det."""
        return min(len(self.train), _TRIED[1])

    @property
    def taught_steps(self) -> int:
        """Of the study on D_rand and D_det: the trial's passes, up to four times its steps.

        With more samples and no more steps D_det teaches less than in the trial.
        """
        return round(STEPS * min(4.0, self.count / self.tried))

    def standard(self, lr: float = RATE) -> tuple[nn.Module, float]:
        """A standard model, and its training loss at the end."""
        model = self._fresh()
        with _failing():
            history = fit(model, self.train, **self._training(len(self.train), lr, self.steps))
        return model, history.rows[-1]["loss"]

    def robust(self, eps: float, lr: float) -> nn.Module:
        """A model trained in a ball."""
        model, settings = self._fresh(), self._training(len(self.train), lr, STEPS)
        with _failing():
            adversarial_fit(
                model, self.train, eps=eps, norm=self.norm, steps=3, step_size=eps / 2,
                bounds=self.bounds, warmup=warmup_for(settings["epochs"]), **settings,
            )  # fmt: skip
        return model

    def curve(self, model: nn.Module, radii: Sequence[float]) -> list[float]:
        """Robust accuracy at each radius by PGD: enough to tell where two models differ most."""
        some = self._some(_ATTACKED)
        return [float(self._robust(model, some, radius)) for radius in radii]

    def try_inverted(
        self, robust: nn.Module, lr: float, radius: float, **settings: Any
    ) -> tuple[int, Estimate]:
        """How many samples were tried, and D_R's robust accuracy minus its control's."""
        least, most = _TRIED
        work = settings["starts"] * settings["steps"]
        some = Subset(self.train, range(min(len(self.train), most, max(least, _GRADIENTS // work))))
        made = robustify.construct_robust_dataset(
            robust, some, bounds=self.bounds, seed=self.seed, progress=False, **settings
        )
        starts = settings["starts"]
        control: Dataset[Any] = some if starts == 1 else ConcatDataset([some] * starts)
        own, other = (
            self._robust(
                self._learned(data, len(some), lr, self.steps, starts), self.held_out, radius
            ).correct
            for data in (made, control)
        )
        return len(some), paired_difference(own, other)

    def targeted(
        self, standard: nn.Module, robust: nn.Module, eps: float
    ) -> tuple[ConstructedDataset, ConstructedDataset]:
        """D_det of few samples, and its control: the same from the robust model."""
        some = Subset(self.train, range(self.tried))
        return self._targeted(standard, some, eps), self._targeted(robust, some, eps)

    def taught(self, made: ConstructedDataset, lr: float) -> Tensor:
        """Which held-out samples a fresh model has right that learned from a dataset."""
        model = self._learned(made, len(made), lr, STEPS)
        return accuracy(model, self.held_out, progress=False).correct

    def _fresh(self) -> nn.Module:
        device = torch.device("cpu" if self.device is None else self.device)
        with seeding.default_generators(self.seed, 0, device):
            model = self._new_model()
        return model if self.device is None else model.to(self.device)

    def _training(self, count: int, lr: float, steps: int) -> dict[str, Any]:
        return {
            "epochs": epochs_for(count, steps),
            "batch_size": BATCH,
            "lr": lr,
            "schedule": "one_cycle",
            "augment": shift_batch if self.is_images else None,
            "seed": self.seed,
            "precision": self.precision,
            "progress": self.progress,
        }

    def _learned(
        self, data: Dataset[Any], count: int, lr: float, steps: int, starts: int = 1
    ) -> nn.Module:
        """A fresh model trained on a constructed dataset, or on its control."""
        model, settings = self._fresh(), self._training(count, lr, steps)
        settings["epochs"] = max(1, round(settings["epochs"] / starts))
        fit(model, data, **settings)
        return model

    def _some(self, count: int) -> Subset[Any]:
        return Subset(self.held_out, range(min(count, len(self.held_out))))

    def _robust(self, model: nn.Module, data: Dataset[Any], radius: float) -> RobustAccuracy:
        return robust_accuracy(
            model, data, eps=radius, norm=self.norm, steps=20, bounds=self.bounds,
            seed=self.seed, progress=False,
        )  # fmt: skip

    def _targeted(self, source: nn.Module, data: Dataset[Any], eps: float) -> ConstructedDataset:
        return nonrobust.construct_det_dataset(
            source, data, eps=eps, norm=self.norm, steps=20, bounds=self.bounds, progress=False
        )

    def success(self, model: nn.Module, eps: float) -> float:
        """How many targeted perturbations reach class y + 1."""
        made = self._targeted(model, self._some(_ATTACKED), eps)
        return float(made.field("success").double().mean())

    def distance(self, model: nn.Module, steps: int, step_size: float) -> float:
        """What an inversion leaves of the distance of activations."""
        made = robustify.construct_robust_dataset(
            model, self._some(_INVERTED), steps=steps, step_size=step_size, momentum=MOMENTUM,
            bounds=self.bounds, seed=self.seed, progress=False,
        )  # fmt: skip
        before, after = (made.field(n).double().mean() for n in ("distance_before", "distance"))
        return float(after / before.clamp_min(1e-12))


def epochs_for(count: int, steps: int) -> int:
    """Epochs that make so many steps; twelve at the least."""
    return max(12, math.ceil(steps / math.ceil(count / BATCH)))


@contextmanager
def _failing() -> Iterator[None]:
    """Learning may fail, which is measured."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the loss never left chance")
        yield


def warmup_for(epochs: int) -> int:
    """Epochs over which the ball grows: a large one is not learned in from scratch."""
    return epochs // 3


def shift_batch(images: Tensor) -> Tensor:
    """Shift a batch of images by at most a sixteenth of their size, all alike."""
    margin = max(1, round(min(images.shape[-2:]) / 16))
    down, across = torch.randint(0, 2 * margin + 1, (2,)).tolist()
    height, width = images.shape[-2:]
    padded = F.pad(images, (margin,) * 4, mode="replicate")
    return padded[..., down : down + height, across : across + width]
