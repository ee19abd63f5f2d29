"""Attacks on some features alone, and in balls with a radius for each feature.

A change of variables makes them ordinary attacks. With ``x`` the input, the attack runs in the
coordinates ``z`` of ``x + scale * z``, where the weighted ball of ``||delta / scale||_p <= eps`` is
the ball of ``||z||_p <= eps``, and every projection, step and random start is exact. A feature
that may not change has the scale 0 and bounds that are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from advfeat import checks
from advfeat.attacks.samples import Batch, select_samples
from advfeat.attacks.settings import like_sample
from advfeat.model import Evaluation, Network
from advfeat.threat import Bounds, FeatureBounds

# Of an attack whose bounds are all in its state.
_NOWHERE: Bounds = (-1e30, 1e30)


class Space(NamedTuple):
    """Coordinates z of samples, ``inputs + scale * z``; each field ``(N, ...)``."""

    inputs: Tensor
    scale: Tensor  # 0 where a feature is fixed
    low: Tensor  # bounds
    high: Tensor

    def points(self, coordinates: Tensor) -> Tensor:
        """Inputs of the model at these coordinates, within the bounds."""
        moved = torch.addcmul(self.inputs, self.scale, coordinates)
        return moved.clamp(self.low, self.high)

    def coordinates(self, points: Tensor) -> Tensor:
        """Coordinates of inputs of the model; 0 where a feature is fixed."""
        fixed = self.scale == 0
        return (points - self.inputs).masked_fill(fixed, 0.0) / self.scale.masked_fill(fixed, 1.0)

    def enter(self, batch: Batch) -> Batch:
        """The batch in these coordinates."""
        box = torch.stack([self.coordinates(self.low), self.coordinates(self.high)], 1)
        start = None if batch.start is None else self.coordinates(batch.start)
        return batch._replace(inputs=torch.zeros_like(self.inputs), start=start, box=box)


def space_of(
    batch: Batch, bounds: FeatureBounds, mask: Tensor | None, scale: Tensor | None
) -> Space:
    """Coordinates in which features that may not change are fixed.

    Parameters
    ----------
    batch
        Samples as they came.
    bounds
        Numbers, or tensors that broadcast against a sample.
    mask
        Features that may change: a tensor that broadcasts against a sample, or one for each sample
        number, ``(M, ...)``. None for all.
    scale
        Broadcasts against a sample: how much of a feature's change counts as 1.
    """
    inputs = batch.inputs
    low, high = (
        like_sample("bounds", end, inputs).to(inputs.dtype)
        if isinstance(end, Tensor)
        else inputs.new_full((1,) * inputs.ndim, end)
        for end in bounds
    )
    by_feature = inputs.new_ones((1,) * inputs.ndim)
    if scale is not None:
        by_feature = like_sample("eps", scale, inputs).to(inputs.dtype)
    by_feature = by_feature * (low < high)
    if mask is not None:
        by_feature = by_feature * _mask_of(batch, mask)
    stuck = (by_feature.expand_as(inputs) == 0).flatten(1).all(1)
    if bool(stuck.any()):
        number = int(batch.ids[stuck][0])
        checks.fail(
            "mask, eps, bounds",
            f"sample {number}",
            "none of its features may change: each is masked, or has a radius or bounds of width 0",
        )
    expanded = (value.expand_as(inputs) for value in (by_feature, low, high))
    return Space(inputs, *expanded)


def _mask_of(batch: Batch, mask: Tensor) -> Tensor:
    """The masks of a batch: of one sample for all, or by sample number."""
    inputs = batch.inputs
    if mask.ndim < inputs.ndim or mask.shape[0] == 1:
        return like_sample("mask", mask, inputs)
    if mask.ndim > inputs.ndim:
        cause = f"expected one like a sample, {tuple(inputs.shape[1:])}, or one for each sample"
        checks.fail("mask.shape", tuple(mask.shape), cause)
    last = int(batch.ids.max())
    if last >= mask.shape[0]:
        cause = f"one for each sample, but there is a sample of number {last}; is it of other data?"
        checks.fail("mask.shape", tuple(mask.shape), cause)
    like_sample("mask", mask[0], inputs)
    return mask[batch.ids.to(mask.device)].to(inputs.device)


class RestrictedNetwork(Network):
    """A network as it appears in the coordinates of a `Space`."""

    def __init__(self, net: Network, space: Space) -> None:
        self._net, self._space = net, space

    def __getattr__(self, name: str) -> Any:
        """Everything else is the network's."""
        return getattr(self._net, name)

    def logits(self, inputs: Tensor, low_precision: bool = False) -> Tensor:
        """Logits at these coordinates."""
        return self._net.logits(self._space.points(inputs), low_precision)

    def logits_gradient(
        self,
        inputs: Tensor,
        objective: Callable[[Tensor], Tensor],
        straight_through: bool = False,
    ) -> Evaluation:
        """Gradient by these coordinates: 0 where a feature is fixed."""
        points = self._space.points(inputs)
        found = self._net.logits_gradient(points, objective, straight_through)
        return found._replace(gradient=found.gradient * self._space.scale)

    def class_count(self, inputs: Tensor) -> int:
        """Number of logits."""
        return self._net.class_count(self._space.inputs)

    def through(self, wrap: Callable[[Network], Network]) -> RestrictedNetwork:
        """The same coordinates before another network, made of the one behind them."""
        return RestrictedNetwork(wrap(self._net), self._space)

    @contextmanager
    def selected(self, chosen: Tensor | slice) -> Iterator[None]:
        """Context in which the inputs are these of the samples."""
        space, self._space = self._space, select_samples(self._space, chosen)
        try:
            with self._net.selected(chosen):
                yield
        finally:
            self._space = space


