"""BatchNorm for Keras."""

from __future__ import annotations

import warnings
from typing import Any

import keras
from keras import ops

import normkit as nk
from normkit import _checks
from normkit._batch_norm import apply_batch_norm

from . import _masks, _moving
from ._tensors import built_shape, real_tensor, tensor

# What this layer has beyond the native one, and the values that make it the native one.
_ADDED: dict[str, Any] = {"correction": 0, "track_running_stats": True, "num_features": None}


@keras.saving.register_keras_serializable(package="normkit")
class BatchNormalization(keras.layers.BatchNormalization):
    """Batch normalization: ``keras.layers.BatchNormalization``, and a little more.

    It has the native arguments, weights, configuration and rules for training and
    ``trainable=False``, so either layer reads the weights that the other saved. Unlike the native
    one's, its results are right to the last digits whatever the mean of the input is, under a
    mixed-precision policy too; an empty batch leaves the moving statistics alone; second
    derivatives are right on each backend; and a mask may have any shape that
    ``nk.BatchNorm.apply`` takes, for any axis, and masked positions come out as ``beta``.

    Args:
        axis, epsilon, center, scale: as in ``keras.layers.BatchNormalization``, and so are the
            initializers, regularizers, constraints and options of every Keras layer.
        momentum: the share of the moving statistics that a step keeps. None: they are the average
            over all batches so far, which a weight named ``count`` counts.
        renorm, renorm_clipping, renorm_momentum, synchronized: as there; with ``renorm`` or
            ``synchronized`` the native layer does the computation.
        correction: which estimate ``moving_variance`` uses: 1 the unbiased one, 0 the population
            variance.
        track_running_stats: whether there are moving statistics. If not, those of the batch are
            used in inference too.
        num_features: number of channels; None takes it from the first input. A layer that is told
            it refuses any other, and is as strict as ``nk.BatchNorm``: one value per channel in
            training is an error, where the native layer returns ``beta``.

    Raises:
        ValueError: an argument is not what it must be; on call, a shape does not fit.
        TypeError: on call, the input is complex.

    Shape: any with the channels at ``axis``; the output is alike, of the layer's compute dtype.

    Source: Ioffe & Szegedy, "Batch Normalization", ICML 2015, arXiv:1502.03167.

    >>> bn = BatchNormalization()
    >>> tuple(bn(ops.ones((8, 5, 3)), training=True).shape)
    (8, 5, 3)
    >>> [weight.name for weight in bn.weights]
    ['gamma', 'beta', 'moving_mean', 'moving_variance']
    """

    def __init__(
        self,
        axis: int = -1,
        momentum: float | None = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        moving_mean_initializer: Any = "zeros",
        moving_variance_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        renorm: bool = False,
        renorm_clipping: dict[str, float] | None = None,
        renorm_momentum: float = 0.99,
        synchronized: bool = False,
        *,
        correction: int = 0,
        track_running_stats: bool = True,
        num_features: int | None = None,
        **kwargs: Any,
    ) -> None:
        _checks.estimator(correction)
        if num_features is not None:
            _checks.length(num_features, "num_features")
        super().__init__(
            axis=axis,
            # The native layer makes a float of it, and uses it only where None is refused.
            momentum=0.0 if momentum is None else momentum,
            epsilon=epsilon,
            center=center,
            scale=scale,
            beta_initializer=beta_initializer,
            gamma_initializer=gamma_initializer,
            moving_mean_initializer=moving_mean_initializer,
            moving_variance_initializer=moving_variance_initializer,
            beta_regularizer=beta_regularizer,
            gamma_regularizer=gamma_regularizer,
            beta_constraint=beta_constraint,
            gamma_constraint=gamma_constraint,
            renorm=renorm,
            renorm_clipping=renorm_clipping,
            renorm_momentum=renorm_momentum,
            synchronized=synchronized,
            **kwargs,
        )
        if (renorm or synchronized) and (momentum is None or correction or not track_running_stats):
            msg = (
                f"renorm and synchronized are computed by the native layer, which needs a number "
                f"as momentum, correction=0 and track_running_stats=True, but got "
                f"momentum={momentum!r}, correction={correction!r} and "
                f"track_running_stats={track_running_stats!r}; leave out one or the other."
            )
            raise ValueError(msg)
        if momentum is None:
            self.momentum = None
        self.correction = correction
        self.track_running_stats = track_running_stats
        self.num_features = num_features
        self.count = None
        # Keras would round the input to the compute dtype before any statistic is taken.
        self.autocast = False

    def build(self, input_shape: Any) -> None:
        (axis,) = _checks.axes_in_range(self.axis, len(input_shape))
        if self.num_features is not None:
            x = keras.KerasTensor(input_shape)
            _checks.lengths(x, (axis,), (self.num_features,), self)
        super().build(input_shape)
        if self.momentum is None and self.track_running_stats:
            self.count = _moving.add_count(self)

    def add_weight(self, *args: Any, name: str | None = None, **kwargs: Any) -> Any:
        # The native build asks for them in any case.
        if name in ("moving_mean", "moving_variance") and not self.track_running_stats:
            return None
        return super().add_weight(*args, name=name, **kwargs)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """Normalize ``inputs``; ``mask`` says which values count (see ``nk.BatchNorm.apply``).

        A mask that came with the input belongs to its first axes. As natively, the mask plays no
        part where the moving statistics are used.
        """
        if self.renorm or self.synchronized:
            if self.synchronized and mask is not None and training and self.trainable:
                warnings.warn(
                    f"{self.name!r} was made with synchronized=True, but Keras takes the "
                    f"statistics of masked input on each replica alone; give it no mask, or make "
                    f"it without synchronized.",
                    UserWarning,
                    stacklevel=2,
                )
            return super().call(inputs, training=training, mask=mask)
        training = bool(training and self.trainable)
        x, backend = real_tensor(inputs, self.compute_dtype)
        axis = self.axis % len(x.shape)
        weights = _masks.weights(inputs, mask, x, axis, backend)
        moving = _moving.of(self)
        if moving and not training:
            weights = None
        elif self.num_features is not None:
            others = tuple(a for a in range(len(x.shape)) if a != axis)
            _checks.values_per_channel(backend.size(x, others))
        state = {name: tensor(variable) for name, variable in moving.items()}
        y, new = apply_batch_norm(
            x,
            tensor(self.gamma),
            tensor(self.beta),
            state,
            axis=axis,
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
        for name, native in _ADDED.items():
            if getattr(self, name) != native:
                config[name] = getattr(self, name)
        return config


def build(definition: nk.BatchNorm, **options: Any) -> BatchNormalization:
    """The layer that ``definition`` describes."""
    return BatchNormalization(
        axis=definition.axis,
        momentum=definition.decay,
        epsilon=definition.eps,
        center=definition.bias,
        scale=definition.scale,
        correction=definition.correction,
        track_running_stats=definition.track_running_stats,
        num_features=definition.num_features,
        **options,
    )


def describe(layer: keras.layers.BatchNormalization) -> nk.BatchNorm:
    """The definition of ``layer``, a native one or normkit's."""
    if layer.renorm:
        msg = (
            f"nk.BatchNorm has no batch renormalization, but {layer.name!r} was made with "
            f"renorm=True; make it without to read its definition."
        )
        raise ValueError(msg)
    added = {name: getattr(layer, name, native) for name, native in _ADDED.items()}
    if added["num_features"] is None:
        added["num_features"] = built_shape(layer)[layer.axis]
    return nk.BatchNorm(
        axis=layer.axis,
        eps=layer.epsilon,
        decay=layer.momentum,
        scale=layer.scale,
        bias=layer.center,
        **added,
    )
