"""Standardization out of PyTorch's own kernels, for eager float32 and float64 tensors on the CPU.

A kernel loses as many units in the last place as the mean is large beside the spread. What it
returns tells whether that was so; then it is applied again to ``x`` less its mean, which is a
constant to the derivative: neither the result nor any of its derivatives depends on it.

Each function here is an operation of ``normkit._backend.Backend``, or None where no kernel fits.
Without this file the engine does all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

Axes = tuple[int, ...]
Found = tuple[Tensor, Tensor | None, Tensor | None]

# Up to here, |mean| / sqrt(variance + eps) costs no digit that the result would have.
_KERNEL = 4.0
# The same where the variance is taken as mean(x * x) - mean * mean.
_SQUARES = 1.5


def fit(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels take ``x`` and give a result of ``dtype``."""
    return (
        x.dtype == dtype
        and dtype in (torch.float32, torch.float64)
        and x.ndim > 1
        and x.numel() > 0
        # They have no forward-mode derivative.
        and torch.autograd.forward_ad._current_level < 0
    )


def standardize(
    x: Tensor,
    axes: Axes,
    scale: Tensor | None,
    bias: Tensor | None,
    eps: float,
    remember: bool,
) -> Found | None:
    if scale is None and bias is not None:
        scale = torch.ones_like(bias)  # some derivatives of the kernels cannot do without
    given = [p for p in (scale, bias) if p is not None]
    if any(p.dtype != x.dtype for p in given):
        return None
    kept = [axis for axis in range(x.ndim) if axis not in axes]
    if len(kept) == 1 and all(tuple(p.shape) == _shape(x, kept[0]) for p in given):
        return _channels(x, kept[0], scale, bias, eps)
    last = axes == tuple(range(x.ndim - len(axes), x.ndim)) and x.is_contiguous()
    if remember or not last:  # these give rstd, in which a variance below eps has few digits
        return None
    y = None
    along = _lie_along(axes, given)
    whole = along and all(p.shape[len(kept) :] == x.shape[len(kept) :] for p in given)
    if len(kept) == 2 and not whole and _are_one_a_channel(x, given):
        y = _groups(x, scale, bias, eps)
    elif along:
        y = _rows(x, axes, scale, bias, eps)
    return None if y is None else (y, None, None)


