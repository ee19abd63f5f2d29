"""Do targeted perturbations reach their target on other models?"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from advfeat import checks, seeding
from advfeat.analysis._features import named_models
from advfeat.analysis._matrix import AccuracyMatrix
from advfeat.loading import Data, Source
from advfeat.metrics import Accuracy
from advfeat.model import attackable, device_of
from advfeat.nonrobust import construct_rand_dataset
from advfeat.threat import Bounds, Norm


def targeted_transfer(
    sources: Mapping[str, nn.Module],
    targets: Mapping[str, nn.Module],
    data: Data,
    *,
    eps: float,
    norm: Norm,
    steps: int = 100,
    bounds: Bounds = (0.0, 1.0),
    seed: int | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> AccuracyMatrix:
    """Measure how often targeted perturbations of one model are classified as the target by others.

    Every sample is perturbed towards a random class other than its label, on each source model.

    Springer et al. (2021, "A little robustness goes a long way") find that sources trained in a
    small ball transfer best: pass models trained with several ``eps``.

    Parameters
    ----------
    sources, targets
        Models by name: ``{"eps 0": standard, "eps 0.1": slightly_robust}`` that perturbations are
        made on, and those that they are tried on.
    data
        A map-style dataset, or a loader of one; at least two classes.
    eps, norm, steps, bounds
        Ball, number of steps and valid range of the targeted PGD, as in `advfeat.pgd`.
    seed
        Seed of the target classes, which are the same for all sources; None draws one number from
        torch's default generator.
    batch_size, progress
        As in `advfeat.accuracy`.

    Returns
    -------
    AccuracyMatrix
        Fraction that a target classifies as the target class, among samples that it does not
        classify so without a perturbation; the class is never that of the label.

    Raises
    ------
    ValueError
        ``eps`` is not above 0, ``steps`` is below 1, or an input is outside ``bounds``.
    TypeError
        ``sources`` or ``targets`` is not a mapping from names to modules.

    Examples
    --------
    >>> import torch
    >>> from advfeat import analysis
    >>> model = torch.nn.Linear(4, 3)
    >>> data = torch.utils.data.TensorDataset(torch.rand(9, 4), torch.arange(9) % 3)
    >>> found = analysis.targeted_transfer(
    ...     {"mine": model}, {"mine": model}, data, eps=9.0, norm="l2", steps=5, seed=0
    ... )
    >>> list(found.values["mine"])
    ['mine']
    """
    named, reached = named_models(sources), named_models(targets)
    checks.seed(seed)
    seed = seeding.resolve(seed)
    clean = {name: _predictions(model, data, batch_size) for name, model in reached.items()}
    values: dict[str, dict[str, Accuracy]] = {}
    for name, source in named.items():
        made = construct_rand_dataset(
            source, data, eps=eps, norm=norm, steps=steps, bounds=bounds, seed=seed,
            exclude_label=True, batch_size=batch_size, progress=progress,
        )  # fmt: skip
        wanted = made.labels
        values[name] = {}
        for target, model in reached.items():
            counted = clean[target] != wanted
            said = _predictions(model, made, batch_size)
            values[name][target] = Accuracy.of((said == wanted)[counted])
    return AccuracyMatrix(values, "targets reached")


def _predictions(model: nn.Module, data: Data, batch_size: int | None) -> torch.Tensor:
    with attackable(model) as net:
        parts = [
            net.logits(net.prepare(batch.inputs)).argmax(1).cpu()
            for batch in Source(data, batch_size).batches(device_of(model))
        ]
    return torch.cat(parts)
