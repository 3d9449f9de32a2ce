"""TensorFlow's answers to what the engine asks of an array library."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from normkit._backend import Array, Backend, Count

from . import _namespace as xp

try:
    from . import _kernels
except ImportError:  # the plain engine does as well, slower
    _kernels = None

# TensorFlow adds the values along the first axes one after the other. Up to so many of them in
# float32 that loses no digit of what is summed here; then it does.
_MANY = 2**12


class TensorFlowBackend(Backend):
    library = "tensorflow"

    @property
    def kernels(self) -> Any:
        return _kernels

    def check(self, x: Array) -> None:
        if isinstance(x, tf.RaggedTensor | tf.SparseTensor | tf.IndexedSlices):
            msg = (
                f"normkit works on dense tensors, but got a {type(x).__name__}; convert it first, "
                f"for example with to_tensor(), and give a mask of what is valid."
            )
            raise TypeError(msg)
        if x.shape.rank is None:
            msg = (
                "the rank of a tensor must be known, but its shape is <unknown>; set it first, "
                "for example with tf.ensure_shape."
            )
            raise ValueError(msg)

    def stop_gradient(self, x: Array) -> Array:
        return tf.stop_gradient(x)

    def constant(self, x: Array) -> Array:
        if not tf.executing_eagerly():
            # See Backend.constant: XLA fuses a multiplication into a subtraction, not through this.
            x = tf.where(x > -float("inf"), x, tf.constant(float("nan"), x.dtype))
        return tf.stop_gradient(x)

    def total(self, x: Array, axes: tuple[int, ...]) -> Array:
        size = self.size(x, axes)
        if isinstance(size, int) and size > _MANY:
            return super().total(x, axes)
        return tf.reduce_sum(x, axes, keepdims=True)

    def size(self, x: Array, axes: tuple[int, ...]) -> Count:
        if all(x.shape[axis] is not None for axis in axes):
            return super().size(x, axes)
        # int64, since the number of elements can be beyond int32 where no length is.
        lengths = tf.shape(x, out_type=tf.int64)
        return tf.reduce_prod(tf.gather(lengths, axes))

    def split(self, x: Array, axis: int, groups: int) -> Array:
        lengths = _lengths(x)
        inner = lengths[axis] // groups
        return tf.reshape(x, (*lengths[:axis], groups, inner, *lengths[axis + 1 :]))

    def join(self, x: Array, axis: int) -> Array:
        lengths = _lengths(x)
        length = lengths[axis] * lengths[axis + 1]
        return tf.reshape(x, (*lengths[:axis], length, *lengths[axis + 2 :]))

    def is_visible(self, x: Array) -> bool:
        # While a function is traced nothing can be read, not even the eager tensors it closes over:
        # whatever is computed from them becomes a part of its graph.
        return isinstance(x, tf.Tensor) and tf.executing_eagerly() and "CPU" in x.device


def _lengths(x: Array) -> list[Count]:
    """The shape of ``x``, with a scalar tensor for each length that is not known yet."""
    known, found = x.shape.as_list(), tf.shape(x)
    return [found[axis] if n is None else n for axis, n in enumerate(known)]


BACKEND = TensorFlowBackend(xp)
