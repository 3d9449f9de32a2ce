"""BatchNorm for Flax NNX."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes, initializers
from flax.typing import Dtype, Initializer, PromoteDtypeFn
from jax import Array

import normkit as nk
from normkit import _checks
from normkit._batch_norm import apply_batch_norm
from normkit.flax import _arguments
from normkit.jax._backend import BACKEND

from ._dtypes import promoted
from ._variables import parameter, remember, state_of, store, trains

_ZEROS, _ONES = initializers.zeros_init(), initializers.ones_init()


class BatchNorm(nnx.BatchNorm):
    """``flax.nnx.BatchNorm``, with its arguments, variables and train/eval rules, and a mask.

    Unlike the native layer's, its results are right to the last digits whatever the mean of the
    input is, statistics are taken before anything is rounded to ``dtype``, an empty batch or a
    mask without any valid value changes no running statistic, and NaN under the mask reaches no
    gradient.

    Args:
        num_features, use_running_average, axis, momentum, epsilon, dtype, param_dtype, use_bias,
            use_scale, bias_init, scale_init, axis_name, axis_index_groups, promote_dtype, rngs,
            bias_metadata, scale_metadata: as in ``flax.nnx.BatchNorm``. ``momentum=None`` is the
            cumulative average; then there is a third ``nnx.BatchStat``, ``count``. With an
            ``axis_name``, and on complex numbers, Flax' own computation is used.
        use_fast_variance: accepted, and of no effect: there is one algorithm, and it is exact.
        correction: which estimate ``var`` uses: 0 the population variance, 1 the unbiased one.
        track_running_stats: if False there is no ``mean`` and ``var``, and the statistics are
            those of the batch in inference too.
        portable: follow ``nk.BatchNorm`` where Flax differs. Refused is input that is not floating
            point, of a single dimension, or in training with a single value per channel (of which
            Flax makes the bias); a mask is read by its rule alone; and the running statistics are
            as wide as the parameters, if those are wider than float32.

    Shape: ``(N, ..., C)``, or C at ``axis``; the output is alike.

    >>> bn = BatchNorm(3, correction=1, rngs=nnx.Rngs(0))
    >>> bn(jnp.ones((8, 5, 3)), mask=jnp.arange(5) < jnp.full((8, 1), 4)).shape
    (8, 5, 3)
    """

    _ADDED: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"correction": 0, "track_running_stats": True}
    )

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: int = -1,
        momentum: float | None = 0.99,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = _ZEROS,
        scale_init: Initializer = _ONES,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        correction: int = 0,
        track_running_stats: bool = True,
        portable: bool = False,
    ) -> None:
        _checks.estimator(correction)
        super().__init__(
            num_features,
            use_running_average=use_running_average,
            axis=axis,
            momentum=momentum,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=bias_init,
            scale_init=scale_init,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            rngs=rngs,
            bias_metadata=bias_metadata,
            scale_metadata=scale_metadata,
        )
        self.correction = correction
        self.track_running_stats = track_running_stats
        self.portable = portable
        if track_running_stats:
            remember(self)
        else:
            self.mean = self.var = nnx.data(None)

    def __call__(
        self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None
    ) -> Array:
        """Normalize ``x``, and in training update the running statistics.

        Args:
            x: array with ``num_features`` values along ``axis``.
            use_running_average: use the running statistics instead of those of ``x``; if None,
                the layer's own setting counts.
            mask: which values count. Booleans that broadcast to ``x``, as in Flax; or what
                ``nk.BatchNorm.apply`` takes: also weights, and without the channel axis. The rest
                takes no part and comes out as the bias, with either kind of statistics.

        Returns:
            An array of the shape of ``x``, in ``dtype`` or what ``x``, the running statistics and
            the parameters promote to.

        Raises:
            ValueError: a shape does not fit, or a mask can be read in two ways.
        """
        x = jnp.asarray(x)
        if self.portable:
            _checks.floating(x, BACKEND)
            _checks.rank(x, 2, "BatchNorm")
        axes = _arguments.positions(self.axis, x.ndim)
        if _arguments.is_native(self, x) or len(axes) != 1:
            _arguments.no_additions(self)
            return super().__call__(x, use_running_average, mask=mask)
        _checks.lengths(x, axes, (self.num_features,), type(self).__name__)
        state = state_of(self)
        training = trains(self, use_running_average)
        if self.portable and (training or not state):
            _arguments.values_per_channel(x, axes)
        scale, bias = (parameter(p, (self.num_features,)) for p in (self.scale, self.bias))
        (x, mean, var, scale, bias), dtype = promoted(
            self, x, state.get("mean"), state.get("var"), scale, bias
        )
        if state and not training:
            state = {"mean": mean, "var": var}
        y, new = apply_batch_norm(
            x,
            scale,
            bias,
            state,
            axis=axes[0],
            eps=self.epsilon,
            decay=self.momentum,
            correction=self.correction,
            training=training,
            weights=_arguments.weights_of(x, mask, axes[0], self.portable),
            dtype=dtype,
            backend=BACKEND,
        )
        if training:
            store(new, self)
        return y


def build(definition: nk.BatchNorm, *, rngs: nnx.Rngs | None = None, **options: Any) -> BatchNorm:
    """The layer that ``definition`` describes."""
    return BatchNorm(
        definition.num_features,
        axis=definition.axis,
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


def describe(layer: nnx.BatchNorm) -> nk.BatchNorm:
    """The definition of ``layer``, a native one or normkit's."""
    return nk.BatchNorm(
        layer.num_features,
        axis=_arguments.one_axis(layer.axis, "BatchNorm"),
        eps=layer.epsilon,
        decay=layer.momentum,
        correction=getattr(layer, "correction", 0),
        scale=layer.scale is not None,
        bias=layer.bias is not None,
        track_running_stats=layer.mean is not None,
    )
