"""Mean and variance in as few passes over the data as XLA can do it in.

One pass gives mean(x) and one mean(x * x), which are exact while the mean is not large beside the
spread. If it is, two more passes (:func:`_shifted`) take the statistics around a value of each
group. On the CPU a branch of the compiled function decides that; elsewhere, where such passes
are fused into one and a branch waits for the device, the latter is done at once.

Each pass starts at an ``optimization_barrier``: what two passes have in common (``x - p``, or ``x``
in float32) is not worth an array, but XLA would make one of it.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.export import is_symbolic_dim

from normkit._statistics import LARGE

Axes = tuple[int, ...]

# Up to here, mean / deviation costs no digit of mean(x * x) - mean(x)**2 that anyone will miss.
_NEAR = 2.0
# Up to this size, passes take less time than a branch, which takes some to compile as well.
_SMALL = 2**14


class Plan(NamedTuple):
    """What is known of a call before there are any values.

    Attributes:
        axes: the reduced axes.
        bulk: the longest run of them, which is added up first; the rest is small.
        tail: the lengths of the axes behind the bulk, if some of them are reduced too: they are
            one axis of the arrays here, so that what is applied to them lies along one axis.
        count: the number of values in a group.
        folded: whether the parameters are constant along it.
        centred: whether the mean is subtracted.
        eps: added to the variance.
        dtype, wide: of the result, and what is computed in.
    """

    axes: Axes
    bulk: Axes
    tail: tuple[Any, ...]
    count: Any
    folded: bool
    centred: bool
    eps: float
    dtype: Any
    wide: Any


class Statistics(NamedTuple):
    """Of each group, in the shape of ``x`` with the bulk as 1: the mean is ``p + r``.

    ``p`` is a constant to the derivative, so near the mean that ``x - p`` loses nothing, and ``r``
    the rest. Both are None where the mean is not subtracted.
    """

    p: Array | None
    r: Array | None
    variance: Array
    rstd: Array


def joined(plan: Plan, a: Array) -> Array:
    """``a`` with the axes of the tail as one."""
    kept = a.shape[: plan.bulk[-1] + 1]
    return a.reshape(*kept, math.prod(a.shape[len(kept) :])) if plan.tail else a


def _parted(plan: Plan, a: Array) -> Array:
    return a.reshape(*a.shape[:-1], *plan.tail) if plan.tail else a


def of_groups(plan: Plan, small: Array) -> Array:
    """One value for each group, the reduced axes being kept."""
    small = _parted(plan, small)
    return small[tuple(slice(0, 1 if a in plan.axes else n) for a, n in enumerate(small.shape))]


def _for_all(plan: Plan, shape: tuple[Any, ...], groups: Array) -> Array:
    """What each group has, in the shape of a small array."""
    return joined(plan, jnp.broadcast_to(groups, shape))


def average(plan: Plan, terms: Array) -> Array:
    """The mean of each group, in the shape of ``terms`` with the bulk as 1."""
    total = jnp.sum(terms, axis=plan.bulk, keepdims=True)
    rest = tuple(axis for axis in plan.axes if axis not in plan.bulk)
    if rest:
        total = _parted(plan, total)
        total = _for_all(plan, total.shape, jnp.sum(total, axis=rest, keepdims=True))
    count = plan.count
    return total / (jnp.asarray(count, total.dtype) if is_symbolic_dim(count) else float(count))


def _pass(plan: Plan, x: Array, *small: Any) -> tuple[Any, ...]:
    """``x`` in what is computed in, and what goes with it, for one pass over the data."""
    x, *small = lax.optimization_barrier((x, *small))
    return x.astype(plan.wide), *small


@partial(jax.custom_jvp, nondiff_argnums=(0,))
@partial(jax.jit, static_argnums=0)
def statistics(plan: Plan, x: Array) -> Statistics:
    take = _taken if plan.centred else _squares
    p, r, variance, per_unit = take(plan, x)
    rstd = per_unit / jnp.sqrt(variance + plan.eps * per_unit * per_unit)
    # Not divided twice by the unit: XLA would divide once, by a square that is zero.
    usual = per_unit == 1
    deviation = jnp.sqrt(jnp.where(usual, 1, variance)) / per_unit
    return Statistics(p, r, jnp.where(usual, variance, deviation * deviation), rstd)


@statistics.defjvp
def _statistics_jvp(plan: Plan, primals: Any, tangents: Any) -> tuple[Statistics, Statistics]:
    (x,), (dx,) = primals, tangents
    found = statistics(plan, x)
    return found, _statistics_tangent(plan, x, found, dx)


@partial(jax.jit, static_argnums=0)
def _statistics_tangent(plan: Plan, x: Array, found: Statistics, dx: Array) -> Statistics:
    u = dx.astype(plan.wide)
    e, *_ = centred(plan, x, found)
    mean, product = None, average(plan, u * e)
    if plan.centred:
        mean = average(plan, u)
        product = product - found.r * mean
    drstd = -found.rstd * (found.rstd * (found.rstd * product))
    return Statistics(None if mean is None else jnp.zeros_like(mean), mean, 2 * product, drstd)


def centred(plan: Plan, x: Array, found: Statistics, *small: Any) -> tuple[Any, ...]:
    x, p, *small = _pass(plan, x, found.p, *small)
    return (x - p if plan.centred else x), *small


def _large(plan: Plan) -> tuple[float, float]:
    return LARGE[plan.wide.name]


def _taken(plan: Plan, x: Array) -> tuple[Array, Array, Array, Array]:
    """p, r, the variance, and the unit in which it is."""
    if _is_small(x):
        return _shifted(plan, x)
    return lax.platform_dependent(x, cpu=partial(_guarded, plan), default=partial(_shifted, plan))


def _is_small(x: Array) -> bool:
    return not any(map(is_symbolic_dim, x.shape)) and x.size <= _SMALL


def _guarded(plan: Plan, x: Array) -> tuple[Array, Array, Array, Array]:
    mean = average(plan, x.astype(plan.wide))
    wide, mean = _pass(plan, x, mean)
    variance = jnp.maximum(average(plan, wide * wide) - mean * mean, 0)
    near = (mean * mean <= _NEAR**2 * variance) & (variance < _large(plan)[0])

    def far(x: Array, *simple: Array) -> tuple[Array, ...]:
        # Group by group, so that none depends on the others.
        found = _shifted(plan, x)
        return tuple(jnp.where(near, a, b) for a, b in zip(simple, found, strict=True))

    simple = mean, jnp.zeros_like(mean), variance, jnp.ones_like(mean)
    return lax.cond(jnp.all(near), lambda _, *simple: simple, far, x, *simple)


def _shifted(plan: Plan, x: Array) -> tuple[Array, Array, Array, Array]:
    """The same around the first value of each group, from which the mean is not further than a
    value may be: what that costs is small beside the largest result."""
    first = x[tuple(slice(0, 1 if a in plan.bulk else n) for a, n in enumerate(x.shape))]
    shape = _parted(plan, first).shape
    first = _for_all(plan, shape, of_groups(plan, first.astype(plan.wide)))
    wide, first = _pass(plan, x, first)
    p = first + average(plan, wide - first)
    # The same p wherever it is used: see Backend.constant.
    p = jnp.where(p > -jnp.inf, p, jnp.nan)
    wide, p = _pass(plan, x, p)
    r = average(plan, wide - p)
    variance, per_unit = _in_a_unit(plan, wide - p)
    return p, r, jnp.maximum(variance - (r * per_unit) ** 2, 0), per_unit


def _squares(plan: Plan, x: Array) -> tuple[None, None, Array, Array]:
    def plainly(x: Array) -> tuple[Array, Array]:
        return _in_a_unit(plan, x.astype(plan.wide))

    if _is_small(x):
        return None, None, *plainly(x)
    guarded = partial(_guarded_squares, plan)
    return None, None, *lax.platform_dependent(x, cpu=guarded, default=plainly)


def _guarded_squares(plan: Plan, x: Array) -> tuple[Array, Array]:
    wide = x.astype(plan.wide)
    variance = average(plan, wide * wide)
    usual = variance < _large(plan)[0]
    return lax.cond(
        jnp.all(usual),
        lambda _, variance: (variance, jnp.ones_like(variance)),
        lambda x, _: _in_a_unit(plan, x.astype(plan.wide)),
        x,
        variance,
    )


def _in_a_unit(plan: Plan, values: Array) -> tuple[Array, Array]:
    """The mean of the squares, in a unit in which it is a number; and that unit."""
    large, small = _large(plan)
    # Were it a constant, XLA would multiply by its square, which is zero.
    unit = lax.optimization_barrier(jnp.asarray(small, values.dtype))
    scaled = values * unit
    variance = average(plan, values * values)
    usual = variance < large
    variance = jnp.where(usual, variance, average(plan, scaled * scaled))
    return variance, jnp.where(usual, 1, unit)
