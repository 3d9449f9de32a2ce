"""InstanceNorm for Flax Linen."""

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


class InstanceNorm(nn.InstanceNorm):
    """``flax.linen.InstanceNorm``, with its fields and variables, and a better mask.

    Unlike the native layer's, its results are right to the last digits whatever the mean of the
    input is, and NaN under the mask reaches no gradient. It may also remember statistics for
    inference, as PyTorch's may.

    Args:
        epsilon, dtype, param_dtype, use_bias, use_scale, bias_init, scale_init, feature_axes,
            axis_name, axis_index_groups: as in ``flax.linen.InstanceNorm``. With an ``axis_name``,
            and on complex numbers, Flax' own computation is used.
        use_fast_variance: accepted, and of no effect: there is one algorithm, and it is exact.
        force_float32_reductions: if False, parameters and running statistics are in
            ``param_dtype``. Those of x are taken in float32 at least all the same.
        track_running_stats: remember the averages of mean and variance over the samples of a
            batch, in ``batch_stats``, and use them for the running average. If False, each sample
            has statistics of its own there too.
        momentum: the share of the running statistics that a step keeps. None is the cumulative
            average; then ``batch_stats`` has a third entry, ``count``.
        correction: which estimate ``var`` uses: 0 the population variance, 1 the unbiased one.
        use_running_average: as in ``flax.linen.BatchNorm``; need not be given without running
            statistics.
        num_features: the number of channels. If given, no other ``x`` is accepted.
        portable: follow ``nk.InstanceNorm`` where Flax differs. Refused is input that is not
            floating point, of fewer than three dimensions, or with a single value per channel of a
            sample (of which Flax makes the bias); a mask is read by its rule alone; and the running
            statistics are as wide as the parameters, if those are wider than float32.

    Shape: ``(N, ..., C)``, or C at ``feature_axes``; the output is alike.

    >>> import jax
    >>> norm = InstanceNorm(track_running_stats=True, use_running_average=False)
    >>> x = jnp.ones((8, 5, 3))
    >>> y, changed = norm.apply(norm.init(jax.random.key(0), x), x, mutable=["batch_stats"])
    >>> y.shape, sorted(changed["batch_stats"])
    ((8, 5, 3), ['mean', 'var'])
    """

    _ADDED: ClassVar[Mapping[str, Any]] = MappingProxyType({"track_running_stats": False})

    track_running_stats: bool = field(default=False, kw_only=True)
    momentum: float | None = field(default=0.99, kw_only=True)
    correction: int = field(default=0, kw_only=True)
    use_running_average: bool | None = field(default=None, kw_only=True)
    num_features: int | None = field(default=None, kw_only=True)
    portable: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        _checks.estimator(self.correction)
        if self.num_features is not None:
            _arguments.one_axis(self.feature_axes, "InstanceNorm")
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Array,
        *,
        mask: Array | None = None,
        use_running_average: bool | None = None,
    ) -> Array:
        """Normalize ``x``, and in training update the running statistics, if there are any.

        Args:
            x: array whose first axis is that of the samples, with the channels along
                ``feature_axes``.
            mask: which values count. Booleans that broadcast to ``x``, as in Flax; or what
                ``nk.InstanceNorm.apply`` takes: also weights, and without the channel axis. The
                rest takes no part and comes out as the bias, with either kind of statistics.
            use_running_average: use the running statistics instead of those of ``x``. With running
                statistics, to be given either here or to the layer.

        Returns:
            An array of the shape of ``x``, in ``dtype`` or what ``x`` and the parameters promote
            to.

        Raises:
            ValueError: a shape does not fit, a mask can be read in two ways, or
                ``use_running_average`` was given twice, or is needed and was not given.
            flax.errors.ModifyScopeVariableError: there are running statistics, and in training
                ``batch_stats`` is not mutable.
        """
        x = jnp.asarray(x)
        if self.portable:
            _checks.floating(x, BACKEND)
            _checks.rank(x, 3, "InstanceNorm")
        axes = _arguments.channels(self.feature_axes, x.ndim)
        if self.num_features is not None:
            _checks.lengths(x, axes, (self.num_features,), type(self).__name__)
        if _arguments.is_native(self, x):
            _arguments.no_additions(self)
            return super().__call__(x, mask=mask)
        training = trains(self, use_running_average)
        shape = [x.shape[axis] for axis in axes]
        remembered = running(self, shape)
        if self.portable and (training or not remembered) and not self.is_initializing():
            _arguments.values_per_instance(x, axes)
        scale, bias = parameters(self, shape)
        weights = _arguments.weights_of(x, mask, axes[0] if len(axes) == 1 else None, self.portable)
        x, dtype = _arguments.promoted(x, scale, bias, dtype=self.dtype)
        y, new = apply_batch_norm(
            x,
            scale,
            bias,
            {name: variable.value for name, variable in remembered.items()},
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
            store(new, self, remembered)
        return y


def build(definition: nk.InstanceNorm, **options: Any) -> InstanceNorm:
    """The layer that ``definition`` describes."""
    return InstanceNorm(
        num_features=definition.num_features,
        feature_axes=definition.axis,
        momentum=definition.decay,
        epsilon=definition.eps,
        use_bias=definition.bias,
        use_scale=definition.scale,
        correction=definition.correction,
        track_running_stats=definition.track_running_stats,
        portable=True,
        **options,
    )


def describe(layer: nn.InstanceNorm, variables: Any = None) -> nk.InstanceNorm:
    """The definition of ``layer``, a native one or normkit's."""
    axis = _arguments.one_axis(layer.feature_axes, "InstanceNorm")
    known = getattr(layer, "num_features", None)
    return nk.InstanceNorm(
        shape_of(layer, variables)[0] if known is None else known,
        axis=axis,
        eps=layer.epsilon,
        decay=getattr(layer, "momentum", 0.99),
        correction=getattr(layer, "correction", 0),
        scale=layer.use_scale,
        bias=layer.use_bias,
        track_running_stats=getattr(layer, "track_running_stats", False),
    )