class RestrictedState(NamedTuple):
    """Samples of a restricted attack."""

    space: Space
    success: Tensor  # (N,) bool, whether the result fools the model
    inner: Any  # state of the attack in the coordinates of the space

    @property
    def inputs(self) -> Tensor:
        """Clean inputs."""
        return self.space.inputs

    @property
    def labels(self) -> Tensor:
        """Labels or targets."""
        labels: Tensor = self.inner.labels
        return labels

    @property
    def value(self) -> Tensor:
        """The attack's objective at the result."""
        value: Tensor = self.inner.value
        return value


class Restricted:
    """An attack on some features alone, or by feature, as the driver of attacks sees it.

    Parameters
    ----------
    attack
        One of the library's, with a ``mask``, or with ``eps`` or ``bounds`` by feature.
    by_feature
        Whether its ``eps`` is a radius for each feature.
    """

    def __init__(self, attack: Any, by_feature: bool) -> None:
        self._attack = attack
        self.targeted: bool = attack.targeted
        self.starts_at_result: bool = attack.starts_at_result
        eps = attack.eps
        self._scale: Tensor | None = getattr(attack, "scale", None)
        if by_feature:
            self._scale, eps = eps, 1.0
        elif isinstance(eps, Tensor):
            eps = eps.flatten()
        inner = {"eps": eps, "mask": None, "bounds": _NOWHERE}
        if getattr(attack, "scale", None) is not None:
            inner["scale"] = None
        self._inner = replace(attack, **inner)

    @property
    def is_fixed_length(self) -> bool:
        """Whether every sample of a batch takes the same number of evaluations."""
        return bool(self._inner.is_fixed_length)

    def enter(self, net: Network, batch: Batch) -> tuple[Space, Network, Batch]:
        """Coordinates of a batch, and network and batch in them."""
        space = space_of(batch, self._attack.bounds, self._attack.mask, self._scale)
        return space, RestrictedNetwork(net, space), space.enter(batch)

    @property
    def plain(self) -> Any:
        """The attack that runs in these coordinates."""
        return self._inner

    def init(self, net: Network, batch: Batch) -> RestrictedState:
        """State of a batch before its first step."""
        space, inside, entered = self.enter(net, batch)
        return self._outer(space, self._inner.init(inside, entered))

    def step(self, net: Network, state: RestrictedState) -> RestrictedState:
        """Advance every sample by one evaluation of the model."""
        inside = RestrictedNetwork(net, state.space)
        return self._outer(state.space, self._inner.step(inside, self._inside(state)))

    def run(self, net: Network, state: RestrictedState) -> RestrictedState:
        """Take all steps of samples that all take equally many."""
        inside = RestrictedNetwork(net, state.space)
        return self._outer(state.space, self._inner.run(inside, self._inside(state)))

    def finished(self, state: RestrictedState) -> Tensor:
        """Samples for which another step changes nothing."""
        finished: Tensor = self._inner.finished(self._inside(state))
        return finished

    def evaluations(self, state: RestrictedState) -> int:
        """Steps after which every sample of this state is finished."""
        return int(self._inner.evaluations(state.inner))

    def result(self, state: RestrictedState) -> Tensor:
        """The input of the model to return."""
        return state.space.points(self._inner.result(self._inside(state)))

    @staticmethod
    def _outer(space: Space, inner: Any) -> RestrictedState:
        return RestrictedState(space, inner.success, inner)

    @staticmethod
    def _inside(state: RestrictedState) -> Any:
        return state.inner._replace(success=state.success)


