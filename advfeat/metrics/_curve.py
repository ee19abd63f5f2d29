"""Accuracy against eps, whole, from minimum-norm attacks."""

from __future__ import annotations

import itertools
import warnings
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from advfeat import checks, plots, seeding, threat
from advfeat.attacks import FAB, Attack, Batch, MinimumPGD, SmoothedPGD
from advfeat.attacks.ensemble import seed_attacks
from advfeat.attacks.minimum_norm import MinimumNorm, rounding
from advfeat.attacks.misleading import SquareBeyondGradients
from advfeat.attacks.restricted import entered
from advfeat.attacks.samples import concat_samples, sample_shapes, select_samples
from advfeat.attacks.settings import own_bounds, own_mask
from advfeat.loading import Data, Source
from advfeat.losses import is_success
from advfeat.metrics._accuracy import CleanPass, places, tensor
from advfeat.metrics._outcome import Accuracy
from advfeat.metrics._sharing import SharedSamples
from advfeat.model import Network, Precision, attackable, device_of
from advfeat.progress import Meter, shows_evaluations
from advfeat.results import Result
from advfeat.suggestions import suggests
from advfeat.tables import Table
from advfeat.threat import FeatureBounds, Norm

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The boundary is not resolved where rounding is above this fraction of the clean lead; a warning
# is given where that is above this fraction of the samples.
_UNRESOLVED, _UNRESOLVED_SAMPLES = 0.02, 0.1
# Noise found less than this fraction of what the other attacks need: gradients are masked there.
_MASKED = 0.9
# Rounds of further search; a sample without masking leaves after so many failures in turn.
_ROUNDS, _PATIENCE = 20, 3
# Of the rounds of smoothed gradients: steps, noise, and by which fraction the ball is smaller than
# the closest distance, at first and at least.
_SMOOTHED_STEPS, _SCALES, _SHRINK, _LEAST_SHRINK = 80, (6.0, 6.0, 9.0, 4.0), 0.1, 0.02
_QUERIES = 2000  # of Square, where random search gets further than gradients
_POLISH_STEPS = 30  # after each success


