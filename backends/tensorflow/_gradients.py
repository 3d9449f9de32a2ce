"""The derivative of standardization: once, in few passes, and any number of times."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from normkit._backend import Backend
from normkit._engine import derivative
from normkit._statistics import averaging, centre, spread

from ._moments import Found, standardized
from ._sums import compiled, over_rows, share, sums
from ._views import Axes, Tensor, View

Given = tuple[Tensor, ...]


class Standardization(NamedTuple):
    """Its derivatives of the second order, by operations that can be differentiated themselves.

    They are rarely asked for, so the engine takes the statistics. TensorFlow's forward mode, which
    is made of them, does not see the tapes that a rule opens, so there are none.
    """

    axes: Axes
    eps: float
    subtract: bool
    backend: Backend

    def second(self, g: Tensor, x: Tensor, scale: Tensor | None, gs: Given) -> Given:
        """Gradients of g, x and the scale, if ``gs`` are those of what g gives x and parameters.

        With J u = rstd * (u - mean(u) - y * mean(u * y)) that is J (g * scale) for x, the sum of
        g * y for the scale, and that of g for the bias.
        """
        dtype = self.backend.statistics_dtype(x.dtype)
        given = gs[1:]
        g, x, of_x = (tf.cast(a, dtype) for a in (g, x, gs[0]))
        given = tuple(tf.cast(a, dtype) for a in given)
        u = g if scale is None else g * tf.cast(scale, dtype)
        y, rstd = self._standardized(x)
        _, mean = averaging(x, self.axes, None, self.backend)

        def jacobian(u: Tensor) -> Tensor:
            return derivative(u, y, rstd, mean, centered=self.subtract)

        of_u = jacobian(of_x)
        along, across = mean(of_x * y), mean(u * y)
        both = mean(of_x * u) - along * across
        if self.subtract:
            both = both - mean(of_x) * mean(u)
        dx = -rstd * (rstd * y * both + across * of_u + along * jacobian(u))
        dg = of_u
        found = []
        if scale is not None:
            dg = dg * tf.cast(scale, dtype) + given[0] * y
            dx = dx + jacobian(given[0] * g)
            found = [_summed(g * of_u, scale)]
            given = given[1:]
        dg = dg + given[0] if given else dg
        return (dg, dx, *found)

    def _standardized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.subtract:
            found, _ = centre(x, self.axes, None, self.backend)
        else:
            _, mean = averaging(x, self.axes, None, self.backend)
            found = spread(x, mean, self.backend)
        rstd = found.rstd(self.eps, self.backend)
        return found.values * rstd, rstd * found.per_unit


def _summed(a: Tensor, parameter: Tensor) -> Tensor:
    """The sum of ``a`` over the axes along which a parameter is one value."""
    axes = [axis for axis, n in enumerate(parameter.shape) if n == 1]
    return tf.reduce_sum(a, axes, keepdims=True)


def with_gradient(
    result: Callable[[], Tensor],
    gradient: Callable[[Tensor], Given],
    second: Callable[[Tensor, Given, Given], Given],
    *inputs: Tensor,
) -> Tensor:
    """``result()``, of which ``gradient`` is the gradient with respect to the inputs.

    Neither is differentiated itself: ``second`` is the gradient of the gradient.
    """

    @tf.custom_gradient
    def of_inputs(*inputs: Tensor) -> tuple[Tensor, Callable[..., Given]]:
        @tf.custom_gradient
        def back(g: Tensor, *inputs: Tensor) -> tuple[Given, Callable[..., Given]]:
            return gradient(tf.stop_gradient(g)), lambda *gs: second(g, inputs, gs)

        def gradient_of_inputs(g: Tensor) -> Given:
            # Of the graph that the gradient is computed in: from there the gradient of the gradient
            # can reach them.
            return back(g, *map(tf.identity, inputs))

        return result(), gradient_of_inputs

    return of_inputs(*inputs)


def gradients(
    g: Tensor, found: Found, v: View, scale: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Those of x, scale and bias, as views, out of that of the result.

    With ``u = g * scale`` that of x is ``rstd * (u - mean(u) - y * mean(u * y))``.
    """
    normal = standardized(found, v, found.rstd)
    product = g * normal
    if scale is not None and scale.shape[v.axis] != 1:
        dx = _of_x_by_rows(g, product, normal, found, v, scale)
        of_scale, of_bias = over_rows(product, v), None
    else:
        of_scale, of_bias = sums(product, v), sums(g, v)
        slope = found.rstd if scale is None else found.rstd * scale
        wide = tf.cast(slope, of_scale.dtype)
        # The means of g * scale and of that times y, times rstd.
        across, along = (tf.cast(share(a * wide, v), g.dtype) for a in (of_bias, of_scale))
        dx = g * slope - normal * along
        dx = dx if found.rough is None else dx - across
        of_scale = tf.reduce_sum(of_scale, 0, keepdims=True)
    if bias is None:
        return dx, of_scale, None
    if bias.shape[v.axis] != 1:
        of_bias = over_rows(g, v)
    else:
        of_bias = tf.reduce_sum(sums(g, v) if of_bias is None else of_bias, 0, keepdims=True)
    return dx, of_scale, of_bias


def _of_x_by_rows(
    g: Tensor, product: Tensor, normal: Tensor, found: Found, v: View, scale: Tensor
) -> Tensor:
    """Where the scale lies along the rows that are standardized (LayerNorm)."""
    rest = normal * tf.cast(share(_weighted(product, scale), v), g.dtype)
    if found.rough is not None:
        rest = rest + tf.cast(share(_weighted(g, scale), v), g.dtype)
    return (g * scale - rest) * found.rstd


def _weighted(x: Tensor, weights: Tensor) -> Tensor:
    """The sum over each row of ``x * weights``, which lie along the columns."""
    if compiled():
        return tf.reduce_sum(x * weights, 2, keepdims=True)
    return tf.matmul(x, tf.reshape(weights, (1, -1, 1)))