def restricted(attack: Any, inputs: Tensor | None = None) -> Any:
    """The attack itself, or a `Restricted` one where it has a mask, or eps or bounds by feature.

    Parameters
    ----------
    attack
        Any attack.
    inputs
        The batch to attack, ``(N, ...)``: ``eps`` of ``(N,)`` is then a radius for each sample.
        None for a dataset, where a tensor is always a radius for each feature.
    """
    by_feature = is_by_feature(getattr(attack, "eps", None), inputs)
    scale, mask = getattr(attack, "scale", None), getattr(attack, "mask", None)
    eps_by_sample = isinstance(getattr(attack, "eps", None), Tensor) and not by_feature
    if not hasattr(attack, "mask"):
        return attack
    reshaped = eps_by_sample and attack.eps.ndim > 1
    tensors = isinstance(attack.bounds[0], Tensor)
    if by_feature or mask is not None or scale is not None or tensors or reshaped:
        return Restricted(attack, by_feature)
    return attack


def entered(attack: Any, net: Network, batch: Batch) -> tuple[Any, Network, Batch]:
    """Attack, network and batch in coordinates in which the attack is an ordinary one."""
    inside = restricted(attack)
    if inside is attack:
        return attack, net, batch
    _, network, moved = inside.enter(net, batch)
    return inside.plain, network, moved


def is_by_feature(eps: object, inputs: Tensor | None) -> bool:
    """Whether a radius is one for each feature, and not one for all, or one for each sample."""
    if not isinstance(eps, Tensor) or eps.ndim == 0:
        return False
    if inputs is None:
        return True
    count = inputs.shape[0]
    if eps.ndim > 1:
        by_sample = eps.ndim == inputs.ndim and eps.shape[0] == count == eps.numel()
        return not by_sample
    if inputs.ndim != 2 or len(eps) != inputs.shape[1]:
        return False
    if count == len(eps) > 1:
        checks.fail(
            "eps.shape",
            tuple(eps.shape),
            f"for inputs {tuple(inputs.shape)} this may be one radius for each sample or for each "
            "feature; write eps[:, None] for samples, eps[None] for features",
        )
    return count != len(eps)


def check_not_restricted(attack: Any, batch: Batch) -> None:
    """Raise an error where the first state is asked for and mask or tensors would be ignored."""
    if batch.box is None and (attack.mask is not None or isinstance(attack.bounds[0], Tensor)):
        raise TypeError(
            "attack.init: with a mask, or bounds by feature, use "
            "advfeat.attacks.restricted.restricted(attack).init"
        )
