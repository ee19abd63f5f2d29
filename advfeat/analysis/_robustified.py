"""Robustified test sets: which of the features that a model uses does a robust source have?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from advfeat import checks, seeding
from advfeat.analysis._features import named_models
from advfeat.analysis._matrix import AccuracyMatrix
from advfeat.loading import Data
from advfeat.metrics import accuracy
from advfeat.robustify import construct_robust_dataset


def robustified_accuracy(
    sources: Mapping[str, nn.Module],
    models: Mapping[str, nn.Module],
    data: Data,
    *,
    steps: int = 100,
    seed: int | None = None,
    progress: bool | None = None,
    **settings: Any,
) -> AccuracyMatrix:
    """Robustify test data by sources of several ``eps``, and test any models on them.

    Springer et al. (2021, "Adversarial perturbations are not so weird"). Each source makes D_R of
    the *test* data: images that agree with the originals in the features of that source alone. A
    model is accurate on them as far as it uses what the source has. Compare sources trained in
    balls of several radii, 0 for a standard one.

    Parameters
    ----------
    sources, models
        By name: ``{"l2 0.5": robust, "l2 0": standard}``, and whatever is to be tested.
    data
        Original test data: a map-style dataset, or a loader of one.
    steps
        Of the inversion; too few leave the images near their starts and every accuracy low.
    seed
        Of the starts, the same for all sources; None draws one number.
    progress, settings
        As in `advfeat.construct_robust_dataset`, such as ``bounds`` and ``momentum``.

    Returns
    -------
    AccuracyMatrix
        For each source, each model's accuracy on what it made; ``"original"`` is the first row.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause.

    Examples
    --------
    >>> import torch
    >>> from advfeat import analysis
    >>> model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(4, 3))
    >>> data = torch.utils.data.TensorDataset(torch.rand(6, 4), torch.arange(6) % 3)
    >>> found = analysis.robustified_accuracy({"a": model}, {"a": model}, data, steps=5, seed=0)
    >>> list(found.values)
    ['original', 'a']
    """
    named, tested = named_models(sources), named_models(models)
    checks.seed(seed)
    seed = seeding.resolve(seed)
    sets: dict[str, Data] = {"original": data}
    for name, source in named.items():
        sets[name] = construct_robust_dataset(
            source, data, steps=steps, seed=seed, progress=progress, **settings
        )
    values = {
        name: {model: accuracy(tested[model], made, progress=False) for model in tested}
        for name, made in sets.items()
    }
    return AccuracyMatrix(values, "accuracy on robustified test data")
