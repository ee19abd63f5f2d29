"""Arrays that are read when asked for, and pickled by the names of their files."""

from __future__ import annotations

import mmap
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from torch import Tensor

from advfeat.datasets.folder import Array
from advfeat.threat import Bounds


class _MappedArray(NamedTuple):
    """An array in a file, or a part of one."""

    path: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


def portable(array: Any) -> Any:
    """What to pickle for an array: of one that is mapped from a file, where it is."""
    if isinstance(array, ConcatArray):
        return array.mapped_with(portable)
    mapped = getattr(array, "_mmap", None)
    if mapped is None:
        return array
    # Parts of a mapped array have the offset of the whole: what counts is where they begin.
    begins = array.__array_interface__["data"][0]
    map_begins = np.frombuffer(mapped, np.uint8).__array_interface__["data"][0]
    map_offset = array.offset - array.offset % mmap.ALLOCATIONGRANULARITY
    offset = map_offset + begins - map_begins
    return _MappedArray(str(array.filename), array.dtype, array.shape, array.strides, offset)


def restored(state: Any) -> Any:
    """The array of what `portable` gave."""
    if isinstance(state, ConcatArray):
        return state.mapped_with(restored)
    if not isinstance(state, _MappedArray):
        return state
    if 0 in state.shape:
        return np.empty(state.shape, state.dtype)
    ends = [(n - 1) * stride for n, stride in zip(state.shape, state.strides, strict=True)]
    before = -sum(end for end in ends if end < 0)
    after = sum(end for end in ends if end > 0) + state.dtype.itemsize
    raw = np.memmap(state.path, np.uint8, "r", state.offset - before, (before + after,))
    first = raw[before : before + state.dtype.itemsize].view(state.dtype)
    return as_strided(first, state.shape, state.strides, subok=True, writeable=False)


class ConcatArray:
    """Samples of several arrays, in an order of their own, as one array; read when asked for."""

    def __init__(self, parts: list[Array], order: Array) -> None:
        self._parts, self._order = parts, order
        self._starts = np.cumsum([0, *map(len, parts)])
        self.dtype, self.shape = parts[0].dtype, (len(order), *parts[0].shape[1:])

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, key: Any) -> Array:
        wanted = self._order[key]
        found: Array = self._read(np.atleast_1d(wanted))
        return found if np.ndim(wanted) else found[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return self._read(self._order).astype(self.dtype if dtype is None else dtype, copy=False)

    def _read(self, places: Array) -> Array:
        found = np.empty((len(places), *self.shape[1:]), self.dtype)
        of = np.searchsorted(self._starts, places, side="right") - 1
        for number, part in enumerate(self._parts):
            found[of == number] = part[places[of == number] - self._starts[number]]
        return found

    def mapped_with(self, function: Any) -> ConcatArray:
        """The same of other parts."""
        return ConcatArray([function(part) for part in self._parts], self._order)


def quantize(images: Tensor, bounds: Bounds) -> Tensor:
    """The nearest of 256 even levels of the bounds, uint8."""
    low, high = bounds
    return ((images - low) / (high - low) * 255).round().to(torch.uint8)


def dequantize(levels: Tensor, bounds: Bounds) -> Tensor:
    """Pixels of uint8 levels, float32."""
    low, high = bounds
    return levels.to(torch.float32) / 255 * (high - low) + low
