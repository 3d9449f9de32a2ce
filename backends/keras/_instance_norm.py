"""InstanceNorm for Keras."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

import normkit as nk
from normkit import _checks
from normkit._batch_norm import apply_batch_norm

from . import _masks, _moving
from ._masks import PROPAGATED, Masked
from ._tensors import built_shape, real_tensor, tensor


@keras.saving.register_keras_serializable(package="normkit")
class InstanceNormalization(Masked, keras.layers.GroupNormalization):
    """Instance normalization: each channel of each sample by itself.

    Keras has no such layer but ``GroupNormalization(groups=-1)``: this is one, with the same
    arguments, results and order of weights, and may remember statistics as ``BatchNormalization``
    does. A mask, also one that Keras propagates, keeps padding out of the statistics, and masked
    positions come out as ``beta``.

    Args:
        axis, epsilon, center, scale: as in ``keras.layers.GroupNormalization``, and so are the
            initializers, regularizers, constraints and options of every Keras layer.
        momentum: the share of the moving statistics that a step keeps, from 0 to 1. None: they are
            the average over all batches so far, which a weight named ``count`` counts.
        moving_mean_initializer, moving_variance_initializer: as in
            ``keras.layers.BatchNormalization``.
        correction: which estimate ``moving_variance`` uses: 1 the unbiased one, 0 the population
            variance.
        track_running_stats: whether to remember the average of mean and variance over the samples
            of a batch, and use that in inference and where ``trainable=False``. If not, each sample
            has its own there too.
        num_features: number of channels; None takes it from the first input. A layer that is told
            it refuses any other, and is as strict as ``nk.InstanceNorm``: one value per instance is
            an error; otherwise it comes out as ``beta``.

    Raises:
        ValueError: an argument is not what it must be; on call, a shape does not fit.
        TypeError: ``axis`` is no integer; on call, the input is complex.

    Shape: any with the batch first and the channels at ``axis``; the output is alike, of the
    layer's compute dtype.

    Source: Ulyanov, Vedaldi & Lempitsky, "Instance Normalization", 2016, arXiv:1607.08022.

    >>> norm = InstanceNormalization(track_running_stats=True)
    >>> tuple(norm(ops.ones((2, 8, 8, 3)), training=True).shape)
    (2, 8, 8, 3)
    >>> [weight.name for weight in norm.weights]
    ['gamma', 'beta', 'moving_mean', 'moving_variance']
    """

    def __init__(
        self,
        axis: int = -1,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        *,
        momentum: float | None = 0.99,
        moving_mean_initializer: Any = "zeros",
        moving_variance_initializer: Any = "ones",
        correction: int = 0,
        track_running_stats: bool = False,
        num_features: int | None = None,
        **kwargs: Any,
    ) -> None:
        _checks.axis_number(axis)
        _checks.decay_rate(momentum)
        _checks.estimator(correction)
        if num_features is not None:
            _checks.length(num_features, "num_features")
        super().__init__(
            groups=-1,
            axis=axis,
            epsilon=epsilon,
            center=center,
            scale=scale,
            beta_initializer=beta_initializer,
            gamma_initializer=gamma_initializer,
            beta_regularizer=beta_regularizer,
            gamma_regularizer=gamma_regularizer,
            beta_constraint=beta_constraint,
            gamma_constraint=gamma_constraint,
            **kwargs,
        )
        self.momentum = momentum
        self.moving_mean_initializer = keras.initializers.get(moving_mean_initializer)
        self.moving_variance_initializer = keras.initializers.get(moving_variance_initializer)
        self.correction = correction
        self.track_running_stats = track_running_stats
        self.num_features = num_features
        self.moving_mean = None
        self.moving_variance = None
        self.count = None

    def build(self, input_shape: Any) -> None:
        axes = _checks.channel_axis(self.axis, len(input_shape))
        if self.num_features is not None:
            _checks.lengths(keras.KerasTensor(input_shape), axes, (self.num_features,), self)
        super().build(input_shape)
        if self.track_running_stats:
            for name in ("moving_mean", "moving_variance"):
                weight = self.add_weight(
                    shape=(input_shape[self.axis],),
                    name=name,
                    initializer=getattr(self, f"{name}_initializer"),
                    trainable=False,
                    autocast=False,
                )
                setattr(self, name, weight)
            if self.momentum is None:
                self.count = _moving.add_count(self)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = PROPAGATED) -> Any:
        """Normalize ``inputs``; ``mask`` says which values count (see ``nk.InstanceNorm.apply``).

        Unless it is given, it is the one that came with the input, which belongs to its first axes.
        It leaves out what it names where the moving statistics are used as well.
        """
        x, backend = real_tensor(inputs, self.compute_dtype)
        axis = self.axis % len(x.shape)
        weights = _masks.weights(inputs, mask, x, axis, backend)
        moving = _moving.of(self)
        training = bool(moving and training and self.trainable)
        if self.num_features is not None and (training or not moving):
            positions = tuple(a for a in range(1, len(x.shape)) if a != axis)
            _checks.values_per_group(backend.size(x, positions), "InstanceNorm")
        state = {name: tensor(variable) for name, variable in moving.items()}
        y, new = apply_batch_norm(
            x,
            tensor(self.gamma),
            tensor(self.beta),
            state,
            axis=axis,
            apart=(0,),
            eps=self.epsilon,
            decay=self.momentum,
            correction=self.correction,
            training=training,
            weights=weights,
            backend=backend,
        )
        if new is not state:
            for name, variable in moving.items():
                variable.assign(new[name])
        return ops.cast(y, self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        config: dict[str, Any] = super().get_config()
        del config["groups"]
        for name in ("momentum", "correction", "track_running_stats", "num_features"):
            config[name] = getattr(self, name)
        for name in ("moving_mean_initializer", "moving_variance_initializer"):
            config[name] = keras.initializers.serialize(getattr(self, name))
        return config


def build(definition: nk.InstanceNorm, **options: Any) -> InstanceNormalization:
    """The layer that ``definition`` describes."""
    return InstanceNormalization(
        axis=definition.axis,
        epsilon=definition.eps,
        center=definition.bias,
        scale=definition.scale,
        momentum=definition.decay,
        correction=definition.correction,
        track_running_stats=definition.track_running_stats,
        num_features=definition.num_features,
        **options,
    )


def describe(layer: InstanceNormalization) -> nk.InstanceNorm:
    """The definition of ``layer``."""
    num_features = layer.num_features
    return nk.InstanceNorm(
        built_shape(layer)[layer.axis] if num_features is None else num_features,
        axis=layer.axis,
        eps=layer.epsilon,
        decay=layer.momentum,
        correction=layer.correction,
        scale=layer.scale,
        bias=layer.center,
        track_running_stats=layer.track_running_stats,
    )
