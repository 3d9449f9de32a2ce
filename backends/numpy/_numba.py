"""The loops over an array, compiled by Numba: over rows of positions, of channels, of features.

Arrays have the five axes of ``_layout.py``, ``x[apart, over, channels, within, positions]``. Values
are added up in float64 around one of them, or around the mean if that one lies far from the others;
results are computed in the dtype of the values. A loop does the share of the work from ``first``
to ``last``, without holding the interpreter's lock, so that threads can do the others.

Products may be fused and sums reordered; what is no number stays none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

if numba.config.DISABLE_JIT:
    msg = "the compiler of Numba is turned off, and without it these loops are slow"
    raise ImportError(msg)

# The squared mean, in units of the variance, beyond which the sums are taken again around it.
_NEAR = 16.0


def _compiled(*fastmath: str) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function, with what is allowed besides what IEEE 754 says."""

    def compiled(function: Callable[..., Any]) -> Any:
        options = {"nogil": True, "error_model": "numpy", "fastmath": {"nsz", *fastmath}}
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # no folder to keep it in: neither beside this file, nor at home
            return numba.njit(**options)(function)

    return compiled


# Sums are vectorized in any order; but a difference stays the difference that is written there.
_in_any_order = _compiled("reassoc", "contract")
_as_written = _compiled("contract")


@_as_written
def _less(value, near):
    return np.float64(value) - near


@_in_any_order
def _sums(x, a, k, near, centered):
    """The averages of d and of d*d over a group, where d is x less what is near its mean."""
    _, over, _, within, positions = x.shape
    count = over * within * positions
    values = squares = 0.0
    for r in range(over):
        for s in range(within):
            row = x[a, r, k, s]
            if centered:
                for i in range(positions):
                    d = _less(row[i], near)
                    values += d
                    squares += d * d
            else:
                for i in range(positions):
                    squares += np.float64(row[i]) * np.float64(row[i])
    return values / count, squares / count


@_as_written
def _moments(x, a, k, centered):
    """What is near the mean of a group, as its values are rounded; the rest of it; the variance."""
    near = np.float64(x[a, 0, k, 0, 0]) if centered else 0.0
    rest, squares = _sums(x, a, k, near, centered)
    if rest * rest > _NEAR * (squares - rest * rest):
        near += rest
        rest, squares = _sums(x, a, k, near, centered)
    variance = squares - rest * rest
    rounded = np.float64(x.dtype.type(near + rest))
    return rounded, (near - rounded) + rest, 0.0 if variance < 0 else variance


@_as_written
def _known(x, mean):
    rounded = np.float64(x.dtype.type(mean))
    return rounded, mean - rounded


@_in_any_order
def _products(x, g, a, k, s, near):
    """The sums of g, and of g*(x - near), at one place within a channel."""
    total = product = 0.0
    for r in range(x.shape[1]):
        row, up = x[a, r, k, s], g[a, r, k, s]
        for i in range(row.size):
            u = np.float64(up[i])
            total += u
            product += u * _less(row[i], near)
    return total, product


@_in_any_order
def _feature_products(row, up, scale, near):
    """The sums of g*scale, and of g*scale*(x - near)."""
    total = product = 0.0
    for i in range(row.size):
        u = np.float64(up[i]) * np.float64(scale[i])
        total += u
        product += u * _less(row[i], near)
    return total, product


@_as_written
def rows_forward(x, y, scale, bias, eps, own, centered, mean, variance, first, last):
    """Standardize groups, with their own statistics or those that are given."""
    _, over, channels, within, positions = x.shape
    kind = y.dtype.type
    for group in range(first, last):
        a, k = group // channels, group % channels
        if own:
            center, rest, variance[a, k] = _moments(x, a, k, centered)
            mean[a, k] = center + rest
        else:
            center, rest = _known(x, mean[a, k])
        near = kind(center)
        rstd = 1 / np.sqrt(variance[a, k] + eps)
        for s in range(within):
            factor = kind(rstd * scale[k, s])
            offset = kind(bias[k, s] - rest * rstd * scale[k, s])
            for r in range(over):
                row, out = x[a, r, k, s], y[a, r, k, s]
                for i in range(positions):
                    out[i] = (row[i] - near) * factor + offset


