"""Adversarial examples of one model on another."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from advfeat import checks, plots, seeding
from advfeat.attacks import Attack, AutoAttack
from advfeat.attacks.base import check_attack, prepare_batch
from advfeat.attacks.settings import own_bounds
from advfeat.loading import Data, Samples, Source
from advfeat.losses import is_success
from advfeat.metrics._choice import named_attack, own_ball
from advfeat.model import attackable, device_of
from advfeat.progress import with_progress
from advfeat.results import Result
from advfeat.statistics import wilson_interval
from advfeat.tables import Table
from advfeat.threat import FeatureBounds, Norm

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_EVERYWHERE = (-math.inf, math.inf)


@dataclass(frozen=True, eq=False, repr=False)
class TransferMatrix(Result):
    """How often the examples made on a source (row) fool a target (column).

    Attributes
    ----------
    sources, targets
        Names of rows and columns.
    fooled
        Fraction that the target gets wrong on the source's example, among samples that source and
        target both classify correctly without one, ``(S, T)``; NaN where there are none. A target
        that is wrong anyway is not fooled.
    both_right
        How many samples these are, int64 ``(S, T)``.
    of_fooled
        The same among samples that the source had right and was fooled on, ``(S, T)``; NaN where
        there are none.
    of_all
        The same among all samples, ``(S, T)``.
    clean_error
        Fraction of samples that each target gets wrong on the clean input, ``(T,)``: what
        ``of_all`` would be without an attack.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    fooled: Tensor
    both_right: Tensor
    of_fooled: Tensor
    of_all: Tensor
    clean_error: Tensor

    def interval(self, source: str, target: str) -> tuple[float, float]:
        """95% Wilson interval of ``fooled`` for one pair, by names."""
        checks.one_of("source", source, self.sources)
        checks.one_of("target", target, self.targets)
        place = self.sources.index(source), self.targets.index(target)
        total = int(self.both_right[place])
        count = round(float(self.fooled[place]) * total) if total else 0
        return wilson_interval(count, total)

    def _summary(self) -> str:
        return f"{len(self.sources)} sources, {len(self.targets)} targets"

    def _content(self) -> Sequence[str | Table]:
        rows: list[tuple[object, ...]] = [
            (name, *(_percent(value) for value in row))
            for name, row in zip(
                (*self.sources, "clean error"),
                (*self.fooled.tolist(), self.clean_error.tolist()),
                strict=True,
            )
        ]
        return [Table(("% fooled, made on", *self.targets), rows)]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Percent fooled of every pair, as a heat map."""
        ax = plots.new_axes(ax, 1.1 * len(self.targets) + 2.4, 0.7 * len(self.sources) + 1.6)
        plots.heat_map(ax, 100 * self.fooled, self.sources, self.targets)
        ax.set(xlabel="tried on", ylabel="made on", title="% fooled")
        return ax


def _percent(value: float) -> str:
    return "none right" if math.isnan(value) else f"{100 * value:.1f}"


@checks.warns_once()
def transfer_matrix(
    sources: Mapping[str, nn.Module],
    targets: Mapping[str, nn.Module],
    data: Data,
    attack: Attack | AutoAttack | str,
    *,
    eps: float | Tensor | None = None,
    norm: Norm | None = None,
    bounds: FeatureBounds = (0.0, 1.0),
    mask: Tensor | None = None,
    seed: int | torch.Generator | None = None,
    target_labels: Callable[[Tensor], Tensor] | None = None,
    batch_size: int | None = None,
    expectation: int = 1,
    progress: bool | None = None,
) -> TransferMatrix:
    """Attack every source model, and try the examples on every target model.

    Parameters
    ----------
    sources, targets
        Models by name; a model may be in both.
    data, batch_size, expectation, progress
        As in `robust_accuracy`; each model is attacked and judged by the mean of ``expectation``
        calls.
    attack
        An attack object, run to its end on each source. Or a name, with ``eps`` and ``norm``:
        ``"mi"`` is `advfeat.attacks.MIFGSM`, ``"mi-di"`` is `advfeat.attacks.DIFGSM`, and
        ``"di"`` the same without momentum, each with its defaults: the papers' settings, and 10
        steps of ``eps / 10`` in all three. The other names are those of `robust_accuracy`.
    eps, norm, bounds, mask
        Of an attack given by its name, as in `robust_accuracy`; an attack object has its own. The
        papers of MI-FGSM and DI-FGSM use ``norm="linf"`` and ``eps`` 16/255 and 15/255.
    seed
        Of an attack that has none of its own: an integer, a generator, or None for one draw from
        torch's default generator.
    target_labels
        For a targeted attack, a function from the labels of a batch to the classes to aim at, such
        as ``lambda y: (y + 1) % 10``. A model is then fooled where it says that class, and
        ``clean_error`` is the fraction of clean inputs on which it does.

    Returns
    -------
    TransferMatrix
        By three denominators, and each target's clean error.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause, before any work is done.

    Examples
    --------
    >>> import torch
    >>> from advfeat.attacks import PGD
    >>> from advfeat.metrics import transfer_matrix
    >>> data = torch.utils.data.TensorDataset(torch.eye(3), torch.arange(3))
    >>> models = {"a": torch.nn.Identity(), "b": torch.nn.Softmax(1)}
    >>> matrix = transfer_matrix(models, models, data, PGD(eps=0.9, norm="linf"))
    >>> matrix.fooled.shape, float(matrix.fooled[0, 1])
    (torch.Size([2, 2]), 1.0)

    By name:

    >>> matrix = transfer_matrix(models, models, data, "mi", eps=0.9, norm="linf")
    """
    for models in (sources, targets):
        if not isinstance(models, Mapping) or not models:
            raise TypeError(
                "sources, targets: expected mappings from a name to a model: {'mine': model}"
            )
        for model in models.values():
            checks.model(model)
    checks.function("target_labels", target_labels)
    is_targeted = target_labels is not None
    attack = _chosen(attack, eps, norm, bounds, mask, seed, is_targeted)
    device = device_of(next(iter(sources.values())))
    source_data = Source(data, batch_size, device)
    shape = (len(sources), len(targets))
    cpu: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    missed_of = {name: torch.zeros(shape, **cpu) for name in ("both_right", "fooled", "all")}
    both_right, fooled_of = (
        torch.zeros(shape, dtype=torch.int64, device="cpu"),
        torch.zeros(len(sources), 1, **cpu),
    )
    clean_wrong, total = torch.zeros(len(targets), **cpu), 0
    batches = source_data.batches(device)
    for samples in with_progress(
        batches, total=source_data.batch_count, label="transfer", progress=progress
    ):
        total += len(samples.ids)
        aimed = samples if target_labels is None else _aimed(samples, target_labels)
        wrong = [_wrong(target, samples, expectation) for target in targets.values()]
        clean = wrong
        if target_labels is not None:
            clean = [_wrong(target, aimed, expectation, True) for target in targets.values()]
        clean_wrong += torch.stack([each.sum() for each in clean])
        for i, source in enumerate(sources.values()):
            made = aimed._replace(inputs=_attacked(source, attack, aimed, expectation))
            right = ~_wrong(source, samples, expectation)
            fooled = right & _wrong(source, made, expectation, attack.targeted)
            fooled_of[i] += fooled.sum()
            for j, target in enumerate(targets.values()):
                missed = _wrong(target, made, expectation, attack.targeted)
                both = right & ~wrong[j]
                both_right[i, j] += both.sum()
                missed_of["both_right"][i, j] += (missed & both).sum()
                missed_of["fooled"][i, j] += (missed & fooled).sum()
                missed_of["all"][i, j] += missed.sum()
    return TransferMatrix(
        tuple(sources),
        tuple(targets),
        fooled=missed_of["both_right"] / both_right,
        both_right=both_right,
        of_fooled=missed_of["fooled"] / fooled_of,
        of_all=missed_of["all"] / total,
        clean_error=clean_wrong / total,
    )


def _chosen(
    attack: Attack | AutoAttack | str,
    eps: float | Tensor | None,
    norm: Norm | None,
    bounds: FeatureBounds,
    mask: Tensor | None,
    seed: int | torch.Generator | None,
    is_targeted: bool,
) -> Attack | AutoAttack:
    """The attack, with a seed if it is random."""
    checks.seed(seed)
    if isinstance(attack, str):
        attack = named_attack(attack, eps, norm, None, bounds, mask, is_targeted)
    else:
        if not isinstance(attack, AutoAttack):
            check_attack(attack, None, None, allow_targeted=True)
        own_ball(eps, norm, None, mask)
        own_bounds(bounds, attack.bounds)
    if attack.targeted != is_targeted:
        cause = "a targeted attack needs it, to know the classes to aim at; another has none"
        checks.fail("target_labels", is_targeted or None, cause)
    if not attack.is_random:
        return attack
    # One seed for all sources: each is attacked from the same random starts.
    own = getattr(attack, "seed", None)
    return attack.with_seed(seeding.resolve(seed if own is None else own))


def _attacked(
    model: nn.Module, attack: Attack | AutoAttack, samples: Samples, expectation: int
) -> Tensor:
    """Adversarial inputs of a model, on its device."""
    device = device_of(model)
    inputs, labels = samples.inputs.to(device), samples.labels.to(device)
    with attackable(model, purpose=None) as net:
        extras = net.choose_extras(samples.entries, inputs)
    return attack(
        model, inputs, labels, index=samples.ids.to(device), expectation=expectation, extras=extras
    )


def _aimed(samples: Samples, target_labels: Callable[[Tensor], Tensor]) -> Samples:
    """The samples with the classes to aim at for labels."""
    targets = target_labels(samples.labels)
    checks.labels(targets, samples.inputs, "target_labels")
    return samples._replace(labels=targets)


def _wrong(model: nn.Module, samples: Samples, expectation: int, targeted: bool = False) -> Tensor:
    """Where a model is wrong, or says the target, bool ``(N,)`` on the CPU."""
    device = device_of(model)
    inputs, labels = samples.inputs.to(device), samples.labels.to(device)
    with attackable(model, purpose="predictions", expectation=expectation) as net:
        batch = prepare_batch(net, inputs, labels, None, _EVERYWHERE, extras=samples.entries)
        with net.given(batch.extras):
            return is_success(net.logits(batch.inputs), batch.labels, targeted).cpu()
