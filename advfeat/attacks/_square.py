"""Square Attack (Andriushchenko et al. 2020): random search that needs no gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advfeat import checks, losses, seeding, threat
from advfeat.attacks.base import Attack, per_sample_eps, verified_logits
from advfeat.attacks.restricted import check_not_restricted
from advfeat.attacks.samples import Batch
from advfeat.attacks.settings import canonical
from advfeat.losses import is_success
from advfeat.model import Network
from advfeat.suggestions import suggests
from advfeat.threat import FeatureBounds, Norm

# Of 10,000 proposals, those after which the area of the window is halved.
_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
# In l1 a proposal weighs more than the radius, and the projection prunes it to its peaks. By the
# reference's factor, the number of channels, gray images and vectors would never be pruned.
_L1_SURPLUS = 3.0


class SquareState(NamedTuple):
    """Samples of a running Square Attack."""

    inputs: Tensor  # (N, ...) clean
    labels: Tensor  # (N,) int64
    eps: Tensor  # (N,)
    keys: Tensor  # (N,) int64, random keys
    step: Tensor  # (N,) int64, queries spent
    current: Tensor  # (N, ...), the best iterate so far
    value: Tensor  # (N,) margin there
    success: Tensor  # (N,) bool, whether it fools the model
    box: Tensor  # (N, 2, ...) bounds of each sample, or (N, 0) where they are the attack's


@suggests
@dataclass(frozen=True, kw_only=True)
class Square(Attack):
    """Square Attack as a value; see `square` for the meaning of each setting.

    Call it on a batch, or give it to `advfeat.robust_accuracy`.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 10))
    >>> attack = Square(eps=8 / 255, norm="linf", queries=20)
    >>> attack(model, torch.rand(2, 3, 8, 8), torch.tensor([0, 2])).shape
    torch.Size([2, 3, 8, 8])
    """

    eps: float | Tensor
    norm: Norm
    queries: int = 5000
    p_init: float = 0.8
    targeted: bool = False
    bounds: FeatureBounds = (0.0, 1.0)
    mask: Tensor | None = None
    seed: int | torch.Generator | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        canonical(self)
        checks.count("queries", self.queries, low=1)
        checks.number("p_init", self.p_init, low=0.0, strict=True)
        checks.fraction("p_init", self.p_init)
        checks.seed(self.seed)

    def init(self, net: Network, batch: Batch) -> SquareState:
        """Put every sample at its start: stripes (linf) or a grid of bumps (l1, l2) of its own."""
        check_not_restricted(self, batch)
        inputs, labels = batch.inputs, batch.labels
        count = inputs.shape[0]
        state = SquareState(
            inputs=inputs,
            labels=labels,
            eps=per_sample_eps(self.eps, inputs),
            keys=seeding.keys(seeding.resolve(self.seed), batch.ids),
            step=torch.zeros_like(labels),
            current=inputs,
            value=inputs.new_full((count,), -torch.inf),
            success=torch.zeros_like(labels, dtype=torch.bool),
            box=batch.state_box,
        )
        if batch.start is not None:
            bounds = threat.bounds_of(batch.box, self.bounds)
            start = threat.project(batch.start, inputs, state.eps, self.norm, bounds)
        else:
            start = self._own_start(state)
        return state._replace(current=start)

    def step(self, net: Network, state: SquareState) -> SquareState:
        """Spend one query of every sample that is not finished; the first evaluates the start."""
        proposal = self._squares(state) if self.norm == "linf" else self._bumps(state)
        first = threat.per_sample(self._is_start(state), state.current)
        candidate = torch.where(first, state.current, proposal.view(state.current.shape))
        logits = verified_logits(net, candidate, state.labels, self.targeted)
        value = losses.objective("margin", state.labels, self.targeted)(logits)
        hits = is_success(logits, state.labels, self.targeted)
        active = ~self.finished(state)
        better = active & (hits | (value > state.value))
        return state._replace(
            step=state.step + active,
            current=torch.where(threat.per_sample(better, candidate), candidate, state.current),
            value=torch.where(better, value.to(state.value.dtype), state.value),
            success=state.success | (hits & active),
        )

    @property
    def max_evaluations(self) -> int:
        """Queries of a sample, its start included."""
        return self.queries

    def finished(self, state: SquareState) -> Tensor:
        """Samples that fool the model, or whose queries are spent."""
        return state.success | (state.step >= self.max_evaluations)

    def _is_start(self, state: SquareState) -> Tensor:
        """Samples whose iterate is a start that was not evaluated yet."""
        return state.step == 0

    def result(self, state: SquareState) -> Tensor:
        """The first success, else the iterate of the largest margin."""
        return state.current

    def _own_start(self, state: SquareState) -> Tensor:
        """Stripes in linf, a grid of bumps in l1 and l2."""
        start = self._stripes(state) if self.norm == "linf" else self._grid(state)
        return start.view(state.inputs.shape)

    def _stripes(self, state: SquareState) -> Tensor:
        """Start of linf: each column of each channel at one of the ball's two faces."""
        inputs = _image(state.inputs)
        count, channels, _, width = inputs.shape
        numbers = seeding.uniform(state.keys, 0, channels * width)
        return self._face(state, inputs, _signs(numbers.view(count, channels, 1, width)))

    def _squares(self, state: SquareState) -> Tensor:
        """Proposal of linf: a window in which each channel is moved to one of the two faces."""
        inputs, current = _image(state.inputs), _image(state.current)
        count, channels, height, width = inputs.shape
        numbers = seeding.uniform(state.keys, state.step, 2 + channels)
        sides = self._sides(state.step, height, width)
        inside = self._place(numbers[:, :2], sides, state).mask
        signs = _signs(numbers[:, 2:]).view(count, channels, 1, 1)
        face = self._face(state, inputs, signs)
        # A window that is at these faces already goes to the opposite ones: no query is spent on
        # the current iterate, as half of them would be in small windows of one channel.
        known = ~((face != current) & inside).any(dim=(1, 2, 3), keepdim=True)
        face = self._face(state, inputs, torch.where(known, -signs, signs))
        return torch.where(inside, face, current)

    def _face(self, state: SquareState, inputs: Tensor, signs: Tensor) -> Tensor:
        moved = inputs + threat.per_sample(state.eps, inputs) * signs
        return threat.clip(moved, self._image_bounds(state), inplace=True)

    def _image_bounds(self, state: SquareState) -> FeatureBounds:
        low, high = threat.bounds_of(state.box, self.bounds)
        if isinstance(low, Tensor) and isinstance(high, Tensor):
            return _image(low), _image(high)
        return self.bounds

    @staticmethod
    def _place(numbers: Tensor, sides: Tensor, state: SquareState) -> _Window:
        """Windows anywhere, or around a feature that may change where some may not."""
        height, width = _image(state.inputs).shape[2:]
        free = threat.free_of(state.box)
        if free is None:
            return _anywhere(numbers, sides, height, width)
        chosen = _drawn(numbers[:, :1], _image(free).to(state.inputs.dtype))
        return _around(chosen, sides, height, width)

    def _grid(self, state: SquareState) -> Tensor:
        """Start of l1 and l2: bumps of random signs and directions side by side, 5 x 5 or so."""
        inputs = _image(state.inputs)
        count, channels, height, width = inputs.shape
        tall, wide = max(height // 5, 1), max(width // 5, 1)
        down, across = height // tall, width // wide
        numbers = seeding.uniform(state.keys, 0, (1 + channels) * down * across)
        numbers = numbers.view(count, 1 + channels, down, across)
        numbers = numbers.repeat_interleave(tall, 2).repeat_interleave(wide, 3)
        sides = _constants(tall, wide, inputs.device).limits.expand(2, 2)
        block = _window(torch.zeros_like(sides), sides, tall, wide)
        sideways = torch.arange(2, device=inputs.device) == 1
        tiles = _bump(block, sideways, self._order).repeat(1, 1, down, across)
        delta = torch.where(numbers[:, :1] < 0.5, tiles[0], tiles[1]) * _signs(numbers[:, 1:])
        top, left = (height - down * tall) // 2, (width - across * wide) // 2
        bottom, right = height - down * tall - top, width - across * wide - left
        delta = F.pad(delta, (left, right, top, bottom)).to(inputs.dtype)
        free = threat.free_of(state.box)
        if free is not None:
            delta = delta * _image(free)
        scale = threat.per_sample(state.eps, delta) / _sizes(delta, self._order, (1, 2, 3))
        return self._within(inputs, delta * scale * self._surplus, state)

    def _bumps(self, state: SquareState) -> Tensor:
        """Proposal of l1 and l2: a window takes a bump, and the norm that another gives up."""
        inputs = _image(state.inputs)
        delta = _image(state.current) - inputs
        count, channels, height, width = inputs.shape
        numbers = seeding.uniform(state.keys, state.step, 5 + channels)
        sides = self._sides(state.step, height, width)
        window = self._place(numbers[:, :2], sides, state)
        if self.norm == "l1":
            # The published one is anywhere: on a perturbation as sparse as those of l1 it would
            # hold nothing, and the query be wasted, three times of four.
            giver = _around(_drawn(numbers[:, 2:3], delta), sides, height, width)
        else:
            giver = _anywhere(numbers[:, 2:4], sides, height, width)
        inside = window.mask
        touched = inside | giver.mask
        order = self._order
        eps = threat.per_sample(state.eps, inputs)
        spare = eps**order - _sizes(delta, order).pow(order).sum(1, keepdim=True)
        freed = _sizes(delta.masked_fill(~touched, 0.0), order)
        # Each channel spends what it frees in both windows, and its part of what was left over.
        budget = (freed**order + spare.clamp_min(0.0) / channels) ** (1 / order)
        bump = _bump(window, numbers[:, 4] < 0.5, order).to(inputs.dtype)
        fresh = delta.masked_fill(~inside, 0.0)
        fresh /= _sizes(fresh, order)
        fresh += bump * _signs(numbers[:, 5:]).view(count, channels, 1, 1)
        free = threat.free_of(state.box)
        if free is not None:
            fresh *= _image(free)
        fresh *= budget * self._surplus / _sizes(fresh, order)
        proposed = torch.where(inside, fresh, delta.masked_fill(touched, 0.0))
        return self._within(inputs, proposed, state)

    def _within(self, inputs: Tensor, delta: Tensor, state: SquareState) -> Tensor:
        """Into ball and bounds: pruned to the largest entries in l1, scaled to the sphere in l2."""
        if self.norm == "l1":
            bounds = self._image_bounds(state)
            return threat.project(inputs + delta, inputs, state.eps, "l1", bounds)
        scale = threat.per_sample(state.eps, delta) / _sizes(delta, 2.0, (1, 2, 3))
        # What the bounds cuts off here is left over for the next window.
        return threat.clip(inputs + delta * scale, self._image_bounds(state), inplace=True)

    @property
    def _order(self) -> float:
        return 1.0 if self.norm == "l1" else 2.0

    @property
    def _surplus(self) -> float:
        return _L1_SURPLUS if self.norm == "l1" else 1.0

    def _areas(self, spent: Tensor, whole: int, stages: Tensor) -> Tensor:
        """Area of each sample's window, of ``whole``; it shrinks with time."""
        stage = torch.bucketize((spent - 1) * 10_000 // self.queries, stages)
        return self.p_init * whole * 0.5**stage

    def _sides(self, spent: Tensor, height: int, width: int) -> Tensor:
        """Height and width of each sample's window, ``(2, N)``."""
        constants = _constants(height, width, spent.device)
        area = self._areas(spent, height * width, constants.stages)
        side = area.sqrt().round()
        # A square that is too large for one axis is longer along the other.
        tall = torch.where(side > width, (area / width).round(), side)
        wide = torch.where(side > height, (area / height).round(), side)
        sides = torch.stack([tall, wide]).to(torch.int64)
        sides = sides.clamp_min(1) if self.norm == "linf" else sides.clamp_min(3) | 1
        return torch.minimum(sides, constants.limits)


class _Constants(NamedTuple):
    """What depends on an image's height and width alone."""

    stages: Tensor  # proposals, of 10,000, after which the window is halved
    limits: Tensor  # (2, 1) int64, height and width
    down: Tensor  # (1, 1, H, 1) int64, each sample's number
    across: Tensor  # (W,) int64, each column's
    levels: Tensor  # (2, R) float64, height of a pyramid's rings in l1 and in l2


@lru_cache(maxsize=64)
def _constants(height: int, width: int, device: torch.device) -> _Constants:
    """Made once for a device: to copy them there for every query would wait."""
    # Ring k rises above ring k + 1 by 1 / (k + 1)**2, in l1 by 1 / (k + 1)**4.
    places = torch.arange(1, max(height, width) // 2 + 3, dtype=torch.float64, device="cpu")
    powers = torch.tensor([[4.0], [2.0]], dtype=torch.float64, device="cpu")
    return _Constants(
        torch.tensor(_HALVED_AFTER, device=device),
        torch.tensor([[height], [width]], device=device),
        torch.arange(height, device=device).view(1, 1, -1, 1),
        torch.arange(width, device=device),
        torch.special.zeta(powers, places).to(device),
    )


class _Window(NamedTuple):
    """A window of each sample's image; broadcast against ``(N, C, H, W)``."""

    down: Tensor  # (N, 1, H, 1), each pixel's distance below the window's upper edge
    across: Tensor  # (N, 1, 1, W), and right of its left edge
    tall: Tensor  # (N, 1, 1, 1)
    wide: Tensor  # (N, 1, 1, 1)

    @property
    def mask(self) -> Tensor:
        """Pixels inside, bool ``(N, 1, H, W)``."""
        rows = (self.down >= 0) & (self.down < self.tall)
        columns = (self.across >= 0) & (self.across < self.wide)
        return rows & columns


def _window(corners: Tensor, sides: Tensor, height: int, width: int) -> _Window:
    """Windows with these upper left corners, heights and widths, int64 ``(2, N)``."""
    upper, left = corners.view(2, -1, 1, 1, 1)
    tall, wide = sides.view(2, -1, 1, 1, 1)
    constants = _constants(height, width, sides.device)
    return _Window(constants.down - upper, constants.across - left, tall, wide)


def _anywhere(numbers: Tensor, sides: Tensor, height: int, width: int) -> _Window:
    """Windows at places drawn by uniform numbers ``(N, 2)``."""
    places = _constants(height, width, sides.device).limits - sides + 1
    # The numbers are below 1 by more than the product rounds away.
    return _window((numbers.t() * places).long(), sides, height, width)


def _around(pixels: Tensor, sides: Tensor, height: int, width: int) -> _Window:
    """Windows around pixels ``(N,)``, moved into the image."""
    corners = torch.stack([pixels // width, pixels % width]) - sides // 2
    last = _constants(height, width, sides.device).limits - sides
    return _window(torch.minimum(corners.clamp_min(0), last), sides, height, width)


def _drawn(numbers: Tensor, delta: Tensor) -> Tensor:
    """Pixels ``(N,)`` drawn by uniform numbers ``(N, 1)``, each as likely as it is perturbed."""
    weights = delta.abs().sum(1).flatten(1)
    # Added up as integers: exact, and so the same on every device.
    fractions = weights / weights.amax(1, keepdim=True).clamp_min(1e-12)
    below = (fractions * 2**30).long().cumsum(1)
    chosen = (numbers.double() * below[:, -1:]).long()
    return (below <= chosen).sum(1).clamp_max(weights.shape[1] - 1)


def _bump(window: _Window, sideways: Tensor, order: float) -> Tensor:
    """Two pyramids of opposite signs that fill the window, ``(N, 1, H, W)`` of unit size.

    They lie side by side where ``sideways``, else one above the other; each falls from its middle
    ring by ring (the eta of the paper, algorithm 4), steeper in l1.
    """
    sideways = sideways.view(-1, 1, 1, 1)
    # A side of one pixel cannot be cut.
    sideways = (sideways | (window.tall == 1)) & (window.wide > 1)
    lower, tall, down = _half(window.down, window.tall, ~sideways)
    right, wide, across = _half(window.across, window.wide, sideways)
    second = lower & right
    rings = torch.maximum(tall, wide) // 2 + 1
    ring = torch.where(window.mask, torch.maximum(down, across), rings)
    constants = _constants(window.down.shape[2], window.across.shape[3], ring.device)
    levels = constants.levels[0 if order == 1.0 else 1]
    heights = (levels[ring] - levels[rings]).float()
    firsts, seconds = heights.masked_fill(second, 0.0), (-heights).masked_fill(~second, 0.0)
    bump = firsts / _sizes(firsts, order) + seconds / _sizes(seconds, order)
    return bump / _sizes(bump, order)


def _half(distance: Tensor, side: Tensor, cut: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Along one axis: is a pixel past the cut, its half's length, its distance to that middle."""
    first = (side // 2).masked_fill(~cut, 0)
    past = distance >= first
    length = torch.where(past, side - first, first)
    middle = first * past + length // 2
    return past, length, (distance - middle).abs()


def _image(tensor: Tensor) -> Tensor:
    """View as ``(N, C, H, W)``: what is no image is one sample of pixels."""
    if tensor.ndim == 4 and tensor.shape[2:].numel() > 1:
        return tensor
    return tensor.flatten(1)[:, None, None]


def _signs(numbers: Tensor) -> Tensor:
    return (numbers >= 0.5).float().mul_(2).sub_(1)


def _sizes(delta: Tensor, order: float, axes: tuple[int, ...] = (2, 3)) -> Tensor:
    """Norm of each channel (or over other axes), kept broadcastable, never exactly zero."""
    found: Tensor = torch.linalg.vector_norm(delta, order, dim=axes, keepdim=True)
    return found.clamp_min(1e-12)


@suggests
def square(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    norm: Norm,
    queries: int = 5000,
    p_init: float = 0.8,
    targeted: bool = False,
    bounds: FeatureBounds = (0.0, 1.0),
    mask: Tensor | None = None,
    seed: int | torch.Generator | None = None,
    expectation: int = 1,
    extras: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Attack one batch by Square Attack, a random search (Andriushchenko et al. 2020).

    Only the model's outputs are used, never a gradient: what it finds where gradient attacks
    find nothing shows that the gradients were masked. Each query moves a random window of the
    image, which shrinks as queries are spent, and is kept where the margin grew. The l1 form is
    that of Croce and Hein (2021). Fewer queries are wasted than in the published code: in linf a
    window never repeats what is there, and in l1 the window that gives up its norm holds some.
    In l1 and l2 all pixels of a window have parts of a fixed pattern and are not set one by one: on
    a linear model the search ends at 0.6 to 0.8 of the optimum on images of 8 x 8 pixels, and at
    0.9 to 0.96 on 12 columns of a table, in plain and in masked balls (docs/benchmarks.md).

    Parameters
    ----------
    model
        Any module that returns class logits ``(N, C)``; see `advfeat.attacks.pgd`.
    inputs
        Floating point, ``(N, ...)`` within ``bounds``. Images ``(N, C, H, W)`` have windows that
        are squares, in all channels; inputs of any other rank have segments of the flattened
        features.
    labels
        Class indices ``(N,)``: true labels, or the targets when ``targeted``.
    eps
        Radius of the ball in the units of ``inputs`` (so 8/255, not 8), a float or one for
        each sample, ``(N,)``.
    norm
        ``"l1"``, ``"l2"`` or ``"linf"``.
    queries
        Evaluations of the model that each sample may take, the one of its start included. A
        sample that is fooled takes no more.
    p_init
        Fraction of the image that the first window covers. It is halved after 0.1, 0.5, 2, 5, 10,
        20, 40, 60 and 80 percent of the queries, as in the paper.
    targeted
        Search for inputs classified as ``labels`` instead of away from them.
    bounds, mask
        As in `advfeat.pgd`. Windows lie around features that may change.
    seed
        An integer, a generator, or None for one draw from torch's default generator.
    expectation, extras
        As in `advfeat.pgd`.

    Returns
    -------
    Tensor
        The first input found that fools the model, else the one of the largest margin, which is
        a perturbed one; the shape of ``inputs``, float32 (float64 for float64 inputs), within
        ball and bounds to 1e-6.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause, before any work is done.

    Examples
    --------
    >>> import torch
    >>> from advfeat.attacks import square
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 10))
    >>> x, y = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    >>> x_adv = square(model, x, y, eps=8 / 255, norm="linf", queries=100)
    >>> bool(((x_adv - x).abs() <= 8 / 255 + 1e-6).all())
    True
    """
    attack = Square(
        eps=eps,
        norm=norm,
        queries=queries,
        p_init=p_init,
        targeted=targeted,
        bounds=bounds,
        mask=mask,
        seed=seed,
    )
    return attack(model, inputs, labels, expectation=expectation, extras=extras)
