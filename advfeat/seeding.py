"""Counter-based random numbers: a pure function of (seed, sample index, draw).

No state is kept, so a sample's noise is the same whatever the batch size, order, process or rank.
The bits come from SplitMix64 (Steele, Lea, Flood 2014) in wrapping 64-bit integer arithmetic,
which is exact and equal on every device.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

# SplitMix64's increment and multipliers as signed 64-bit integers.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64

MAX_SEED = 2**63 - 1


def resolve(seed: int | torch.Generator | None) -> int:
    """Return the integer to use: the seed itself, or one draw from a generator.

    ``None`` draws from torch's default generator, so ``torch.manual_seed`` governs it.

    Examples
    --------
    >>> resolve(7)
    7
    """
    if not (seed is None or isinstance(seed, torch.Generator)):
        return int(seed)  # a NumPy integer too
    device = seed.device if isinstance(seed, torch.Generator) else torch.device("cpu")
    return int(torch.randint(MAX_SEED, (), generator=seed, device=device))


def keys(seed: int, index: Tensor) -> Tensor:
    """One key for each sample, int64 ``(N,)``: all its random numbers follow from it.

    Parameters
    ----------
    seed
        Any Python integer; taken modulo 2**64.
    index
        The samples' own indices, int64 ``(N,)``.
    """
    index = index.to(torch.int64)
    root = torch.full_like(index, _signed(seed))
    return _mix(_mix(root) + index * _GOLDEN)


def bits(keys: Tensor, draw: int | Tensor, count: int) -> Tensor:
    """Random 64-bit integers, int64 ``(N, count)``, one sample for each key.

    ``draw`` says which draw of the sample this is, an integer or ``(N,)``; different draws are
    independent.
    """
    offset = torch.as_tensor(draw, dtype=torch.int64, device=keys.device) * _GOLDEN
    stream = _mix(_mix(keys + offset) ^ keys)
    counter = torch.arange(1, count + 1, dtype=torch.int64, device=keys.device) * _GOLDEN
    return _mix(stream[:, None] + counter)


def uniform(keys: Tensor, draw: int | Tensor, count: int) -> Tensor:
    """Uniform float32 numbers strictly between 0 and 1, ``(N, count)``.

    Examples
    --------
    >>> both = uniform(keys(7, torch.tensor([3, 5])), 0, 4)
    >>> torch.equal(both[1:], uniform(keys(7, torch.tensor([5])), 0, 4))
    True
    """
    # 23 bits and a half: every value is exact in float32, and neither 0 nor 1 occurs.
    top = (bits(keys, draw, count) >> 41) & (2**23 - 1)
    return (top.to(torch.float32) + 0.5) * 2.0**-23


def integers(keys: Tensor, draw: int | Tensor, high: int) -> Tensor:
    """One uniform integer in ``[0, high)`` for each key, int64 ``(N,)``; ``high`` below 2**31."""
    top = (bits(keys, draw, 1).squeeze(1) >> 32) & (2**32 - 1)
    return (top * high) >> 32


def derive(seed: int, draw: int) -> int:
    """Another seed, for a part of the work that is to have random numbers of its own."""
    return int(bits(keys(seed, torch.zeros(1, dtype=torch.int64, device="cpu")), draw, 1))


def generator(seed: int, draw: int = 0) -> torch.Generator:
    """Return a CPU generator for sequential work (shuffling an epoch), keyed by (seed, draw)."""
    return torch.Generator().manual_seed(derive(seed, draw))


@contextmanager
def default_generators(seed: int, draw: int, device: torch.device) -> Iterator[None]:
    """Let torch's default generators follow from (seed, draw) inside, and put them back after.

    Dropout, augmentation and the order of a user's loader are then the same in a run that was cut
    and resumed, and the same seed gives the same weights.
    """
    number = derive(seed, draw)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.set_rng_state(torch.Generator().manual_seed(number).get_state())
        for gpu in devices:
            torch.cuda.set_rng_state(torch.Generator(gpu).manual_seed(number).get_state(), gpu)
        yield


@contextmanager
def all_generators(seed: int, draw: int, device: torch.device) -> Iterator[None]:
    """As `default_generators`, and those of Python and NumPy too."""
    own, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002 - what models draw from
    number = derive(seed, draw)
    with default_generators(seed, draw, device):
        try:
            random.seed(number)
            np.random.seed(number % 2**32)  # noqa: NPY002
            yield
        finally:
            random.setstate(own)
            np.random.set_state(numpys)  # noqa: NPY002


def _mix(value: Tensor) -> Tensor:
    value = (value ^ _shift(value, 30)) * _FIRST
    value = (value ^ _shift(value, 27)) * _SECOND
    return value ^ _shift(value, 31)


def _shift(value: Tensor, places: int) -> Tensor:
    """Logical right shift: torch's own keeps the sign."""
    mask: int = 2 ** (64 - places) - 1
    return (value >> places) & mask


def _signed(seed: int) -> int:
    seed %= 2**64
    return seed - 2**64 if seed >= 2**63 else seed
