"""What the layers of both Flax APIs share: dtypes, axes and masks as Flax has them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype
from jax import Array

from normkit import _checks
from normkit._backend import DType
from normkit._statistics import Axes
from normkit.jax._backend import BACKEND


def is_native(layer: Any, x: Array) -> bool:
    """Whether Flax computes: statistics across replicas, or complex numbers."""
    dtypes = (x.dtype, layer.param_dtype, layer.dtype)
    return layer.axis_name is not None or any(
        dtype is not None and jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes
    )


def additions(layer: Any) -> list[str]:
    """The options of ``layer`` that go beyond those of Flax' own, as they would be written."""
    found = [
        f"{name}={getattr(layer, name)!r}"
        for name, native in layer._ADDED.items()
        if getattr(layer, name) != native
    ]
    if getattr(layer, "track_running_stats", False) and layer.momentum is None:
        found.append("momentum=None")
    if layer.epsilon is None:
        found.append("epsilon=None")
    return found


def no_additions(layer: Any) -> None:
    """Where Flax computes, a layer can be no more than Flax' own."""
    found = additions(layer)
    if found:
        msg = (
            f"{type(layer).__name__} has {' and '.join(found)}, which works neither across "
            f"replicas (axis_name) nor on complex numbers; leave it at its default there."
        )
        raise ValueError(msg)


def promoted(x: Array, *others: Array | None, dtype: DType | None) -> tuple[Array, DType]:
    """``x`` in the dtype to compute in, and the dtype of the result.

    The result has ``dtype``, or what ``x`` and the ``others`` promote to. ``x`` is only ever
    widened: to that, and to float32 at least. It loses no digits before its mean is subtracted.
    """
    # Promotion is these layers' documented rule, so strict mode has nothing to warn of.
    with jax.numpy_dtype_promotion("standard"):
        dtype = canonicalize_dtype(x, *others, dtype=dtype)
        if x.dtype == dtype:  # the engine widens it itself, where it passes over it
            return x, dtype
        wide = jnp.promote_types(jnp.promote_types(x.dtype, dtype), jnp.float32)
    return x.astype(wide), dtype


def as_tuple(axes: Any) -> Axes:
    """``axes`` as they were given, one or several, each once."""
    return tuple(dict.fromkeys(axes)) if isinstance(axes, Iterable) else (axes,)


def as_shape(lengths: int | Iterable[int]) -> tuple[int, ...]:
    """``lengths`` as a shape."""
    return tuple(lengths) if isinstance(lengths, Iterable) else (lengths,)


def positions(axes: Any, ndim: int) -> Axes:
    """``axes`` as nonnegative numbers in ascending order. As in Flax, one may be named twice."""
    return tuple(sorted({a for axis in as_tuple(axes) for a in _checks.axes_in_range(axis, ndim)}))


def weights_of(x: Array, mask: Any, channel: int | None, portable: bool) -> Array | None:
    """``mask`` as weights of the rank of ``x``.

    Flax reads a boolean mask by broadcasting, which aligns the last axes; normkit adds that a
    mask may lack the ``channel`` axis. A shape that is both is not guessed at.
    """
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    if not portable and mask.dtype == bool and mask.ndim < x.ndim:
        aligned = (1,) * (x.ndim - mask.ndim) + mask.shape
        if _fits(aligned, x):
            if channel is not None and mask.ndim == x.ndim - 1:
                lacking = (*mask.shape[:channel], 1, *mask.shape[channel:])
                if lacking != aligned and _fits(lacking, x):
                    raise _ambiguous(x, mask, lacking, aligned)
            mask = mask.reshape(aligned)
    return _checks.weights_for(x, mask, channel, BACKEND)


def _fits(shape: tuple[int, ...], x: Array) -> bool:
    return all(n in (1, m) for n, m in zip(shape, x.shape, strict=True))


def _ambiguous(x: Array, mask: Array, lacking: Axes, aligned: Axes) -> ValueError:
    msg = (
        f"a mask of shape {mask.shape} can be read in two ways for x of shape {x.shape}; give it "
        f"the rank of x: {lacking} if it lacks the channel axis, {aligned} if it broadcasts."
    )
    return ValueError(msg)


def values_per_channel(x: Array, axes: Axes) -> None:
    """More than one value, along all but ``axes``, to take the statistics of a channel from."""
    rest = [length for axis, length in enumerate(x.shape) if axis not in axes]
    _checks.values_per_channel(math.prod(rest))


def one_axis(axis: Any, kind: str) -> int:
    """The channel axis of a layer that a definition can describe."""
    axes = as_tuple(axis)
    if len(axes) != 1:
        msg = (
            f"nk.{kind} has one channel axis, but the layer has axes {axis!r}; no definition "
            f"describes it."
        )
        raise ValueError(msg)
    return int(axes[0])


def same_axes(layer: Any, kind: str) -> Axes:
    """The axes of a LayerNorm or RMSNorm that a definition can describe."""
    axes = as_tuple(layer.feature_axes)
    if set(axes) != set(as_tuple(layer.reduction_axes)):
        msg = (
            f"nk.{kind} normalizes over the axes of its parameters, but the layer has "
            f"reduction_axes={layer.reduction_axes!r} and feature_axes={layer.feature_axes!r}; "
            f"no definition describes it."
        )
        raise ValueError(msg)
    # Flax takes them in any order, and lays parameters out in ascending order.
    alike = len({axis < 0 for axis in axes}) == 1
    return tuple(sorted(axes)) if alike else axes


def one_length_each(shape: tuple[int, ...], axes: Axes) -> None:
    """A definition knows the length of x along each axis, but NNX keeps parameters flat."""
    if len(axes) != len(shape):
        msg = (
            f"the length of x along each of the axes {axes} is not known: the layer keeps flat "
            f"parameters of {shape[0]} features. Give num_features= the lengths, as a tuple."
        )
        raise ValueError(msg)


def channels(axes: Any, ndim: int) -> Axes:
    """The channel axes of an InstanceNorm: any but that of the samples."""
    for axis in as_tuple(axes):
        _checks.channel_axis(axis, ndim)
    return positions(axes, ndim)


def values_per_instance(x: Array, axes: Axes) -> None:
    """More than one value, along all but ``axes`` and the first, to take statistics from."""
    rest = [length for axis, length in enumerate(x.shape) if axis not in (0, *axes)]
    _checks.values_per_group(math.prod(rest), "InstanceNorm")


def grouped(x: Array, layer: Any) -> tuple[int, Axes]:
    """The channel axis of a GroupNorm, and the axes that it takes statistics over."""
    if layer.reduction_axes is None:
        # As in Flax, a single vector is one sample.
        single = x.ndim == 1 and not layer.portable
        (axis,) = (_checks.axes_in_range if single else _checks.channel_axis)(layer.axis, x.ndim)
        return axis, tuple(range(1, x.ndim)) or (axis,)
    (axis,) = _checks.axes_in_range(layer.axis, x.ndim)
    axes = positions(layer.reduction_axes, x.ndim)
    if axis not in axes:
        msg = (
            f"reduction_axes must include the channel axis, {layer.axis}, but they are "
            f"{layer.reduction_axes!r} for an x of {x.ndim} dimensions; add it to them."
        )
        raise ValueError(msg)
    return axis, axes


def samples_alone(layer: Any) -> None:
    """A GroupNorm that a definition can describe: each sample by itself, over all positions."""
    if layer.reduction_axes is not None:
        msg = (
            f"nk.GroupNorm normalizes over all axes but the first, but the layer has "
            f"reduction_axes={layer.reduction_axes!r}; no definition describes it."
        )
        raise ValueError(msg)
