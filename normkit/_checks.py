"""What arguments must be. Each sentence gives the rule, what came, and what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from array_api_compat import is_numpy_array

from normkit._arrays import backend_of
from normkit._backend import Array, Backend, Count, is_array


def floating(x: Array, backend: Backend, name: str = "x") -> None:
    """Real floating-point arrays only: of anything else the mean is not of the same kind."""
    backend.check(x)
    if not backend.is_floating(x.dtype):
        msg = (
            f"{name} must hold real floating-point numbers, but its dtype is {x.dtype}; "
            f"convert it first, for example to float32."
        )
        raise TypeError(msg)


def axes_in_range(axes: Any, ndim: int) -> tuple[int, ...]:
    """``axes`` as nonnegative numbers in ascending order; all of them if None."""
    if axes is None:
        return tuple(range(ndim))
    given = axes if isinstance(axes, Sequence) else (axes,)
    found = []
    for axis in given:
        axis_number(axis)
        if not -ndim <= axis < ndim:
            msg = (
                f"axis {axis} is out of range for an array of {ndim} dimensions; "
                f"use one from {-ndim} to {ndim - 1}."
            )
            raise ValueError(msg)
        found.append(int(axis) % ndim)
    if len(set(found)) < len(found):
        msg = f"each axis may be named once, but got {tuple(given)} for {ndim} dimensions."
        raise ValueError(msg)
    return tuple(sorted(found))


def epsilon(eps: Any) -> None:
    """``eps`` is a finite positive number."""
    value = float(eps) if isinstance(eps, Real) else math.nan
    if not 2.0**-126 <= value < math.inf:  # the smallest normal number of float32
        msg = (
            f"eps must be positive and finite, in float32 too, but got {eps!r}; 1e-5 is a common "
            f"choice."
        )
        raise ValueError(msg)


def decay_rate(decay: Any) -> None:
    """``decay`` is a fraction, or None for the cumulative average."""
    value = float(decay) if isinstance(decay, Real) else math.nan
    if decay is not None and not 0 <= value <= 1:
        msg = (
            f"decay must be a number from 0 to 1, or None for the cumulative average, but got "
            f"{decay!r}; it is the share of the running statistics that a step keeps, so "
            f"PyTorch's momentum=0.1 is decay=0.9."
        )
        raise ValueError(msg)


def no_momentum(momentum: Any) -> TypeError:
    """A word that means opposite things."""
    msg = (
        f"there is no momentum, which means opposite things in different frameworks, but got "
        f"momentum={momentum!r}; give decay, the share of the running statistics that a step "
        f"keeps: 1 - momentum of PyTorch, momentum of Keras and Flax."
    )
    return TypeError(msg)


def estimator(correction: Any) -> None:
    """``correction`` is 0 (population variance) or 1 (unbiased estimate)."""
    if isinstance(correction, bool) or correction not in (0, 1):
        msg = (
            f"correction must be 0 or 1, but got {correction!r}; 1 tracks the unbiased variance "
            f"(as PyTorch does), 0 the population variance (as Keras and Flax do)."
        )
        raise ValueError(msg)


def length(value: Any, name: str) -> None:
    """A number of features: a positive integer."""
    if not _is_integer(value) or value < 1:
        msg = f"{name} must be a positive integer, but got {value!r}."
        raise ValueError(msg)


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def axis_number(axis: Any) -> None:
    """One axis, by its position."""
    if not _is_integer(axis):
        msg = f"an axis must be an integer, but got {axis!r}; name axes by their position."
        raise TypeError(msg)


def rank(x: Array, least: int, what: Any) -> None:
    """Enough dimensions to have something to reduce."""
    if len(x.shape) < least:
        msg = (
            f"{what} needs an array of at least {least} dimensions, but x has shape "
            f"{tuple(x.shape)}; add a batch axis."
        )
        raise ValueError(msg)


def lengths(x: Array, axes: tuple[int, ...], expected: tuple[int, ...], what: Any) -> None:
    """``x`` is as long along ``axes`` as its layer was defined to be."""
    found = tuple(x.shape[axis] for axis in axes)
    if not same_lengths(found, expected):
        msg = (
            f"{what} needs an x of lengths {expected} along its axes {axes}, but x has shape "
            f"{tuple(x.shape)}: lengths {found}. Define the layer for these, or move the axes of x."
        )
        raise ValueError(msg)


def keys(given: Mapping[str, Array], wanted: Mapping[str, bool], what: Any) -> None:
    """Exactly the arrays that the layer has."""
    expected = sorted(name for name, has in wanted.items() if has)
    if sorted(given) != expected:
        msg = (
            f"{what} must have the keys {expected}, but has {sorted(given)}; "
            f"start from the layer's own init()."
        )
        raise ValueError(msg)


def same_lengths(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether two shapes are the same, as far as their lengths are known."""
    return len(a) == len(b) and all(
        n == m or n is None or m is None for n, m in zip(a, b, strict=True)
    )


