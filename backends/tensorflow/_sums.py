"""Sums and averages over an axis of three.

Values are added up in blocks of a few, and these in float64: that keeps their digits, and costs
next to nothing. All results here are float64.
"""

from __future__ import annotations

from math import prod
from typing import Any

import tensorflow as tf

from ._views import Tensor, View

try:
    from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext as _in_xla
except ImportError:  # not public: without it compiled functions are right as well, but slower

    def _in_xla(graph: Any) -> bool:
        return False


# How many rows are added up one after the other.
_BLOCK = 64


def compiled() -> bool:
    """Whether a function is being traced for XLA."""
    return not tf.executing_eagerly() and _in_xla(tf.compat.v1.get_default_graph())


def sums(x: Tensor, v: View) -> Tensor:
    """The sum over each part."""
    if v.axis == 2:
        return _wide(tf.reduce_sum(x, 2, keepdims=True))  # in a tree
    samples, rows, columns = v.shape
    known = isinstance(rows, int)
    if known and rows <= _BLOCK:
        return _rows(x)
    block = _divisor(rows if known else v.inner)
    rest: Any = 0.0
    if block * block < _BLOCK:
        # Blocks, and what is left of each sample.
        block = _BLOCK
        whole = rows // block * block
        x, rest = x[:, :whole], _rows(x[:, whole:])
    count = rows // block
    blocks = _rows(tf.reshape(x, (samples * count, block, columns)))
    blocks = tf.reshape(blocks, (samples, count, columns))
    return tf.reduce_sum(blocks, 1, keepdims=True) + rest


def over_rows(x: Tensor, v: View) -> Tensor:
    """The sum over all but the columns."""
    rows = v.shape[0] * v.shape[1]
    v = v._replace(shape=(1, rows, v.shape[2]), axis=1, inner=1)
    return sums(tf.reshape(x, v.shape), v)


def average(x: Tensor, v: View) -> Tensor:
    """The mean over each group, one for each part; of nothing it is zero."""
    return share(sums(x, v), v)


def share(totals: Tensor, v: View) -> Tensor:
    """The mean over each group, out of the sums over parts."""
    totals = v.pool(_wide(totals))
    if all(isinstance(n, int) for n in v.values):
        return totals / float(max(prod(v.values), 1))
    count = tf.ones((), totals.dtype)
    for n in v.values:  # as floating-point numbers: their product may be beyond the integers
        count *= tf.cast(n, totals.dtype)
    return totals / tf.maximum(count, 1)


def _rows(x: Tensor) -> Tensor:
    if compiled():
        return _wide(tf.reduce_sum(x, 1, keepdims=True))
    # A product with ones runs several times as fast as TensorFlow's own sum over rows.
    rows = tf.shape(x)[1] if x.shape[1] is None else x.shape[1]
    return _wide(tf.matmul(tf.ones((1, 1, rows), x.dtype), x))


def _wide(x: Tensor) -> Tensor:
    return tf.cast(x, tf.float64)


def _divisor(n: int) -> int:
    """The largest divisor of ``n`` that is not too large for a block."""
    return next((d for d in range(min(n, _BLOCK), 0, -1) if n % d == 0), 1)
