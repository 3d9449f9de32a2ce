"""Standardization in few passes over the data, and its derivative.

How the statistics are taken is in ``_kernel_statistics.py``. The derivative is that of
``normkit._engine.derivative``, in terms that share their sums when it is transposed. It keeps ``x``
itself for the backward pass, and nothing else of its size.

Each function here is an operation of ``normkit._backend.Backend``, or None where the engine does
it. Without this file it does all of it.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, core, errors, lax
from jax.export import is_symbolic_dim

from normkit._backend import Backend
from normkit._explain import declined, taken

from ._kernel_statistics import (
    Axes,
    Plan,
    Statistics,
    average,
    centred,
    joined,
    of_groups,
    statistics,
)

PATHS = {
    "channels": "parameters, if any, that are constant along the longest run of reduced axes",
    "features": "parameters that vary along the longest run of reduced axes",
}

# A length that is not known yet counts as this one where runs of axes are compared.
_SYMBOLIC = 64
# What says that symbols cannot be compared; older versions of JAX have it elsewhere.
_INCONCLUSIVE = "InconclusiveDimensionOperation"
_UNKNOWN = getattr(errors if hasattr(errors, _INCONCLUSIVE) else core, _INCONCLUSIVE)


def standardize(
    x: Array,
    axes: Axes,
    scale: Array | None,
    bias: Array | None,
    eps: float,
    remember: bool,
    dtype: Any,
    backend: Backend,
) -> tuple[Array, Array | None, Array | None] | None:
    plan = _plan(x, axes, (scale, bias), True, eps, dtype, backend.statistics_dtype(x.dtype))
    if plan is None:
        return None
    shape, x = x.shape, joined(plan, x)
    found = statistics(plan, x)
    parameters = (_parameter(plan, p) for p in (scale, bias))
    y = _normalized(plan, x, found, *parameters).reshape(shape)
    if not remember:
        return y, None, None
    return y, of_groups(plan, found.p + found.r), of_groups(plan, found.variance)


def normalize(
    x: Array,
    mean: Array,
    variance: Array,
    scale: Array | None,
    bias: Array | None,
    eps: float,
    dtype: Any,
    backend: Backend,
) -> None:
    return declined("with statistics that are given, XLA makes one pass of the engine")


def rescale(
    x: Array, axes: Axes, scale: Array | None, eps: float, dtype: Any, backend: Backend
) -> Array | None:
    plan = _plan(x, axes, (scale,), False, eps, dtype, backend.statistics_dtype(x.dtype))
    if plan is None:
        return None
    shape, x = x.shape, joined(plan, x)
    y = _normalized(plan, x, statistics(plan, x), _parameter(plan, scale), None)
    return y.reshape(shape)


def _plan(
    x: Array,
    axes: Axes,
    parameters: tuple[Array | None, ...],
    centred: bool,
    eps: float,
    dtype: Any,
    wide: Any,
) -> Plan | None:
    if not all(_is_positive(n) for n in x.shape):
        return declined("an array is empty, or may be")
    given = [p for p in parameters if p is not None]
    varies = [any(_is_long(p.shape[axis]) for p in given) for axis in range(x.ndim)]
    bulk = _longest_run(x.shape, axes, varies)
    if not bulk:
        return declined("there is nothing to add up")
    folded = not any(varies[axis] for axis in bulk)
    taken("channels" if folded else "features")
    tail = x.shape[bulk[-1] + 1 :] if bulk[-1] < max(axes) else ()
    count = math.prod(x.shape[axis] for axis in axes)
    dtypes = jnp.dtype(dtype), jnp.dtype(wide)
    return Plan(axes, bulk, tail, count, folded, centred, float(eps), *dtypes)


def _longest_run(shape: tuple[Any, ...], axes: Axes, varies: list[bool]) -> Axes:
    """The axes of the longest run of reduced ones along which parameters do, or do not, vary."""
    runs: list[list[int]] = []
    open_ = False
    for axis, length in enumerate(shape):
        if not _is_long(length):
            continue
        if axis not in axes:
            open_ = False
        elif open_ and varies[runs[-1][-1]] == varies[axis]:
            runs[-1].append(axis)
        else:
            runs.append([axis])
            open_ = True
    return max(map(tuple, runs), key=lambda run: _nominal(shape, run), default=())


def _nominal(shape: tuple[Any, ...], axes: Axes) -> int:
    return math.prod(_SYMBOLIC if is_symbolic_dim(shape[a]) else shape[a] for a in axes)


def _is_long(length: Any) -> bool:
    return is_symbolic_dim(length) or length > 1


def _is_positive(length: Any) -> bool:
    try:
        return bool(length >= 1)
    except _UNKNOWN:
        return False


def _parameter(plan: Plan, p: Array | None) -> Array | None:
    if p is None or not plan.tail:
        return p
    kept = p.shape[: plan.bulk[-1] + 1]
    return joined(plan, jnp.broadcast_to(p, (*kept, *plan.tail)))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
@partial(jax.jit, static_argnums=0)
def _normalized(
    plan: Plan, x: Array, found: Statistics, scale: Array | None, bias: Array | None
) -> Array:
    """``(x - p - r) * rstd * scale + bias``. ``found`` has to be that of ``x``."""
    scale, bias = (None if a is None else a.astype(plan.wide) for a in (scale, bias))
    if plan.folded:
        k = found.rstd if scale is None else found.rstd * scale
        offset = -found.r * k if plan.centred else None
        if bias is not None:
            offset = bias if offset is None else offset + bias
        e, k, offset = centred(plan, x, found, k, offset)
        return (e * k if offset is None else e * k + offset).astype(plan.dtype)
    offset = found.r * found.rstd if plan.centred else None
    y, rstd, offset, scale, bias = centred(plan, x, found, found.rstd, offset, scale, bias)
    y = y * rstd
    y = y if offset is None else y - offset
    y = y if scale is None else y * scale
    return (y if bias is None else y + bias).astype(plan.dtype)


@_normalized.defjvp
def _normalized_jvp(plan: Plan, primals: Any, tangents: Any) -> tuple[Array, Array]:
    x, found, scale, bias = primals
    # Those of the statistics are in the formula already.
    dx, _, dscale, dbias = tangents
    y = _normalized(plan, x, found, scale, bias)
    return y, _tangent(plan, x, found, scale, dx, dscale, dbias)


@partial(jax.jit, static_argnums=0)
def _tangent(plan: Plan, *args: Any) -> Array:
    # What is computed of x is computed again in the backward pass, not kept for it.
    change = _folded_tangent if plan.folded else _tangent_along
    return jax.checkpoint(partial(change, plan))(*args)


def _folded_tangent(
    plan: Plan,
    x: Array,
    found: Statistics,
    scale: Array | None,
    dx: Array,
    dscale: Array | None,
    dbias: Array | None,
) -> Array:
    """Everything small is gathered in two terms: transposed, these are two sums over the bulk."""
    k = found.rstd if scale is None else found.rstd * scale.astype(plan.wide)
    u, mean, product = _means(plan, x, found, dx)
    slope = -k * product
    if dscale is not None:
        slope = slope + dscale.astype(plan.wide)
    offset = None
    if plan.centred:
        offset = -k * mean - found.r * found.rstd * slope
    if dbias is not None:
        offset = dbias.astype(plan.wide) + (0 if offset is None else offset)
    z, k = _rough(plan, x, found, k)
    dy = u * k + slope * z
    return (dy if offset is None else dy + offset).astype(plan.dtype)


def _tangent_along(
    plan: Plan,
    x: Array,
    found: Statistics,
    scale: Array | None,
    dx: Array,
    dscale: Array | None,
    dbias: Array | None,
) -> Array:
    """What the standardized values are multiplied by is one term: transposed, its gradient is an
    array that both sums over the data are taken of."""
    rstd = found.rstd
    u, mean, product = _means(plan, x, found, dx)
    slope = -rstd * product
    dy = u * rstd
    offset = None if mean is None else -rstd * mean
    if scale is not None:
        first = scale.astype(plan.wide)
        second = lax.optimization_barrier(first)  # see _pass
        dy, slope = dy * first, slope * second
        offset = None if offset is None else offset * lax.optimization_barrier(second)
    if dscale is not None:
        slope = slope + dscale.astype(plan.wide)
    y, shift = _rough(plan, x, found, found.r * rstd if plan.centred else None)
    dy = dy + slope * (y if shift is None else y - shift)
    if offset is not None:
        dy = dy + offset
    if dbias is not None:
        dy = dy + dbias.astype(plan.wide)
    return dy.astype(plan.dtype)


def _means(plan: Plan, x: Array, found: Statistics, dx: Array) -> tuple[Array, Array | None, Array]:
    """u, mean(u), and mean(u * y) of the standardized values y."""
    u = dx.astype(plan.wide)
    z, *_ = _rough(plan, x, found)
    product = average(plan, u * z)
    if not plan.centred:
        return u, None, product
    mean = average(plan, u)
    return u, mean, product - found.r * found.rstd * mean


def _rough(plan: Plan, x: Array, found: Statistics, *small: Any) -> tuple[Any, ...]:
    """The standardized values but for ``r * rstd``, which is to be subtracted.

    No product of ``rstd`` with itself takes its place: of huge values that would be zero.
    """
    e, rstd, *small = centred(plan, x, found, found.rstd, *small)
    return e * rstd, *small
