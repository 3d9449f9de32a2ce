"""RMSNorm for Flax Linen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from types import MappingProxyType
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Initializer
from jax import Array

import normkit as nk
from normkit import _checks
from normkit._rms_norm import apply_rms_norm
from normkit.flax import _arguments
from normkit.jax._backend import BACKEND

from ._variables import parameter, shape_of


class RMSNorm(nn.RMSNorm):
    """``flax.linen.RMSNorm``, with its fields and variables, and a better mask.

    Unlike the native layer's, its squares do not overflow, and NaN under the mask reaches no
    gradient.

    Args:
        epsilon, dtype, param_dtype, use_scale, reduction_axes, feature_axes, axis_name,
            axis_index_groups: as in ``flax.linen.RMSNorm``. With an ``axis_name``, and on complex
            numbers, Flax' own computation is used. ``epsilon`` may be None, for the machine
            epsilon of the dtype that is computed in.
        scale_init: as in Flax; None is ones, or zeros if ``zero_centered``.
        use_fast_variance: accepted, and of no effect: nothing is subtracted.
        force_float32_reductions: if False, the scale is cast to ``param_dtype``, as in Flax. The
            mean of the squares is taken in float32 at least all the same.
        zero_centered: multiply by ``1 + scale``, which starts from zeros (as Gemma does).
        scale_after_cast: multiply by the scale after rounding to the dtype of the result, in that
            dtype (as Llama does); if False, before.
        shape: the lengths of ``x`` along ``feature_axes``, in ascending order of axes. If given,
            no other ``x`` is accepted.
        portable: follow ``nk.RMSNorm`` where Flax differs. Refused is input that is not floating
            point; and a mask is read by its rule alone.

    Shape: any; the output is alike.

    >>> import jax
    >>> rms, x = RMSNorm(), jnp.ones((2, 3, 4))
    >>> rms.apply(rms.init(jax.random.key(0), x), x).shape
    (2, 3, 4)
    """

    _ADDED: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"zero_centered": False, "scale_after_cast": False}
    )

    epsilon: float | None = 1e-6
    scale_init: Initializer | None = None
    zero_centered: bool = field(default=False, kw_only=True)
    scale_after_cast: bool = field(default=False, kw_only=True)
    shape: int | tuple[int, ...] | None = field(default=None, kw_only=True)
    portable: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.scale_init is None:
            first = nn.initializers.zeros if self.zero_centered else nn.initializers.ones
            self.scale_init = first
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
        if self.shape is not None:
            _checks.lengths(x, features, _arguments.as_shape(self.shape), type(self).__name__)
        scale = parameter(self, "scale", [x.shape[axis] for axis in features])
        weights = _arguments.weights_of(x, mask, axes[-1] if axes else None, self.portable)
        x, dtype = _arguments.promoted(x, scale, dtype=self.dtype)
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


def build(definition: nk.RMSNorm, **options: Any) -> RMSNorm:
    """The layer that ``definition`` describes."""
    shape, axes = definition.parameter_shape, _arguments.as_tuple(definition.axes)
    # A single one looks as it does in Flax.
    only = axes[0] if len(axes) == 1 else axes
    return RMSNorm(
        shape=shape[0] if len(shape) == 1 else shape,
        epsilon=definition.eps,
        use_scale=definition.scale,
        reduction_axes=only,
        feature_axes=only,
        zero_centered=definition.zero_centered,
        scale_after_cast=definition.scale_after_cast,
        portable=True,
        **options,
    )


def describe(layer: nn.RMSNorm, variables: Any = None) -> nk.RMSNorm:
    """The definition of ``layer``, a native one or normkit's."""
    axes = _arguments.same_axes(layer, "RMSNorm")
    known = getattr(layer, "shape", None)
    return nk.RMSNorm(
        shape_of(layer, variables) if known is None else known,
        axes=axes,
        eps=layer.epsilon,
        scale=layer.use_scale,
        zero_centered=getattr(layer, "zero_centered", False),
        scale_after_cast=getattr(layer, "scale_after_cast", False),
    )
