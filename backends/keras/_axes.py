"""What layers along one or more axes have in common: LayerNormalization and RMSNormalization."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras

from normkit import _checks

from ._tensors import built_shape

Axes = tuple[int, ...]


def axes_of(layer: Any) -> Axes:
    """The axes of ``layer``, as they were given."""
    return tuple(layer.axis) if isinstance(layer.axis, Sequence) else (layer.axis,)


def lengths(shape: int | Sequence[int] | None, layer: Any) -> Axes | None:
    """The argument ``shape`` of ``layer``, one length for each of its axes."""
    if shape is None:
        return None
    shape = tuple(shape) if isinstance(shape, Sequence) else (shape,)
    for n in shape:
        _checks.length(n, "each length in shape")
    _checks.one_axis_each(shape, axes_of(layer))
    return shape


def build(layer: Any, native: Callable[[Any], None], input_shape: Any) -> None:
    """Build ``layer`` with the ``native`` method, which takes its axes for nonnegative ones."""
    ndim, given = len(input_shape), axes_of(layer)
    axes = _checks.axes_in_range(given, ndim)
    if layer.shape is not None:
        _checks.lengths(keras.KerasTensor(input_shape), axes, layer.shape, layer)
    # The native build sorts by number, which puts axis -1 before axis 1 and lays the parameters out
    # in that order; so it sees no negative ones.
    layer.axis = list(axes)
    native(input_shape)
    if layer.shape is not None:
        layer.axis = list(given)
    else:
        layer.axis = sorted(given, key=lambda axis: axis % ndim)
    layer.input_spec = input_spec(layer, input_shape)


def input_spec(layer: Any, input_shape: Any) -> keras.layers.InputSpec | None:
    """What is known of the inputs of a ``layer`` built on ``input_shape``; None: nothing."""
    if not layer.weights and getattr(layer, "shape", None) is None:
        return None
    axes = axes_of(layer)
    return keras.layers.InputSpec(
        min_ndim=max(axis + 1 if axis >= 0 else -axis for axis in axes),
        axes={axis: input_shape[axis] for axis in axes},
    )


def described(layer: Any) -> tuple[Axes, Axes]:
    """``shape`` and ``axes`` of the definition of ``layer``, a native one or normkit's."""
    axes, shape = axes_of(layer), getattr(layer, "shape", None)
    if shape is None:
        whole = built_shape(layer)
        axes = tuple(sorted(axes, key=lambda axis: axis % len(whole)))
        shape = tuple(whole[axis] for axis in axes)
    return shape, axes


def are_last(layer: Any) -> bool:
    """Whether the axes of a built ``layer`` are the last ones of its input."""
    if axes_of(layer) == tuple(range(-len(axes_of(layer)), 0)):
        return True
    ndim = len(built_shape(layer))
    axes = _checks.axes_in_range(axes_of(layer), ndim)
    return axes == tuple(range(ndim - len(axes), ndim))


def multiplied_elsewhere(layer: Any) -> ValueError:
    """A native layer that does not multiply along the axes that it normalizes over."""
    msg = (
        f"{layer.name!r} normalizes over axis={layer.axis!r}, but natively it multiplies along the "
        f"last axes; no definition describes that. Make it with the last axes, or normkit's."
    )
    return ValueError(msg)