def same_library(p: Array, x: Array, name: str, backend: Backend) -> Array:
    """``p`` as an array of the library that ``x`` is of. Only NumPy's are converted unasked."""
    if backend_of(p) is backend:
        return p
    if is_numpy_array(p):
        return backend.asarray(p, x)
    msg = (
        f"{name} must be an array of the same library as x, but got a {type(p).__name__}; convert "
        f"it first."
    )
    raise TypeError(msg)


def parameter(
    p: Array | None, x: Array, shape: tuple[int, ...], name: str, backend: Backend
) -> Array | None:
    """``p`` as an array of the library of ``x``, with the shape of the axes that it lies along."""
    if p is None:
        return None
    p = same_library(p, x, name, backend)
    floating(p, backend, name)
    if not same_lengths(tuple(p.shape), shape):
        msg = (
            f"{name} must have shape {shape}, one value for each position along the "
            f"axes it belongs to, but its shape is {tuple(p.shape)}."
        )
        raise ValueError(msg)
    return p


def remembered(array: Array, shape: tuple[int, ...], name: str, backend: Backend) -> None:
    """State is of the library of ``x``: it is kept, so it is not converted."""
    if backend_of(array) is not backend or not same_lengths(tuple(array.shape), shape):
        msg = (
            f"state[{name!r}] must be an array of shape {shape} of the same library as x, but got "
            f"a {type(array).__name__} of shape {tuple(array.shape)}; start from the layer's own "
            f"init(xp=...)."
        )
        raise ValueError(msg)


def broadcasts(p: Array, x: Array, name: str) -> None:
    """The shape of ``p`` broadcasts to that of ``x``."""
    shape, full = tuple(p.shape), tuple(x.shape)
    last = full[len(full) - len(shape) :]
    if len(shape) > len(full) or any(
        n not in (1, m) and None not in (n, m) for n, m in zip(shape, last, strict=True)
    ):
        msg = (
            f"{name} must broadcast to the shape of x, {full}, but its shape is {shape}; give it "
            f"the rank of x, with length 1 along the axes it does not depend on."
        )
        raise ValueError(msg)


def same_shape(a: Array, x: Array, name: str) -> None:
    """One value for each of ``x``."""
    if tuple(a.shape) != tuple(x.shape):
        msg = f"{name} must have the shape {tuple(x.shape)}, but its shape is {tuple(a.shape)}."
        raise ValueError(msg)


def values_per_channel(count: Count) -> None:
    """More than one value to take the statistics of a channel from."""
    if not is_array(count) and count == 1:
        msg = (
            "BatchNorm in training needs more than one value per channel, but got one: its "
            "variance is not defined. Use a larger batch, or the running statistics."
        )
        raise ValueError(msg)


def values_per_group(count: Count, what: Any) -> None:
    """More than one value to take the statistics of a group from."""
    if not is_array(count) and count == 1:
        msg = (
            f"{what} needs more than one value in each group that it normalizes, but got one: its "
            f"variance is not defined. Use larger groups, or an x with more positions."
        )
        raise ValueError(msg)


def divisible(num_channels: int | None, num_groups: int) -> None:
    """Groups of equal size."""
    if num_channels is None:
        msg = (
            "the number of channels must be known to divide them into groups, but it is None; set "
            "the shape of x first, for example with tf.ensure_shape."
        )
        raise ValueError(msg)
    if num_channels % num_groups:
        msg = (
            f"num_channels ({num_channels}) must be divisible by num_groups ({num_groups}), so "
            f"that the groups are of equal size."
        )
        raise ValueError(msg)


