"""What a model sees in frequencies: accuracy on filtered images, sensitivity to waves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from advfeat import checks, plots, seeding, threat
from advfeat.analysis._features import named_models, stacked
from advfeat.analysis._spectrum import check_images, radius_of, ring_of
from advfeat.loading import Data
from advfeat.metrics import Accuracy, accuracy
from advfeat.model import attackable, device_of
from advfeat.progress import with_progress
from advfeat.results import Result
from advfeat.tables import Table
from advfeat.threat import Bounds

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
    """Measure the accuracy on images of low, and of high, spatial frequencies only.

    Every image is filtered in its Fourier transform, channel by channel. Its mean value is kept by
    both filters, and the result is clipped to the bounds.

    Parameters
    ----------
    models
        Models by name, ``{"standard": model, "robust": other}``.
    data
        Images ``(N, C, H, W)`` with labels: a dataset, a loader or a list of batches.
    cutoffs
        Frequencies in cycles per pixel, at least 0. The highest frequency along an axis is 0.5,
        that of the corner of the spectrum 0.71. The low-pass filter keeps frequencies up to the
        cutoff, the high-pass filter those above.
    bounds
        Valid range of the inputs, ``(low, high)``.
    progress
        As in `advfeat.robust_accuracy`.

    Returns
    -------
    FilteredAccuracy
        ``low`` and ``high``: for each model, by name, its accuracies with intervals in the order of
        ``cutoffs``.

    Raises
    ------
    ValueError
        ``cutoffs`` is empty or has a negative number, or the inputs are no images.
    TypeError
        ``models`` is not a mapping from names to modules.

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
    check_images(samples.inputs)
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
    radius = radius_of(*images.shape[-2:]).to(images.device)
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
        frequency, ring = ring_of(height, width)
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
    """Measure the error of a model under each wave of the Fourier basis (Yin et al. 2019).

    For each frequency, a real wave of l2 norm ``size`` is added to each channel of every image,
    with a random sign for each image and channel, and the result is clipped to the bounds.

    Parameters
    ----------
    model
        Any module.
    data
        Images ``(N, C, H, W)`` with labels: a dataset, a loader or a list of batches. There are
        about H W / 2 passes over them.
    size
        l2 norm of the wave in each channel, in the units of the inputs.
    bounds
        Valid range of the inputs, ``(low, high)``.
    seed
        Seed of the signs: an integer or a generator; None draws one number from torch's default
        generator.
    progress
        As in `advfeat.robust_accuracy`.

    Returns
    -------
    FourierSensitivity
        ``error``: fraction of wrong answers under each wave, ``(H, W)``, with the lowest
        frequencies in the middle; ``clean`` is that without a wave.

    Raises
    ------
    ValueError
        ``size`` is negative, or the inputs are no images.
    TypeError
        ``model`` is no module.

    Examples
    --------
    >>> import torch
    >>> from advfeat import analysis
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> data = torch.utils.data.TensorDataset(torch.rand(10, 1, 8, 8), torch.arange(10) % 3)
    >>> analysis.fourier_sensitivity(model, data, size=0.5, seed=0).error.shape
    torch.Size([8, 8])
    """
    checks.model(model)
    checks.number("size", size, low=0.0)
    checks.bounds(bounds)
    checks.seed(seed)
    samples = stacked(data, device_of(model))
    check_images(samples.inputs)
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
