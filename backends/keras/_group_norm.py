"""GroupNorm for Keras."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

import normkit as nk
from normkit import _checks
from normkit._group_norm import apply_group_norm, group_size

from . import _masks
from ._masks import PROPAGATED, Masked
from ._tensors import built_shape, real_tensor, tensor


@keras.saving.register_keras_serializable(package="normkit")
class GroupNormalization(Masked, keras.layers.GroupNormalization):
    """Group normalization: ``keras.layers.GroupNormalization``, right to the last digits.

    It has the native arguments, weights and configuration, so either layer reads the weights that
    the other saved. Unlike the native one's, its results do not depend on the mean of the input,
    integer input is not rounded back to integers, and second derivatives are right on each backend.
    A mask, also one that Keras propagates, keeps padding out of the statistics, which natively it
    enters, and masked positions come out as ``beta``.

    Args:
        groups, axis, epsilon, center, scale: as in ``keras.layers.GroupNormalization``, and so are
            the initializers, regularizers, constraints and options of every Keras layer.
            ``groups=-1`` makes one of each channel.
        num_channels: number of channels; None takes it from the first input. A layer that is told
            it refuses any other, and is as strict as ``nk.GroupNorm``: one value per group is an
            error, where the native layer returns ``beta``.

    Raises:
        ValueError: an argument is not what it must be; on call, a shape does not fit.
        TypeError: ``axis`` is no integer; on call, the input is complex.

    Shape: any with the batch first and the channels at ``axis``; the output is alike, of the
    layer's compute dtype.

    Source: Wu & He, "Group Normalization", ECCV 2018, arXiv:1803.08494.

    >>> tuple(GroupNormalization(2)(ops.ones((3, 5, 6))).shape)
    (3, 5, 6)
    """

    def __init__(
        self,
        groups: int = 32,
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
        num_channels: int | None = None,
        **kwargs: Any,
    ) -> None:
        _checks.axis_number(axis)
        if num_channels is not None:
            _checks.length(num_channels, "num_channels")
        super().__init__(
            groups=groups,
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
        self.num_channels = num_channels
        # The native build puts the number of channels in place of -1.
        self._each_channel = groups == -1

    def build(self, input_shape: Any) -> None:
        axes = _checks.channel_axis(self.axis, len(input_shape))
        if self.num_channels is not None:
            _checks.lengths(keras.KerasTensor(input_shape), axes, (self.num_channels,), self)
        super().build(input_shape)

    def call(self, inputs: Any, mask: Any = PROPAGATED) -> Any:
        """Normalize ``inputs``; ``mask`` says which values count (see ``nk.GroupNorm.apply``).

        Unless it is given, it is the one that came with the input, which belongs to its first axes.
        """
        x, backend = real_tensor(inputs, self.compute_dtype)
        axis = self.axis % len(x.shape)
        weights = _masks.weights(inputs, mask, x, axis, backend)
        if self.num_channels is not None:
            _checks.values_per_group(group_size(x, self.groups, backend), "GroupNorm")
        y = apply_group_norm(
            x,
            tensor(self.gamma),
            tensor(self.beta),
            groups=self.groups,
            axis=axis,
            eps=self.epsilon,
            weights=weights,
            backend=backend,
        )
        return ops.cast(y, self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        config: dict[str, Any] = super().get_config()
        if self._each_channel:
            config["groups"] = -1
        if self.num_channels is not None:
            config["num_channels"] = self.num_channels
        return config


def build(definition: nk.GroupNorm, **options: Any) -> GroupNormalization:
    """The layer that ``definition`` describes."""
    return GroupNormalization(
        groups=definition.num_groups,
        axis=definition.axis,
        epsilon=definition.eps,
        center=definition.bias,
        scale=definition.scale,
        num_channels=definition.num_channels,
        **options,
    )


def describe(layer: keras.layers.GroupNormalization) -> nk.GroupNorm:
    """The definition of ``layer``, a native one or normkit's."""
    num_channels = getattr(layer, "num_channels", None)
    if num_channels is None:
        num_channels = built_shape(layer)[layer.axis]
    return nk.GroupNorm(
        num_channels if layer.groups == -1 else layer.groups,
        num_channels,
        axis=layer.axis,
        eps=layer.epsilon,
        scale=layer.scale,
        bias=layer.center,
    )