def weights_for(
    x: Array, weights: Array | None, channel: int | None, backend: Backend
) -> Array | None:
    """``weights`` (or a mask) in the statistics dtype, with the rank of ``x``, ready to broadcast.

    Without a ``channel`` axis they broadcast by the usual rule. With one, they have the rank of
    ``x``, or one less: then they lack the channel axis.
    """
    if weights is None:
        return None
    xp = backend.xp
    weights = backend.asarray(weights, x)
    shape, full = tuple(weights.shape), tuple(x.shape)
    if channel is not None and len(shape) == len(full) - 1:
        shape = (*shape[:channel], 1, *shape[channel:])
    elif channel is None:
        shape = (1,) * (len(full) - len(shape)) + shape
    fits = len(shape) == len(full) and all(
        w in (1, n) or w is None or n is None for w, n in zip(shape, full, strict=True)
    )
    if not fits:
        rule = (
            "broadcast to the shape of x"
            if channel is None
            else "have the shape of x, broadcast to it at equal rank, or lack only the channel axis"
        )
        msg = (
            f"a mask or weights must {rule}, but its shape is {tuple(weights.shape)} and x has "
            f"shape {full}; reshape it first."
        )
        raise ValueError(msg)
    if xp.isdtype(weights.dtype, "complex floating"):
        msg = (
            f"a mask or weights must be booleans or nonnegative numbers, but the dtype is "
            f"{weights.dtype}."
        )
        raise TypeError(msg)
    if not xp.isdtype(weights.dtype, "bool") and backend.is_visible(weights):
        if not bool(xp.all(weights >= 0)):
            msg = (
                "weights must not be negative, nor NaN: they say how often each value counts, and "
                "0 leaves it out."
            )
            raise ValueError(msg)
    for _ in range(len(shape) - len(weights.shape)):
        weights = xp.expand_dims(weights, axis=0 if channel is None else channel)
    counted = xp.astype(weights, backend.statistics_dtype(x.dtype))
    if xp.isdtype(weights.dtype, "bool"):
        return counted
    # Where they could not be seen above.
    return xp.where(counted > 0, counted, xp.zeros_like(counted))


def one_axis_each(shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    """A layer names one axis for each length, at least one, in ascending order."""
    if len(shape) != len(axes) or not shape:
        msg = (
            f"shape and axes must name the same number of axes, one at least, but got shape "
            f"{shape} and axes {axes}."
        )
        raise ValueError(msg)
    for sign in (True, False):
        alike = [axis for axis in axes if (axis < 0) == sign]
        if alike != sorted(set(alike)):
            msg = (
                f"axes must be in ascending order, each once, as the lengths in shape are, but got "
                f"{axes}; sort both."
            )
            raise ValueError(msg)


def shape_and_axes(shape: Any, axes: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The lengths that a layer is defined for and the axes they are of, the last ones if None."""
    shape = tuple(shape) if isinstance(shape, Sequence) else (shape,)
    for n in shape:
        length(n, "each length in shape")
    if axes is None:
        axes = tuple(range(-len(shape), 0))
    axes = tuple(axes) if isinstance(axes, Sequence) else (axes,)
    for axis in axes:
        axis_number(axis)
    one_axis_each(shape, axes)
    return shape, axes


def channel_axis(axis: Any, ndim: int) -> tuple[int, ...]:
    """The channel axis where the first axis is the batch's."""
    found = axes_in_range(axis, ndim)
    if found == (0,):
        msg = (
            f"the first axis is that of the samples, which are normalized one by one, but the "
            f"channel axis {axis} of {ndim} dimensions is the same; move the axes of x."
        )
        raise ValueError(msg)
    return found


def no_definition(value: Any) -> TypeError:
    """What was given as a definition is none."""
    msg = f"a layer is built from a definition such as nk.BatchNorm(64), but got {value!r}."
    return TypeError(msg)


def computes_as_its_class(layer: Any, call: str, *packages: str) -> None:
    """Refuse a layer of a subclass that has a ``call`` of its own: no definition describes it."""
    kind = type(layer)
    [of] = [c for c in kind.__mro__ if call in vars(c)][:1]
    if not of.__module__.startswith(tuple(f"{package}." for package in (*packages, "normkit"))):
        msg = (
            f"{kind.__module__}.{kind.__qualname__} has a {call} of its own, so that it may "
            f"compute anything; there is no definition that describes it."
        )
        raise ValueError(msg)


def no_layer(value: Any) -> TypeError:
    """What was given as a layer is none whose definition is known."""
    msg = (
        f"a definition can be read from a normalization layer, but got a "
        f"{type(value).__module__}.{type(value).__qualname__}."
    )
    return TypeError(msg)
