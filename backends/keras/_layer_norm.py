"""LayerNorm for Keras."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

import normkit as nk
from normkit import _checks
from normkit._layer_norm import apply_layer_norm

from . import _axes, _masks
from ._masks import PROPAGATED, Masked
from ._tensors import real_tensor, tensor


@keras.saving.register_keras_serializable(package="normkit")
class LayerNormalization(Masked, keras.layers.LayerNormalization):
    """Layer normalization: ``keras.layers.LayerNormalization``, right to the last digits.

    It has the native arguments, weights and configuration, so either layer reads the weights that
    the other saved. Unlike the native one's, its results do not depend on the mean of the input,
    integer input is not rounded back to integers, any axes work on each backend, and so do second
    derivatives. A mask, also one that Keras propagates, is handed on, and masked positions come out
    as ``beta``, where natively they are normalized like the others.

    Args:
        axis, epsilon, center, scale: as in ``keras.layers.LayerNormalization``, and so are the
            initializers, regularizers, constraints and options of every Keras layer.
        shape: the lengths of the input along ``axis``; None takes them from the first input. A
            layer that is told them refuses any other.

    Raises:
        ValueError: an argument is not what it must be; on call, a shape does not fit.
        TypeError: on call, the input is complex.

    Shape: any; the output is alike, of the layer's compute dtype.

    Source: Ba, Kiros & Hinton, "Layer Normalization", 2016, arXiv:1607.06450.

    >>> tuple(LayerNormalization()(ops.ones((2, 3, 4))).shape)
    (2, 3, 4)
    """

    def __init__(
        self,
        axis: int | Sequence[int] = -1,
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
        shape: int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
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
        self.shape = _axes.lengths(shape, self)

    def build(self, input_shape: Any) -> None:
        _axes.build(self, super().build, input_shape)

    def call(self, inputs: Any, mask: Any = PROPAGATED) -> Any:
        """Normalize ``inputs``; ``mask`` says which values count (see ``nk.LayerNorm.apply``).

        Unless it is given, it is the one that came with the input, which belongs to its first axes.
        With ``rms_scaling`` the native layer does the computation, which knows no mask.
        """
        if self.rms_scaling:
            return super().call(inputs)
        x, backend = real_tensor(inputs, self.compute_dtype)
        axes = _checks.axes_in_range(_axes.axes_of(self), len(x.shape))
        y = apply_layer_norm(
            x,
            tensor(self.gamma),
            tensor(self.beta),
            axes=axes,
            eps=self.epsilon,
            weights=_masks.weights(inputs, mask, x, axes[-1], backend),
            backend=backend,
        )
        return ops.cast(y, self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        config: dict[str, Any] = super().get_config()
        if self.shape is not None:
            config["shape"] = list(self.shape)
        return config


def build(definition: nk.LayerNorm, **options: Any) -> LayerNormalization:
    """The layer that ``definition`` describes."""
    return LayerNormalization(
        axis=definition.axes,
        epsilon=definition.eps,
        center=definition.bias,
        scale=definition.scale,
        shape=definition.shape,
        **options,
    )


def describe(layer: keras.layers.LayerNormalization) -> nk.LayerNorm:
    """The definition of ``layer``, a native one or normkit's."""
    if layer.rms_scaling:
        msg = (
            f"nk.LayerNorm always centres, but {layer.name!r} was made with rms_scaling=True; "
            f"make it without to read its definition."
        )
        raise ValueError(msg)
    shape, axes = _axes.described(layer)
    native = not isinstance(layer, LayerNormalization)
    if native and keras.backend.backend() == "torch" and layer.weights:
        if not _axes.are_last(layer):
            raise _axes.multiplied_elsewhere(layer)
    return nk.LayerNorm(
        shape,
        axes=axes,
        eps=layer.epsilon,
        scale=layer.scale,
        bias=layer.center,
    )