@dataclass(frozen=True, eq=False, repr=False)
class RobustnessCurve(Result):
    """Distance of each sample to the nearest adversarial example that was found.

    Attributes
    ----------
    distance
        ``(total,)`` in ``norm``: 0 where the model is wrong on the clean input, infinite where
        nothing was found.
    index
        Sample number of each sample, int64 ``(total,)``.
    norm
        The norm it is measured in.
    scale
        What the features were measured in multiples of; None in their own units.
    """

    distance: Tensor
    index: Tensor
    norm: Norm
    scale: Tensor | None = None

    def at(self, eps: float) -> Accuracy:
        """Robust accuracy at one radius: the fraction of samples farther than ``eps``."""
        checks.number("eps", eps, low=0.0)
        return Accuracy.of(self.distance > eps, self.index)

    def table(self, eps: Sequence[float]) -> list[dict[str, float]]:
        """Return robust accuracy at each ``eps``, as a list of dictionaries."""
        return [{"eps": radius, "robust_accuracy": float(self.at(radius))} for radius in eps]

    @property
    def median(self) -> float:
        """Median distance: where robust accuracy crosses one half."""
        return float(self.distance.median())

    @property
    def _unit(self) -> str:
        return self.norm if self.scale is None else f"{self.norm}, in multiples of scale"

    def _summary(self) -> str:
        return f"{len(self.distance)} samples, median {self.median:.4g} in {self._unit}"

    def _content(self) -> Sequence[str | Table]:
        wrong = int((self.distance == 0).sum())
        return [
            f"{len(self.distance)} samples, {wrong} wrong without an attack, "
            f"median distance {self.median:.4g} in {self._unit}"
        ]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Fraction of samples that are still robust, over the radius."""
        ax = plots.new_axes(ax)
        plots.robustness_curves({"model": self}, norm=self.norm, ax=ax)
        return ax


@suggests
def robustness_curve(
    model: nn.Module,
    data: Data,
    *,
    norm: Norm,
    attack: MinimumNorm | None = None,
    bounds: FeatureBounds = (0.0, 1.0),
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    seed: int | torch.Generator | None = 0,
    batch_size: int | None = None,
    precision: Precision = "float32",
    expectation: int = 1,
    progress: bool | None = None,
) -> RobustnessCurve:
    """Measure robust accuracy at every eps, by the distance to the nearest adversarial example.

    Parameters
    ----------
    model, data, bounds, batch_size, precision, expectation, progress
        As in `robust_accuracy`.
    norm
        In which distances are measured.
    mask
        As in `robust_accuracy`.
    scale
        A tensor that broadcasts against one sample: distances are ``||delta / scale||``, so that
        at an ``eps`` each feature may change by ``eps * scale`` in linf. A feature of scale 0 is
        fixed.
    attack
        One minimum-norm attack without ``eps``, such as `advfeat.attacks.FMN`. By default the
        closest of several for every sample: `advfeat.attacks.MinimumPGD` with noise (two restarts)
        and without, and `advfeat.attacks.FAB` towards the four likeliest classes; then rounds of
        `advfeat.attacks.SmoothedPGD` in smaller balls, of MinimumPGD with other noise and, in linf,
        of `advfeat.attacks.Square` where that gets further than gradients, and a
        search in small steps around the closest point. That takes about 800 gradients a sample,
        and up to 2,800 where gradients are masked: where noise finds much closer points.
    seed
        Seed of the attacks that are random and have none of their own.

    Returns
    -------
    RobustnessCurve
        ``curve.at(eps)`` is an `Accuracy`. Every distance is that of a point which the model gets
        wrong in a float32 forward pass.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause, before any work is done.

    Warns
    -----
    UserWarning
        If the logits are so large beside their differences that float32 does not resolve the
        boundary.

    Examples
    --------
    >>> import torch
    >>> from advfeat.metrics import robustness_curve
    >>> data = torch.utils.data.TensorDataset(torch.eye(3), torch.arange(3))
    >>> curve = robustness_curve(torch.nn.Identity(), data, norm="linf")
    >>> float(curve.at(0.4)), float(curve.at(0.6))
    (1.0, 0.0)
    """
    norm = checks.norm(norm)
    if attack is None:
        attacks, polish = _default_attacks(norm, bounds, mask, scale)
    else:
        own_mask(mask)
        attacks, polish = (attack,), None
        if scale is not None:
            checks.fail("scale", "a tensor", "the attack has its own; pass it to the attack")
    for each in attacks:
        if not isinstance(each, MinimumNorm) or each.norm != norm or each.eps is not None:
            checks.fail(
                "attack", each, f"expected MinimumPGD, FMN or FAB in norm={norm!r}, without eps"
            )
        own_bounds(bounds, each.bounds)
    checks.seed(seed)
    checks.model(model)
    source = Source(data, batch_size, device_of(model))
    shared = SharedSamples(source, "robustness_curve")
    progress = progress if shared.process.is_first else False
    number = seeding.resolve(shared.seed(seed))
    attacks = tuple(each for each in seed_attacks(attacks, number) if isinstance(each, MinimumNorm))
    clean = CleanPass(source, model, attacks[0].bounds, "robustness curve", False)
    total = None if source.is_stream else len(source)
    ids, found, unresolved = array("q"), array("f"), array("b")
    with (
        Meter(progress, "robustness curve", total, unit="samples") as meter,
        attackable(model, precision=precision, expectation=expectation) as net,
    ):
        for batch, count in _chunks(clean, net, source.batch_size):
            with net.given(batch.extras):
                unresolved.extend(_unresolved(net, batch)[:count].tolist())
                distance = _closest(net, batch, attacks, polish, number, meter)
            meter.update(clean.settled(count))
            ids.extend(batch.ids[:count].tolist())
            found.extend(distance[:count].tolist())
    distances = torch.zeros(clean.index.shape, dtype=torch.float32, device="cpu")
    distances[places(clean.index, tensor(ids))] = tensor(found)
    index, distances = shared.gather(clean.index, distances)
    if shared.sum(sum(unresolved)) > _UNRESOLVED_SAMPLES * max(1, shared.sum(len(unresolved))):
        warnings.warn(
            "the logits are so large that float32 rounds away their differences near the "
            "boundary, and distances are too long; remove what all logits have in common (an "
            "offset), or evaluate in float64: model.double() and float64 inputs",
            stacklevel=2,
        )
    scale = attacks[0].scale
    return RobustnessCurve(distances, index, norm, None if scale is None else scale.cpu())


def _default_attacks(
    norm: Norm, bounds: FeatureBounds, mask: Tensor | None, scale: Tensor | None
) -> tuple[tuple[MinimumNorm, ...], MinimumNorm]:
    """Attacks from the clean input, and one from the closest point that they found."""
    own: dict[str, Any] = {"norm": norm, "bounds": bounds, "mask": mask, "scale": scale}
    attacks = (
        MinimumPGD(**own, restarts=2, targets=9),
        MinimumPGD(**own, noise=0.0, targets=9),
        FAB(**own, steps=20, targets=4),
    )
    return attacks, MinimumPGD(**own, steps=60, step_size=0.1, noise=0.0, targets=9)


def _chunks(clean: CleanPass, net: Network, size: int) -> Iterator[tuple[Batch, int]]:
    """Remaining samples in batches of one size, and how many count: the last one is padded.

    Some models take one batch size alone.
    """
    for _, batches in itertools.groupby(clean.resisting(net), sample_shapes):
        yield from _chunks_of_one_shape(batches, clean, size)


def _chunks_of_one_shape(
    batches: Iterable[Batch], clean: CleanPass, size: int
) -> Iterator[tuple[Batch, int]]:
    held: list[Batch] = []
    for batch in batches:
        held.append(batch)
        while (count := sum(len(part.ids) for part in held)) >= size:
            whole = concat_samples(*held)
            yield select_samples(whole, slice(0, size)), size
            held = [select_samples(whole, slice(size, count))]
    if count := sum(len(part.ids) for part in held):
        whole = concat_samples(*held)
        padded = torch.arange(min(size, len(clean.index)), device=whole.ids.device)
        yield select_samples(whole, padded.clamp_max(count - 1)), count


def _closest(
    net: Network,
    batch: Batch,
    attacks: Sequence[MinimumNorm],
    polish: MinimumNorm | None,
    seed: int,
    meter: Meter,
) -> Tensor:
    """Distance of the closest point that any of the attacks finds, ``(N,)``."""

    def shows(name: str, net: Network = net) -> None:
        net.on_gradient = shows_evaluations(meter, {"attack": name}, "gradients")

    others = [entered(attack, net, batch)[0] for attack in attacks[1:]]
    polish = None if polish is None else entered(polish, net, batch)[0]
    first, net, batch = entered(attacks[0], net, batch)
    attacks = [first, *others]
    closest, distance = batch.inputs, batch.inputs.new_full((len(batch.ids),), torch.inf)
    found = []
    for place, attack in enumerate(attacks, 1):
        shows(f"{type(attack).__name__} {place}/{len(attacks)}")
        state = attack.run(net, attack.init(net, batch))
        found.append(state.distance)
        closest, distance = _closer(closest, distance, attack.result(state), state.distance)
    norm, bounds = attacks[0].norm, attacks[0].bounds
    if polish is not None:
        shows("search around the closest points")
        masked = found[0] < _MASKED * torch.stack(found[1:]).amin(0)
        search = _Search(net, norm, bounds, replace(polish, steps=_POLISH_STEPS), seed)
        closest, distance = search.run(batch, closest, distance, masked)
        state = polish.run(net, polish.init(net, batch._replace(start=closest)))
        closest, distance = _closer(closest, distance, polish.result(state), state.distance)
    wrong = is_success(net.logits(closest), batch.labels, False)
    distance = threat.size(closest - batch.inputs, norm)
    # All of them are right on the clean input, whatever a random model says when asked again.
    smallest = torch.finfo(distance.dtype).tiny
    return torch.where(wrong, distance.clamp_min(smallest), torch.inf)


def _closer(first: Tensor, near: Tensor, second: Tensor, far: Tensor) -> tuple[Tensor, Tensor]:
    """The closer one of two points of each sample, and its distance."""
    swaps = far < near
    return torch.where(threat.per_sample(swaps, second), second, first), near.minimum(far)


@dataclass(frozen=True)
class _Search:
    """Further runs by smoothed gradients, each within less than a sample's distance so far.

    Which optimum a run ends in is chance where gradients are masked, so those samples get all
    rounds; others leave soon.
    """

    net: Network
    norm: Norm
    bounds: FeatureBounds
    polish: MinimumNorm
    seed: int

    def run(
        self, batch: Batch, closest: Tensor, distance: Tensor, masked: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Closest points and their distances, after the search."""
        fraction, failures = torch.full_like(distance, _SHRINK), torch.zeros_like(batch.labels)
        for number in range(_ROUNDS):
            chosen = (masked | (failures < _PATIENCE)).nonzero().squeeze(1)
            if not len(chosen):
                break
            samples = select_samples(batch, chosen)
            attack = self._attack(number, samples, distance[chosen], fraction[chosen])
            if attack.starts_at_result:
                samples = samples._replace(start=closest[chosen])
            with self.net.selected(chosen):
                found, size, hits = self._attacked(attack, samples, distance[chosen])
            best = _closer(closest[chosen], distance[chosen], found, size)
            closest = closest.index_copy(0, chosen, best[0])
            distance = distance.index_copy(0, chosen, best[1])
            kept = fraction[chosen]
            fraction[chosen] = torch.where(hits, kept, (kept / 2).clamp_min(_LEAST_SHRINK))
            failures[chosen] = torch.where(hits, 0, failures[chosen] + 1)
        return closest, distance

    def _attack(self, number: int, samples: Batch, distance: Tensor, fraction: Tensor) -> Attack:
        """Two rounds of three are of the kind that is the stronger one in the norm.

        In linf every third round is random search, where that gets further than gradients.
        """
        seed = seeding.derive(self.seed, number)
        if (number % 3 == 2) != (self.norm == "l1"):
            return MinimumPGD(norm=self.norm, bounds=self.bounds, seed=seed)
        low, high = threat.bounds_of(samples.box, self.bounds)
        most = torch.maximum(high - samples.inputs, samples.inputs - low)
        square = self.norm == "linf" and number % 3 == 1
        shrink = fraction / 4 if square else fraction
        eps = (distance * (1 - shrink)).minimum(threat.size(most, self.norm))
        if self.norm == "linf" and samples.box is None:
            eps = eps.clamp_max(high - low)
        ball: dict[str, Any] = {"eps": eps, "norm": self.norm, "bounds": self.bounds, "seed": seed}
        if square:
            return SquareBeyondGradients(**ball, queries=_QUERIES)
        scale = _SCALES[number % len(_SCALES)]
        return SmoothedPGD(**ball, steps=_SMOOTHED_STEPS, scales=(scale,), returns="first")

    def _attacked(
        self, attack: Attack, samples: Batch, distance: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What an attack found, polished where it is closer; its distance, and where that is so."""
        found, size = self._result(attack, samples)
        hits = size < distance
        if bool(hits.any()):
            with self.net.selected(hits):
                near = select_samples(samples, hits)._replace(start=found[hits])
                polished = self._result(self.polish, near)
            found[hits], size[hits] = _closer(found[hits], size[hits], *polished)
        return found, size, hits

    def _result(self, attack: Attack, samples: Batch) -> tuple[Tensor, Tensor]:
        """What an attack found, and its distance: infinite where it failed."""
        state = attack.run(self.net, attack.init(self.net, samples))
        found = attack.result(state)
        size = threat.size(found - samples.inputs, self.norm)
        return found.clone(), torch.where(state.success, size, torch.inf)


def _unresolved(net: Network, batch: Batch) -> Tensor:
    """Samples whose lead over the second class is not far above rounding, bool ``(N,)``."""
    logits = net.logits(batch.inputs)
    first, second = logits.topk(2, dim=1).values.unbind(1)
    return rounding(logits) > _UNRESOLVED * (first - second)
