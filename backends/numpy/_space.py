"""What computing in blocks needs: their size, memory for them, and sums that keep their digits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from normkit._statistics import LARGE

from ._layout import Axes

Given = NDArray | None

# How many values a block has: with what is computed from it, it fits into a second-level cache.
BLOCK = 2**17
# So many are added up at once in the dtype of the values, one after the other or in rows.
ROWS_AT_ONCE, _PIECE = 2**10, 2**13
# Where the variance is larger, squares overflow, or what derivatives are made of underflows.
LIMIT = {np.dtype(name): variance for name, (variance, _) in LARGE.items()}


@contextmanager
def conditions(row: int) -> Iterator[None]:
    """Nobody is warned of what is not finite; and ufuncs do not copy what they broadcast.

    They copy it through their buffer, unless that holds less than a row.
    """
    with np.errstate(all="ignore"):
        np.setbufsize(16 if row >= 512 else 4096)
        yield


def dots(u: NDArray, v: NDArray) -> NDArray:
    """The sums of ``u * v`` along the last axis."""
    whole = u.shape[-1] // _PIECE * _PIECE
    if u.shape[-1] <= _PIECE:
        return np.vecdot(u, v)
    pieces = (a[..., :whole].reshape(*a.shape[:-1], -1, _PIECE) for a in (u, v))
    rest = np.vecdot(u[..., whole:], v[..., whole:])
    return np.vecdot(*pieces).astype(np.float64).sum(-1) + rest


class Space:
    """Memory for blocks in the dtype that is computed in, used again for each of them."""

    def __init__(self, compute: np.dtype) -> None:
        self.compute = compute
        self._arrays: dict[str, NDArray] = {}

    def of(self, name: str, shape: Axes) -> NDArray:
        size = math.prod(shape)
        if name not in self._arrays or self._arrays[name].size < size:
            self._arrays[name] = np.empty(size, self.compute)
        return self._arrays[name][:size].reshape(shape)

    def load(self, a: NDArray, name: str) -> NDArray:
        """``a``, or what it is in the dtype that is computed in."""
        if a.dtype == self.compute:
            return a
        space = self.of(name, a.shape)
        np.copyto(space, a, casting="unsafe")
        return space

    def result(self, y: NDArray) -> NDArray:
        """Where to compute what is to be stored in ``y``."""
        return y if y.dtype == self.compute else self.of("result", y.shape)

    def store(self, y: NDArray, result: NDArray) -> None:
        if y.dtype != self.compute:
            np.copyto(y, result, casting="unsafe")
