"""Standardization for compilers: what torch.compile and torch.export see instead of the engine.

A compiler makes one loop of all that can be computed side by side, so that what counts is how
often x is gone through. Here that is twice and a bit, where the engine takes five passes::

    p = mean(part of x)     d = x - p     c = mean(d)     s = mean(d * d)
    variance = s - c * c    y = (d - c) / sqrt(variance + eps)                mean = p + c

The part is an eighth of the values, or more. If its mean is far from that of all, the variance is
large as well: c * c is at most seven times the variance, whatever the values are, and ``s - c * c``
loses three bits at worst. Nothing here depends on p, which is a constant to the derivative.

For torch.compile the derivative is written out: the symmetric one of ``_engine.derivative``, with
both of its sums in one loop. All of it is branch-free, and without this file the engine is traced.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.fx.experimental.symbolic_shapes import statically_known_true

from normkit._explain import declined, taken

Axes = tuple[int, ...]

PATHS = {
    "fused": "exported and transformed functions: sums around a rough mean, in few passes",
    "fused, with its derivative": "compiled functions: the same, and the gradient in few passes",
    "fused, of given moments": "compiled and exported functions in evaluation",
}


class Found(NamedTuple):
    """The statistics of x along some axes, which are kept with length 1.

    Attributes:
        rough, rest: the mean in two parts, None where it is not subtracted. The rest is None as
            well if the rough part is all of it.
        variance: the mean square of what is left, in a unit of its own where not ``usual``.
        rstd: 1 / sqrt(variance + eps), in units of 1 / x.
        usual: where the unit is that of x.
    """

    rough: Tensor | None
    rest: Tensor | None
    variance: Tensor
    rstd: Tensor
    usual: Tensor | None


def standardize(
    x: Tensor,
    axes: Axes,
    scale: Tensor | None,
    bias: Tensor | None,
    eps: float,
    remember: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    if _is_empty(x):
        return declined("x is empty")
    found = _find(x, axes, eps, centred=True)
    y = _apply(x, axes, scale, bias, eps, dtype, found)
    if not remember:
        return y, None, None
    mean = found.rough if found.rest is None else found.rough + found.rest
    return y, mean, _in_units_of_x(found)


def normalize(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    taken("fused, of given moments")
    wide = functools.reduce(
        torch.promote_types, (x.dtype, mean.dtype, variance.dtype), torch.float32
    )
    factor = torch.rsqrt(variance.to(wide) + eps)
    if scale is not None and scale.shape == factor.shape:
        factor, scale = factor * scale.to(wide), None
    mean, factor = _kept(mean.to(wide), factor)
    y = (x.to(wide) - mean) * factor
    if scale is not None:
        y = y * scale.to(wide)
    return (y if bias is None else y + bias.to(wide)).to(dtype)


def rescale(
    x: Tensor, axes: Axes, scale: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor | None:
    if _is_empty(x):
        return declined("x is empty")
    return _apply(x, axes, scale, None, eps, dtype, _find(x, axes, eps, centred=False))


def _is_empty(x: Tensor) -> bool:
    return any(statically_known_true(n == 0) for n in x.shape)


def _apply(
    x: Tensor,
    axes: Axes,
    scale: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    found: Found,
) -> Tensor:
    wide = _wide(x.dtype)
    scale, bias = (None if p is None else p.to(wide) for p in (scale, bias))
    if _rule_applies():
        taken("fused, with its derivative")
        parts = found.rough, found.rest, found.rstd
        return _Standardized.apply(x, scale, bias, *parts, axes, eps, dtype)
    taken("fused")
    return _affine(x, axes, scale, bias, found.rough, found.rest, found.rstd).to(dtype)


def _rule_applies() -> bool:
    """Whether gradients are all that may be asked for; else those of each operation serve."""
    return (
        torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and torch._C._functorch.get_dynamic_layer_stack_depth() == 0
        and torch.autograd.forward_ad._current_level < 0
    )


class _Standardized(Function):
    """Standardization and what follows it, by statistics that have been taken already."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor | None, bias: Tensor | None, *rest: Any
    ) -> Tensor:
        rough, shift, rstd, ctx.axes, ctx.eps, dtype = rest
        ctx.centred = rough is not None
        ctx.bias = None if bias is None else tuple(bias.shape)
        ctx.save_for_backward(x, scale)
        return _affine(x, ctx.axes, scale, bias, rough, shift, rstd).to(dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        # Taken again, so that this has a derivative in its turn. A compiler sees that they are the
        # ones of the forward pass, and keeps those; they are all it keeps besides x and scale.
        with torch.enable_grad():
            found = _find(x, ctx.axes, ctx.eps, ctx.centred)
            dx, dscale, dbias = _gradients(x, g, ctx.axes, scale, ctx.bias, found)
        return dx, dscale, dbias, None, None, None, None, None, None


def _gradients(
    x: Tensor, g: Tensor, axes: Axes, scale: Tensor | None, bias: Axes | None, found: Found
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    rough, rest, _, rstd, _ = found
    u, d = g.to(rstd.dtype), _less(x, rough)
    # First over the axes along which there is one scale: gradients of all kinds come from that.
    given = [shape for shape in (None if scale is None else scale.shape, bias) if shape is not None]
    alone = tuple(a for a in axes if all(shape[a] == 1 for shape in given))
    along = tuple(a for a in axes if a not in alone)
    du, total = _total(u * d, alone), _total(u, alone)
    dy = du if rest is None else du - rest * total  # sums of u * (x - mean)
    dscale = None if scale is None else _sum_to(dy * rstd, scale.shape)
    dbias = None if bias is None else _sum_to(total, bias)
    share = _share(x, axes)
    if scale is not None and not along and scale.shape == rstd.shape:
        factor = rstd * scale  # the same for a whole group
    else:
        factor = rstd
        if scale is not None:
            u, dy, total = u * scale, dy * scale, total * scale
    slope = rstd * (rstd * _total(dy, along) * share)
    mean = None
    if rough is not None:
        mean = _total(total, along) * share
        mean = mean if rest is None else mean - rest * slope
    if _side_by_side(x, axes):
        factor, slope, mean = _kept(factor, slope, mean)
    dx = u - d * slope
    if mean is not None:
        dx = dx - mean
    return (dx * factor).to(x.dtype), dscale, dbias


def _affine(
    x: Tensor,
    axes: Axes,
    scale: Tensor | None,
    bias: Tensor | None,
    rough: Tensor | None,
    rest: Tensor | None,
    rstd: Tensor,
) -> Tensor:
    factor, shift = rstd, None
    if scale is not None and any(scale.shape[axis] == 1 for axis in axes):
        factor, scale = factor * scale, None  # one number for many values
    if rest is not None:
        shift = rest * factor
        if scale is None and bias is not None and bias.shape == shift.shape:
            shift, bias = shift - bias, None
    if _side_by_side(x, axes):
        rough, factor, shift = _kept(rough, factor, shift)
    y = _less(x, rough) * factor
    if shift is not None:
        y = y - shift
    if scale is not None:
        y = y * scale
    return y if bias is None else y + bias


def _side_by_side(x: Tensor, axes: Axes) -> bool:
    """Whether values of several groups lie side by side, or groups in many places."""
    kept = (axis for axis in range(x.ndim) if axis not in axes)
    return 0 in axes or any(statically_known_true(x.stride(axis) == 1) for axis in kept)


def _kept(*given: Tensor | None) -> list[Tensor | None]:
    """The same in an array: Inductor computes again, for every value, what is in none."""
    found = [a for a in given if a is not None]
    if len(found) == 1 or any(a.shape != found[0].shape for a in found):
        return list(given)
    parts = iter(torch.cat(found).chunk(len(found)))
    return [None if a is None else next(parts) for a in given]


# Of the statistics' dtype: the mean square from which on there is another unit, what values are
# multiplied by to be in it, and what is then added to them: squares of usual values in that unit
# would be numbers that processors are slow with. (The variance does not depend on it.)
_UNITS = {
    torch.float32: (2.0**80, 2.0**-76, 2.0**-62),
    torch.float64: (2.0**640, 2.0**-600, 2.0**-500),
}


def _find(x: Tensor, axes: Axes, eps: float, centred: bool) -> Found:
    """The statistics of ``x``."""
    share = _share(x, axes)
    rough, near = _rough(x, axes, centred)
    d = _less(x, rough)
    if near is None:
        squares = _total(d * d, axes) * share
    else:
        squares = near + _total(d * d - near, axes) * share
    rest = _total(d, axes) * share if centred else None
    offset, usual = rest, None
    large, unit, away = _UNITS[d.dtype]
    if x.dtype != torch.float16:  # whose squares are no large numbers
        usual = squares < large
        far = d * unit + away
        squares = torch.where(usual, squares, _total(far * far, axes) * share)
        offset = None if rest is None else torch.where(usual, rest, rest * unit + away)
    variance = squares
    if offset is not None:
        variance = squares - offset * offset
        # Of equal values rounding alone is left, which must not come out negative.
        least = squares * 2.0**-20
        variance = torch.where(variance >= least, variance, least)
    if usual is None:
        rstd = torch.rsqrt(variance + eps)
    else:
        rstd = torch.rsqrt(torch.where(usual, variance + eps, variance + eps * unit * unit))
        rstd = torch.where(usual, rstd, rstd * unit)
    if rest is not None and x.dtype == torch.bfloat16:
        # The mean has so many more digits than x that it needs no rest.
        rough, rest = rough + rest, None
    return Found(rough, rest, variance, rstd, usual)


def _in_units_of_x(found: Found) -> Tensor:
    """The variance, infinite where it is no number of its dtype."""
    if found.usual is None:
        return found.variance
    unit = _UNITS[found.variance.dtype][1]
    # Not divided twice by the unit: a compiler would divide once, by a square that is zero.
    deviation = torch.sqrt(found.variance) / unit
    return torch.where(found.usual, found.variance, deviation * deviation)


def _rough(x: Tensor, axes: Axes, centred: bool) -> tuple[Tensor | None, Tensor | None]:
    """The mean of an eighth of the values, and of their squares when it is subtracted: constants.

    The first is None if the mean is not subtracted; the second, if it does not matter.
    """
    first, wide = x, _wide(x.dtype)
    for axis in axes:
        first = first.narrow(axis, 0, 1)
    first = first.to(wide).detach() if centred else 0.0
    short = _is_short(x, axes)
    if short and (not centred or _has_few_digits(x, axes)):
        return (first if centred else None), None
    for axis in axes:
        if statically_known_true(x.shape[axis] >= 8):
            x = x.narrow(axis, 0, -(-x.shape[axis] // 8))
            break
    share = _share(x, axes)
    # What is added up is near zero, or a sum in the order of the values would be far off.
    d = x.detach().to(wide) - first
    mean = d.sum(axes, keepdim=True) * share if centred else 0.0
    if centred and x.device.type != "cpu":
        # See Backend.constant: a multiplication is not fused into what follows through this.
        mean = torch.where(mean > -torch.inf, mean, torch.nan)
    near = None if short else (d * d).sum(axes, keepdim=True) * share - mean * mean
    return (first + mean if centred else None), near


def _has_few_digits(x: Tensor, axes: Axes) -> bool:
    """Whether any of the values is a rough mean, since x has few digits and not many values."""
    return x.dtype == torch.bfloat16 and statically_known_true(_count(x, axes) <= 4096)


def _is_short(x: Tensor, axes: Axes) -> bool:
    """Whether squares may be added up as they are.

    In float32 a sum in the order of the values drifts: that of the squares of numbers with few
    digits loses a quarter of a unit at every other step, as a square has the remainder 0 or 1.
    """
    if x.dtype == torch.bfloat16 or statically_known_true(_count(x, axes) <= 256):
        return True
    # Inductor adds up sixteen rows of what lies side by side.
    first, _ = _steps(x, axes)
    last = x.ndim - 1
    return (
        last in first
        and statically_known_true(x.stride(last) == 1)
        and statically_known_true(_count(x, first) <= 4096)
    )


def _less(x: Tensor, rough: Tensor | None) -> Tensor:
    x = x.to(_wide(x.dtype))
    return x if rough is None else x - rough


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _share(x: Tensor, axes: Axes) -> Any:
    """What a sum is multiplied by to be a mean. That of nothing is zero."""
    count = _count(x, axes)
    return 1 / count if count else 1.0


def _count(x: Tensor, axes: Axes) -> Any:
    return math.prod([x.shape[axis] for axis in axes])


def _total(x: Tensor, axes: Axes) -> Tensor:
    """The sum over ``axes``, which are kept."""
    for step in _steps(x, axes):
        if step:
            x = x.sum(step, keepdim=True)
    return x


def _steps(x: Tensor, axes: Axes) -> tuple[Axes, Axes]:
    """The axes to sum over in a first step and in a second, which may have none.

    The first goes along what lies side by side in memory. Neither is so long that it would lose
    digits, or that Inductor would take precautions that cost more than another step does.
    """
    first = tuple(a for i, a in enumerate(axes) if axes[i:] == tuple(range(a, x.ndim)))
    first = first or axes[1:] or axes
    while len(first) > 1 and statically_known_true(_count(x, first) > 4096):
        first = first[1:]
    return first, tuple(axis for axis in axes if axis not in first)


def _sum_to(x: Tensor, shape: Iterable[int]) -> Tensor:
    """``x`` added up over all axes along which ``shape`` has length 1."""
    return _total(x, tuple(axis for axis, length in enumerate(shape) if length == 1))
