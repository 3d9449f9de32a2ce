"""Standardization in few passes over the data: eagerly, in graphs, and compiled by XLA.

The formulas are those of the engine, on the data as three axes (``_views.py``), with sums as
products with ones where TensorFlow runs these better (``_sums.py``), and with the analytic
derivative, for which nothing is kept but the input and its statistics (``_gradients.py``).

:func:`standardize`, :func:`normalize` and :func:`rescale` are the operations of
``normkit._backend.Backend``. Without this file the engine does all of it.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from tensorflow.python.eager.forwardprop_util import pack_tangents  # not public; see _view

from normkit._backend import Backend
from normkit._explain import declined, taken

from ._gradients import Standardization, gradients, with_gradient
from ._moments import Found, affine, columns, fused, moments
from ._sums import sums
from ._views import Axes, Tensor, View, lengths, view

PATHS = {
    "moments of columns": "statistics over leading or middle axes, channels (in groups) last",
    "moments of rows": "statistics over the last axes, or over the positions of channels",
    "squares of rows": "the root mean square over the last axes",
    "squares of columns": "the root mean square over leading or middle axes",
    "fused columns": "statistics that are given, one for each channel, channels last",
}
_NAMES = {1: "columns", 2: "rows"}
_FLOATS = (tf.float16, tf.bfloat16, tf.float32, tf.float64)
# So few values cost less than the operations on them, of which the engine has fewer.
_FEW = 2**19


@tf.autograph.experimental.do_not_convert
def standardize(
    x: Tensor,
    axes: Axes,
    scale: Tensor | None,
    bias: Tensor | None,
    eps: float,
    remember: bool,
    dtype: tf.DType,
    backend: Backend,
) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    v = _view(x, axes, [p for p in (scale, bias) if p is not None])
    if v is None:
        return None
    taken(f"moments of {_NAMES[v.axis]}")
    found, y = _standardized(x, axes, v, scale, bias, eps, True, dtype, backend)
    if not remember:
        return y, None, None
    shape = [1 if a in axes else n for a, n in enumerate(lengths(x))]
    return y, *(tf.reshape(a, shape) for a in (found.rough + found.rest, found.variance))


@tf.autograph.experimental.do_not_convert
def rescale(
    x: Tensor, axes: Axes, scale: Tensor | None, eps: float, dtype: tf.DType, backend: Backend
) -> Tensor | None:
    v = _view(x, axes, [] if scale is None else [scale])
    if v is None:
        return None
    taken(f"squares of {_NAMES[v.axis]}")
    return _standardized(x, axes, v, scale, None, eps, False, dtype, backend)[1]


@tf.autograph.experimental.do_not_convert
def normalize(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: tf.DType,
    backend: Backend,
) -> Tensor | None:
    inputs = {"mean": mean, "variance": variance, "scale": scale, "bias": bias}
    inputs = {name: p for name, p in inputs.items() if p is not None}
    axes = tuple(a for a, n in enumerate(mean.shape) if n == 1)
    v = _view(x, axes, list(inputs.values()))
    if v is None:
        return None
    if x.dtype != dtype or not fused(dtype, v) or tf.float64 in (mean.dtype, variance.dtype):
        return declined("XLA compiles it, the dtype is float64, or channels are not last")
    taken("fused columns")
    x, *given = (tf.convert_to_tensor(a) for a in (x, *inputs.values()))

    @tf.custom_gradient
    def run(x: Tensor, *given: Tensor) -> tuple[Tensor, Any]:
        constants = (tf.stop_gradient(p) for p in given)
        p = {n: v.flat(a, tf.float32) for n, a in zip(inputs, constants, strict=True)}
        slope = tf.math.rsqrt(p["variance"] + eps)
        slope = slope * p["scale"] if "scale" in p else slope
        values = tf.reshape(tf.stop_gradient(x), v.shape)
        y = columns(values, p["mean"], slope, p.get("bias"))

        def gradient(g: Tensor) -> tuple[Tensor, ...]:
            # By operations that can be differentiated in their turn.
            p = {n: v.flat(a, tf.float32) for n, a in zip(inputs, given, strict=True)}
            g, values = (tf.cast(tf.reshape(a, v.shape), tf.float32) for a in (g, x))
            rstd = tf.math.rsqrt(p["variance"] + eps)
            slope = rstd * p["scale"] if "scale" in p else rstd
            of_bias = tf.cast(sums(g, v), tf.float32)
            of_scale = tf.cast(sums(g * ((values - p["mean"]) * rstd), v), tf.float32)
            found = {
                "mean": -slope * of_bias,
                "variance": -0.5 * rstd * slope * of_scale,
                "scale": of_scale,
                "bias": of_bias,
            }
            return _like((x, *given), [g * slope, *(found[name] for name in inputs)])

        return tf.reshape(y, tf.shape(x)), gradient

    return run(x, *given)


def _view(x: Tensor, axes: Axes, given: list[Tensor]) -> View | None:
    if tf.executing_eagerly() and x.shape.num_elements() < _FEW:
        return declined("it is a small eager tensor")
    if x.dtype not in _FLOATS:
        return declined(f"the dtype is {x.dtype.name}")
    if pack_tangents([x, *given]).indices:
        # In a graph tf.custom_gradient takes no part in it: there the tangent would be zero.
        return declined("it is differentiated in forward mode")
    v = view(x, axes, given)
    return declined("reduced axes or those of parameters lie apart") if v is None else v


def _standardized(
    x: Tensor,
    axes: Axes,
    v: View,
    scale: Tensor | None,
    bias: Tensor | None,
    eps: float,
    subtract: bool,
    dtype: tf.DType,
    backend: Backend,
) -> tuple[Found, Tensor]:
    x, *given = (tf.convert_to_tensor(a) for a in (x, scale, bias) if a is not None)
    values = tf.reshape(tf.stop_gradient(x), v.shape)
    found = moments(values, v, eps, subtract, backend)
    wide = found.rstd.dtype
    w, b = (None if p is None else v.flat(tf.stop_gradient(p), wide) for p in (scale, bias))

    def result() -> Tensor:
        return tf.reshape(affine(found, v, w, b, dtype), tf.shape(x))

    def gradient(g: Tensor) -> tuple[Tensor, ...]:
        g = tf.cast(tf.reshape(g, v.shape), wide)
        dx, of_scale, of_bias = gradients(g, found, v, w, b)
        wanted = [dx] + [of_scale] * (w is not None) + [of_bias] * (b is not None)
        return _like((x, *given), wanted)

    rule = Standardization(axes, eps, subtract, backend)

    def second(g: Tensor, inputs: tuple[Tensor, ...], gs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *given = inputs
        found = rule.second(g, x, None if scale is None else given[0], gs)
        rest = [tf.zeros_like(p) for p in inputs[len(found) - 1 :]]
        return _like((g, *inputs), [*found, *rest])

    return found, with_gradient(result, gradient, second, x, *given)


def _like(inputs: tuple[Tensor, ...], found: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients with the shapes and dtypes of what they are gradients of."""
    return tuple(
        tf.reshape(tf.cast(a, x.dtype), tf.shape(x)) for x, a in zip(inputs, found, strict=True)
    )
