"""RMSNorm for Flax NNX."""

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
from normkit._rms_norm import apply_rms_norm
from normkit.flax import _arguments
from normkit.jax._backend import BACKEND

from ._dtypes import promoted
from ._variables import parameter

_ZEROS, _ONES = initializers.zeros_init(), initializers.ones_init()


class RMSNorm(nnx.RMSNorm):
    """``flax.nnx.RMSNorm``, with its arguments and variables, and a better mask.

    Unlike in the native layer, the squares are taken before anything is rounded to ``dtype``, they
    do not overflow, and NaN under the mask reaches no gradient.

    Args:
        num_features: the length of ``x`` along ``feature_axes``. For several of them it is the
            product of their lengths, as in Flax, which keeps parameters flat; or the lengths, and
            then the scale has that shape.
        epsilon, dtype, param_dtype, use_scale, reduction_axes, feature_axes, axis_name,
            axis_index_groups, promote_dtype, rngs, scale_metadata: as in ``flax.nnx.RMSNorm``. With
            an ``axis_name``, and on complex numbers, Flax' own computation is used. ``epsilon`` may
            be None, for the machine epsilon of the dtype that is computed in.
        scale_init: as in Flax; None is ones, or zeros if ``zero_centered``.
        use_fast_variance: accepted, and of no effect: nothing is subtracted.
        zero_centered: multiply by ``1 + scale``, which starts from zeros (as Gemma does).
        scale_after_cast: multiply by the scale after rounding to the dtype of the result, in that
            dtype (as Llama does); if False, before.
        portable: follow ``nk.RMSNorm`` where Flax differs. Refused is input that is not floating
            point, or has another number of features even if there is no scale; and a mask is read
            by its rule alone.

    Shape: any with ``num_features`` values along ``feature_axes``; the output is alike.

    >>> RMSNorm(4, rngs=nnx.Rngs(0))(jnp.ones((2, 3, 4))).shape
    (2, 3, 4)
    """

    _ADDED: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"zero_centered": False, "scale_after_cast": False}
    )

    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        epsilon: float | None = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_scale: bool = True,
        scale_init: Initializer | None = None,
        reduction_axes: Axes = -1,
        feature_axes: Axes = -1,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        zero_centered: bool = False,
        scale_after_cast: bool = False,
        portable: bool = False,
    ) -> None:
        shape = _arguments.as_shape(num_features)
        if len(shape) > 1:
            _checks.one_axis_each(shape, _arguments.as_tuple(feature_axes))
        first = scale_init or (_ZEROS if zero_centered else _ONES)
        super().__init__(
            math.prod(shape),
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_scale=use_scale,
            # Flax asks for a flat parameter.
            scale_init=lambda key, _, dtype: first(key, shape, dtype),
            reduction_axes=reduction_axes,
            feature_axes=feature_axes,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            rngs=rngs,
            scale_metadata=scale_metadata,
        )
        self.num_features = num_features
        self.zero_centered = zero_centered
        self.scale_after_cast = scale_after_cast
        self.portable = portable

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """Normalize ``x``.

        Args:
            x: array with ``num_features`` values along ``feature_axes``.
            mask: which values count. Booleans that broadcast to ``x``, as in Flax; or what
                ``nk.RMSNorm.apply`` takes: also weights, and without the last of the axes that
                are normalized over. The rest takes no part and comes out as zero.

        Returns:
            An array of the shape of ``x``, in ``dtype`` or what ``x`` and the scale promote to.

        Raises:
            ValueError: a shape does not fit, or a mask can be read in two ways.
        """
        x = jnp.asarray(x)
        if self.portable:
            _checks.floating(x, BACKEND)
        if _arguments.is_native(self, x):
            _arguments.no_additions(self)
            return super().__call__(x, mask=mask)
        axes = _arguments.positions(self.reduction_axes, x.ndim)
        features = _arguments.positions(self.feature_axes, x.ndim)
        lengths = tuple(x.shape[axis] for axis in features)
        shape = _arguments.as_shape(self.num_features)
        # Without a scale Flax takes any number of features.
        if len(shape) == len(features) and (self.portable or self.scale is not None):
            _checks.lengths(x, features, shape, type(self).__name__)
        scale = parameter(self.scale, lengths)
        weights = _arguments.weights_of(x, mask, axes[-1] if axes else None, self.portable)
        (x, scale), dtype = promoted(self, x, scale)
        return apply_rms_norm(
            x,
            scale,
            axes=axes,
            parameter_axes=features,
            eps=self.epsilon,
            zero_centered=self.zero_centered,
            scale_after_cast=self.scale_after_cast,
            weights=weights,
            dtype=dtype,
            backend=BACKEND,
        )


def build(definition: nk.RMSNorm, *, rngs: nnx.Rngs | None = None, **options: Any) -> RMSNorm:
    """The layer that ``definition`` describes."""
    shape, axes = definition.parameter_shape, _arguments.as_tuple(definition.axes)
    # A single one looks as it does in Flax.
    only = axes[0] if len(axes) == 1 else axes
    return RMSNorm(
        shape[0] if len(shape) == 1 else shape,
        epsilon=definition.eps,
        use_scale=definition.scale,
        reduction_axes=only,
        feature_axes=only,
        zero_centered=definition.zero_centered,
        scale_after_cast=definition.scale_after_cast,
        portable=True,
        rngs=nnx.Rngs(0) if rngs is None else rngs,
        **options,
    )


def describe(layer: nnx.RMSNorm) -> nk.RMSNorm:
    """The definition of ``layer``, a native one or normkit's."""
    axes, shape = _arguments.same_axes(layer, "RMSNorm"), _arguments.as_shape(layer.num_features)
    _arguments.one_length_each(shape, axes)
    return nk.RMSNorm(
        shape,
        axes=axes,
        eps=layer.epsilon,
        scale=layer.scale is not None,
        zero_centered=getattr(layer, "zero_centered", False),
        scale_after_cast=getattr(layer, "scale_after_cast", False),
    )