@_as_written
def rows_backward(x, g, dx, scale, eps, own, centered, mean, variance, dscale, dbias, first, last):
    """Their gradients; those of scale and bias are added up."""
    _, over, channels, within, positions = x.shape
    count = over * within * positions
    kind = dx.dtype.type
    for group in range(first, last):
        a, k = group // channels, group % channels
        if own:
            center, rest, variance[a, k] = _moments(x, a, k, centered)
        else:
            center, rest = _known(x, mean[a, k])
        rstd = 1 / np.sqrt(variance[a, k] + eps)
        slope = offset = 0.0
        for s in range(within):
            total, product = _products(x, g, a, k, s, center)
            product -= rest * total
            dbias[k, s] += total
            dscale[k, s] += product * rstd
            offset += total * scale[k, s]
            slope += product * scale[k, s]
        near = kind(center)
        slope *= rstd * rstd * rstd / count
        offset = slope * rest - (rstd * offset / count if centered else 0.0)
        if not own:
            slope = offset = 0.0
        for s in range(within):
            factor, steep, level = kind(rstd * scale[k, s]), kind(slope), kind(offset)
            for r in range(over):
                row, up, out = x[a, r, k, s], g[a, r, k, s], dx[a, r, k, s]
                if own:
                    for i in range(positions):
                        out[i] = up[i] * factor - (row[i] - near) * steep + level
                else:
                    for i in range(positions):
                        out[i] = up[i] * factor


@_as_written
def features_forward(x, y, scale, bias, eps, centered, mean, variance, first, last):
    """Standardize rows, each feature of which has its own scale and bias."""
    kind = y.dtype.type
    for group in range(first, last):
        a, k = group // x.shape[2], group % x.shape[2]
        center, left, variance[a, k] = _moments(x, a, k, centered)
        mean[a, k] = center + left
        near, rest = kind(center), kind(left)
        rstd = kind(1 / np.sqrt(variance[a, k] + eps))
        row, out = x[a, 0, k, 0], y[a, 0, k, 0]
        for i in range(row.size):
            out[i] = ((row[i] - near) - rest) * rstd * scale[k, i] + bias[k, i]


@_as_written
def features_backward(x, g, dx, scale, eps, centered, mean, variance, dscale, dbias, first, last):
    """Their gradients; those of scale and bias are added up."""
    kind = dx.dtype.type
    for group in range(first, last):
        a, k = group // x.shape[2], group % x.shape[2]
        center, left, variance[a, k] = _moments(x, a, k, centered)
        near, rest = kind(center), kind(left)
        rstd = 1 / np.sqrt(variance[a, k] + eps)
        row, up, out = x[a, 0, k, 0], g[a, 0, k, 0], dx[a, 0, k, 0]
        offset, slope = _feature_products(row, up, scale[k], center)
        slope -= left * offset
        slope *= rstd * rstd * rstd / row.size
        offset *= rstd / row.size if centered else 0.0
        factor, steep, level = kind(rstd), kind(slope), kind(offset)
        for i in range(row.size):
            d = (row[i] - near) - rest
            out[i] = up[i] * scale[k, i] * factor - d * steep - level
            dscale[k, i] += np.float64(up[i] * d * factor)
            dbias[k, i] += np.float64(up[i])


@_in_any_order
def columns_sums(x, near, values, squares, samples, rows):
    """Add up d and d*d down the columns, where d is x less what is near its mean."""
    for a in range(samples[0], samples[1]):
        for r in range(rows[0], rows[1]):
            row = x[a, r]
            for i in range(row.size):
                d = _less(row[i], near[a, i])
                values[a, i] += d
                squares[a, i] += d * d


@_in_any_order
def columns_gradient_sums(x, g, near, sums, products, samples, rows):
    """Add up g and g*d."""
    for a in range(samples[0], samples[1]):
        for r in range(rows[0], rows[1]):
            row, up = x[a, r], g[a, r]
            for i in range(row.size):
                u = np.float64(up[i])
                sums[a, i] += u
                products[a, i] += u * _less(row[i], near[a, i])


@_as_written
def columns_affine(x, y, near, factor, offset, samples, rows):
    for a in range(samples[0], samples[1]):
        for r in range(rows[0], rows[1]):
            row, out = x[a, r], y[a, r]
            for i in range(row.size):
                out[i] = (row[i] - near[a, i]) * factor[a, i] + offset[a, i]


@_as_written
def columns_gradient(x, g, dx, near, factor, slope, offset, samples, rows):
    for a in range(samples[0], samples[1]):
        for r in range(rows[0], rows[1]):
            row, up, out = x[a, r], g[a, r], dx[a, r]
            for i in range(row.size):
                d = row[i] - near[a, i]
                out[i] = up[i] * factor[a, i] - d * slope[a, i] + offset[a, i]
