"""A trained BatchNorm folded into the layer before it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from normkit import _checks
from normkit._arrays import backend_of
from normkit._backend import Array, Backend
from normkit._batch_norm import BatchNorm
from normkit._definition import Definition, Params, State
from normkit._engine import with_rank
from normkit._statistics import Axes, cast


def fold(
    weight: Array,
    bias: Array | None,
    definition: Definition,
    params: Params,
    state: State,
    *,
    channel_axis: int | Sequence[int],
    groups: int = 1,
    group_axis: int = 0,
) -> tuple[Array, Array]:
    """The weight and bias of one layer that does what a layer and the BatchNorm after it do.

    With its running statistics a BatchNorm multiplies each channel by one number and adds another,
    which a dense layer or a convolution can do as well::

        factor = scale / sqrt(var + eps)
        weight, bias = weight * factor, (bias - mean) * factor + the BatchNorm's bias

    It is computed in float64 if the library has it, and rounded once. Nothing given is changed.

    Args:
        weight, bias: those of the layer; a bias of None is zeros.
        definition: the BatchNorm.
        params, state: its own, as from ``definition.init``; of the state, ``mean`` and ``var``.
        channel_axis: the axis of ``weight`` along which the output channels lie; or several, the
            one that counts slowest first, as the last two of Keras' depthwise convolutions.
        groups: into how many groups ``group_axis`` is divided, if ``weight`` has along
            ``channel_axis`` the output channels of a single group: so do PyTorch's transposed
            convolutions. The output channels are those of the first group, of the second and so on.
        group_axis: the axis of the input channels there.

    Returns:
        ``(weight, bias)``: of the shape and dtype of ``weight``; one value per channel, in the
        dtype of the bias that was given.

    Raises:
        TypeError: ``definition`` is no BatchNorm; an array is of another library, or its dtype is
            not real floating point.
        ValueError: a shape does not fit, there are no running statistics; a variance is negative
            or NaN, or a result too large for its dtype (where their values can be seen).

    >>> import numpy as np, normkit as nk
    >>> bn = nk.BatchNorm(2, eps=1.0)
    >>> params, state = bn.init()
    >>> state |= {"mean": np.float32([1, 2]), "var": np.float32([3, 0])}
    >>> weight, bias = nk.fold(np.float32([[4, 4]]), None, bn, params, state, channel_axis=1)
    >>> weight.tolist(), bias.tolist()
    ([[2.0, 4.0]], [-0.5, -2.0])
    """
    backend = backend_of(weight)
    _checks.floating(weight, backend, "weight")
    if not isinstance(definition, BatchNorm):
        msg = (
            f"only a BatchNorm can be folded, whose statistics in inference do not depend on the "
            f"input, but got {definition!r}."
        )
        raise TypeError(msg)
    if not definition.track_running_stats:
        msg = (
            "a BatchNorm without running statistics takes those of its input, so it cannot be "
            "folded; define it with track_running_stats=True."
        )
        raise ValueError(msg)
    channels = _axes(channel_axis, len(weight.shape))
    split, channels, group_axis = _in_groups(weight, channels, groups, group_axis, backend)
    lengths = tuple(split.shape[axis] for axis in channels)
    n = definition.num_features
    if math.prod(lengths) != n:
        msg = (
            f"weight must have {n} output channels, as many as the BatchNorm, but for "
            f"channel_axis={channel_axis} and groups={groups} its shape {tuple(weight.shape)} has "
            f"{math.prod(lengths)}."
        )
        raise ValueError(msg)
    wide = backend.statistics_dtype(weight.dtype, backend.xp.float64)
    factor, shift = _affine(definition, params, state, weight, wide, backend)
    if bias is None:
        kept = weight.dtype
    else:
        (bias,) = _arrays({"bias": bias}, weight, (n,), backend)
        kept = bias.dtype
        shift = shift + cast(bias, wide, backend) * factor
    factor = _along(factor, lengths, channels, split, backend)
    scaled = _rounded(cast(split, wide, backend), factor, weight.dtype, "weight", backend)
    if groups > 1:
        scaled = backend.join(scaled, group_axis)
    return scaled, _rounded(shift, None, kept, "bias", backend)


def _rounded(x: Array, factor: Array | None, dtype: Any, name: str, backend: Backend) -> Array:
    """``x``, times ``factor``, in ``dtype``; a ValueError where it is too large for that."""
    xp = backend.xp
    with backend.quiet():
        rounded = cast(x if factor is None else x * factor, dtype, backend)
    if not backend.is_visible(rounded):
        return rounded
    finite = xp.isfinite(x) if factor is None else xp.isfinite(x) & xp.isfinite(factor)
    if bool(xp.any(finite & ~xp.isfinite(rounded))):
        msg = (
            f"the folded {name} is too large for {dtype}; convert the {name} first, for example "
            f"to float32."
        )
        raise ValueError(msg)
    return rounded


def _axes(given: Any, ndim: int) -> Axes:
    """``given`` as nonnegative numbers, in its own order."""
    several = given if isinstance(given, Sequence) else (given,)
    _checks.axes_in_range(several, ndim)
    if not several:
        msg = "channel_axis must name one axis at least, but got none."
        raise ValueError(msg)
    return tuple(int(axis) % ndim for axis in several)


def _in_groups(
    weight: Array, channels: Axes, groups: int, group_axis: int, backend: Backend
) -> tuple[Array, Axes, int]:
    """``weight`` with its groups along an axis of their own, the first of its channel axes."""
    _checks.length(groups, "groups")
    if groups == 1:
        return weight, channels, group_axis
    (axis,) = _axes(group_axis, len(weight.shape))
    if axis in channels or weight.shape[axis] % groups:
        msg = (
            f"group_axis must be an axis of weight that can be divided into {groups} groups, and "
            f"none of the output channels, but got {group_axis} for the shape "
            f"{tuple(weight.shape)} with its output channels along {channels}."
        )
        raise ValueError(msg)
    moved = tuple(channel + (channel > axis) for channel in channels)
    return backend.split(weight, axis, groups), (axis, *moved), axis


def _affine(
    definition: BatchNorm, params: Params, state: State, weight: Array, wide: Any, backend: Backend
) -> tuple[Array, Array]:
    """What the BatchNorm multiplies each channel by, and what it then adds."""
    shape = definition.parameter_shape
    _checks.keys(params, {"scale": definition.scale, "bias": definition.bias}, "params")
    _checks.keys(state, {"mean": True, "var": True, "count": "count" in state}, "state")
    named = {f"state[{name!r}]": state[name] for name in ("mean", "var")}
    mean, var = _arrays(named, weight, shape, backend)
    given = dict(zip(params, _arrays(params, weight, shape, backend), strict=True))
    if backend.is_visible(var) and not bool(backend.xp.all(var >= 0)):
        msg = (
            "state['var'] must hold variances, but some are negative or NaN; take the running "
            "statistics again."
        )
        raise ValueError(msg)
    factor = 1 / backend.xp.sqrt(cast(var, wide, backend) + definition.eps)
    if "scale" in given:
        factor = factor * cast(given["scale"], wide, backend)
    shift = -(cast(mean, wide, backend) * factor)
    if "bias" in given:
        shift = shift + cast(given["bias"], wide, backend)
    return factor, shift


def _arrays(
    given: dict[str, Array], weight: Array, shape: tuple[int, ...], backend: Backend
) -> list[Array]:
    """What lies along the channels, as arrays of the library of ``weight``."""
    found = []
    for name, array in given.items():
        array = _checks.same_library(array, weight, name, backend)
        _checks.floating(array, backend, name)
        if tuple(array.shape) != shape:
            msg = (
                f"{name} must have shape {shape}, one value for each output channel, but its "
                f"shape is {tuple(array.shape)}."
            )
            raise ValueError(msg)
        found.append(array)
    return found


def _along(
    factor: Array, lengths: tuple[int, ...], axes: Axes, weight: Array, backend: Backend
) -> Array:
    """``factor`` along ``axes`` of ``weight``, the first of which counts slowest."""
    if len(axes) > 1:
        order = tuple(sorted(range(len(axes)), key=axes.__getitem__))
        factor = backend.xp.permute_dims(backend.xp.reshape(factor, lengths), order)
    return with_rank(factor, tuple(sorted(axes)), len(weight.shape), backend)
