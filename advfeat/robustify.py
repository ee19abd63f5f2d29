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

    Each image starts as another image and is moved until the robust model's activations on it
    are those on the original, whose label it keeps. Standard training on the result gives a
    model with robust accuracy.

    Parameters
    ----------
    model
        An adversarially trained model; any module.
    data
        A map-style dataset, or a loader of one (its order does not matter). Without random
        augmentation: an image is fetched again as another's start.
    layer
        Where activations are taken: a module's name or the module (its output), a callable of the
        inputs, or None for the input of the Linear that gives the logits, the paper's choice. Its
        name and width are in ``manifest["layer"]``.
    start
        ``"images"``: another sample, uniform over all others. ``"noise"``: N(0, 1) / 20 + 0.5 of
        the bounds (the released notebook). Or a tensor with one start for each
        sample, ``(N, ...)``, or ``(starts, N, ...)`` of several.
    starts
        Constructed samples for each sample of the data, each from a start of its own: default 1,
        as in the paper. With several, ``start_number`` says which start a sample is from, and all
        samples of start 0 come first: they are the dataset of one start.
        `advfeat.datasets.StartSampler` draws one of them for each image and epoch.
    steps, step_size
        Steps of fixed l2 length. Default 1000 of 0.1, the paper's for CIFAR-10; Restricted
        ImageNet used 2000 of 1, noise starts 10,000 steps.
    momentum
        Fraction of the last move that is added to the next (heavy ball), in [0, 1); in the paper 0.
        0.9 comes as near in fewer steps, 27 for 100 in docs/benchmarks.md: moves grow from
        ``step_size`` to at most 1 / (1 - momentum) times that.
    bounds
        The range ``(low, high)`` of valid inputs, numbers or tensors that broadcast against one
        sample.
    seed
        Of the starts; None draws one number from torch's default generator.
    patience
        Leave a sample where it is once its squared distance has not fallen by a thousandth in so
        many steps, and continue with another in its place; by default every sample takes all steps,
        as in the paper.
    straight_through
        Let gradients pass the last ReLU before the layer unchanged, as the released code of the
        paper does; by default a unit that is not active gives none.
    batch_size
        Samples built together; by default the loader's; for a dataset 128, up to 1024 on a GPU.
        Does not change the result.
    precision
        ``"bfloat16"`` takes gradients in bfloat16 where the hardware has it.
    compile
        Go through ``torch.compile``; warns and continues without where it fails. Like another
        device or batch size it changes a result by rounding, and is not a setting of the dataset.
    expectation
        Of a random model, take the mean logits or activations of so many calls, always with the
        same random numbers, at so many times the cost.
    progress
        Show stage, count and time left: one line in a terminal or notebook, lines at intervals
        in a log, there by default from ten seconds on. True says it at once, False never.
    out
        A folder to build the dataset in, sample by sample, not in memory. It can be killed at
        any moment: the same call on the same folder continues where it was (with ``seed=None``,
        with the seed that it began with), and returns a finished folder at once, memory-mapped.
        Model and data are recognised by a digest of the weights and of 256 samples; a ``layer``
        that is a callable by its name alone. Under torchrun every rank makes a part of the samples;
        ``out`` is
        then on a disk of all ranks; or a name ending in ``rank-{rank}`` (as it stands), and
        each rank has a folder of its own, which `ConstructedDataset.open` joins. Without ``out``
        every rank makes all samples.
    dtype
        ``"uint8"`` stores images as 256 levels of the bounds, a quarter of the bytes. What is told
        of a sample is then measured on the rounded image, beside ``rounding`` (l2 moved by it) and
        ``distance_unrounded`` or ``success_unrounded``.

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
