"""D_NR, D_det and D_rand: datasets that hold non-robust features (sections 3.1 and 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from advfeat import checks, seeding
from advfeat.attacks import Batch
from advfeat.construction import BuildOptions, Start, build_inverted, build_targeted
from advfeat.datasets import ConstructedDataset
from advfeat.datasets.dataset import Dtype
from advfeat.durable import Folder
from advfeat.loading import Data
from advfeat.model import Layer, Network, Precision
from advfeat.suggestions import suggests
from advfeat.threat import FeatureBounds, Norm

__all__ = ["construct_det_dataset", "construct_nonrobust_dataset", "construct_rand_dataset"]


@suggests
def construct_nonrobust_dataset(
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
    """Make D_NR: as `advfeat.construct_robust_dataset`, from a standard model.

    Training on the result gives a model that is accurate and not robust. The arguments, the result
    and the errors are those of `advfeat.construct_robust_dataset`.

    Parameters
    ----------
    model
        A standard model; any module.
    data, layer, start, starts, steps, step_size, momentum, bounds, seed, patience, \
    straight_through, batch_size, precision, compile, progress, out, dtype
        As in `advfeat.construct_robust_dataset`.

    Returns
    -------
    ConstructedDataset
        As in `advfeat.construct_robust_dataset`.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause.

    Examples
    --------
    >>> import torch
    >>> import advfeat as af
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
    >>> data = torch.utils.data.TensorDataset(torch.rand(8, 6), torch.arange(8) % 3)
    >>> af.construct_nonrobust_dataset(model, data, start="noise", steps=5, seed=0)
    ConstructedDataset(D_NR: 8 of 6; images, index, labels, distance, distance_before, size)
    """
    return build_inverted(
        model,
        data,
        method="D_NR",
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


@suggests
def construct_det_dataset(
    model: nn.Module,
    data: Data,
    *,
    eps: float | Tensor = 0.5,
    norm: Norm = "l2",
    shift: int = 1,
    steps: int = 100,
    step_size: float | None = None,
    bounds: FeatureBounds = (0.0, 1.0),
    mask: Tensor | None = None,
    patience: int | None = None,
    batch_size: int | None = None,
    precision: Precision = "float32",
    compile: bool = False,
    expectation: int = 1,
    progress: bool | None = None,
    out: Folder | None = None,
    dtype: Dtype = "float32",
) -> ConstructedDataset:
    """Make D_det: each image attacked towards the class after its own, and labelled so.

    Robust features then indicate a wrong class, and non-robust features indicate the label. So if a
    model that is trained on D_det predicts true labels, it uses non-robust features.

    Parameters
    ----------
    model
        The standard model to attack. With a robust model, the result is the control.
    data
        A map-style dataset, or a loader of one (its order does not matter).
    eps, norm
        The ball, in the units of the inputs. Default l2 0.5, the paper's for CIFAR-10; Restricted
        ImageNet used 3. ``eps`` may be a tensor that broadcasts against one sample, the radius of
        each feature, as in `advfeat.pgd`; ``size`` is then in multiples of it.
    shift
        The target is (label + shift) mod classes; the paper's is 1.
    steps, step_size
        Targeted PGD from the image: default 100 steps of ``eps / 5`` (0.1 in the paper). A sample
        that reaches its target continues.
    patience
        Stop a sample when its loss has not decreased by a thousandth of itself in this many steps,
        and continue with another sample. By default every sample takes all steps, as in the paper.
    mask
        Features that may change: a bool tensor that broadcasts against one sample, or one for each
        sample of the data, by its number.
    bounds, batch_size, precision, compile, expectation, progress, out, dtype
        As in `advfeat.construct_robust_dataset`.

    Returns
    -------
    ConstructedDataset
        ``images`` float32 (float64 of float64 data and model), ``labels`` (the targets), and for
        each sample ``index``, ``source_labels``, ``success`` (the model says the target, in
        float32) and ``size`` (of the perturbation, in ``norm``).

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause, before any work is done.

    Examples
    --------
    >>> import torch
    >>> import advfeat as af
    >>> data = torch.utils.data.TensorDataset(torch.eye(3), torch.arange(3))
    >>> made = af.construct_det_dataset(torch.nn.Identity(), data, eps=0.9, steps=10)
    >>> made.labels, made.field("success")
    (tensor([1, 2, 0]), tensor([True, True, True]))
    """
    checks.count("shift", shift, low=0)

    def choose(net: Network, batch: Batch) -> Tensor:
        classes = net.class_count(batch.inputs)
        if shift % classes == 0:
            checks.fail("shift", shift, f"with {classes} classes every target equals its label")
        return (batch.labels + shift) % classes

    return build_targeted(
        choose,
        model,
        data,
        method="D_det",
        settings={"shift": shift},
        eps=eps,
        norm=norm,
        steps=steps,
        step_size=step_size,
        bounds=bounds,
        mask=mask,
        patience=patience,
        options=BuildOptions(batch_size, precision, progress, out, dtype, compile, expectation),
    )


@suggests
def construct_rand_dataset(
    model: nn.Module,
    data: Data,
    *,
    eps: float | Tensor = 0.5,
    norm: Norm = "l2",
    exclude_label: bool = False,
    steps: int = 100,
    step_size: float | None = None,
    bounds: FeatureBounds = (0.0, 1.0),
    mask: Tensor | None = None,
    seed: int | torch.Generator | None = None,
    patience: int | None = None,
    batch_size: int | None = None,
    precision: Precision = "float32",
    compile: bool = False,
    expectation: int = 1,
    progress: bool | None = None,
    out: Folder | None = None,
    dtype: Dtype = "float32",
) -> ConstructedDataset:
    """Make D_rand: each image attacked towards a random class, and labelled so.

    Only non-robust features agree with the labels. Train on it with a low learning rate (0.01 in
    the paper) and for many epochs: accuracy stays at chance for tens of epochs before it rises.

    Parameters
    ----------
    model, data, eps, norm, steps, step_size, bounds, mask, patience, batch_size, precision, \
compile, expectation, progress, out, dtype
        As in `construct_det_dataset`.
    exclude_label
        The paper draws the target uniformly from all classes, so one image in C keeps its label and
        is hardly changed. With True the target is one of the other classes.
    seed
        Seed of the targets. None draws one number from torch's default generator.

    Returns
    -------
    ConstructedDataset
        As in `construct_det_dataset`.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause.

    Examples
    --------
    >>> import torch
    >>> import advfeat as af
    >>> data = torch.utils.data.TensorDataset(torch.eye(3), torch.arange(3))
    >>> made = af.construct_rand_dataset(torch.nn.Identity(), data, steps=5, seed=0)
    >>> len(made), made.manifest["settings"]["seed"]
    (3, 0)
    """
    checks.seed(seed)
    options = BuildOptions(batch_size, precision, progress, out, dtype, compile, expectation)
    drawn = options.seed(seed)

    def choose(net: Network, batch: Batch) -> Tensor:
        classes = net.class_count(batch.inputs)
        keys = seeding.keys(drawn, batch.ids)
        if exclude_label:
            return (batch.labels + 1 + seeding.integers(keys, 0, classes - 1)) % classes
        return seeding.integers(keys, 0, classes)

    return build_targeted(
        choose,
        model,
        data,
        method="D_rand",
        settings={"seed": drawn, "exclude_label": exclude_label},
        eps=eps,
        norm=norm,
        steps=steps,
        step_size=step_size,
        bounds=bounds,
        mask=mask,
        patience=patience,
        options=options,
    )