def normalize(
    x: Tensor, mean: Tensor, variance: Tensor, scale: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor | None:
    given = [p for p in (mean, variance, scale, bias) if p is not None]
    long = [axis for axis, n in enumerate(mean.shape) if n > 1] or [1]
    shape = _shape(x, long[0])
    if any(tuple(p.shape) != shape or p.dtype != x.dtype for p in given):
        return None
    if mean.requires_grad or variance.requires_grad:  # the kernel takes them for constants
        return None
    if _second(x, long[0]) is None:
        return None
    near = mean * mean <= _KERNEL**2 * (variance + eps)
    if not _all(near):
        offset = _unless(near, mean)
        x, mean = x - offset, mean - offset
    # Copies of the statistics, since a training step may change the buffers before the gradient of
    # this call is asked for.
    mean, variance = mean.clone(), variance.clone()
    flat = (None if p is None else p.reshape(-1) for p in (mean, variance, scale, bias))
    y = torch.nn.functional.batch_norm(_second(x, long[0]), *flat, False, 0.0, eps)
    return y.view(x.shape)


def rescale(x: Tensor, axes: Axes, scale: Tensor | None, eps: float) -> Tensor | None:
    last = tuple(range(x.ndim - len(axes), x.ndim))
    if axes != last or not axes or not x.is_contiguous():
        return None
    if scale is not None and (scale.dtype != x.dtype or not _lie_along(axes, [scale])):
        return None
    rows = x.flatten(axes[0])
    with torch.no_grad():
        norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        rstd = torch.rsqrt(norm * norm / rows.shape[-1] + eps)
    if not _all(rstd > 0):  # squares that are no numbers
        return None
    weight = _last(scale, x.shape[axes[0] :])
    weight = None if weight is None else weight.view(-1)
    return _Scaled.apply(rows, weight, rstd, eps).view(x.shape)


def _rows(
    x: Tensor, axes: Axes, scale: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor | None:
    """LayerNorm over the last axes."""
    shape = x.shape[axes[0] :]
    w, b = (_last(p, shape) for p in (scale, bias))
    return _around(x, lambda x: torch.native_layer_norm(x, shape, w, b, eps))


def _groups(x: Tensor, scale: Tensor | None, bias: Tensor | None, eps: float) -> Tensor | None:
    """GroupNorm where samples and groups are the first two axes."""
    samples, groups, *rest = x.shape
    size = next(p.shape[2] for p in (scale, bias) if p is not None)
    channels = groups * size
    positions = x.numel() // (samples * channels)
    w, b = (None if p is None else p.reshape(channels) for p in (scale, bias))
    kept = (samples, groups, *[1] * len(rest))

    def kernel(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, rstd = torch.native_group_norm(
            x.view(samples, channels, positions), w, b, samples, channels, positions, groups, eps
        )
        return y.view(x.shape), mean.view(kept), rstd.view(kept)

    return _around(x, kernel)


def _around(x: Tensor, kernel: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> Tensor | None:
    """``kernel`` of ``x``, or of ``x`` less its mean."""
    y, mean, rstd = kernel(x)
    mean, rstd = mean.detach(), rstd.detach()
    if not _all(rstd > 0):  # squares that are no numbers
        return None
    near = (mean * rstd).abs() <= _KERNEL
    # Group by group, so that none depends on the others.
    return y if _all(near) else kernel(x - _unless(near, mean))[0]


def _channels(
    x: Tensor, channel: int, scale: Tensor | None, bias: Tensor | None, eps: float
) -> Found | None:
    """BatchNorm."""
    found = _second(x, channel)
    if found is None:
        return None
    shape = _shape(x, channel)
    w, b = (None if p is None else p.reshape(-1) for p in (scale, bias))
    mean, variance = _moments(found.detach())
    offset: Tensor | float = 0.0
    near = mean * mean <= _SQUARES**2 * (variance + eps)
    if not _all(near):
        offset = _unless(near, mean).view(shape)
        found = _second(x - offset, channel)
        mean, variance = _moments(found.detach())
    if not _all(torch.isfinite(variance)):
        return None
    y = _Standardized.apply(found, w, b, mean, variance, eps)
    return y.view(x.shape), offset + mean.view(shape), variance.view(shape)


def _second(x: Tensor, channel: int) -> Tensor | None:
    """``x`` with the channels as second axis, if that is only another view of it.

    None if the kernels would have to copy it, or give their result another layout.
    """
    if channel == x.ndim - 1 and x.is_contiguous():
        return x.view(-1, x.shape[-1])
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    kept = torch.contiguous_format, formats.get(x.ndim, torch.contiguous_format)
    if channel == 1 and any(x.is_contiguous(memory_format=format) for format in kept):
        return x
    return None


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel, along axis 1, where the mean is near zero."""
    axes = (0, *range(2, x.ndim))
    mean = x.mean(axes)
    if x.ndim > 2 and x.is_contiguous():
        norms = torch.linalg.vector_norm(x.flatten(2), dim=2)
        squares = (norms * norms).sum(0)
    else:
        # A norm down the columns adds up one row after the other, and would lose digits.
        squares = (x * x).sum(axes)
    count = x.numel() // x.shape[1]
    return mean, (squares / count - mean * mean).clamp_(min=0)


class _Standardized(Function):
    """BatchNorm along axis 1, by the statistics of ``x``, which have been taken already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        weight, bias, mean, variance, ctx.eps = rest
        ctx.save_for_backward(x, weight, mean, variance)
        return torch.nn.functional.batch_norm(x, mean, variance, weight, bias, False, 0.0, ctx.eps)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance = ctx.saved_tensors
        rstd = torch.rsqrt(variance + ctx.eps)
        wanted = list(ctx.needs_input_grad[:3])
        found = torch.ops.aten.native_batch_norm_backward(
            g, x, weight, mean, variance, mean, rstd, True, ctx.eps, wanted
        )
        return *found, None, None, None


class _Scaled(Function):
    """RMSNorm of the last axis, by ``rstd``, which has been taken already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        weight, rstd, ctx.eps = rest
        ctx.save_for_backward(x, weight, rstd)
        y = x * rstd
        return y if weight is None else y.mul_(weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():
            # This is differentiated in its turn, and rstd is a function of x.
            rstd = torch.rsqrt((x * x).mean(-1, keepdim=True) + ctx.eps)
            normal = x * rstd
            u = g if weight is None else g * weight
            dx = rstd * (u - normal * (u * normal).mean(-1, keepdim=True))
            dweight = None if weight is None else (g * normal).sum(tuple(range(g.ndim - 1)))
            return dx, dweight, None, None
        wanted = [True, weight is not None, False]
        dx, dweight, _ = torch.ops.aten.native_layer_norm_backward(
            g, x, x.shape[-1:], torch.zeros_like(rstd), rstd, weight, None, wanted
        )
        # That is LayerNorm's where the mean is zero; it takes the mean of the gradient away too.
        mean = g.mean(-1) if weight is None else g @ (weight / x.shape[-1])
        return dx.addcmul_(rstd, mean.unsqueeze(-1)), dweight, None, None


def _all(condition: Tensor) -> bool:
    return bool(condition.all())


def _unless(near: Tensor, mean: Tensor) -> Tensor:
    return torch.where(near, torch.zeros_like(mean), mean)


def _shape(x: Tensor, axis: int) -> Axes:
    """Of one value for each position along ``axis``, with the rank of ``x``."""
    return tuple(n if a == axis else 1 for a, n in enumerate(x.shape))


def _last(p: Tensor | None, shape: Axes) -> Tensor | None:
    """A parameter that lies along the last axes, without the others."""
    return None if p is None else p[(0,) * (p.ndim - len(shape))].expand(shape).contiguous()


def _lie_along(axes: Iterable[int], given: list[Tensor]) -> bool:
    return all(n == 1 or axis in axes for p in given for axis, n in enumerate(p.shape))


def _are_one_a_channel(x: Tensor, given: list[Tensor]) -> bool:
    """Whether parameters are those of the channels, which axes 1 and 2 are split into."""
    channels = (1, *x.shape[1:3], *[1] * (x.ndim - 3))
    instances = (1, x.shape[1], *[1] * (x.ndim - 2))
    shapes = {tuple(p.shape) for p in given}
    return shapes in ({channels}, {instances})
