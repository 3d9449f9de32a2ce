"""Standardization in one go over the memory, for NumPy arrays: which calls, and by what.

An operation of the engine goes over the whole array a dozen times. Here groups that fit into the
cache are finished before the next ones are loaded: by ``_blocks.py`` with NumPy's own functions, or
by ``_compiled.py`` in loops of ``_numba.py`` on all cores, if Numba is installed
(``pip install 'normkit[numba]'``) and the array has a megabyte or more. Numba compiles a loop when
it is first needed, which takes about a second, and keeps it on disk for the next time. What fits
into the cache as a whole is done by ``_small.py``.

Each function here is an operation of ``normkit._backend.Backend``, and :func:`backward` that of a
layer; or None where nothing fits. Without this file the engine does all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import ModuleType

import numpy as np
from numpy.typing import DTypeLike, NDArray

from normkit._backend import Backend
from normkit._explain import declined, taken
from normkit._statistics import averaging, cast, centre, spread

from . import _blocks, _small
from ._layout import FEATURES, Axes, Layout, layout, order_of
from ._space import LIMIT

Given = NDArray | None

PATHS = {
    "compiled": "a megabyte or more of float32 or float64, if Numba is installed",
    "blocks": "any other array without gaps in memory",
    "small": "up to 16384 values, in memory in any way",
}
# From here on compiled loops pay for their threads; and nobody waits for a compiler before.
_LARGE = 2**20
# Up to here it is the number of calls that costs time.
_SMALL = 2**14
_DTYPES = frozenset(map(np.dtype, ("float32", "float64", "float16")))
_WIDE = np.dtype(np.float64)
_USUAL = np.dtype(np.float32)


def standardize(
    x: NDArray,
    axes: Axes,
    scale: Given,
    bias: Given,
    eps: float,
    remember: bool,
    dtype: DTypeLike,
    backend: Backend,
) -> tuple[NDArray, Given, Given] | None:
    found = _standardized(x, axes, scale, bias, eps, True, dtype, backend)
    if found is None:
        return None
    y, mean, variance = found
    return (y, mean, variance) if remember else (y, None, None)


def rescale(
    x: NDArray, axes: Axes, scale: Given, eps: float, dtype: DTypeLike, backend: Backend
) -> Given:
    found = _standardized(x, axes, scale, None, eps, False, dtype, backend)
    return None if found is None else found[0]


def normalize(
    x: NDArray,
    mean: NDArray,
    variance: NDArray,
    scale: Given,
    bias: Given,
    eps: float,
    dtype: DTypeLike,
    backend: Backend,
) -> Given:
    if any(p is not None and p.shape != mean.shape for p in (variance, scale, bias)):
        return declined("statistics and parameters are not of one shape")
    if not _is_one(x):
        return None
    if x.size <= _SMALL:
        return declined("x is small")
    seen = _seen(x, _others(mean), mean.shape)
    if seen is None:
        return None
    compute = np.result_type(_compute(x), mean.dtype, variance.dtype)
    y = seen.empty(x, dtype)
    mean, variance = _given(seen, mean, variance)
    scale, bias = (seen.parameter(p, _WIDE) for p in (scale, bias))
    _by(x, y, compute).normalize(
        seen.view(x), seen.view(y), seen.form, mean, variance, scale, bias, eps, compute
    )
    return y


def backward(
    x: NDArray,
    grad: NDArray,
    axes: Axes,
    along: Axes,
    given: Mapping[str, NDArray],
    eps: float,
    centered: bool,
) -> tuple[NDArray, NDArray, NDArray] | None:
    if type(grad) is not np.ndarray or not _is_floating(grad):
        return declined("the gradient is not a NumPy array of floating-point numbers")
    scale, mean, variance = (given.get(name) for name in ("scale", "mean", "var"))
    if not _is_one(x):
        return None
    if mean is not None:
        axes = _others(mean)
    if x.size <= _SMALL:
        if mean is not None:
            return declined("x is small")
        return _small_backward(x, grad, axes, along, scale, eps, centered)
    seen = _seen(x, axes, tuple(n if axis in along else 1 for axis, n in enumerate(x.shape)))
    if seen is None:
        return None
    statistics = () if mean is None else (mean.dtype, variance.dtype)
    compute = np.result_type(_compute(x), *statistics)
    grad = seen.alike(grad, x)
    dx = seen.empty(x, x.dtype)
    found = _by(x, grad, compute).backward(
        *(seen.view(a) for a in (x, grad, dx)),
        seen.form,
        *_given(seen, mean, variance),
        seen.parameter(scale, _parameters(seen, compute)),
        eps,
        centered,
        compute,
    )
    if found is None:
        return declined("squares are no numbers")
    return dx, *(seen.gradient(p) for p in found)


def _small_backward(
    x: NDArray,
    grad: NDArray,
    axes: Axes,
    along: Axes,
    scale: Given,
    eps: float,
    centered: bool,
) -> tuple[NDArray, NDArray, NDArray] | None:
    others = tuple(axis for axis in range(x.ndim) if axis not in along)
    found = _small.backward(x, grad, axes, others, scale, eps, centered, _compute(x))
    if found is None:
        return declined("squares are no numbers")
    taken("small")
    dx, *rest = found
    return dx.astype(x.dtype, copy=False), *rest


def _given(seen: Layout, *statistics: Given) -> list[Given]:
    """Statistics of each channel, as if they were those of x."""
    return [None if p is None else seen.parameter(p, _WIDE).reshape(1, -1) for p in statistics]


def _is_one(x: NDArray) -> bool:
    """Whether ``x`` is an array for any of this."""
    if type(x) is not np.ndarray:
        declined(f"x is a {type(x).__name__}, not an array of NumPy itself")
    elif not _is_floating(x):
        declined(f"x has dtype {x.dtype}")
    elif not x.size:
        declined("x is empty")
    else:
        return True
    return False


def _seen(x: NDArray, axes: Axes, along: Axes) -> Layout | None:
    """The view of ``x``, if there is one."""
    order = order_of(x)
    if order is None:
        return declined("x has gaps in memory")
    seen = layout(x.shape, order, tuple(axes), along)
    if seen is None:
        return declined("a group is a single value, or the axes alternate too often")
    return seen


def _by(x: NDArray, other: NDArray, compute: np.dtype) -> ModuleType:
    """What computes."""
    if x.nbytes >= _LARGE and x.dtype == other.dtype == compute:
        compiled = _loops()
        if compiled is not None:
            taken("compiled")
            return compiled
    taken("blocks")
    return _blocks


@cache
def _loops() -> ModuleType | None:
    # Not before it is needed: importing Numba takes half a second.
    try:
        from . import _compiled
    except ImportError:
        return None
    return _compiled


def _standardized(
    x: NDArray,
    axes: Axes,
    scale: Given,
    bias: Given,
    eps: float,
    centered: bool,
    dtype: DTypeLike,
    backend: Backend,
) -> tuple[NDArray, NDArray, NDArray] | None:
    """The result, mean and variance."""
    if not _is_one(x):
        return None
    compute = _compute(x)
    if x.size <= _SMALL:
        taken("small")
        y, mean, variance = _small.standardize(x, axes, scale, bias, eps, centered, compute)
        lost = ~(variance <= LIMIT[compute])
        y = cast(y, dtype, backend)
    else:
        seen = _seen(x, axes, _along(x, scale, bias))
        if seen is None:
            return None
        y = seen.empty(x, dtype)
        given = (seen.parameter(p, _parameters(seen, compute)) for p in (scale, bias))
        found = _by(x, y, compute).standardize(
            seen.view(x), seen.view(y), seen.form, *given, eps, centered, compute
        )
        with np.errstate(over="ignore"):
            mean, variance = (seen.statistic(a, compute) for a in found[:2])
        lost = seen.statistic(found[2], bool)
    if lost.any():
        plain = _engine(cast(x, compute, backend), axes, scale, bias, eps, centered, backend)
        for a, b in zip((y, mean, variance) if centered else (y,), plain, strict=False):
            np.copyto(a, b, where=lost, casting="unsafe")
    return y, mean, variance


def _engine(
    x: NDArray,
    axes: Axes,
    scale: Given,
    bias: Given,
    eps: float,
    centered: bool,
    backend: Backend,
) -> tuple[NDArray, NDArray, NDArray]:
    """The same by the engine: for groups whose squares are no numbers."""
    if centered:
        found, (_, mean, variance, _) = centre(x, axes, None, backend)
    else:
        found = spread(x, averaging(x, axes, None, backend)[1], backend)
        mean = variance = found.variance
    y = found.values * found.rstd(eps, backend)
    y = y if scale is None else y * cast(scale, x.dtype, backend)
    return y if bias is None else y + cast(bias, x.dtype, backend), mean, variance


def _is_floating(x: NDArray) -> bool:
    return x.dtype in _DTYPES or (x.dtype.name == "bfloat16" and x.dtype.isnative)


def _compute(x: NDArray) -> np.dtype:
    return _WIDE if x.dtype == _WIDE else _USUAL


def _parameters(seen: Layout, compute: np.dtype) -> np.dtype:
    """The dtype of parameters: wide, where they are multiplied by statistics first."""
    return compute if seen.form == FEATURES else _WIDE


def _along(x: NDArray, *given: Given) -> Axes:
    """The shape that all that is given broadcasts to."""
    shapes = [p.shape for p in given if p is not None]
    if len(shapes) == 2 and shapes[0] != shapes[1]:
        return np.broadcast_shapes(*shapes)
    return shapes[0] if shapes else (1,) * x.ndim


def _others(p: NDArray) -> Axes:
    return tuple(axis for axis, n in enumerate(p.shape) if n == 1)
