"""Rows of features, each with its own scale and bias (LayerNorm, RMSNorm), block by block."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ._space import BLOCK, LIMIT, ROWS_AT_ONCE, Given, Space, conditions, dots


def standardize(
    x: NDArray,
    y: NDArray,
    scale: Given,
    bias: Given,
    eps: float,
    centered: bool,
    compute: np.dtype,
) -> tuple[NDArray, NDArray]:
    """See ``_blocks.py``."""
    apart, _, channels, _, length = x.shape
    scale, bias = (None if p is None else p.reshape(-1) for p in (scale, bias))
    x, y = x.reshape(-1, length), y.reshape(-1, length)
    each = np.full(length, 1 / length, compute)
    negligible = np.finfo(compute).eps
    space = Space(compute)
    mean, variance = np.zeros((2, len(x)), compute)
    with conditions(length):
        for block in _blocks(len(x), channels, length):
            values, out = space.load(x[block], "x"), space.result(y[block])
            d, rest, mean[block], variance[block] = _centred(values, each, centered, out)
            rstd = 1 / np.sqrt(variance[block] + eps)
            if centered:
                # Row by row, so that none depends on the others.
                rest = np.where(np.abs(rest) * rstd > negligible, rest, 0)
                if rest.any():
                    d = np.subtract(d, rest[:, None], out=out)
            np.multiply(d, rstd[:, None], out=out)
            whole = out.reshape(-1, channels * length)
            if scale is not None:
                whole *= scale
            if bias is not None:
                whole += bias
            space.store(y[block], out)
    return mean.reshape(apart, channels), variance.reshape(apart, channels)


def backward(
    x: NDArray,
    g: NDArray,
    dx: NDArray,
    scale: Given,
    eps: float,
    centered: bool,
    compute: np.dtype,
) -> tuple[NDArray, NDArray] | None:
    """See ``_blocks.py``."""
    _, _, channels, _, length = x.shape
    x, g, dx = (a.reshape(-1, length) for a in (x, g, dx))
    each, ones = np.full(length, 1 / length, compute), np.ones(ROWS_AT_ONCE, compute)
    weights = np.broadcast_to(each, (channels, length)) if scale is None else scale * each
    space = Space(compute)
    dscale, dbias = np.zeros((2, channels * length))

    def down(u: NDArray) -> NDArray:
        whole = u.reshape(-1, channels * length)
        return _wide(ones[: len(whole)] @ whole)

    def along(u: NDArray) -> NDArray:
        return _wide(dots(u.reshape(-1, channels, length), weights).reshape(-1))

    with conditions(length):
        for block in _blocks(len(x), channels, length):
            values, u = space.load(x[block], "x"), space.load(g[block], "g")
            own, products = (space.of(name, values.shape) for name in ("d", "products"))
            d, rest, _, variance = _centred(values, each, centered, own)
            if not np.all(variance <= LIMIT[compute]):
                return None
            rstd = 1 / np.sqrt(_wide(variance) + eps)
            factor = rstd[:, None].astype(compute)
            dbias += down(u)
            offset, slope = along(u), along(np.multiply(u, d, out=products))
            products *= factor
            dscale += down(products)
            if centered:
                rest = _wide(rest)
                np.multiply(u, (rest * rstd)[:, None].astype(compute), out=products)
                dscale -= down(products)
                slope -= rest * offset
            slope *= rstd**3
            offset = rstd * offset - rest * slope
            out = space.result(dx[block])
            np.multiply(u, factor, out=out)
            if scale is not None:
                whole = out.reshape(-1, channels * length)
                whole *= scale.reshape(-1)
            out -= np.multiply(d, slope[:, None].astype(compute), out=own)
            if centered:
                out -= offset[:, None].astype(compute)
            space.store(dx[block], out)
    return dscale.reshape(channels, length), dbias.reshape(channels, length)


def _blocks(rows: int, channels: int, length: int) -> Iterator[slice]:
    step = max(1, min(ROWS_AT_ONCE, BLOCK // length) // channels) * channels
    return (slice(i, i + step) for i in range(0, rows, step))


def _centred(
    values: NDArray, each: NDArray, centered: bool, out: NDArray
) -> tuple[NDArray, NDArray | float, NDArray | float, NDArray]:
    """The values less what is near their mean, and what is left of it; mean and variance."""
    if not centered:
        return values, 0.0, 0.0, _dots(values, values) * each[0]
    near = _dots(values, each)
    d, rest, variance = _around(near, values, each, out)
    far = rest * rest > variance
    if far.any():  # equal values, or nearly so
        near = np.where(far, near + rest, near)
        d, rest, variance = _around(near, values, each, out)
        variance = np.maximum(variance, 0)
    return d, rest, near + rest, variance


def _around(
    near: NDArray, values: NDArray, each: NDArray, out: NDArray
) -> tuple[NDArray, NDArray, NDArray]:
    d = np.subtract(values, near[:, None], out=out)
    rest = _dots(d, each)
    return d, rest, _dots(d, d) * each[0] - rest * rest


def _dots(u: NDArray, v: NDArray) -> NDArray:
    return dots(u, v).astype(u.dtype, copy=False)


def _wide(a: NDArray) -> NDArray:
    """In float64: before it meets such numbers, since ufuncs convert through their buffer."""
    return a.astype(np.float64, copy=False)
