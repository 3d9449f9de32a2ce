"""LayerNorm for Keras."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

import normkit as nk
from normkit import _checks
from normkit._layer_norm import apply_layer_norm

from ._tensors import built_shape, real_tensor, tensor


@keras.saving.register_keras_serializable(package="normkit")
class LayerNormalization(keras.layers.LayerNormalization):
    """Layer normalization: ``keras.layers.LayerNormalization``, right to the last digits.

    It has the native arguments, weights and configuration, so either layer reads the weights that
    the other saved. Unlike the native one's, its results do not depend on the mean of the input,
    integer input is not rounded back to integers, any axes work on each backend, and so do second
    derivatives. As natively, a mask that Keras propagates is handed on and changes no value: it
    says which samples count, and each sample is normalized alone.

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
        if shape is not None:
            shape = tuple(shape) if isinstance(shape, Sequence) else (shape,)
            for n in shape:
                _checks.length(n, "each length in shape")
            _checks.one_axis_each(shape, _axes(self))
        self.shape = shape

    def build(self, input_shape: Any) -> None:
        ndim = len(input_shape)
        given = _axes(self)
        axes = _checks.axes_in_range(given, ndim)
        if self.shape is not None:
            _checks.lengths(keras.KerasTensor(input_shape), axes, self.shape, self)
        # The native build sorts by number, which puts axis -1 before axis 1 and lays the
        # parameters out in that order; so it sees no negative ones.
        self.axis = list(axes)
        super().build(input_shape)
        if self.shape is not None:
            self.axis = list(given)
        else:
            self.axis = sorted(given, key=lambda axis: axis % ndim)
        if self.scale or self.center or self.shape is not None:
            self.input_spec = keras.layers.InputSpec(
                min_ndim=max(axis + 1 if axis >= 0 else -axis for axis in self.axis),
                axes={axis: input_shape[axis] for axis in self.axis},
            )

    def call(self, inputs: Any) -> Any:
        """Normalize ``inputs``."""
        if self.rms_scaling:
            return super().call(inputs)
        x, backend = real_tensor(inputs, self.compute_dtype)
        y = apply_layer_norm(
            x,
            tensor(self.gamma),
            tensor(self.beta),
            axes=_checks.axes_in_range(_axes(self), len(x.shape)),
            eps=self.epsilon,
            backend=backend,
        )
        return ops.cast(y, self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        config: dict[str, Any] = super().get_config()
        if self.shape is not None:
            config["shape"] = list(self.shape)
        return config


def _axes(layer: keras.layers.LayerNormalization) -> tuple[int, ...]:
    return (layer.axis,) if isinstance(layer.axis, int) else tuple(layer.axis)


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
    axes, shape = _axes(layer), getattr(layer, "shape", None)
    if shape is None:
        whole = built_shape(layer)
        axes = tuple(sorted(axes, key=lambda axis: axis % len(whole)))
        shape = tuple(whole[axis] for axis in axes)
    return nk.LayerNorm(
        shape,
        axes=axes,
        eps=layer.epsilon,
        scale=layer.scale,
        bias=layer.center,
    )
