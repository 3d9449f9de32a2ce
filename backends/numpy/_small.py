"""Standardization of arrays that fit into the cache as a whole, in few calls of NumPy.

The algorithm is that of ``_blocks.py``; here it is the number of calls that costs time. Arrays may
lie in memory in any way.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ._space import LIMIT, Given

Axes = tuple[int, ...]
Found = tuple[NDArray, NDArray | float, NDArray]

# More values than these are added up in float64: a sum along the first axis goes from one to the
# next.
_MANY = 2**10


def standardize(
    x: NDArray, axes: Axes, scale: Given, bias: Given, eps: float, centered: bool, compute: np.dtype
) -> tuple[NDArray, NDArray | float, NDArray]:
    """The result, in the dtype that is computed in; mean and variance, reduced axes kept."""
    with np.errstate(all="ignore"):
        d, mean, variance = _statistics(x.astype(compute, copy=False), axes, centered)
        factor = 1 / np.sqrt(variance + eps)
        if scale is not None and scale.shape == factor.shape:
            factor, scale = factor * scale, None
        y = d * factor
        if scale is not None:
            y *= scale
        if bias is not None:
            y += bias
    return y, mean, variance


def backward(
    x: NDArray,
    g: NDArray,
    axes: Axes,
    others: Axes,
    scale: Given,
    eps: float,
    centered: bool,
    compute: np.dtype,
) -> tuple[NDArray, NDArray, NDArray] | None:
    """The gradients of x, and of scale and bias, which lie along all but the ``others``."""
    g = g.astype(compute, copy=False)
    with np.errstate(all="ignore"):
        d, _, variance = _statistics(x.astype(compute, copy=False), axes, centered)
        if not (variance <= LIMIT[compute]).all():
            return None
        rstd = 1 / np.sqrt(variance + eps)
        d = d * rstd
        products = g * d
        dscale, dbias = _sum(products, others), _sum(g, others)
        if scale is not None:
            g, products = g * scale, products * scale
        share = 1 / math.prod(x.shape[axis] for axis in axes)
        d *= _sum(products, axes) * share
        dx = g - d
        if centered:
            dx -= _sum(g, axes) * share
        dx *= rstd
    return dx, dscale, dbias


def _statistics(values: NDArray, axes: Axes, centered: bool) -> Found:
    """The values less their mean; their mean and variance."""
    share = 1 / math.prod(values.shape[axis] for axis in axes)
    if not centered:
        return values, 0.0, _sum(values * values, axes) * share
    near = _sum(values, axes) * share
    d, rest, variance = _around(near, values, axes, share)
    far = rest * rest > variance
    if far.any():  # equal values, or nearly so
        near = np.where(far, near + rest, near)
        d, rest, variance = _around(near, values, axes, share)
        variance = np.maximum(variance, 0)
    d -= rest
    return d, near + rest, variance


def _around(near: NDArray, values: NDArray, axes: Axes, share: float) -> Found:
    d = values - near
    rest = _sum(d, axes) * share
    return d, rest, _sum(d * d, axes) * share - rest * rest


def _sum(a: NDArray, axes: Axes) -> NDArray:
    dtype = np.float64 if a.size > _MANY else None
    return np.add.reduce(a, axes, dtype, None, True).astype(a.dtype, copy=False)
