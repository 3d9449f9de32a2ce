"""An array as the faster paths see it: five axes, of which any may have length 1.

They are, from the slowest in memory to the fastest::

    apart, over, channels, within, positions

Statistics are taken for each of ``apart`` and ``channels``, over the rest; parameters lie along
``channels`` and ``within``. Every layer is such a view, channels first or last::

    BatchNorm (N, C, H, W)      1, N, C, 1, H*W        BatchNorm (N, H, W, C)    1, N*H*W, C, 1, 1
    GroupNorm (N, C, H, W)      N, 1, G, C/G, H*W      GroupNorm (N, H, W, C)    N, H*W, G, C/G, 1
    InstanceNorm (N, C, H, W)   N, 1, C, 1, H*W        LayerNorm (N, L, F)       N*L, 1, 1, 1, F

Of LayerNorm and RMSNorm, parameters lie along ``positions``. (So do those of GroupNorm on (N, C),
which is N, 1, G, 1, C/G.)
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

Axes = tuple[int, ...]

# What lies along the last axis in memory: one value a channel each, so that these go through rows
# (positions) or columns (channels); or the features of a group, each with its own parameters.
ROWS, COLUMNS, FEATURES = "rows", "columns", "features"

# Whether an axis is reduced, and whether parameters lie along it: axes next to each other in memory
# that are alike in both are one.
_SLOTS = ((False, False), (True, False), (False, True), (True, True), (True, False))


class Layout(NamedTuple):
    """The view of one kind of array.

    Attributes:
        order: the axes of the array as they lie in memory.
        back: the axes of what has that order, as they are in the array.
        shape: the lengths of the five.
        form: ROWS, COLUMNS or FEATURES.
        kept: the shape of statistics, and of what parameters broadcast to, with the rank of the
            array.
        along: the same of the parameters.
    """

    order: Axes
    back: Axes
    shape: Axes
    form: str
    kept: Axes
    along: Axes

    def view(self, a: NDArray) -> NDArray:
        """``a`` with the five axes."""
        return a.transpose(self.order).reshape(self.shape)

    def empty(self, x: NDArray, dtype: DTypeLike) -> NDArray:
        """An array of the shape of ``x``, laid out in memory the same way."""
        return np.empty([x.shape[axis] for axis in self.order], dtype).transpose(self.back)

    def alike(self, a: NDArray, x: NDArray) -> NDArray:
        """``a``, or a copy of it that is laid out in memory as ``x`` is."""
        if a.transpose(self.order).flags.c_contiguous:
            return a
        copy = self.empty(x, a.dtype)
        copy[...] = a
        return copy

    def parameter(self, p: NDArray | None, dtype: DTypeLike) -> NDArray | None:
        """A value for each channel and place within it; or each feature."""
        if p is None:
            return None
        shape = self.shape[2:5:2] if self.form == FEATURES else self.shape[2:4]
        if p.shape != self.along:
            p = np.broadcast_to(p, self.along)
        return np.ascontiguousarray(p.transpose(self.order), dtype).reshape(shape)

    def gradient(self, p: NDArray) -> NDArray:
        """That of a parameter, with the rank of the array."""
        return self._back(p, self.along)

    def statistic(self, found: NDArray, dtype: DTypeLike) -> NDArray:
        """Statistics of ``apart`` and ``channels``, with the rank of the array."""
        return self._back(found.astype(dtype), self.kept)

    def _back(self, a: NDArray, shape: Axes) -> NDArray:
        return a.reshape([shape[axis] for axis in self.order]).transpose(self.back)


def order_of(x: NDArray) -> Axes | None:
    """The axes of ``x`` as they lie in memory; None if there are gaps between its values."""
    if x.flags.c_contiguous:
        return tuple(range(x.ndim))
    order = tuple(sorted(range(x.ndim), key=lambda axis: -x.strides[axis]))
    return order if x.transpose(order).flags.c_contiguous else None


@lru_cache(maxsize=256)
def layout(lengths: Axes, order: Axes, reduced: Axes, along: Axes) -> Layout | None:
    """The view of arrays of these ``lengths``, with parameters ``along`` some of their axes.

    None if they are no such view.
    """
    shape, wide = [1] * 5, list(along)
    slot = 0
    axes = [axis for axis in order if lengths[axis] > 1]
    for kind, run_ in groupby(axes, key=lambda axis: (axis in reduced, along[axis] > 1)):
        run = list(run_)
        while slot < 5 and not _takes(slot, kind):
            slot += 1
        if slot == 5:
            return None
        shape[slot] = math.prod(lengths[axis] for axis in run)
        if slot == 2:
            for axis in run:
                wide[axis] = lengths[axis]
        slot += 1
    apart, over, channels, within, positions = shape
    if over * within * positions == 1:
        return None
    form = ROWS if positions > 1 else COLUMNS
    if over == positions == 1:
        form, shape = FEATURES, [apart, 1, channels, 1, within]
    elif channels == within == positions == 1:
        form, shape = ROWS, [apart, 1, 1, 1, over]
    kept = tuple(1 if axis in reduced else n for axis, n in enumerate(lengths))
    back = tuple(order.index(axis) for axis in range(len(order)))
    return Layout(order, back, tuple(shape), form, kept, tuple(wide))


def _takes(slot: int, kind: tuple[bool, bool]) -> bool:
    # Channels without parameters are kept axes after others that are reduced.
    return kind == _SLOTS[slot] or (slot == 2 and kind == (False, False))
