"""Images of a study's report: the same samples in every dataset, class by class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

import torch
from torch import Tensor

from advfeat import pages
from advfeat.datasets import ConstructedDataset
from advfeat.loading import Source
from advfeat.study._findings import Run
from advfeat.study._plan import PLANS
from advfeat.threat import Bounds

# Of each class at most so many samples, and in all at most so many pixels of images.
_EACH, _PIXELS = 4, 4_000_000


def explorer(run: Run, bounds: Bounds) -> Iterator[str]:
    """A folded part for each class, where samples are images."""
    made = {n: run.dataset(n) for n in run.made if PLANS[n].method != "original"}
    if not made:
        return
    source = Source(run.work.samples)
    (image,) = source.samples(source.indices[:1], torch.device("cpu")).inputs
    if not pages.is_image(image):
        return
    places = {name: _places(each) for name, each in made.items()}
    by_class = _samples_by_class(made, places)
    most = _PIXELS // (max(image.numel(), 96 * 96) * (len(made) + 1))
    each = max(1, min(_EACH, most // max(1, len(by_class))))
    shown = list(by_class.items())[: max(1, most // each)]
    yield pages.heading("Images of each class")
    for label, numbers in shown:
        yield pages.folded(f"class {label}", _grid(made, places, source, numbers[:each], bounds))
    if len(shown) < len(by_class):
        yield pages.note(f"The first {len(shown)} of {len(by_class)} classes.")


def _places(made: ConstructedDataset) -> dict[int, int]:
    """For each sample number its first place in a dataset, which may have several starts of it."""
    found: dict[int, int] = {}
    for place, number in enumerate(made.field("index").tolist()):
        found.setdefault(number, place)
    return found


def _samples_by_class(
    made: dict[str, ConstructedDataset], places: dict[str, dict[int, int]]
) -> dict[int, list[int]]:
    """For each class, samples that all datasets have."""
    name, first = next(iter(made.items()))
    labels = first.field("source_labels") if "source_labels" in first.fields else first.labels
    true = labels.tolist()
    found: dict[int, list[int]] = {}
    for number, place in places[name].items():
        if all(number in each for each in places.values()):
            found.setdefault(true[place], []).append(number)
    return dict(sorted(found.items()))


def _grid(
    made: dict[str, ConstructedDataset],
    places: dict[str, dict[int, int]],
    source: Source,
    numbers: Sequence[int],
    bounds: Bounds,
) -> str:
    """A line for each sample: the original, and what each dataset made of it, with its label."""
    original = source.samples(list(numbers), torch.device("cpu"))
    columns = [_cells(original.inputs, original.labels, bounds)]
    for name, each in made.items():
        part = each.subset([places[name][number] for number in numbers])
        columns.append(_cells(part.images, part.labels, bounds))
    head = "".join(f"<th>{escape(name)}</th>" for name in ("original", *made))
    body = "".join(f"<tr>{''.join(line)}</tr>" for line in zip(*columns, strict=True))
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _cells(images: Tensor, labels: Tensor, bounds: Bounds) -> list[str]:
    return [
        f'<td><img alt="" src="{pages.image_uri(image, bounds)}"><br>{label}</td>'
        for image, label in zip(images, labels.tolist(), strict=True)
    ]
