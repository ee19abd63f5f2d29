"""Attacks whose examples transfer: MI-FGSM (Dong et al. 2018), DI-FGSM (Xie et al. 2019)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from advfeat import checks, seeding
from advfeat.attacks._pgd import PGD, PGDState
from advfeat.attacks.restricted import RestrictedNetwork
from advfeat.attacks.samples import Batch
from advfeat.model import Evaluation, Network
from advfeat.suggestions import suggests

# Draws of a sample from here on are those of its resized copies; before it, of random starts.
_FIRST_DRAW = 1 << 32


@suggests
@dataclass(frozen=True, kw_only=True)
class MIFGSM(PGD):
    """The momentum iterative fast gradient sign method (Dong et al. 2018).

    PGD with the paper's settings: gradients of unit l1 size are added up with a decay of
    ``momentum``, and each of ``steps`` steps is ``eps / steps`` long. The paper measures transfer
    at ``eps=16/255`` in linf with 10 steps. See `pgd` for the other settings.

    Examples
    --------
    >>> import torch
    >>> from advfeat.attacks import MIFGSM
    >>> model = torch.nn.Linear(4, 3)
    >>> attack = MIFGSM(eps=16 / 255, norm="linf")
    >>> attack.steps, attack.momentum
    (10, 1.0)
    >>> attack(model, torch.rand(2, 4), torch.tensor([0, 2])).shape
    torch.Size([2, 4])
    """

    momentum: float = 1.0

    @property
    def _default_step(self) -> float:
        return 1.0 / self.steps


@suggests
@dataclass(frozen=True, kw_only=True)
class DIFGSM(MIFGSM):
    """MI-FGSM on gradients of randomly resized and padded images (Xie et al. 2019).

    In each step an image is, with probability ``probability``, resized to a random size and
    padded with zeros at a random place to the size it had. With the default ``momentum=1.0`` this
    is the paper's M-DI-FGSM, and with 0 its DI-FGSM. Images only, ``(N, C, H, W)``. By default
    there are 10 steps of ``eps / 10``, as in MI-FGSM; Xie et al. take steps of 1/255, and as many
    as Kurakin et al. (2017): the smaller of ``eps + 4`` and ``1.25 * eps``, in levels of 255.

    Parameters
    ----------
    probability
        Of a resized copy in each step; default 0.5, the paper's.
    resize
        Smallest size as a fraction of the image's; default 0.9. The paper enlarges images of 299
        pixels to at most 330, which is the same ratio for a model that takes any size.

    Examples
    --------
    >>> import torch
    >>> from advfeat.attacks import DIFGSM
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> attack = DIFGSM(eps=16 / 255, norm="linf", seed=0)
    >>> attack(model, torch.rand(2, 1, 8, 8), torch.tensor([0, 2])).shape
    torch.Size([2, 1, 8, 8])
    """

    probability: float = 0.5
    resize: float = 0.9

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        for name in ("probability", "resize"):
            value = getattr(self, name)
            checks.number(name, value, low=0.0, strict=name == "resize")
            if value > 1:
                checks.fail(name, value, "a fraction, at most 1")

    @property
    def is_random(self) -> bool:
        """Whether the result depends on the seed."""
        return super().is_random or self.probability > 0

    def init(self, net: Network, batch: Batch) -> PGDState:
        """Put every sample at its start."""
        if batch.inputs.ndim != 4:
            shape = tuple(batch.inputs.shape)
            checks.fail("inputs.shape", shape, "DIFGSM resizes images, (N, C, H, W)")
        return super().init(net, batch)

    def _evaluate(self, net: Network, state: PGDState) -> Evaluation:
        """Gradient through the resized copies, by the images themselves."""
        wrap = partial(_ResizedNetwork, *self._resizing(state))
        resized = net.through(wrap) if isinstance(net, RestrictedNetwork) else wrap(net)
        found = resized.logits_gradient(state.current, self._objective(state))
        if not self._keeps:
            return found
        # What is kept must be judged by the image, not by its copy.
        logits = net.logits(state.current)
        return Evaluation(found.gradient, self._objective(state)(logits), logits)

    def _resizing(self, state: PGDState) -> tuple[Tensor, Tensor]:
        """Matrices ``(N, 1, H, H)`` and ``(N, 1, W, W)`` that resize and pad each image."""
        numbers = seeding.uniform(state.keys, _FIRST_DRAW + state.step, 4).to(state.current.dtype)
        chosen, size, *offsets = numbers.unbind(1)
        height, width = (
            _resizing_matrix(length, size, offset, self.resize, chosen < self.probability)
            for length, offset in zip(state.current.shape[2:], offsets, strict=True)
        )
        return height, width


class _ResizedNetwork(Network):
    """A network behind a linear change of the images, ``down @ image @ across.mT``."""

    def __init__(self, down: Tensor, across: Tensor, net: Network) -> None:
        self._down, self._across, self._net = down, across, net

    def logits_gradient(
        self,
        inputs: Tensor,
        objective: Callable[[Tensor], Tensor],
        straight_through: bool = False,
    ) -> Evaluation:
        """Gradient by the images at their changed copies."""
        copies = self._down @ inputs @ self._across.mT
        found = self._net.logits_gradient(copies, objective, straight_through)
        return found._replace(gradient=self._down.mT @ found.gradient @ self._across)


def _resizing_matrix(
    length: int, size: Tensor, offset: Tensor, resize: float, chosen: Tensor
) -> Tensor:
    """Bilinear resizing of an axis, and zeros around it, as matrices ``(N, 1, length, length)``.

    ``size`` and ``offset`` are uniform in (0, 1), ``(N,)``; samples that are not chosen get the
    identity.
    """
    least = int(length * resize)
    new = least + (size * (length - least)).floor()
    new = torch.where(chosen, new.clamp_min(1), length)
    first = (offset * (length - new + 1)).floor()
    places = torch.arange(length, device=size.device, dtype=size.dtype)
    own = places - first[:, None]  # place in the resized axis
    source = ((own + 0.5) * (length / new)[:, None] - 0.5).clamp(0, length - 1)
    weights = (1 - (source[:, :, None] - places).abs()).clamp_min(0)
    inside = (own >= 0) & (own < new[:, None])
    return (weights * inside[:, :, None])[:, None]
