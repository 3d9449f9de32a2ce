"""LayerNorm for Flax NNX."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes, initializers
from flax.typing import Axes, Dtype, Initializer, PromoteDtypeFn
from jax import Array

import normkit as nk
from normkit import _checks
from normkit._layer_norm import apply_layer_norm
from normkit.flax import _arguments
from normkit.jax._backend import BACKEND

from ._dtypes import promoted
from ._variables import parameter

_ZEROS, _ONES = initializers.zeros_init(), initializers.ones_init()


class LayerNorm(nnx.LayerNorm):
    """``flax.nnx.LayerNorm``, with its arguments and variables, and a better mask.

    Unlike the native layer's, its results are right to the last digits whatever the mean of the
    input is, statistics are taken before anything is rounded to ``dtype``, and NaN under the mask
    reaches no gradient.

    Args:
        num_features: the length of ``x`` along ``feature_axes``. For several of them it is the
            product of their lengths, as in Flax, which keeps parameters flat; or the lengths, and
            then the parameters have that shape.
        epsilon, dtype, param_dtype, use_bias, use_scale, bias_init, scale_init, reduction_axes,
            feature_axes, axis_name, axis_index_groups, promote_dtype, rngs, bias_metadata,
            scale_metadata: as in ``flax.nnx.LayerNorm``. With an ``axis_name``, and on complex
            numbers, Flax' own computation is used.
        use_fast_variance: accepted, and of no effect: there is one algorithm, and it is exact.
        portable: follow ``nk.LayerNorm`` where Flax differs. Refused is input that is not floating
            point, or has another number of features even if there are no parameters; and a mask
            is read by its rule alone.

    Shape: any with ``num_features`` values along ``feature_axes``; the output is alike.

    >>> LayerNorm(4, rngs=nnx.Rngs(0))(jnp.ones((2, 3, 4))).shape
    (2, 3, 4)
    """

    _ADDED: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        epsilon: float = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = _ZEROS,
        scale_init: Initializer = _ONES,
        reduction_axes: Axes = -1,
        feature_axes: Axes = -1,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        portable: bool = False,
    ) -> None:
        shape = _arguments.as_shape(num_features)
        if len(shape) > 1:
            _checks.one_axis_each(shape, _arguments.as_tuple(feature_axes))
        super().__init__(
            math.prod(shape),
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            # Flax asks for a flat parameter.
            bias_init=lambda key, _, dtype: bias_init(key, shape, dtype),
            scale_init=lambda key, _, dtype: scale_init(key, shape, dtype),
            reduction_axes=reduction_axes,
            feature_axes=feature_axes,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            rngs=rngs,
            bias_metadata=bias_metadata,
            scale_metadata=scale_metadata,
        )
        self.num_features = num_features
        self.portable = portable

    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        """Normalize ``x``.

        Args:
            x: array with ``num_features`` values along ``feature_axes``.
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
        lengths = tuple(x.shape[axis] for axis in features)
        shape = _arguments.as_shape(self.num_features)
        given = (self.scale, self.bias)
        # Without parameters Flax takes any number of features.
        if len(shape) == len(features) and (self.portable or any(p is not None for p in given)):
            _checks.lengths(x, features, shape, type(self).__name__)
        scale, bias = (parameter(p, lengths) for p in given)
        (x, scale, bias), dtype = promoted(self, x, scale, bias)
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


def build(definition: nk.LayerNorm, *, rngs: nnx.Rngs | None = None, **options: Any) -> LayerNorm:
    """The layer that ``definition`` describes."""
    shape, axes = definition.parameter_shape, _arguments.as_tuple(definition.axes)
    # A single one looks as it does in Flax.
    only = axes[0] if len(axes) == 1 else axes
    return LayerNorm(
        shape[0] if len(shape) == 1 else shape,
        epsilon=definition.eps,
        use_bias=definition.bias,
        use_scale=definition.scale,
        reduction_axes=only,
        feature_axes=only,
        portable=True,
        rngs=nnx.Rngs(0) if rngs is None else rngs,
        **options,
    )


def describe(layer: nnx.LayerNorm) -> nk.LayerNorm:
    """The definition of ``layer``, a native one or normkit's."""
    axes, shape = _arguments.same_axes(layer, "LayerNorm"), _arguments.as_shape(layer.num_features)
    _arguments.one_length_each(shape, axes)
    return nk.LayerNorm(
        shape,
        axes=axes,
        eps=layer.epsilon,
        scale=layer.scale is not None,
        bias=layer.bias is not None,
    )
