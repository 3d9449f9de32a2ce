"""RMSNorm for Keras."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

import normkit as nk
from normkit import _checks
from normkit._rms_norm import apply_rms_norm

from . import _axes, _masks
from ._masks import PROPAGATED, Masked
from ._tensors import real_tensor, tensor

# What this layer has beyond the native one, and the values that make it the native one.
_ADDED: dict[str, Any] = {"zero_centered": False, "scale_after_cast": False, "use_scale": True}


@keras.saving.register_keras_serializable(package="normkit")
class RMSNormalization(Masked, keras.layers.RMSNormalization):
    """Root-mean-square normalization: ``keras.layers.RMSNormalization``, for any axes.

    It has the native arguments, weights and configuration, so either layer reads the weights that
    the other saved. Unlike the native one it multiplies along the axes that it normalizes over,
    whichever they are; takes its statistics from the input before a mixed-precision policy rounds
    it; does not round integer input back to integers; squares of large numbers do not overflow;
    and it hands on a mask: masked positions come out as zero.

    Args:
        axis, epsilon: as in ``keras.layers.RMSNormalization``, and so are the options of every
            Keras layer. ``epsilon=None`` is the machine epsilon of the dtype that is computed in,
            1.2e-7 for float32 and half types.
        zero_centered: multiply by ``1 + scale``, which starts from zeros (as Gemma does).
        scale_after_cast: multiply by the scale after rounding to the compute dtype, in that dtype
            (as Llama does); if False, before.
        use_scale: whether there is a weight ``scale``.
        shape: the lengths of the input along ``axis``; None takes them from the first input. A
            layer that is told them refuses any other.

    Raises:
        ValueError: an argument is not what it must be; on call, a shape does not fit.
        TypeError: on call, the input is complex.

    Shape: any; the output is alike, of the layer's compute dtype.

    Source: Zhang & Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019,
    arXiv:1910.07467.

    >>> tuple(RMSNormalization()(ops.ones((2, 3, 4))).shape)
    (2, 3, 4)
    """

    def __init__(
        self,
        axis: int | Sequence[int] = -1,
        epsilon: float | None = 1e-6,
        *,
        zero_centered: bool = False,
        scale_after_cast: bool = False,
        use_scale: bool = True,
        shape: int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(axis=axis, epsilon=epsilon, **kwargs)
        self.zero_centered = zero_centered
        self.scale_after_cast = scale_after_cast
        self.use_scale = use_scale
        self.shape = _axes.lengths(shape, self)
        self.supports_masking = True
        # Keras would round the input to the compute dtype before any statistic is taken.
        self.autocast = False

    def build(self, input_shape: Any) -> None:
        _axes.build(self, super().build, input_shape)

    def add_weight(self, *args: Any, name: str | None = None, **kwargs: Any) -> Any:
        # The native build asks for one that starts from ones, and is rounded before it is used.
        if name == "scale":
            if not self.use_scale:
                return None
            kwargs["initializer"] = "zeros" if self.zero_centered else "ones"
            kwargs["autocast"] = False
        return super().add_weight(*args, name=name, **kwargs)

    def call(self, x: Any, mask: Any = PROPAGATED) -> Any:
        """Normalize ``x``; ``mask`` says which values count (see ``nk.RMSNorm.apply``).

        Unless it is given, it is the one that came with the input, which belongs to its first axes.
        """
        inputs = x
        x, backend = real_tensor(inputs, self.compute_dtype)
        axes = _checks.axes_in_range(_axes.axes_of(self), len(x.shape))
        return apply_rms_norm(
            x,
            tensor(self.scale),
            axes=axes,
            eps=self.epsilon,
            zero_centered=self.zero_centered,
            scale_after_cast=self.scale_after_cast,
            weights=_masks.weights(inputs, mask, x, axes[-1], backend),
            dtype=ops.convert_to_tensor(0, self.compute_dtype).dtype,
            backend=backend,
        )

    def get_config(self) -> dict[str, Any]:
        config: dict[str, Any] = super().get_config()
        for name, native in _ADDED.items():
            if getattr(self, name) != native:
                config[name] = getattr(self, name)
        if self.shape is not None:
            config["shape"] = list(self.shape)
        return config


def build(definition: nk.RMSNorm, **options: Any) -> RMSNormalization:
    """The layer that ``definition`` describes."""
    return RMSNormalization(
        axis=definition.axes,
        epsilon=definition.eps,
        zero_centered=definition.zero_centered,
        scale_after_cast=definition.scale_after_cast,
        use_scale=definition.scale,
        shape=definition.shape,
        **options,
    )


def describe(layer: keras.layers.RMSNormalization) -> nk.RMSNorm:
    """The definition of ``layer``, a native one or normkit's."""
    shape, axes = _axes.described(layer)
    native = not isinstance(layer, RMSNormalization)
    if native and not _axes.are_last(layer):
        raise _axes.multiplied_elsewhere(layer)
    # Natively None stands for what is set for all of Keras.
    eps = keras.backend.epsilon() if native and layer.epsilon is None else layer.epsilon
    return nk.RMSNorm(
        shape,
        axes=axes,
        eps=eps,
        scale=getattr(layer, "use_scale", True),
        zero_centered=getattr(layer, "zero_centered", False),
        scale_after_cast=getattr(layer, "scale_after_cast", False),
    )
