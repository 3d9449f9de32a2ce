"""The statistics of a view, and its values standardized by them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from normkit._backend import Backend
from normkit._statistics import LARGE, two_sum

from ._sums import average, compiled
from ._views import Tensor, View

# Up to here, |mean| / sqrt(variance + eps) costs no digit that the result would have.
_NEAR = 4.0
# What the operation for columns takes.
_FUSED = (tf.float16, tf.bfloat16, tf.float32)


class Found(NamedTuple):
    """Values and their statistics, one for each part.

    Attributes:
        x: the values, as a view; no derivative passes through anything here.
        rough: the mean, up to what rounding left of it; None if it is not subtracted.
        rest: what rounding left.
        usual: whether no mean is large beside the spread, and no square too large.
        variance: the mean of the squares.
        rstd: 1 / sqrt(variance + eps).
    """

    x: Tensor
    rough: Tensor | None
    rest: Tensor
    usual: Tensor
    variance: Tensor
    rstd: Tensor


def moments(x: Tensor, v: View, eps: float, subtract: bool, backend: Backend) -> Found:
    """The statistics of ``x``, less its mean if that is to be subtracted.

    They are taken around the mean as it is rounded. Where that is large beside the spread, or where
    squares overflow, they are taken once more: around what is left of the mean there, and in a unit
    in which squares are finite.
    """
    dtype = backend.statistics_dtype(x.dtype)
    values = tf.cast(x, dtype)
    rough, rest = None, None
    if subtract:
        mean = average(values, v)
        rough = backend.constant(tf.cast(mean, dtype))
        rest = tf.cast(mean - tf.cast(rough, mean.dtype), dtype)
        values = values - rough
    squares = tf.cast(average(tf.square(values), v), dtype)
    large, per_unit_of_large = LARGE[dtype.name]
    near = squares < large
    if rough is not None:
        near &= tf.square(rough) <= _NEAR**2 * (squares + eps)
    usual = tf.reduce_all(near)

    def once() -> tuple[Any, Tensor, Tensor]:
        parts = () if rough is None else (rough, rest)
        return parts, squares, tf.math.rsqrt(squares + eps)

    def again() -> tuple[Any, Tensor, Tensor]:
        one = tf.ones_like(squares)
        per_unit = tf.where(squares < large, one, per_unit_of_large * one)
        values, parts = tf.cast(x, dtype), ()
        if rough is not None:
            values = values - rough
            rest = backend.constant(tf.cast(average(values, v), dtype))
            values = values - rest
            # What is left of the mean is now small: of equal values there is nothing, and nothing
            # that rounding leaves of its product with rstd.
            parts = two_sum(rough, rest)
        variance = tf.cast(average(tf.square(values * per_unit), v), dtype)
        rstd = tf.math.rsqrt(variance + eps * per_unit * per_unit) * per_unit
        # Not divided twice by the unit: a compiler would divide once, by a square that is zero.
        deviation = tf.sqrt(tf.where(per_unit == 1, one, variance)) / per_unit
        return parts, tf.where(per_unit == 1, variance, deviation * deviation), rstd

    parts, variance, rstd = _either(usual, once, again)
    rough, rest = parts or (None, tf.zeros_like(variance))
    return Found(x, rough, rest, usual, variance, rstd)


def affine(
    found: Found, v: View, scale: Tensor | None, bias: Tensor | None, dtype: tf.DType
) -> Tensor:
    """Standardized, scaled and shifted; ``scale`` and ``bias`` have three axes."""
    if all(p.shape[v.axis] == 1 for p in (scale, bias) if p is not None):
        slope = found.rstd if scale is None else found.rstd * scale
        return standardized(found, v, slope, bias, dtype)
    y = standardized(found, v, found.rstd)
    y = y if scale is None else y * scale
    return tf.cast(_sum(y, bias), dtype)


def standardized(
    found: Found,
    v: View,
    slope: Tensor,
    shift: Tensor | None = None,
    dtype: tf.DType | None = None,
) -> Tensor:
    """``(x - mean) * slope + shift``, of which there is one for each part."""
    x, wide = found.x, slope.dtype
    dtype = wide if dtype is None else dtype
    if fused(x.dtype, v) and x.dtype == dtype:
        return columns(x, found.rough, slope, _less(shift, found, found.rest * slope))

    def large() -> Tensor:
        values = tf.cast(x, wide)
        values = values if found.rough is None else values - found.rough
        return tf.cast(_sum(values * slope, _less(shift, found, found.rest * slope)), dtype)

    def small() -> Tensor:
        # The product is not much larger than the result; this is an array fewer.
        y = tf.cast(x, wide) * slope
        return tf.cast(y + _less(shift, found, (found.rough + found.rest) * slope), dtype)

    if found.rough is None or compiled():
        return large()
    return _either(found.usual, small, large)


def fused(dtype: tf.DType, v: View) -> bool:
    """Whether :func:`columns` takes values of ``dtype``, and pays."""
    return v.axis == 1 and v.is_one_sample and dtype in _FUSED and not compiled()


def columns(x: Tensor, mean: Tensor | None, slope: Tensor, shift: Tensor | None) -> Tensor:
    """``(x - mean) * slope + shift``, one value a column of each, in one pass: BatchNorm's."""
    one, zero = tf.ones_like(slope), tf.zeros_like(slope)
    given = (slope, zero if shift is None else shift, zero if mean is None else mean, one)
    slope, shift, mean, variance = (tf.reshape(p, [-1]) for p in given)
    y, *_ = tf.raw_ops.FusedBatchNormV3(
        x=tf.expand_dims(x, 0),
        scale=slope,
        offset=shift,
        mean=mean,
        variance=variance,
        epsilon=0.0,
        is_training=False,
    )
    return tf.squeeze(y, 0)


def _either(condition: Tensor, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
    if tf.executing_eagerly():
        return yes() if bool(condition) else no()
    # XLA cannot compile what TensorFlow makes of a branch that it wants to differentiate.
    return tf.nest.map_structure(tf.stop_gradient, tf.cond(condition, yes, no))


def _less(a: Tensor | None, found: Found, b: Tensor) -> Tensor | None:
    if found.rough is None:
        return a
    return -b if a is None else a - b


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return a if b is None else b
    return a + b
