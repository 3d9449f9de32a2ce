"""BatchNorm for Flax Linen."""

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
from normkit._batch_norm import apply_batch_norm
from normkit.flax import _arguments
from normkit.jax._backend import BACKEND

from ._variables import parameters, running, shape_of, store, trains


class BatchNorm(nn.BatchNorm):
    """``flax.linen.BatchNorm``, with its fields, variables and train/eval rules, and a mask.

    Unlike the native layer's, its results are right to the last digits whatever the mean of the
    input is, an empty batch or a mask without any valid value changes no running statistic, and
    NaN under the mask reaches no gradient.

    Args:
        use_running_average, axis, momentum, epsilon, dtype, param_dtype, use_bias, use_scale,
            bias_init, scale_init, axis_name, axis_index_groups: as in ``flax.linen.BatchNorm``.
            ``momentum=None`` is the cumulative average; then ``batch_stats`` has a third entry,
            ``count``. With an ``axis_name``, and on complex numbers, Flax' own computation is used.
        use_fast_variance: accepted, and of no effect: there is one algorithm, and it is exact.
        force_float32_reductions: if False, the running statistics are kept in ``param_dtype``, as
            in Flax. Those of the batch are taken in float32 at least all the same.
        correction: which estimate ``var`` uses: 0 the population variance, 1 the unbiased one.
        track_running_stats: if False there is no ``batch_stats``, and the statistics are those of
            the batch in inference too; ``use_running_average`` need not be given.
        num_features: the number of channels. If given, no other ``x`` is accepted.
        portable: follow ``nk.BatchNorm`` where Flax differs. Refused is input that is not floating
            point, of a single dimension, or in training with a single value per channel (of which
            Flax makes the bias); a mask is read by its rule alone; and the running statistics are
            as wide as the parameters, if those are wider than float32.

    Shape: ``(N, ..., C)``, or C at ``axis``; the output is alike.

    >>> import jax
    >>> bn, x = BatchNorm(use_running_average=False, correction=1), jnp.ones((8, 5, 3))
    >>> variables = bn.init(jax.random.key(0), x)
    >>> y, changed = bn.apply(variables, x, mask=x > 0, mutable=["batch_stats"])
    >>> y.shape, round(float(changed["batch_stats"]["mean"][0]), 4)
    ((8, 5, 3), 0.01)
    """

    _ADDED: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"correction": 0, "track_running_stats": True}
    )

    momentum: float | None = 0.99
    correction: int = field(default=0, kw_only=True)
    track_running_stats: bool = field(default=True, kw_only=True)
    num_features: int | None = field(default=None, kw_only=True)
    portable: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        _checks.estimator(self.correction)
        if self.num_features is not None:
            _arguments.one_axis(self.axis, "BatchNorm")
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None
    ) -> Array:
        """Normalize ``x``, and in training update the running statistics.

        Args:
            x: array whose channels lie along ``axis``.
            use_running_average: use the running statistics instead of those of ``x``. To be given
                either here or to the layer.
            mask: which values count. Booleans that broadcast to ``x``, as in Flax; or what
                ``nk.BatchNorm.apply`` takes: also weights, and without the channel axis. The rest
                takes no part and comes out as the bias, with either kind of statistics.

        Returns:
            An array of the shape of ``x``, in ``dtype`` or what ``x`` and the parameters promote
            to.

        Raises:
            ValueError: a shape does not fit, a mask can be read in two ways, or
                ``use_running_average`` was given twice, or not at all.
            flax.errors.ModifyScopeVariableError: in training ``batch_stats`` is not mutable.
        """
        x = jnp.asarray(x)
        if self.portable:
            _checks.floating(x, BACKEND)
            _checks.rank(x, 2, "BatchNorm")
        if _arguments.is_native(self, x):
            _arguments.no_additions(self)
            return super().__call__(x, use_running_average, mask=mask)
        axes = _arguments.positions(self.axis, x.ndim)
        if self.num_features is not None:
            _checks.lengths(x, axes, (self.num_features,), type(self).__name__)
        training = trains(self, use_running_average)
        shape = [x.shape[axis] for axis in axes]
        remembered = running(self, shape)
        if self.portable and (training or not remembered) and not self.is_initializing():
            _arguments.values_per_channel(x, axes)
        scale, bias = parameters(self, shape)
        weights = _arguments.weights_of(x, mask, axes[0] if len(axes) == 1 else None, self.portable)
        wide, dtype = _arguments.promoted(x, scale, bias, dtype=self.dtype)
        y, new = apply_batch_norm(
            wide,
            scale,
            bias,
            {name: variable.value for name, variable in remembered.items()},
            axis=axes,
            eps=self.epsilon,
            decay=self.momentum,
            correction=self.correction,
            training=training,
            weights=weights,
            dtype=dtype,
            backend=BACKEND,
        )
        if training:
            store(new, self, remembered)
        return y


def build(definition: nk.BatchNorm, **options: Any) -> BatchNorm:
    """The layer that ``definition`` describes."""
    return BatchNorm(
        num_features=definition.num_features,
        axis=definition.axis,
        momentum=definition.decay,
        epsilon=definition.eps,
        use_bias=definition.bias,
        use_scale=definition.scale,
        correction=definition.correction,
        track_running_stats=definition.track_running_stats,
        portable=True,
        **options,
    )


def describe(layer: nn.BatchNorm, variables: Any = None) -> nk.BatchNorm:
    """The definition of ``layer``, a native one or normkit's."""
    axis = _arguments.one_axis(layer.axis, "BatchNorm")
    known = getattr(layer, "num_features", None)
    return nk.BatchNorm(
        shape_of(layer, variables)[0] if known is None else known,
        axis=axis,
        eps=layer.epsilon,
        decay=layer.momentum,
        correction=getattr(layer, "correction", 0),
        scale=layer.use_scale,
        bias=layer.use_bias,
        track_running_stats=getattr(layer, "track_running_stats", True),
    )
