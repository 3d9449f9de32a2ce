"""GroupNorm for Flax NNX."""

from __future__ import annotations

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
from normkit._group_norm import apply_group_norm, group_size
from normkit.flax import _arguments
from normkit.jax._backend import BACKEND

from ._dtypes import promoted
from ._variables import parameter

_ZEROS, _ONES = initializers.zeros_init(), initializers.ones_init()


class GroupNorm(nnx.GroupNorm):
    """``flax.nnx.GroupNorm``, with its arguments and variables, and a better mask.

    Unlike the native layer's, its results are right to the last digits whatever the mean of the
    input is, statistics are taken before anything is rounded to ``dtype``, NaN under the mask
    reaches no gradient, and ``reduction_axes`` mean what they say: the native layer confuses the
    statistics of different positions wherever it keeps more than one axis besides the channels'.

    Args:
        num_features, num_groups, group_size, epsilon, dtype, param_dtype, use_bias, use_scale,
            bias_init, scale_init, reduction_axes, axis_name, axis_index_groups, promote_dtype,
            rngs, bias_metadata, scale_metadata: as in ``flax.nnx.GroupNorm``. With an
            ``axis_name``, and on complex numbers, Flax' own computation is used.
        use_fast_variance: accepted, and of no effect: there is one algorithm, and it is exact.
        axis: the channel axis.
        portable: follow ``nk.GroupNorm`` where Flax differs. Refused is input that is not floating
            point, of a single dimension, or with a single value per group (of which Flax makes the
            bias); and a mask is read by its rule alone.

    Shape: ``(N, ..., C)``, or C at ``axis``; the output is alike. With ``reduction_axes`` the
    first axis need not be that of the samples.

    >>> GroupNorm(6, num_groups=2, rngs=nnx.Rngs(0))(jnp.ones((3, 5, 6))).shape
    (3, 5, 6)
    """

    _ADDED: ClassVar[Mapping[str, Any]] = MappingProxyType({"axis": -1})

    def __init__(
        self,
        num_features: int,
        num_groups: int | None = 32,
        group_size: int | None = None,
        *,
        epsilon: float = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = _ZEROS,
        scale_init: Initializer = _ONES,
        reduction_axes: Axes | None = None,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        axis: int = -1,
        portable: bool = False,
    ) -> None:
        _checks.axis_number(axis)
        super().__init__(
            num_features,
            num_groups,
            group_size,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=bias_init,
            scale_init=scale_init,
            reduction_axes=reduction_axes,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            rngs=rngs,
            bias_metadata=bias_metadata,
            scale_metadata=scale_metadata,
        )
        self.axis = axis
        self.portable = portable

    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        """Normalize ``x``.

        Args:
            x: array with ``num_features`` values along ``axis``.
            mask: which values count. Booleans that broadcast to ``x``, as in Flax; or what
                ``nk.GroupNorm.apply`` takes: also weights, and without the channel axis. The rest
                takes no part and comes out as the bias.

        Returns:
            An array of the shape of ``x``, in ``dtype`` or what ``x`` and the parameters promote
            to.

        Raises:
            ValueError: a shape does not fit, a mask can be read in two ways, or
                ``reduction_axes`` lack the channel axis.
        """
        x = jnp.asarray(x)
        if self.portable:
            _checks.floating(x, BACKEND)
            _checks.rank(x, 2, "GroupNorm")
        axis, axes = _arguments.grouped(x, self)
        features = self.num_groups * self.group_size
        _checks.lengths(x, (axis,), (features,), type(self).__name__)
        if _arguments.is_native(self, x):
            _arguments.no_additions(self)
            if x.ndim - len(axes) != 1:
                msg = (
                    f"across replicas (axis_name) and on complex numbers Flax computes, whose "
                    f"GroupNorm for NNX is wrong unless it keeps a single axis besides the "
                    f"channels', but reduction_axes={self.reduction_axes!r} of {x.ndim} dimensions "
                    f"keep {x.ndim - len(axes)}; use flax.linen.GroupNorm there."
                )
                raise ValueError(msg)
            return super().__call__(x, mask=mask)
        if self.portable:
            _checks.values_per_group(group_size(x, self.num_groups, BACKEND), "GroupNorm")
        scale, bias = (parameter(p, (features,)) for p in (self.scale, self.bias))
        weights = _arguments.weights_of(x, mask, axis, self.portable)
        (x, scale, bias), dtype = promoted(self, x, scale, bias)
        return apply_group_norm(
            x,
            scale,
            bias,
            groups=self.num_groups,
            axis=axis,
            axes=axes,
            eps=self.epsilon,
            weights=weights,
            dtype=dtype,
            backend=BACKEND,
        )


def build(definition: nk.GroupNorm, *, rngs: nnx.Rngs | None = None, **options: Any) -> GroupNorm:
    """The layer that ``definition`` describes."""
    return GroupNorm(
        definition.num_channels,
        definition.num_groups,
        axis=definition.axis,
        epsilon=definition.eps,
        use_bias=definition.bias,
        use_scale=definition.scale,
        portable=True,
        rngs=nnx.Rngs(0) if rngs is None else rngs,
        **options,
    )


def describe(layer: nnx.GroupNorm) -> nk.GroupNorm:
    """The definition of ``layer``, a native one or normkit's."""
    _arguments.samples_alone(layer)
    return nk.GroupNorm(
        layer.num_groups,
        layer.num_groups * layer.group_size,
        axis=getattr(layer, "axis", -1),
        eps=layer.epsilon,
        scale=layer.scale is not None,
        bias=layer.bias is not None,
    )
