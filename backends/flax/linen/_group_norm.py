"""GroupNorm for Flax Linen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from types import MappingProxyType
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

import normkit as nk
from normkit import _checks
from normkit._group_norm import apply_group_norm, group_size
from normkit.flax import _arguments
from normkit.jax._backend import BACKEND

from ._variables import parameters, shape_of


class GroupNorm(nn.GroupNorm):
    """``flax.linen.GroupNorm``, with its fields and variables, and a better mask.

    Unlike the native layer's, its results are right to the last digits whatever the mean of the
    input is, and NaN under the mask reaches no gradient.

    Args:
        num_groups, group_size, epsilon, dtype, param_dtype, use_bias, use_scale, bias_init,
            scale_init, reduction_axes, axis_name, axis_index_groups: as in
            ``flax.linen.GroupNorm``. With an ``axis_name``, and on complex numbers, Flax' own
            computation is used.
        use_fast_variance: accepted, and of no effect: there is one algorithm, and it is exact.
        force_float32_reductions: if False, the parameters are cast to ``param_dtype``, as in Flax.
            Statistics are taken in float32 at least all the same.
        axis: the channel axis.
        num_features: the number of channels. If given, no other ``x`` is accepted.
        portable: follow ``nk.GroupNorm`` where Flax differs. Refused is input that is not floating
            point, of a single dimension, or with a single value per group (of which Flax makes the
            bias); and a mask is read by its rule alone.

    Shape: ``(N, ..., C)``, or C at ``axis``; the output is alike. With ``reduction_axes`` the
    first axis need not be that of the samples.

    >>> import jax
    >>> gn, x = GroupNorm(num_groups=2), jnp.ones((3, 5, 6))
    >>> gn.apply(gn.init(jax.random.key(0), x), x).shape
    (3, 5, 6)
    """

    _ADDED: ClassVar[Mapping[str, Any]] = MappingProxyType({"axis": -1})

    axis: int = field(default=-1, kw_only=True)
    num_features: int | None = field(default=None, kw_only=True)
    portable: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        _checks.axis_number(self.axis)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        """Normalize ``x``.

        Args:
            x: array whose channels lie along ``axis``.
            mask: which values count. Booleans that broadcast to ``x``, as in Flax; or what
                ``nk.GroupNorm.apply`` takes: also weights, and without the channel axis. The rest
                takes no part and comes out as the bias.

        Returns:
            An array of the shape of ``x``, in ``dtype`` or what ``x`` and the parameters promote
            to.

        Raises:
            ValueError: a shape does not fit, a mask can be read in two ways, ``reduction_axes``
                lack the channel axis, or not one of ``num_groups`` and ``group_size`` was given.
        """
        x = jnp.asarray(x)
        if self.portable:
            _checks.floating(x, BACKEND)
            _checks.rank(x, 2, "GroupNorm")
        axis, axes = _arguments.grouped(x, self)
        if self.num_features is not None:
            _checks.lengths(x, (axis,), (self.num_features,), type(self).__name__)
        groups = _groups(self, x.shape[axis])
        if _arguments.is_native(self, x):
            _arguments.no_additions(self)
            return super().__call__(x, mask=mask)
        if self.portable and not self.is_initializing():
            _checks.values_per_group(group_size(x, groups, BACKEND), "GroupNorm")
        scale, bias = parameters(self, [x.shape[axis]])
        weights = _arguments.weights_of(x, mask, axis, self.portable)
        x, dtype = _arguments.promoted(x, scale, bias, dtype=self.dtype)
        return apply_group_norm(
            x,
            scale,
            bias,
            groups=groups,
            axis=axis,
            axes=axes,
            eps=self.epsilon,
            weights=weights,
            dtype=dtype,
            backend=BACKEND,
        )


def _groups(layer: nn.GroupNorm, channels: int) -> int:
    """How many groups ``channels`` are divided into."""
    if (layer.num_groups is None) == (layer.group_size is None):
        msg = (
            f"either num_groups or group_size must be given, but they are {layer.num_groups} and "
            f"{layer.group_size}; with a group_size, num_groups=None takes back its default of 32."
        )
        raise ValueError(msg)
    if layer.group_size is None:
        _checks.length(layer.num_groups, "num_groups")
        _checks.divisible(channels, layer.num_groups)
        return int(layer.num_groups)
    _checks.length(layer.group_size, "group_size")
    if channels % layer.group_size:
        msg = (
            f"the number of channels ({channels}) must be a multiple of group_size "
            f"({layer.group_size}), so that the groups are of equal size."
        )
        raise ValueError(msg)
    return channels // layer.group_size


def build(definition: nk.GroupNorm, **options: Any) -> GroupNorm:
    """The layer that ``definition`` describes."""
    return GroupNorm(
        definition.num_groups,
        num_features=definition.num_channels,
        axis=definition.axis,
        epsilon=definition.eps,
        use_bias=definition.bias,
        use_scale=definition.scale,
        portable=True,
        **options,
    )


def describe(layer: nn.GroupNorm, variables: Any = None) -> nk.GroupNorm:
    """The definition of ``layer``, a native one or normkit's."""
    _arguments.samples_alone(layer)
    known = getattr(layer, "num_features", None)
    channels = shape_of(layer, variables)[0] if known is None else known
    return nk.GroupNorm(
        _groups(layer, channels),
        channels,
        axis=getattr(layer, "axis", -1),
        eps=layer.epsilon,
        scale=layer.use_scale,
        bias=layer.use_bias,
    )
