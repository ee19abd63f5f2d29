"""Where perturbations live: frequencies, scales, and what a model sees in them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from advfeat import checks, plots, seeding, threat
from advfeat.analysis._features import named_models, stacked
from advfeat.attacks import PGD
from advfeat.loading import Data
from advfeat.metrics import Accuracy, accuracy
from advfeat.model import attackable, device_of
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
    """Ask whether small-scale features are the non-robust ones: where perturbations have energy.

    Every model is attacked by PGD on the margin, and the perturbations are taken apart, as are the
    images themselves (less their mean image). Each sample counts the same.

    Parameters
    ----------
    models
        By name: ``{"standard": model, "robust": other}``.
    data
        Images ``(N, C, H, W)``: a dataset, a loader or a list of batches; held in memory.
    eps, norm, steps, bounds
        Of PGD.
    progress
        As everywhere: None shows it in a terminal, and in a log from ten seconds on.

    Returns
    -------
    Spectrum
        Energy of images and perturbations by frequency and by scale.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause.

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
        _check_images(samples.inputs)
        pairs = list(zip(samples.inputs.split(256), samples.labels.split(256), strict=True))  # type: ignore[no-untyped-call]
        label = f"spectrum of {name}"
        shown = with_progress(pairs, total=len(pairs), label=label, progress=progress)
        moved = [attack(model, inputs, labels) for inputs, labels in shown]
        parts.setdefault("images", (samples.inputs - samples.inputs.mean(0)).float().cpu())
        parts[name] = (torch.cat(moved) - samples.inputs).float().cpu()
    frequency, ring = _ring_of(*parts["images"].shape[-2:])
    rings = {name: _fractions(_ring_energy(part, ring)) for name, part in parts.items()}
    levels = {name: _fractions(_pyramid_energy(part)) for name, part in parts.items()}
    return Spectrum(frequency, rings, levels)


def _check_images(inputs: Tensor) -> None:
    if inputs.ndim != 4 or min(inputs.shape[-2:]) < 2:
        checks.fail("data", tuple(inputs.shape), "expected images (N, C, H, W)")


def _radius(height: int, width: int) -> Tensor:
    """Frequency of each entry of a two-dimensional Fourier transform, cycles a pixel."""
    return torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None])


