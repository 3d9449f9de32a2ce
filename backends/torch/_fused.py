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
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.fx.experimental.symbolic_shapes import statically_known_true

from normkit._backend import Backend
from normkit._explain import declined, taken

from ._fit import Axes
from ._fused_statistics import (
    Found,
    find,
    in_units_of_x,
    less,
    share_of,
    sum_to,
    total_over,
    wide_of,
)

PATHS = {
    "fused": "exported and transformed functions: sums around a rough mean, in few passes",
    "fused, with its derivative": "compiled functions: the same, and the gradient in few passes",
    "fused, of given moments": "compiled and exported functions in evaluation",
}


def standardize(
    x: Tensor,
    axes: Axes,
    scale: Tensor | None,
    bias: Tensor | None,
    eps: float,
    remember: bool,
    dtype: torch.dtype,
    backend: Backend,
) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    if _is_empty(x):
        return declined("x is empty")
    found = find(x, axes, eps, centred=True)
    y = _apply(x, axes, scale, bias, eps, dtype, found)
    if not remember:
        return y, None, None
    mean = found.rough if found.rest is None else found.rough + found.rest
    return y, mean, in_units_of_x(found)


def normalize(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    backend: Backend,
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
    x: Tensor, axes: Axes, scale: Tensor | None, eps: float, dtype: torch.dtype, backend: Backend
) -> Tensor | None:
    if _is_empty(x):
        return declined("x is empty")
    return _apply(x, axes, scale, None, eps, dtype, find(x, axes, eps, centred=False))


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
    wide = wide_of(x.dtype)
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
            found = find(x, ctx.axes, ctx.eps, ctx.centred)
            dx, dscale, dbias = _gradients(x, g, ctx.axes, scale, ctx.bias, found)
        return dx, dscale, dbias, None, None, None, None, None, None


def _gradients(
    x: Tensor, g: Tensor, axes: Axes, scale: Tensor | None, bias: Axes | None, found: Found
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    rough, rest, _, rstd, _ = found
    u, d = g.to(rstd.dtype), less(x, rough)
    # First over the axes along which there is one scale: gradients of all kinds come from that.
    given = [shape for shape in (None if scale is None else scale.shape, bias) if shape is not None]
    alone = tuple(a for a in axes if all(shape[a] == 1 for shape in given))
    along = tuple(a for a in axes if a not in alone)
    du, total = total_over(u * d, alone), total_over(u, alone)
    dy = du if rest is None else du - rest * total  # sums of u * (x - mean)
    dscale = None if scale is None else sum_to(dy * rstd, scale.shape)
    dbias = None if bias is None else sum_to(total, bias)
    share = share_of(x, axes)
    if scale is not None and not along and scale.shape == rstd.shape:
        factor = rstd * scale  # the same for a whole group
    else:
        factor = rstd
        if scale is not None:
            u, dy, total = u * scale, dy * scale, total * scale
    slope = rstd * (rstd * total_over(dy, along) * share)
    mean = None
    if rough is not None:
        mean = total_over(total, along) * share
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
    y = less(x, rough) * factor
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
