"""Where perturbations live: frequencies and scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advfeat import checks, plots
from advfeat.analysis._features import named_models, stacked
from advfeat.attacks import PGD
from advfeat.loading import Data
from advfeat.model import device_of
from advfeat.progress import with_progress
from advfeat.results import Result
from advfeat.tables import Table
from advfeat.threat import Bounds, Norm

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False, repr=False)
class Spectrum(Result):
    """Where images and perturbations have their energy; see `spectrum`.

    Attributes
    ----------
    frequency
        Middle of each ring of frequencies, cycles a pixel, ``(F,)``.
    rings
        For ``"images"`` and each model's perturbations: fraction of energy in each ring, ``(F,)``.
    levels
        The same for the levels of a Laplacian pyramid, ``(L,)``: the finest (one pixel) first,
        what is left last.
    """

    frequency: Tensor
    rings: Mapping[str, Tensor]
    levels: Mapping[str, Tensor]

    def mean_frequency(self, name: str) -> float:
        """Energy-weighted mean frequency, cycles a pixel."""
        return float(self.rings[name] @ self.frequency)

    def _summary(self) -> str:
        return f"{len(self.frequency)} frequencies, energy of {', '.join(self.rings)}"

    def _content(self) -> Sequence[str | Table]:
        count = len(next(iter(self.levels.values())))
        scales = [f"{2**level} px" for level in range(count - 1)]
        rows = [
            (name, f"{self.mean_frequency(name):.3f}", *(f"{float(v):.1%}" for v in levels))
            for name, levels in self.levels.items()
        ]
        return [Table(("energy", "mean cycles/px", *scales, "coarser"), rows)]

    def plot(self, ax: Sequence[Axes] | None = None) -> tuple[Axes, ...]:
        """Fractions by frequency and by level, in two panels."""
        left, right = plots.new_panels(ax, 2, 9.0, 3.6)
        plots.lines(left, self.frequency, {n: 100 * v for n, v in self.rings.items()})
        left.set(xlabel="frequency (cycles / pixel)", ylabel="energy (%)")
        left.set_ylim(bottom=0)
        count = len(next(iter(self.levels.values())))
        plots.lines(right, range(count), {n: 100 * v for n, v in self.levels.items()})
        names = [f"{2**level} px" for level in range(count - 1)]
        right.set_xticks(range(count), [*names, "coarser"])
        right.set(xlabel="level of the Laplacian pyramid", ylabel="energy (%)")
        right.set_ylim(bottom=0)
        for axes in (left, right):
            axes.grid(alpha=0.3)
        right.legend(frameon=False)
        return left, right


def spectrum(
    models: Mapping[str, nn.Module],
    data: Data,
    *,
    eps: float,
    norm: Norm,
    steps: int = 20,
    bounds: Bounds = (0.0, 1.0),
    progress: bool | None = None,
) -> Spectrum:
    """Measure at which spatial frequencies and scales perturbations have their energy.

    It answers whether non-robust features are features of a small scale. Every model is attacked by
    PGD on the margin. The spectrum of the perturbations is compared with that of the images less
    their mean image. Each sample has the same weight.

    Parameters
    ----------
    models
        Models by name, ``{"standard": model, "robust": other}``.
    data
        Images ``(N, C, H, W)``: a dataset, a loader or a list of batches; held in memory.
    eps, norm, steps, bounds
        Ball, number of steps and valid range of PGD, as in `advfeat.pgd`.
    progress
        As in `advfeat.robust_accuracy`.

    Returns
    -------
    Spectrum
        Fractions of the energy of images and perturbations by frequency and by scale.

    Raises
    ------
    ValueError
        The inputs are no images ``(N, C, H, W)``, or ``eps`` is not above 0.
    TypeError
        ``models`` is not a mapping from names to modules.

    Examples
    --------
    >>> import torch
    >>> from advfeat import analysis
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> data = torch.utils.data.TensorDataset(torch.rand(10, 1, 8, 8), torch.arange(10) % 3)
    >>> found = analysis.spectrum({"mine": model}, data, eps=0.5, norm="l2")
    >>> print(f"{found.rings['mine'].sum():.3f} {found.levels['mine'].sum():.3f}")
    1.000 1.000
    """
    named = named_models(models)
    attack = PGD(eps=eps, norm=norm, steps=steps, loss="margin", bounds=bounds)
    parts: dict[str, Tensor] = {}
    for name, model in named.items():
        samples = stacked(data, device_of(model))
        check_images(samples.inputs)
        pairs = list(zip(samples.inputs.split(256), samples.labels.split(256), strict=True))  # type: ignore[no-untyped-call]
        label = f"spectrum of {name}"
        shown = with_progress(pairs, total=len(pairs), label=label, progress=progress)
        moved = [attack(model, inputs, labels) for inputs, labels in shown]
        parts.setdefault("images", (samples.inputs - samples.inputs.mean(0)).float().cpu())
        parts[name] = (torch.cat(moved) - samples.inputs).float().cpu()
    frequency, ring = ring_of(*parts["images"].shape[-2:])
    rings = {name: _fractions(_ring_energy(part, ring)) for name, part in parts.items()}
    levels = {name: _fractions(_pyramid_energy(part)) for name, part in parts.items()}
    return Spectrum(frequency, rings, levels)


def check_images(inputs: Tensor) -> None:
    if inputs.ndim != 4 or min(inputs.shape[-2:]) < 2:
        checks.fail("data", tuple(inputs.shape), "expected images (N, C, H, W)")


def radius_of(height: int, width: int) -> Tensor:
    """Frequency of each entry of a two-dimensional Fourier transform, cycles a pixel."""
    return torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None])


def ring_of(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Middle of each ring, one cycle an image wide, and the ring of every frequency."""
    across = min(height, width)
    ring = (radius_of(height, width) * across).round().long()
    return torch.arange(int(ring.max()) + 1) / across, ring


def _ring_energy(images: Tensor, ring: Tensor) -> Tensor:
    """Energy of every image in every ring, ``(N, F)``; they add up to its squared length."""
    power = torch.fft.fft2(images, norm="ortho").abs().square().sum(1).flatten(1)
    energy = torch.zeros(len(images), int(ring.max()) + 1)
    return energy.index_add_(1, ring.flatten(), power)


def _pyramid_energy(images: Tensor) -> Tensor:
    """Energy of every image in every level, ``(N, L)``, the finest first.

    Each level is what an image loses where blocks of two by two pixels become their mean, so
    levels are orthogonal where sizes are powers of two, and what is left is weighted by its blocks.
    """
    energies, area = [], 1
    while min(images.shape[-2:]) > 1:
        coarse = F.avg_pool2d(images, 2, ceil_mode=True, count_include_pad=False)
        back = coarse.repeat_interleave(2, -2).repeat_interleave(2, -1)
        back = back[..., : images.shape[-2], : images.shape[-1]]
        energies.append(area * (images - back).square().sum((1, 2, 3)))
        images, area = coarse, 4 * area
    return torch.stack([*energies, area * images.square().sum((1, 2, 3))], 1)


def _fractions(energy: Tensor) -> Tensor:
    """Mean fraction of every column, over the samples that have any energy."""
    total = energy.sum(1, keepdim=True)
    some = total[:, 0] > 0
    if not bool(some.any()):
        checks.fail("data", "all zero", "no image or perturbation has any energy")
    return (energy[some] / total[some]).mean(0)
