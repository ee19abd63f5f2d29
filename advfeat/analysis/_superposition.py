"""Superposition: how many features share a dimension (Elhage et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advfeat import checks
from advfeat.results import Result


@dataclass(frozen=True, eq=False, repr=False)
class Superposition(Result):
    """How a layer's features share its dimensions; see `superposition`.

    Attributes
    ----------
    dimensionality
        Of each feature, float64 ``(features,)``: 1 if it has a dimension of its own, 1/2 for a
        pair that shares one, 0 for a feature without a direction.
    dimensions
        Numbers in the input of the layer.
    """

    dimensionality: Tensor
    dimensions: int

    @property
    def features_per_dimension(self) -> float:
        """Features that have a direction over the dimensions they occupy; NaN if there are none."""
        occupied = float(self.dimensionality.sum())
        return int((self.dimensionality > 0).sum()) / occupied if occupied else float("nan")

    def _summary(self) -> str:
        return (
            f"{int((self.dimensionality > 0).sum())} features in "
            f"{float(self.dimensionality.sum()):.1f} of {self.dimensions} dimensions: "
            f"{self.features_per_dimension:.2f} a dimension"
        )


def superposition(layer: nn.Module | Tensor) -> Superposition:
    """Measure how many features a layer packs into each dimension.

    The dimensionality of a feature with direction w_i is ||w_i||^2 / sum_j (w_i/||w_i|| . w_j)^2
    (Elhage et al. 2022, "Toy models of superposition"). They find that a toy model's vulnerability
    rises in proportion to features per dimension, and that adversarial training lowers both. Call
    it on the same layer of a standard and of a robust model.

    Parameters
    ----------
    layer
        A ``torch.nn.Linear`` or convolution: each output unit is a feature whose direction is its
        weights. Or the directions, ``(features, dimensions)``.

    Returns
    -------
    Superposition
        Dimensionality of each feature, and features per dimension.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause.

    Examples
    --------
    >>> import torch
    >>> from advfeat import analysis
    >>> pair = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])  # two features in one dimension
    >>> analysis.superposition(pair).features_per_dimension
    2.0
    >>> analysis.superposition(torch.eye(3)).features_per_dimension
    1.0
    """
    weight = layer if isinstance(layer, Tensor) else getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"layer: {type(layer).__name__} has no weight; pass a Linear, a convolution or a tensor"
        )
    if weight.ndim < 2:
        checks.fail("layer", tuple(weight.shape), "expected a direction for each feature")
    directions = weight.detach().cpu().double().flatten(1)
    if not bool(torch.isfinite(directions).all()):
        checks.fail("layer", "weights", "not all are finite")
    length = directions.norm(dim=1)
    unit = directions / length.clamp_min(1e-300)[:, None]
    shared = (unit @ directions.T).square().sum(1)
    found = torch.where(length > 0, length.square() / shared.clamp_min(1e-300), 0.0)
    return Superposition(found, directions.shape[1])
