"""TensorFlow's answers to what the engine asks of an array library."""

from __future__ import annotations

import tensorflow as tf
from normkit._backend import Array, Backend, Count

from . import _namespace as xp

_BITS = {2: tf.int16, 4: tf.int32, 8: tf.int64}  # by size in bytes


class TensorFlowBackend(Backend):
    def constant(self, x: Array) -> Array:
        x = tf.stop_gradient(x)
        if tf.executing_eagerly():
            return x
        # Where XLA computes x more than once, it may fuse its last multiplication into whatever
        # comes next, and so have it in two roundings. It does not fuse across these operations,
        # which drop the last bit (if none were dropped, it would drop the operations).
        bits = tf.bitcast(x, _BITS[x.dtype.size])
        return tf.bitcast(tf.bitwise.bitwise_and(bits, tf.constant(-2, bits.dtype)), x.dtype)

    def size(self, x: Array, axes: tuple[int, ...]) -> Count:
        if all(x.shape[axis] is not None for axis in axes):
            return super().size(x, axes)
        # int64, since the number of elements can be beyond int32 where no length is.
        lengths = tf.shape(x, out_type=tf.int64)
        return tf.reduce_prod(tf.gather(lengths, axes))

    def is_visible(self, x: Array) -> bool:
        # While a function is traced nothing can be read, not even the eager tensors it closes over:
        # whatever is computed from them becomes a part of its graph.
        return isinstance(x, tf.Tensor) and tf.executing_eagerly() and "CPU" in x.device


BACKEND = TensorFlowBackend(xp)