def _ring_of(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Middle of each ring, one cycle an image wide, and the ring of every frequency."""
    across = min(height, width)
    ring = (_radius(height, width) * across).round().long()
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


@dataclass(frozen=True, eq=False, repr=False)
class FilteredAccuracy(Result):
    """Accuracy on low-pass and on high-pass images; see `filtered_accuracy`.

    Attributes
    ----------
    cutoffs
        Cycles a pixel.
    low, high
        For each model its accuracy at each cutoff.
    """

    cutoffs: tuple[float, ...]
    low: Mapping[str, tuple[Accuracy, ...]]
    high: Mapping[str, tuple[Accuracy, ...]]

    def _summary(self) -> str:
        return f"{len(self.low)} models, {len(self.cutoffs)} cutoffs"

    def _content(self) -> Sequence[str | Table]:
        rows: list[tuple[object, ...]] = [
            (f"{name}, {kind}", *(f"{value:.1%}" for value in values))
            for name in self.low
            for kind, values in (("low-pass", self.low[name]), ("high-pass", self.high[name]))
        ]
        return [Table(("cutoff (cycles/px)", *(f"{c:.3g}" for c in self.cutoffs)), rows)]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Accuracy over the cutoff."""
        axes = plots.new_axes(ax, 5.6, 3.8)
        series = {
            f"{name}, {kind}": [100 * value for value in values]
            for name in self.low
            for kind, values in (("low-pass", self.low[name]), ("high-pass", self.high[name]))
        }
        plots.lines(axes, self.cutoffs, series)
        axes.set(xlabel="cutoff (cycles / pixel)", ylabel="accuracy (%)", ylim=(0, 102))
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
        return axes


def filtered_accuracy(
    models: Mapping[str, nn.Module],
    data: Data,
    *,
    cutoffs: Sequence[float],
    bounds: Bounds = (0.0, 1.0),
    progress: bool | None = None,
) -> FilteredAccuracy:
    """Accuracy where only low, or only high, frequencies are left of each image.

    An image's mean value stays in both, and the result is clipped to the bounds.

    Parameters
    ----------
    models
        By name.
    data
        Images ``(N, C, H, W)``.
    cutoffs
        Cycles a pixel, at least 0; the corner of the spectrum is at 0.71. Low-pass keeps
        frequencies up to it, high-pass those above.
    progress
        As everywhere: None shows it in a terminal, and in a log from ten seconds on.

    Returns
    -------
    FilteredAccuracy
        Accuracy of every model on low-pass and high-pass images, for each cutoff.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause.

    Examples
    --------
    >>> import torch
    >>> from advfeat import analysis
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> data = torch.utils.data.TensorDataset(torch.rand(10, 1, 8, 8), torch.arange(10) % 3)
    >>> found = analysis.filtered_accuracy({"mine": model}, data, cutoffs=[0.25, 0.75])
    >>> len(found.low["mine"])
    2
    """
    named = named_models(models)
    if not isinstance(cutoffs, Sequence) or not cutoffs:
        checks.fail("cutoffs", cutoffs, "expected a list of frequencies: cutoffs=[0.1, 0.25]")
    for cutoff in cutoffs:
        checks.number("cutoffs", cutoff, low=0.0)
    checks.bounds(bounds)
    samples = stacked(data, torch.device("cpu"))
    _check_images(samples.inputs)
    low: dict[str, tuple[Accuracy, ...]] = {}
    high: dict[str, tuple[Accuracy, ...]] = {}
    for found, below in ((low, True), (high, False)):
        sets = [
            TensorDataset(filtered(samples.inputs, cutoff, below).clamp(*bounds), samples.labels)
            for cutoff in cutoffs
        ]
        for name, model in named.items():
            found[name] = tuple(accuracy(model, data, progress=progress) for data in sets)
    return FilteredAccuracy(tuple(cutoffs), low, high)


def filtered(images: Tensor, cutoff: float, below: bool) -> Tensor:
    """Keep the frequencies up to the cutoff, or those above; and the mean of each image."""
    radius = _radius(*images.shape[-2:]).to(images.device)
    kept = (radius <= cutoff + 1e-9) == below
    kept[0, 0] = True
    found: Tensor = torch.fft.ifft2(torch.fft.fft2(images) * kept).real
    return found


@dataclass(frozen=True, eq=False, repr=False)
class FourierSensitivity(Result):
    """Error of a model under each wave of the Fourier basis; see `fourier_sensitivity`.

    Attributes
    ----------
    error
        Fraction of wrong answers, ``(H, W)``; the lowest frequencies are in the middle.
    clean
        Fraction of wrong answers on the images as they are.
    size
        l2 size of the waves.
    """

    error: Tensor
    clean: float
    size: float

    def _summary(self) -> str:
        return f"l2 {self.size:g}, error {float(self.error.max()):.1%} at most"

    def _content(self) -> Sequence[str | Table]:
        height, width = self.error.shape
        frequency, ring = _ring_of(height, width)
        ring = torch.fft.fftshift(ring)
        rows = [
            (f"{float(f):.3f}", f"{float(self.error[ring == place].mean()):.1%}")
            for place, f in enumerate(frequency)
        ]
        title = f"waves of l2 size {self.size:g}; without one {self.clean:.1%}"
        return [title, Table(("cycles/px", "error"), rows)]

    def plot(self, ax: Axes | None = None) -> Axes:
        """The map, low frequencies in the middle."""
        axes = plots.new_axes(ax, 4.6, 3.8)
        height, width = self.error.shape
        left, top = -(width // 2) - 0.5, -(height // 2) - 0.5
        shown = axes.imshow(
            100 * self.error.numpy(), cmap="cividis", vmin=0,
            vmax=max(1.0, 100 * float(self.error.max())),
            extent=(left, left + width, top + height, top),
        )  # fmt: skip
        axes.set(xlabel="cycles across", ylabel="cycles down", title=f"l2 {self.size:g}")
        plots.figure_of(axes).colorbar(shown, ax=axes, label="error (%)")
        return axes


def fourier_sensitivity(
    model: nn.Module,
    data: Data,
    *,
    size: float,
    bounds: Bounds = (0.0, 1.0),
    seed: int | torch.Generator | None = None,
    progress: bool | None = None,
) -> FourierSensitivity:
    """Error of a model under each wave of the two-dimensional Fourier basis (Yin et al. 2019).

    To every image a real wave of one frequency and l2 size ``size`` is added to each channel with
    a random sign, and the result clipped to the bounds.

    Parameters
    ----------
    model
        Any module.
    data
        Images ``(N, C, H, W)``; there are about H W / 2 passes over them.
    size
        l2 size of the wave in each channel, in the units of the inputs.
    seed
        Of the signs; None draws one number from torch's default generator.
    progress
        As everywhere: None shows it in a terminal, and in a log from ten seconds on.

    Returns
    -------
    FourierSensitivity
        Error of the model under each wave of the Fourier basis.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause.

    Examples
    --------
    >>> import torch
    >>> from advfeat import analysis
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> data = torch.utils.data.TensorDataset(torch.rand(10, 1, 8, 8), torch.arange(10) % 3)
    >>> analysis.fourier_sensitivity(model, data, size=0.5, seed=0).error.shape
    torch.Size([8, 8])
    """
    checks.number("size", size, low=0.0)
    checks.bounds(bounds)
    checks.seed(seed)
    samples = stacked(data, device_of(model))
    _check_images(samples.inputs)
    inputs = samples.inputs.float()
    height, width = inputs.shape[-2:]
    keys = seeding.keys(seeding.resolve(seed), torch.arange(len(inputs), device=inputs.device))
    error = torch.zeros(height, width)
    with attackable(model) as net:

        def wrong(images: Tensor) -> float:
            parts = zip(images.split(512), samples.labels.split(512), strict=True)  # type: ignore[no-untyped-call]
            count = sum(int((net.logits(x).argmax(1) != y).sum()) for x, y in parts)
            return count / len(images)

        clean = wrong(inputs)
        for down in with_progress(
            range(height), total=height, label="Fourier sensitivity", progress=progress
        ):
            for across in range(width):
                mirrored = (-down % height, -across % width)
                if mirrored < (down, across):
                    error[down, across] = error[mirrored]
                    continue
                bits = seeding.uniform(keys, down * width + across, inputs.shape[1])
                signs = (bits > 0.5).to(inputs.dtype)[:, :, None, None] * 2 - 1
                wave = size * _wave(height, width, down, across).to(inputs)
                error[down, across] = wrong((inputs + signs * wave).clamp(*bounds))
    return FourierSensitivity(torch.fft.fftshift(error), clean, size)


def _wave(height: int, width: int, down: int, across: int) -> Tensor:
    """The real wave of one frequency, of l2 size 1."""
    phase = torch.arange(height)[:, None] * down / height + torch.arange(width) * across / width
    # An eighth of a turn, so that no wave is zero at every pixel.
    wave = torch.cos(2 * math.pi * phase + math.pi / 4)
    return wave / threat.size(wave[None], "l2")
