"""The datasets of a study, as its stages need them."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from advfeat import checks
from advfeat.datasets import ConstructedDataset
from advfeat.loading import Data, Source
from advfeat.metrics import Accuracy
from advfeat.model import attackable, device_of
from advfeat.model.state import random_state_kept
from advfeat.unpacking import as_dataset


def dataset_of(argument: str, data: Data) -> Dataset[Any]:
    """A map-style dataset, or what a loader covers of its own, in the order of its samples."""
    data = as_dataset(data)
    source = Source(data)
    if source.is_stream:
        checks.fail(
            argument, type(data).__name__, "samples are fetched by number; pass a map-style dataset"
        )
    _check_repeats(argument, source)
    dataset: Any = data.dataset if isinstance(data, DataLoader) else data
    if source.indices == list(range(len(dataset))):
        return dataset  # type: ignore[no-any-return]
    return Subset(dataset, source.indices)


# Samples that are read twice: one in 256 random flips goes unnoticed.
_READ_TWICE = 8


def _check_repeats(argument: str, source: Source) -> None:
    """Check that a sample is the same each time: models are compared on the same ones."""
    cpu = torch.device("cpu")
    with random_state_kept(cpu):
        one, again = (source.samples(source.indices[:_READ_TWICE], cpu).inputs for _ in range(2))
    same = one.shape == again.shape and torch.allclose(one, again, rtol=0, atol=0, equal_nan=True)
    if not same:
        cause = "reading a sample twice gives two values: leave random augmentation to the recipe"
        checks.fail(argument, type(source.dataset).__name__, cause)


def first(data: Dataset[Any], samples: int) -> Dataset[Any]:
    """The first samples, all where there are fewer."""
    return Subset(data, range(min(samples, len(data))))  # type: ignore[arg-type]


def resident(made: ConstructedDataset, model: nn.Module) -> Dataset[Any]:
    """The dataset on the model's own GPU, where it fits: nothing is to be copied or waited for.

    It may take a quarter of the memory that is free.
    """
    device = device_of(model)
    if device.type == "cuda":
        bytes_needed = 4 * made.fields["images"].size
        if 4 * bytes_needed <= torch.cuda.mem_get_info(device)[0]:
            return TensorDataset(made.images.to(device), made.labels.to(device))
    return made


def as_text(accuracy: Accuracy) -> str:
    """Outcomes as text, a digit a sample."""
    return "".join("1" if right else "0" for right in accuracy.correct.tolist())


def from_text(outcomes: str) -> Accuracy:
    """The accuracy behind outcomes as text."""
    return Accuracy.of(torch.tensor([digit == "1" for digit in outcomes]))


def constant_accuracies(data: Dataset[Any]) -> tuple[float, float]:
    """Fractions of the rarest and of the commonest class: what constant answers get right."""
    batches = Source(data, 1024).batches(torch.device("cpu"))
    counts = torch.bincount(torch.cat([batch.labels for batch in batches]))
    total = int(counts.sum())
    return int(counts.min()) / total, int(counts.max()) / total


def plain(settings: Any) -> Any:
    """As JSON has it: functions and other values of settings by their names."""
    return json.loads(json.dumps(settings, default=lambda v: getattr(v, "__qualname__", str(v))))


class Shifted(Dataset[tuple[Tensor, Tensor]]):
    """Original inputs, labels shifted by one class: what D_det pretends."""

    def __init__(self, data: Dataset[Any], model: nn.Module) -> None:
        self._source = Source(data)
        example = self._source.samples(self._source.indices[:1], device_of(model)).inputs
        with attackable(model) as net:
            self._classes = net.class_count(net.prepare(example))

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        numbers = [self._source.indices[place] for place in places]
        found = self._source.samples(numbers, torch.device("cpu"))
        return list(zip(found.inputs, (found.labels + 1) % self._classes, strict=True))


class ModelMaker:
    """The user's function, which must make a new module in each call.

    Parameters
    ----------
    make_model
        The function.
    """

    def __init__(self, make_model: Callable[[], nn.Module]) -> None:
        self._make = make_model
        self._made: list[weakref.ref[nn.Parameter]] = []

    def __call__(self) -> nn.Module:
        """Make a module, none of whose trainable parameters is one of an earlier module."""
        model: object = self._make()
        if not isinstance(model, nn.Module):
            raise TypeError(f"make_model: made {type(model).__name__}; expected a torch.nn.Module")
        trained = [p for p in model.parameters() if p.requires_grad]
        before = {id(parameter) for ref in self._made if (parameter := ref()) is not None}
        if any(id(parameter) in before for parameter in trained):
            raise ValueError(
                "make_model: made the same parameters twice, so each model of the study would be "
                "trained on from the one before; make a new module in each call, or a copy: "
                "make_model=lambda: copy.deepcopy(model)"
            )
        self._made += map(weakref.ref, trained)
        return model
