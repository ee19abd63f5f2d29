"""D_R: a dataset that holds the robust features of another (Ilyas et al. 2019, section 3.1)."""

from __future__ import annotations

import torch
from torch import nn

from advfeat.construction import BuildOptions, Start, build_inverted
from advfeat.datasets import ConstructedDataset
from advfeat.datasets.dataset import Dtype
from advfeat.durable import Folder
from advfeat.loading import Data
from advfeat.model import Layer, Precision
from advfeat.suggestions import suggests
from advfeat.threat import FeatureBounds

__all__ = ["construct_robust_dataset"]


@suggests
def construct_robust_dataset(
    model: nn.Module,
    data: Data,
    *,
    layer: Layer = None,
    start: Start = "images",
    starts: int = 1,
    steps: int = 1000,
    step_size: float = 0.1,
    momentum: float = 0.0,
    bounds: FeatureBounds = (0.0, 1.0),
    seed: int | torch.Generator | None = None,
    patience: int | None = None,
    straight_through: bool = False,
    batch_size: int | None = None,
    precision: Precision = "float32",
    compile: bool = False,
    expectation: int = 1,
    progress: bool | None = None,
    out: Folder | None = None,
    dtype: Dtype = "float32",
) -> ConstructedDataset:
    """Make D_R: images with the activations that a robust model has on the originals.

    Each image starts as another image. It is changed until the robust model's activations are those
    of the original, and it gets the original's label. Standard training on the result gives a model
    with robust accuracy.

    Parameters
    ----------
    model
        An adversarially trained model; any module.
    data
        A map-style dataset, or a loader of one (its order does not matter), without random
        augmentation, because an image is read again as the start of another.
    layer
        Where activations are read: a module or its name (its output), or a function of the inputs.
        None is the input of the Linear layer that returns the logits, as in the paper. Its name
        and width are stored in ``manifest["layer"]``.
    start
        ``"images"``: another sample, uniform over all others. ``"noise"``: N(0, 1) / 20 + 0.5 of
        the bounds (the released notebook). Or a tensor with one start for each
        sample, ``(N, ...)``, or ``(starts, N, ...)`` of several.
    starts
        Number of constructed samples for each sample of the data, each from its own start; default
        1, as in the paper. With several, ``start_number`` is the number of the start. All samples
        of start 0 come first: they are the same as with ``starts=1``.
        `advfeat.datasets.StartSampler` draws one of them for each image and epoch.
    steps, step_size
        Steps of fixed l2 length. Default 1000 of 0.1, the paper's for CIFAR-10; Restricted
        ImageNet used 2000 of 1, noise starts 10,000 steps.
    momentum
        Fraction of the last move that is added to the next (heavy ball), in [0, 1); in the paper 0.
        With 0.9 the same distance needs fewer steps (27 instead of 100 in docs/benchmarks.md),
        because moves grow from ``step_size`` to at most 1 / (1 - momentum) times that.
    bounds
        The range ``(low, high)`` of valid inputs, numbers or tensors that broadcast against one
        sample.
    seed
        Seed of the starts. None draws one number from torch's default generator.
    patience
        Stop a sample when its squared distance has not decreased by a thousandth in this many
        steps, and continue with another sample. By default every sample takes all steps, as in
        the paper.
    straight_through
        Let gradients pass the last ReLU before the layer unchanged, as the paper's released code
        does. By default the gradient of an inactive unit is zero.
    batch_size
        Samples that are built together; default: the loader's; for a dataset 128, and up to 1024
        on a GPU. It does not change the result.
    precision
        ``"bfloat16"`` takes gradients in bfloat16 where the hardware has it.
    compile
        Use ``torch.compile``. If it fails, warn and continue without it. Like device and batch size
        it changes results by rounding only, and is not a setting of the dataset.
    expectation
        Of a random model, take the mean logits or activations of so many calls, always with the
        same random numbers, at so many times the cost.
    progress
        Show stage, count and time left: one line in a terminal or notebook, lines at intervals
        in a log. None shows it after ten seconds, True from the beginning, False never.
    out
        A folder to write the dataset to, instead of memory. After an interruption at any time the
        same call resumes (with ``seed=None``, with its first seed). On a finished folder it returns
        at once, memory-mapped. Model and data are identified by a digest of the weights and of 256
        samples, and a ``layer`` that is a function by its name alone. Under torchrun every rank
        computes a part of the samples. Then ``out`` is on a disk of all ranks, or its name ends in
        ``rank-{rank}`` (with the braces): each rank writes its own folder, and
        `ConstructedDataset.open` joins them. Without ``out`` every rank computes all samples.
    dtype
        ``"uint8"`` stores images as 256 levels of the bounds, a quarter of the bytes. All fields
        are then measured on the rounded images. ``rounding`` (the l2 change by rounding) and
        ``distance_unrounded`` or ``success_unrounded`` are added.

    Returns
    -------
    ConstructedDataset
        ``images`` float32 (float64 of float64 data and model), ``labels``, and for each
        sample ``index``, ``start_index``, ``start_number`` (of several ``starts``), ``distance``
        and ``distance_before`` (l2 in activations) and ``size`` (l2 from the start).

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause, before any work is done; also where
        ``out`` holds a dataset made with other settings, another model or other data.
    OSError
        ``out`` is another process's at the moment, cannot be written to or is full. What is
        finished there is safe.

    Examples
    --------
    >>> import torch
    >>> import advfeat as af
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
    >>> data = torch.utils.data.TensorDataset(torch.rand(8, 6), torch.arange(8) % 3)
    >>> af.construct_robust_dataset(model, data, steps=5, seed=0).images.shape
    torch.Size([8, 6])
    """
    return build_inverted(
        model,
        data,
        method="D_R",
        layer=layer,
        start=start,
        starts=starts,
        steps=steps,
        step_size=step_size,
        momentum=momentum,
        bounds=bounds,
        seed=seed,
        patience=patience,
        straight_through=straight_through,
        options=BuildOptions(batch_size, precision, progress, out, dtype, compile, expectation),
    )
