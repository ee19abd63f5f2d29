"""The most fragile and the most robust samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from advfeat.metrics._outcome import RobustAccuracy, attack_name
from advfeat.metrics._report._contents import Contents
from advfeat.metrics._report._samples import Drawn
from advfeat.model import attackable, device_of
from advfeat.results import Result


@dataclass(frozen=True, eq=False, repr=False)
class Example(Result):
    """A sample, and what an attack made of it.

    Attributes
    ----------
    kind
        ``"fragile"`` or ``"robust"``.
    index, label
        Number of the sample in the data, and its label.
    predicted
        The model's class on the attacked input.
    distance
        To the nearest adversarial example, as in the curve; None where that was not measured.
    broken_by
        The attack that fooled the model; None where none did.
    clean, adversarial
        The inputs; None where the result was read from JSON.
    """

    kind: Literal["fragile", "robust"]
    index: int
    label: int
    predicted: int
    distance: float | None
    broken_by: str | None
    clean: Tensor | None
    adversarial: Tensor | None

    _left_out = ("clean", "adversarial")

    def _summary(self) -> str:
        distance = "" if self.distance is None else f", distance {self.distance:.4g}"
        return f"sample {self.index}, {self.kind}, {self.label} -> {self.predicted}{distance}"


def examples(model: nn.Module, drawn: Drawn, contents: Contents, count: int) -> tuple[Example, ...]:
    """The samples nearest to and farthest from the boundary, ``count`` of each."""
    robust = contents.robust
    distance: dict[int, float] = {}
    if contents.curve is not None:
        curve = contents.curve
        distance = dict(zip(curve.index.tolist(), curve.distance.tolist(), strict=True))
    places = {number: place for place, number in enumerate(robust.index.tolist())}
    fragile, strong = _ordered(robust, distance)
    chosen = [("fragile", n) for n in fragile[:count]] + [("robust", n) for n in strong[:count]]
    if not chosen or robust.adversarial is None:
        return ()
    numbers = [number for _, number in chosen]
    indices = torch.tensor([places[number] for number in numbers])
    attacked = robust.adversarial[indices]
    clean = drawn.inputs_of(numbers)
    with attackable(model, purpose="predictions") as net:
        found = net.logits(net.prepare(attacked.to(device_of(model)))).argmax(1).tolist()
    names = [attack_name(attack) for attack in robust.attacks]
    return tuple(
        Example(
            kind,  # type: ignore[arg-type]
            number,
            contents.labels[number],
            int(predicted),
            distance.get(number),
            names[place] if (place := int(robust.broken_by[places[number]])) >= 0 else None,
            clean[number],
            attacked[line],
        )
        for line, ((kind, number), predicted) in enumerate(zip(chosen, found, strict=True))
    )


def _ordered(
    robust: RobustAccuracy, distance: dict[int, float]
) -> tuple[Sequence[int], Sequence[int]]:
    """Numbers of broken samples, the most fragile first; of robust ones, the most robust first."""
    index, broken = robust.index.tolist(), robust.broken_by.tolist()
    value = robust.value.nan_to_num().tolist()
    far = float("inf")

    def nearness(place: int) -> tuple[float, int, float]:
        # Without distances: what the first attack broke is more fragile than what the last did.
        return distance.get(index[place], far), broken[place], -value[place]

    fragile = sorted((p for p in range(len(index)) if broken[p] >= 0), key=nearness)
    strong = [p for p in range(len(index)) if broken[p] == -1]
    measured = [p for p in strong if index[p] in distance]
    strong = sorted(measured or strong, key=lambda p: (-distance.get(index[p], 0.0), value[p]))
    return [index[p] for p in fragile], [index[p] for p in strong]
