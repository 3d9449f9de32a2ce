"""Standardization by the compiled loops of ``_numba.py``, shared out among threads."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _numba, _sweeps
from ._layout import COLUMNS, FEATURES, Axes
from ._space import LIMIT
from ._sweeps import Given, View
from ._threads import Share, shares, together


def standardize(
    x: NDArray,
    y: NDArray,
    form: str,
    scale: Given,
    bias: Given,
    eps: float,
    centered: bool,
    compute: np.dtype,
) -> tuple[NDArray, NDArray, NDArray]:
    """See ``_blocks.py``."""
    with np.errstate(all="ignore"):
        if form == COLUMNS:
            view = _Columns(x.shape, compute)
            mean, variance = _sweeps.standardize(view, x, y, scale, bias, eps, centered)
        else:
            mean, variance = np.zeros((2, x.shape[0], x.shape[2]))
            scale, bias = _or(scale, 1, x, form), _or(bias, 0, x, form)
            if form == FEATURES:
                loop, options = _numba.features_forward, (centered,)
            else:
                loop, options = _numba.rows_forward, (True, centered)
            _share(loop, mean.size, x, y, scale, bias, eps, *options, mean, variance)
        if compute == np.float32:
            return mean, variance, np.zeros(mean.shape, bool)
        return mean, variance, ~(variance <= LIMIT[compute])


def normalize(
    x: NDArray,
    y: NDArray,
    form: str,
    mean: NDArray,
    variance: NDArray,
    scale: Given,
    bias: Given,
    eps: float,
    compute: np.dtype,
) -> None:
    """See ``_blocks.py``."""
    with np.errstate(all="ignore"):
        if form == COLUMNS:
            view = _Columns(x.shape, compute)
            _sweeps.normalize(view, x, y, mean, variance, scale, bias, eps)
        else:
            scale, bias = _or(scale, 1, x, form), _or(bias, 0, x, form)
            options = eps, False, True, mean, variance
            _share(_numba.rows_forward, mean.size, x, y, scale, bias, *options)


def backward(
    x: NDArray,
    g: NDArray,
    dx: NDArray,
    form: str,
    mean: Given,
    variance: Given,
    scale: Given,
    eps: float,
    centered: bool,
    compute: np.dtype,
) -> tuple[NDArray, NDArray] | None:
    """See ``_blocks.py``."""
    limit = LIMIT[compute]
    with np.errstate(all="ignore"):
        if form == COLUMNS:
            view = _Columns(x.shape, compute)
            return _sweeps.backward(view, x, g, dx, mean, variance, scale, eps, centered, limit)
        own = mean is None
        if own:
            mean, variance = np.zeros((2, x.shape[0], x.shape[2]))
        scale = _or(scale, 1, x, form)
        if form == FEATURES:
            loop, options = _numba.features_backward, (centered,)
        else:
            loop, options = _numba.rows_backward, (own, centered)
        # Each thread adds up for itself.
        found = np.zeros((len(shares(mean.size)), 2, *scale.shape))
        _share(loop, mean.size, x, g, dx, scale, eps, *options, mean, variance, each=found)
        # Of float32, what is no number here is none in x either.
        lost = variance > limit if compute == np.float32 else ~(variance <= limit)
        return None if lost.any() else tuple(found.sum(0))


def _share(loop: Any, length: int, *args: Any, each: Given = None) -> None:
    """``loop`` over as many groups, in several threads."""
    jobs = []
    for i, share in enumerate(shares(length)):
        own = () if each is None else tuple(each[i])
        jobs.append(partial(loop, *args, *own, *share))
    together(jobs)


def _or(p: Given, otherwise: float, x: NDArray, form: str) -> NDArray:
    if p is not None:
        return p
    if form == FEATURES:
        return np.full(x.shape[2:5:2], otherwise, x.dtype)
    return np.full(x.shape[2:4], otherwise, np.float64)


class _Columns(View):
    """Rows of channels."""

    def __init__(self, shape: Axes, compute: np.dtype) -> None:
        super().__init__(shape, compute)
        # Sums of float32 are in float64, which has digits to spare.
        self.far = 2.0**20 if compute == np.float32 else 2.0**4

    def rough_mean(self, x: NDArray) -> NDArray:
        return x[:, 0, :, :, 0].mean(2, np.float64)

    def sums(self, x: NDArray, g: Given, near: NDArray, own: bool, centered: bool) -> list[NDArray]:
        near = self._spread(near[..., None], np.float64)
        # Threads that go through different rows add up for themselves.
        found = np.zeros((len(self._shares()), 4, *near.shape))
        squares, values, products, sums = (found[:, i] for i in range(4))
        if own:
            self._go(_numba.columns_sums, self._see(x), near, each=(values, squares))
        if g is not None:
            loop, seen = _numba.columns_gradient_sums, (self._see(x), self._see(g))
            self._go(loop, *seen, near, each=(sums, products))
        wanted = (own, own and centered, g is not None, g is not None)
        shape = (-1, *self.shape[2:4])
        return [found[:, i].sum(0).reshape(shape) for i in range(4) if wanted[i]]

    def affine(
        self, x: NDArray, y: NDArray, near: NDArray, factor: NDArray, offset: NDArray
    ) -> None:
        terms = (self._spread(p, self.compute) for p in (near[..., None], factor, offset))
        self._go(_numba.columns_affine, self._see(x), self._see(y), *terms)

    def gradient(
        self,
        x: NDArray,
        g: NDArray,
        dx: NDArray,
        near: NDArray,
        factor: NDArray,
        slope: Given,
        offset: Given,
    ) -> None:
        zero = np.zeros_like(near)
        slope, offset = (zero if p is None else p for p in (slope, offset))
        terms = (near[..., None], factor, slope[..., None], offset[..., None])
        terms = (self._spread(p, self.compute) for p in terms)
        self._go(_numba.columns_gradient, *map(self._see, (x, g, dx)), *terms)

    def _see(self, a: NDArray) -> NDArray:
        return a.reshape(*self.shape[:2], -1)

    def _spread(self, p: NDArray, dtype: Any) -> NDArray:
        spread = np.empty((len(p), *self.shape[2:4]), dtype)
        spread[...] = p
        return spread.reshape(len(p), -1)

    def _shares(self) -> list[tuple[Share, Share]]:
        """Which samples, and which of their rows, are for each thread."""
        apart, over, *_ = self.shape
        if apart > over:
            return [(share, (0, over)) for share in shares(apart)]
        return [((0, apart), share) for share in shares(over)]

    def _go(self, loop: Any, *args: Any, each: tuple[NDArray, ...] = ()) -> None:
        jobs = []
        for i, share in enumerate(self._shares()):
            jobs.append(partial(loop, *args, *(a[i] for a in each), *share))
        together(jobs)
