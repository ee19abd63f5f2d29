"""Options of training that few runs need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from advfeat import checks


@dataclass(frozen=True, kw_only=True)
class Options:
    """Further options of `fit` and `adversarial_fit`; all of them are off by default.

    Parameters
    ----------
    ema
        Decay of an exponential moving average of the weights, from 0 (none) to below 1; 0.999 is
        common. After ``t`` steps the decay is at most ``(1 + t) / (10 + t)``, so that the
        first steps do not count. The averaged model has BatchNorm statistics of its own, from the
        same batches. It is what validation measures and what ``model`` is at the end.
    awp
        Adversarial weight perturbation (Wu et al. 2020): the gradient is taken where each weight
        tensor has been moved up the loss by this fraction of its own norm; 0.005 in the paper.
        It doubles the cost of a step without its attack.
    clip_norm
        Gradients longer than this, all parameters together, are shortened to it.
    label_smoothing
        Fraction of the label's probability that is spread over all classes, in the cross-entropy of
        ``fit`` and of the objectives ``"pgd"`` and ``"trades"``.
    accumulate
        Parts in which each batch goes through the model, to need less memory: without BatchNorm
        the result is the same.
    compile
        Compile the model by `torch.compile`, for training and for the attack.
    class_weights
        Weight of each class in the loss, ``C`` numbers. A batch's loss is the weighted mean, as in
        ``torch.nn.CrossEntropyLoss(weight=...)``.
    sample_weight
        The field of a batch that holds a weight for each sample: a key of a mapping, or a position
        in a tuple. They multiply the class weights.
    patience
        Stop after this many epochs without a better validation figure (robust accuracy; accuracy
        for `fit`), and leave the model as it was in the best epoch.

    Examples
    --------
    >>> Options(ema=0.999, patience=5).accumulate
    1
    """

    ema: float = 0.0
    awp: float = 0.0
    clip_norm: float | None = None
    label_smoothing: float = 0.0
    accumulate: int = 1
    compile: bool = False
    class_weights: Sequence[float] | Tensor | None = None
    sample_weight: str | int | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        checks.fraction("ema", self.ema)
        if self.ema == 1:
            checks.fail("ema", self.ema, "the average would never move; 0.999 is common")
        checks.number("awp", self.awp, low=0.0)
        if self.clip_norm is not None:
            checks.number("clip_norm", self.clip_norm, low=0.0, strict=True)
        checks.fraction("label_smoothing", self.label_smoothing)
        checks.count("accumulate", self.accumulate, low=1)
        if not isinstance(self.compile, bool):
            raise TypeError(f"compile={self.compile!r}: expected True or False")
        if self.class_weights is not None:
            _check_class_weights(self.class_weights)
        if self.sample_weight is not None and not isinstance(self.sample_weight, (str, int)):
            raise TypeError(
                f"sample_weight={self.sample_weight!r}: expected a key or a position in a batch"
            )
        if self.patience is not None:
            checks.count("patience", self.patience, low=1)


def _check_class_weights(weights: Sequence[float] | Tensor) -> None:
    try:
        found = torch.as_tensor(weights, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError("class_weights: expected one number for each class") from error
    if found.ndim != 1 or not bool(torch.isfinite(found).all()) or bool((found < 0).any()):
        checks.fail("class_weights", found.tolist(), "expected finite numbers of at least 0")
