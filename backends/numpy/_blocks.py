"""The sweeps of ``_sweeps.py`` block by block, each in the cache, with NumPy's own functions.

Within a block sums are those of BLAS; what they add up to is kept in float64. Rows of features, as
in LayerNorm, are in ``_features.py``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _features, _sweeps
from ._layout import COLUMNS, FEATURES, Axes
from ._space import BLOCK, LIMIT, ROWS_AT_ONCE, Space, conditions, dots
from ._sweeps import Given, View


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
    """Write the result to ``y``. Mean and variance, and which of the groups must be done again."""
    if form == FEATURES:
        mean, variance = _features.standardize(x, y, scale, bias, eps, centered, compute)
    else:
        view = _view(x, form, compute)
        with conditions(view.row):
            mean, variance = _sweeps.standardize(view, x, y, scale, bias, eps, centered)
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
    """The same with statistics that are given."""
    view = _view(x, form, compute)
    with conditions(view.row):
        _sweeps.normalize(view, x, y, mean, variance, scale, bias, eps)


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
    """Write the gradient of x to ``dx``; those of scale and bias. None: the engine must do it.

    Statistics are given, or those of ``x``.
    """
    if form == FEATURES:
        return _features.backward(x, g, dx, scale, eps, centered, compute)
    view = _view(x, form, compute)
    with conditions(view.row):
        return _sweeps.backward(
            view, x, g, dx, mean, variance, scale, eps, centered, LIMIT[compute]
        )


def _view(x: NDArray, form: str, compute: np.dtype) -> _Blocks:
    return (_Columns if form == COLUMNS else _Rows)(x.shape, compute)


class _Blocks(View):
    """What is done to each block.

    Attributes:
        row: how many values there are in a row as it is seen here.
    """

    row: int

    def __init__(self, shape: Axes, compute: np.dtype) -> None:
        super().__init__(shape, compute)
        self._space = Space(compute)

    @abstractmethod
    def _see(self, a: NDArray) -> NDArray:
        """The array as it is cut into blocks."""

    @abstractmethod
    def _blocks(self) -> list[Any]:
        """The indices of the blocks."""

    @abstractmethod
    def _empty(self) -> NDArray:
        """Where to add up."""

    @abstractmethod
    def _add(self, sums: NDArray, block: Any, u: NDArray, v: Given = None) -> None:
        """The sums of ``u * v``, or of ``u``."""

    @abstractmethod
    def _total(self, sums: NDArray) -> NDArray:
        """For each group, and each place within its channels."""

    @abstractmethod
    def _spread(self, p: NDArray) -> NDArray:
        """Values for groups and places, to be broadcast part by part."""

    @abstractmethod
    def _part(self, p: NDArray, block: Any) -> NDArray:
        """Of these, what a block is broadcast with."""

    def sums(self, x: NDArray, g: Given, near: NDArray, own: bool, centered: bool) -> list[NDArray]:
        shift = self._shift(near)
        wanted = (own, own and centered, g is not None, g is not None)
        squares, values, products, sums = (self._empty() if want else None for want in wanted)
        x, g = self._see(x), None if g is None else self._see(g)
        for block in self._blocks():
            d = self._shifted(x, block, shift)
            if squares is not None:
                self._add(squares, block, d, d)
            if values is not None:
                self._add(values, block, d)
            if g is not None:
                u = self._space.load(g[block], "g")
                self._add(products, block, u, d)
                self._add(sums, block, u)
        return [self._total(a) for a in (squares, values, products, sums) if a is not None]

    def affine(
        self, x: NDArray, y: NDArray, near: NDArray, factor: NDArray, offset: NDArray
    ) -> None:
        shift, factor, offset = self._shift(near), self._spread(factor), self._spread(offset)
        x, y = self._see(x), self._see(y)
        for block in self._blocks():
            out = self._space.result(y[block])
            d = self._shifted(x, block, shift, out)
            np.multiply(d, self._part(factor, block), out=out)
            out += self._part(offset, block)
            self._space.store(y[block], out)

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
        shift, factor = self._shift(near), self._spread(factor)
        if slope is not None:
            slope, offset = self._spread(slope[..., None]), self._spread(offset[..., None])
        x, g, dx = self._see(x), self._see(g), self._see(dx)
        for block in self._blocks():
            out = self._space.result(dx[block])
            np.multiply(self._space.load(g[block], "g"), self._part(factor, block), out=out)
            if slope is not None:
                d = self._shifted(x, block, shift)
                own = self._space.of("x", d.shape)
                out -= np.multiply(d, self._part(slope, block), out=own)
                out += self._part(offset, block)
            self._space.store(dx[block], out)

    def _shift(self, near: NDArray) -> Given:
        return self._spread(near[..., None]) if near.any() else None

    def _shifted(self, x: NDArray, block: Any, shift: Given, out: Given = None) -> NDArray:
        d = self._space.load(x[block], "x")
        if shift is None:
            return d
        out = self._space.of("x", d.shape) if out is None else out
        return np.subtract(d, self._part(shift, block), out=out)


class _Rows(_Blocks):
    """Rows of positions, each of which has one value of every statistic and parameter."""

    def __init__(self, shape: Axes, compute: np.dtype) -> None:
        super().__init__(shape, compute)
        self.row = shape[4]
        self._ones = np.ones(self.row, compute)

    def _see(self, a: NDArray) -> NDArray:
        return a.reshape(-1, self.row)

    def _blocks(self) -> list[Any]:
        rows, step = math.prod(self.shape[:4]), max(1, BLOCK // self.row)
        return [slice(i, i + step) for i in range(0, rows, step)]

    def rough_mean(self, x: NDArray) -> NDArray:
        some = self._space.load(x[:, 0, :, :, :ROWS_AT_ONCE], "x")
        found = dots(some, self._ones[: some.shape[-1]]).astype(np.float64)
        return found.mean(2) / some.shape[-1]

    def _empty(self) -> NDArray:
        return np.empty(math.prod(self.shape[:4]))

    def _add(self, sums: NDArray, block: Any, u: NDArray, v: Given = None) -> None:
        sums[block] = dots(u, self._ones if v is None else v)

    def _total(self, sums: NDArray) -> NDArray:
        return sums.reshape(self.shape[:4]).sum(1)

    def _spread(self, p: NDArray) -> NDArray:
        spread = np.empty(self.shape[:4], self.compute)
        spread[...] = p[:, None]
        return spread.reshape(-1, 1)

    def _part(self, p: NDArray, block: Any) -> NDArray:
        return p[block]


class _Columns(_Blocks):
    """Rows of channels, whose statistics and parameters lie along a row.

    Several of them are seen as one, since broadcasting along short rows is slow.
    """

    def __init__(self, shape: Axes, compute: np.dtype) -> None:
        super().__init__(shape, compute)
        _, over, channels, within, _ = shape
        self.row, self._times = channels * within, 1
        while self.row < 512 and over % (2 * self._times) == 0:
            self._times, self.row = 2 * self._times, 2 * self.row
        self._rows = over // self._times
        self._ones = np.ones(min(ROWS_AT_ONCE, self._rows), compute)

    def _see(self, a: NDArray) -> NDArray:
        return a.reshape(self.shape[0], self._rows, self.row)

    def _blocks(self) -> list[Any]:
        apart, rows = self.shape[0], self._rows
        step = max(1, min(ROWS_AT_ONCE, BLOCK // self.row))
        some = max(1, step // rows)
        return [
            (slice(a, a + some), slice(r, r + step))
            for a in range(0, apart, some)
            for r in range(0, rows, step)
        ]

    def rough_mean(self, x: NDArray) -> NDArray:
        some = x[:, :16, :, :, 0].astype(self.compute, copy=False)
        return some.mean((1, 3)).astype(np.float64)

    def _empty(self) -> NDArray:
        return np.zeros((self.shape[0], self.row))

    def _add(self, sums: NDArray, block: Any, u: NDArray, v: Given = None) -> None:
        if v is not None:
            u = np.multiply(u, v, out=self._space.of("products", u.shape))
        sums[block[0]] += (self._ones[: u.shape[1]] @ u).astype(np.float64)

    def _total(self, sums: NDArray) -> NDArray:
        return sums.reshape(-1, self._times, *self.shape[2:4]).sum(1)

    def _spread(self, p: NDArray) -> NDArray:
        spread = np.empty((len(p), self._times, *self.shape[2:4]), self.compute)
        spread[...] = p[:, None]
        return spread.reshape(len(p), 1, self.row)

    def _part(self, p: NDArray, block: Any) -> NDArray:
        return p[block[0]]
