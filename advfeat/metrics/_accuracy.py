"""Accuracy on clean and on attacked inputs, with counts, outcomes and intervals."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from advfeat import checks
from advfeat.attacks import Attack, AutoAttack, Batch, pool
from advfeat.attacks.base import can_move, is_unmoved, prepare_batch, warn_of_unmoved
from advfeat.attacks.samples import select_samples
from advfeat.construction.checking import check_known_labels
from advfeat.loading import Data, Source
from advfeat.losses import is_success
from advfeat.metrics._choice import choose_attacks
from advfeat.metrics._masking import BadGradients, masking_signs
from advfeat.metrics._outcome import WRONG, Accuracy, RobustAccuracy
from advfeat.metrics._sharing import SharedSamples
from advfeat.model import Network, Precision, attackable, device_of
from advfeat.progress import Meter, shows_evaluations, with_progress
from advfeat.suggestions import suggests
from advfeat.threat import FeatureBounds, Norm

_EVERYWHERE = (-math.inf, math.inf)


@suggests
@torch.no_grad()
def accuracy(
    model: nn.Module,
    data: Data,
    *,
    batch_size: int | None = None,
    expectation: int = 1,
    progress: bool | None = None,
) -> Accuracy:
    """Measure standard accuracy, in evaluation mode.

    A sample with NaN among its logits counts as wrong.

    Parameters
    ----------
    model
        Any module that returns class logits.
    data
        A dataset, a loader or a list of batches ``(inputs, labels, ...)``; moved to the model's
        device. If batches are mappings, entries with the name of a parameter of ``forward``
        (``attention_mask``) are passed to the model. Under ``torchrun`` the samples are divided
        between the ranks, by the DistributedSampler if there is one, and every rank returns the
        result on all samples; on one rank alone use `advfeat.distributed.on_one_rank`.
    batch_size
        Samples in a forward pass; default: the loader's; for a dataset 128, and up to 1024 on
        a GPU.
    expectation
        For random models: use the mean logits of this many calls, always with the same random
        numbers. The cost grows by the same factor.
    progress
        Show stage, count and time left: one line in a terminal or notebook, lines at intervals
        in a log. None shows it after ten seconds, True from the beginning, False never.

    Returns
    -------
    Accuracy
        A float with ``count``, ``total``, ``correct``, ``index`` and ``interval``.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause.

    Examples
    --------
    >>> import torch
    >>> import advfeat as af
    >>> data = torch.utils.data.TensorDataset(torch.eye(3), torch.tensor([0, 1, 0]))
    >>> af.accuracy(torch.nn.Identity(), data)
    0.6667 (2/3, 95% interval 0.2077 to 0.9385)
    """
    checks.model(model)
    source = Source(data, batch_size, device_of(model))
    shared = SharedSamples(source, "accuracy")
    progress = progress if shared.process.is_first else False
    clean = CleanPass(source, model, _EVERYWHERE, "accuracy", progress)
    with attackable(model, purpose="predictions", expectation=expectation) as net:
        for _ in clean.read(net):
            pass
    index, right = shared.gather(clean.index, clean.right)
    return Accuracy.of(right, index)


@suggests
@checks.warns_once()
def robust_accuracy(
    model: nn.Module,
    data: Data,
    *,
    eps: float | Tensor | None = None,
    norm: Norm | None = None,
    attack: Attack | AutoAttack | Sequence[Attack | AutoAttack] | str | None = None,
    steps: int | None = None,
    bounds: FeatureBounds = (0.0, 1.0),
    mask: Tensor | None = None,
    seed: int | torch.Generator | None = None,
    batch_size: int | None = None,
    precision: Precision = "float32",
    compile: bool = False,
    expectation: int = 1,
    keep_inputs: bool = False,
    progress: bool | None = None,
) -> RobustAccuracy:
    """Accuracy under attack, and on clean inputs in the same pass.

    A sample is robust if no attack makes the model misclassify it. Only correctly classified
    samples are attacked, and a misclassified sample is not attacked further. An attack counts as
    successful only if a float32 forward pass on the returned input confirms it.

    Parameters
    ----------
    model, data, batch_size, progress
        As in `accuracy`. The batch size does not change the result.
    eps, norm
        The ball, in the units of the inputs; required unless ``attack`` is given. ``eps`` is a
        float, or a radius for each feature: a tensor that broadcasts against one sample, as in
        `advfeat.pgd`.
    attack
        An attack object, a list of them, or a name (``"autoattack"``, ``"pgd"``, ...) for an attack
        with its defaults. With a list, a sample is robust if all attacks fail. Default
        ``advfeat.attacks.AutoAttack(version="fast")``; for a number in a paper use
        ``version="standard"``.
    steps
        Use PGD with this many steps, from the clean input, instead of the default attack. This is
        quicker, but a weaker attack: the number is a looser upper bound.
    bounds
        The range ``(low, high)`` of valid inputs, numbers or tensors that broadcast against one
        sample. An attack object has its own.
    mask
        Features that may change: a bool tensor that broadcasts against one sample, or one for each
        sample, ``(total, ...)``, in the order of the sample numbers (``index``). An attack object
        has its own.
    seed
        Seed of the attacks that have none of their own. None draws one number from torch's default
        generator where needed.
    precision
        ``"bfloat16"`` computes gradients in bfloat16; success is always checked in float32.
    compile
        Attack through ``torch.compile``. If it fails, warn and continue without it.
    expectation
        As in `accuracy`; gradients are averaged over the same calls (EOT, Athalye et al. 2018).
    keep_inputs
        Keep the attacked inputs in ``adversarial``.

    Returns
    -------
    RobustAccuracy
        A float, as in `Accuracy`, with the clean accuracy (``standard``), and for each sample
        the attack that succeeded and its objective.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause, before any work is done.

    Examples
    --------
    >>> import torch
    >>> import advfeat as af
    >>> data = torch.utils.data.TensorDataset(torch.eye(3), torch.tensor([0, 1, 0]))
    >>> robust = af.robust_accuracy(torch.nn.Identity(), data, eps=0.8, norm="linf", seed=0)
    >>> float(robust), robust.standard.count, robust.broken_by
    (0.0, 2, tensor([ 0,  0, -2]))
    """
    choose_attacks(attack, eps, norm, steps, bounds, 0 if seed is None else seed, mask)
    checks.model(model)
    source = Source(data, batch_size, device_of(model))
    shared = SharedSamples(source, "robust_accuracy")
    attacks = choose_attacks(attack, eps, norm, steps, bounds, shared.seed(seed), mask)
    progress = progress if shared.process.is_first else False
    clean = CleanPass(source, model, attacks[0].bounds, "robust accuracy", False, keep_inputs)
    bad_gradients = BadGradients(attacks)
    ids, broken, values, adversarial = array("q"), array("q"), array("f"), []
    unmoved = 0
    # In a ball of radius 0 a random model would be asked again until it is wrong.
    moving = attacks if any(map(can_move, attacks)) else ()
    settings: dict[str, Any] = {"precision": precision, "compile": compile}
    total = None if source.is_stream else len(source)
    with (
        Meter(progress, "robust accuracy", total, unit="samples") as meter,
        attackable(model, expectation=expectation, **settings) as net,
    ):
        shown: dict[str, str] = {}
        net.on_gradient = net.on_logits = shows_evaluations(meter, shown)
        for verdict in pool.worst_case(moving, net, clean.resisting(net), source.batch_size):
            bad_gradients.add(net, verdict, attacks[0].bounds)
            ids.extend(verdict.ids.tolist())
            broken.extend(verdict.attack.tolist())
            values.extend(verdict.value.tolist())
            last = broken[-1] if broken else pool.ROBUST
            shown["attack"] = type(attacks[max(last, -1)]).__name__
            meter.update(clean.settled(len(verdict.ids)), shown)
            adversarial += [verdict.adversarial.cpu()] if keep_inputs else []
            still = is_unmoved(verdict.adversarial, verdict.inputs) & ~verdict.success
            unmoved += int(still.sum())
    unmoved, zero = shared.sum(unmoved), shared.sum(bad_gradients.zero)
    misled = shared.sum(bad_gradients.misleading), shared.sum(bad_gradients.checked)
    broken_by = torch.full_like(clean.index, WRONG)
    value = torch.full(broken_by.shape, torch.nan, dtype=torch.float32, device="cpu")
    found_at = places(clean.index, tensor(ids))
    broken_by[found_at], value[found_at] = tensor(broken), tensor(values)
    inputs = clean.inputs
    if inputs is not None and adversarial:
        inputs[found_at] = torch.cat(adversarial)
    index, right, broken_by, value, inputs = shared.gather(
        clean.index, clean.right, broken_by, value, inputs
    )
    if unmoved and moving and not zero:
        warn_of_unmoved(unmoved, len(index))
    robust = RobustAccuracy.of(broken_by == pool.ROBUST, index)
    robust.standard, robust.attacks = Accuracy.of(right, index), attacks
    robust.broken_by, robust.value = broken_by, value
    robust.adversarial = None if inputs is None else inputs.contiguous()
    signs = masking_signs(attacks, broken_by, zero, *misled)
    doubt = " may be too high" if float(robust) else ""
    for topic, sign in signs.items():
        checks.warn(f"robust accuracy {float(robust):.4f}{doubt}: {sign}", topic=topic)
    robust.warnings = tuple(signs.values())
    return robust


class CleanPass:
    """One reading of the data, which evaluates the clean samples on their way to an attack."""

    def __init__(
        self,
        source: Source,
        model: nn.Module,
        bounds: FeatureBounds,
        label: str,
        progress: bool | None,
        keep_inputs: bool = False,
    ) -> None:
        self._batches = with_progress(
            source.batches(device_of(model)),
            total=source.batch_count,
            label=label,
            progress=progress,
        )
        self._source, self._bounds, self._batch_size = source, bounds, source.batch_size
        self._index, self._right, self._counted = array("q"), array("b"), 0
        self._wrong = 0
        self._inputs: list[Tensor] | None = [] if keep_inputs else None

    def read(self, net: Network) -> Iterator[tuple[Batch, Tensor]]:
        """Every batch, checked and prepared, with whether the model is right on each sample."""
        net.batches.usual = self._batch_size
        for samples in self._batches:
            batch = prepare_batch(
                net,
                samples.inputs,
                samples.labels,
                samples.ids,
                self._bounds,
                extras=samples.entries,
            )
            with net.given(batch.extras):
                right = is_success(net.logits(batch.inputs), batch.labels, targeted=True)
            if not self._index and net.classes is not None and not self._source.is_stream:
                check_known_labels(self._source, self._bounds, net.classes)
            self._index.extend(samples.ids.tolist())
            outcomes = right.tolist()
            self._right.extend(outcomes)
            self._wrong += len(outcomes) - sum(outcomes)
            if self._inputs is not None:
                self._inputs.append(batch.inputs.cpu())
                first, last = self._inputs[0].shape[1:], self._inputs[-1].shape[1:]
                if first != last:
                    checks.fail("keep_inputs", True, f"inputs of two shapes, {first} and {last}")
            yield batch, right

    def resisting(self, net: Network) -> Iterator[Batch]:
        """The samples on which the model is right."""
        for batch, right in self.read(net):
            if bool(right.any()):
                yield select_samples(batch, right)

    def settled(self, count: int) -> int:
        """Samples settled since the last call: ``count`` attacked ones, and those wrong anyway."""
        found, self._counted = count + self._wrong - self._counted, self._wrong
        return found

    @property
    def index(self) -> Tensor:
        """Sample numbers in the order they were read, once all were."""
        return tensor(self._index)

    @property
    def right(self) -> Tensor:
        """Whether the model is right on each of them, bool ``(total,)``."""
        return tensor(self._right).bool()

    @property
    def inputs(self) -> Tensor | None:
        """A copy of the clean inputs, if they were to be kept."""
        if self._inputs is None:
            return None
        return torch.cat(self._inputs) if self._inputs else torch.empty(0)


def tensor(values: array[int] | array[float]) -> Tensor:
    """What was gathered sample by sample.

    In an array, for small tensors that outlive the large ones around them break up the heap, and
    memory would grow with the number of samples.
    """
    return torch.from_numpy(np.array(values))


def places(index: Tensor, ids: Tensor) -> Tensor:
    """Where each of ``ids`` stands in ``index``."""
    order = index.argsort()
    return order[torch.searchsorted(index[order], ids)]
