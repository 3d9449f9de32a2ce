"""InstanceNorm for Flax NNX."""

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
from normkit._batch_norm import apply_batch_norm
from normkit.flax import _arguments
from normkit.jax._backend import BACKEND

from ._dtypes import promoted
from ._variables import parameter, remember, state_of, store, trains

_ZEROS, _ONES = initializers.zeros_init(), initializers.ones_init()


class InstanceNorm(nnx.InstanceNorm):
    """``flax.nnx.InstanceNorm``, with its arguments and variables, and a better mask.

    Unlike the native layer's, its results are right to the last digits whatever the mean of the
    input is, statistics are taken before anything is rounded to ``dtype``, and NaN under the mask
    reaches no gradient. It may also remember statistics for inference, as PyTorch's may.

    Args:
        num_features, epsilon, dtype, param_dtype, use_bias, use_scale, bias_init, scale_init,
            feature_axes, axis_name, axis_index_groups, promote_dtype, rngs, bias_metadata,
            scale_metadata: as in ``flax.nnx.InstanceNorm``. With an ``axis_name``, and on complex
            numbers, Flax' own computation is used.
        use_fast_variance: accepted, and of no effect: there is one algorithm, and it is exact.
        track_running_stats: remember the averages of mean and variance over the samples of a
            batch, as ``nnx.BatchStat`` variables ``mean`` and ``var``, and use them for the
            running average. If False, each sample has statistics of its own there too.
        momentum: the share of the running statistics that a step keeps. None is the cumulative
            average; then there is a third ``nnx.BatchStat``, ``count``.
        correction: which estimate ``var`` uses: 0 the population variance, 1 the unbiased one.
        use_running_average: as in ``flax.nnx.BatchNorm``; of no effect without running statistics.
        portable: follow ``nk.InstanceNorm`` where Flax differs. Refused is input that is not
            floating point, of fewer than three dimensions, or with a single value per channel of a
            sample (of which Flax makes the bias); a mask is read by its rule alone; and the running
            statistics are as wide as the parameters, if those are wider than float32.

    Shape: ``(N, ..., C)``, or C at ``feature_axes``; the output is alike.

    >>> norm = InstanceNorm(3, track_running_stats=True, rngs=nnx.Rngs(0))
    >>> norm(jnp.ones((8, 5, 3))).shape, list(nnx.state(norm, nnx.BatchStat))
    ((8, 5, 3), ['mean', 'var'])
    """

    _ADDED: ClassVar[Mapping[str, Any]] = MappingProxyType({"track_running_stats": False})

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = _ZEROS,
        scale_init: Initializer = _ONES,
        feature_axes: Axes = -1,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        track_running_stats: bool = False,
        momentum: float | None = 0.99,
        correction: int = 0,
        use_running_average: bool | None = False,
        portable: bool = False,
    ) -> None:
        _checks.estimator(correction)
        super().__init__(
            num_features,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=bias_init,
            scale_init=scale_init,
            feature_axes=feature_axes,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            rngs=rngs,
            bias_metadata=bias_metadata,
            scale_metadata=scale_metadata,
        )
        self.track_running_stats = track_running_stats
        self.momentum = momentum
        self.correction = correction
        self.use_running_average = use_running_average
        self.portable = portable
        if track_running_stats:
            remember(self)

    def __call__(
        self,
        x: Array,
        *,
        mask: Array | None = None,
        use_running_average: bool | None = None,
    ) -> Array:
        """Normalize ``x``, and in training update the running statistics, if there are any.

        Args:
            x: array whose first axis is that of the samples, with ``num_features`` values along
                ``feature_axes``.
            mask: which values count. Booleans that broadcast to ``x``, as in Flax; or what
                ``nk.InstanceNorm.apply`` takes: also weights, and without the channel axis. The
                rest takes no part and comes out as the bias, with either kind of statistics.
            use_running_average: use the running statistics instead of those of ``x``; if None,
                the layer's own setting counts.

        Returns:
            An array of the shape of ``x``, in ``dtype`` or what ``x`` and the parameters promote
            to.

        Raises:
            ValueError: a shape does not fit, or a mask can be read in two ways.
        """
        x = jnp.asarray(x)
        if self.portable:
            _checks.floating(x, BACKEND)
            _checks.rank(x, 3, "InstanceNorm")
        axes = _arguments.channels(self.feature_axes, x.ndim)
        if _arguments.is_native(self, x):
            _arguments.no_additions(self)
            return super().__call__(x, mask=mask)
        lengths = tuple(x.shape[axis] for axis in axes)
        state = state_of(self)
        # With nothing to hold one value a feature, Flax takes any number of them.
        used = self.portable or state or self.scale is not None or self.bias is not None
        if used and math.prod(lengths) != self.num_features:
            _checks.lengths(x, axes, (self.num_features,), type(self).__name__)
        training = trains(self, use_running_average)
        if self.portable and (training or not state):
            _arguments.values_per_instance(x, axes)
        scale, bias = (parameter(p, lengths) for p in (self.scale, self.bias))
        only = axes[0] if len(axes) == 1 else None
        weights = _arguments.weights_of(x, mask, only, self.portable)
        (x, scale, bias), dtype = promoted(self, x, scale, bias)
        y, new = apply_batch_norm(
            x,
            scale,
            bias,
            {name: a.reshape(lengths) if a.ndim else a for name, a in state.items()},
            axis=axes,
            apart=(0,),
            eps=self.epsilon,
            decay=self.momentum,
            correction=self.correction,
            training=training,
            weights=weights,
            dtype=dtype,
            backend=BACKEND,
        )
        if training:
            store(new, self)
        return y

    def set_view(self, use_running_average: bool | None = None) -> None:
        """What ``nnx.view`` calls, as in ``flax.nnx.BatchNorm``."""
        if use_running_average is not None:
            self.use_running_average = use_running_average


def build(
    definition: nk.InstanceNorm, *, rngs: nnx.Rngs | None = None, **options: Any
) -> InstanceNorm:
    """The layer that ``definition`` describes."""
    return InstanceNorm(
        definition.num_features,
        feature_axes=definition.axis,
        momentum=definition.decay,
        epsilon=definition.eps,
        use_bias=definition.bias,
        use_scale=definition.scale,
        correction=definition.correction,
        track_running_stats=definition.track_running_stats,
        portable=True,
        rngs=nnx.Rngs(0) if rngs is None else rngs,
        **options,
    )


def describe(layer: nnx.InstanceNorm) -> nk.InstanceNorm:
    """The definition of ``layer``, a native one or normkit's."""
    return nk.InstanceNorm(
        layer.num_features,
        axis=_arguments.one_axis(layer.feature_axes, "InstanceNorm"),
        eps=layer.epsilon,
        decay=getattr(layer, "momentum", 0.99),
        correction=getattr(layer, "correction", 0),
        scale=layer.scale is not None,
        bias=layer.bias is not None,
        track_running_stats=getattr(layer, "track_running_stats", False),
    )
