"""LayerNorm for Flax Linen."""

from __future__ import annotations

from dataclasses import field
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

import normkit as nk
from normkit import _checks
from normkit._layer_norm import apply_layer_norm
from normkit.flax import _arguments
from normkit.jax._backend import BACKEND

from ._variables import parameters, shape_of


class LayerNorm(nn.LayerNorm):
    """``flax.linen.LayerNorm``, with its fields and variables, and a better mask.

    Unlike the native layer's, its results are right to the last digits whatever the mean of the
    input is, and NaN under the mask reaches no gradient.

    Args:
        epsilon, dtype, param_dtype, use_bias, use_scale, bias_init, scale_init, reduction_axes,
            feature_axes, axis_name, axis_index_groups: as in ``flax.linen.LayerNorm``. With an
            ``axis_name``, and on complex numbers, Flax' own computation is used.
        use_fast_variance: accepted, and of no effect: there is one algorithm, and it is exact.
        force_float32_reductions: if False, the parameters are cast to ``param_dtype``, as in Flax.
            Statistics are taken in float32 at least all the same.
        shape: the lengths of ``x`` along ``feature_axes``, in ascending order of axes. If given,
            no other ``x`` is accepted.
        portable: follow ``nk.LayerNorm`` where Flax differs. Refused is input that is not floating
            point; and a mask is read by its rule alone.

    Shape: any; the output is alike.

    >>> import jax
    >>> ln, x = LayerNorm(), jnp.ones((2, 3, 4))
    >>> ln.apply(ln.init(jax.random.key(0), x), x).shape
    (2, 3, 4)
    """

    shape: int | tuple[int, ...] | None = field(default=None, kw_only=True)
    portable: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.shape is not None:
            _checks.one_axis_each(
                _arguments.as_shape(self.shape), _arguments.as_tuple(self.feature_axes)
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        """Normalize ``x``.

        Args:
            x: array whose features lie along ``feature_axes``.
            mask: which values count. Booleans that broadcast to ``x``, as in Flax; or what
                ``nk.LayerNorm.apply`` takes: also weights, and without the last of the axes that
                are normalized over. The rest takes no part and comes out as the bias.

        Returns:
            An array of the shape of ``x``, in ``dtype`` or what ``x`` and the parameters promote
            to.

        Raises:
            ValueError: a shape does not fit, or a mask can be read in two ways.
        """
        x = jnp.asarray(x)
        if self.portable:
            _checks.floating(x, BACKEND)
        if _arguments.is_native(self, x):
            return super().__call__(x, mask=mask)
        axes = _arguments.positions(self.reduction_axes, x.ndim)
        features = _arguments.positions(self.feature_axes, x.ndim)
        if self.shape is not None:
            _checks.lengths(x, features, _arguments.as_shape(self.shape), type(self).__name__)
        scale, bias = parameters(self, [x.shape[axis] for axis in features])
        x, dtype = _arguments.promoted(x, scale, bias, dtype=self.dtype)
        return apply_layer_norm(
            x,
            scale,
            bias,
            axes=axes,
            parameter_axes=features,
            eps=self.epsilon,
            weights=_arguments.weights_of(x, mask, axes[-1] if axes else None, self.portable),
            dtype=dtype,
            backend=BACKEND,
        )


def build(definition: nk.LayerNorm, **options: Any) -> LayerNorm:
    """The layer that ``definition`` describes."""
    shape, axes = definition.parameter_shape, _arguments.as_tuple(definition.axes)
    # A single one looks as it does in Flax.
    only = axes[0] if len(axes) == 1 else axes
    return LayerNorm(
        shape=shape[0] if len(shape) == 1 else shape,
        epsilon=definition.eps,
        use_bias=definition.bias,
        use_scale=definition.scale,
        reduction_axes=only,
        feature_axes=only,
        portable=True,
        **options,
    )


def describe(layer: nn.LayerNorm, variables: Any = None) -> nk.LayerNorm:
    """The definition of ``layer``, a native one or normkit's."""
    axes = _arguments.same_axes(layer, "LayerNorm")
    known = getattr(layer, "shape", None)
    return nk.LayerNorm(
        shape_of(layer, variables) if known is None else known,
        axes=axes,
        eps=layer.epsilon,
        scale=layer.use_scale,
        bias=layer.use_bias,
    )
