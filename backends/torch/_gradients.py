"""Standardization with statistics that have been taken already, and its derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

# So many values are worked on at once: they stay in the cache from one operation to the next.
_BLOCK = 2**18
# From so many on, four passes over images are faster than the native derivative.
_MANY = 2**16


def wanted(*inputs: Tensor | None) -> bool:
    """Whether anyone may ask for a gradient with respect to one of these."""
    return torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in inputs)


def standardized(
    x: Tensor, w: Tensor | None, b: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> Tensor:
    """BatchNorm along axis 1, by ``mean`` and ``variance`` of ``x``."""
    apply = _Standardized.apply if wanted(x, w, b) else _standardize
    return apply(x, w, b, mean, variance, eps)


def _standardize(
    x: Tensor, w: Tensor | None, b: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> Tensor:
    return torch.batch_norm(x, w, b, mean, variance, False, 0.0, eps, False)


class _Standardized(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        weight, _, mean, variance, ctx.eps = rest
        ctx.save_for_backward(x, weight, mean, variance)
        return _standardize(x, *rest)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance = ctx.saved_tensors
        rstd = torch.rsqrt(variance + ctx.eps)
        asked = list(ctx.needs_input_grad[:3])
        if asked[0] and not _is_differentiable(g) and _are_images(x):
            found = _of_images(g, x, weight, mean, variance, rstd, ctx.eps)
            found = (a if want else None for a, want in zip(found, asked, strict=True))
            return *found, None, None, None
        found = torch.ops.aten.native_batch_norm_backward(
            g, x, weight, mean, variance, mean, rstd, True, ctx.eps, asked
        )
        return *found, None, None, None


def _are_images(x: Tensor) -> bool:
    return x.ndim > 2 and x.is_contiguous() and x.dtype == torch.float32 and x.numel() >= _MANY


def _of_images(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    rstd: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The same where each channel of a sample is contiguous."""
    g = g.contiguous()
    samples, width = x.shape[:2]
    size = x[0, 0].numel()
    each = (a.expand(samples, width).contiguous() for a in (mean, rstd))
    ones = torch.ones_like(mean)  # the kernel has none of these sums without a weight
    _, dweight, dbias = torch.ops.aten.native_group_norm_backward(
        g, x, *each, ones, samples, width, size, width, [False, True, True]
    )
    # dx = rstd * weight * (g - mean(g) - normal * mean(g * normal)), normal = (x - mean) * rstd
    factor = rstd if weight is None else rstd * weight
    share = -factor / (samples * size)
    dx = torch.batch_norm(x, share * dweight, share * dbias, mean, variance, False, 0.0, eps, False)
    dx.addcmul_(g, factor.view(-1, *[1] * (x.ndim - 2)))
    return dx, None if weight is None else dweight, dbias


def _is_differentiable(g: Tensor) -> bool:
    """Whether this backward pass is differentiated in its turn, or one for many gradients."""
    functorch = torch._C._functorch
    return (
        torch.is_grad_enabled()
        or type(g) is not Tensor
        or functorch.is_functorch_wrapped_tensor(g)
        or functorch.is_legacy_batchedtensor(g)
        or torch._C._len_torch_dispatch_stack() > 0
    )


def centred_rows(
    x: Tensor, w: Tensor, b: Tensor | None, shape: tuple[int, ...], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of a half type, mean and rstd.

    The native derivative adds up those of the parameters in the half type: after some thousand rows
    not a digit of them is right.
    """
    if wanted(w, b):
        return _CentredRows.apply(x, w, b, shape, eps)
    return torch.native_layer_norm(x, shape, w, b, eps)


class _CentredRows(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        _, ctx.shape, ctx.eps = rest
        y, mean, rstd = torch.native_layer_norm(x, ctx.shape, w, rest[0], ctx.eps)
        ctx.save_for_backward(x, w, mean, rstd)
        ctx.mark_non_differentiable(mean, rstd)
        return y, mean, rstd

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        length = rstd.numel()
        rows, tall = x.view(length, -1), g.reshape(length, -1)
        if _is_differentiable(g):
            dx, dw = _formula(tall, rows, weight.view(-1), ctx.eps, centred=True)
            return _as_given(ctx, dx.view(x.shape), dw, tall.float().sum(0), weight)
        dx, _, _ = torch.ops.aten.native_layer_norm_backward(
            g, x, ctx.shape, mean, rstd, weight, None, [True, False, False]
        )
        dw, db = _sums_of_rows(rows, tall, mean.view(-1), rstd.view(-1))
        return _as_given(ctx, dx, dw, db, weight)


def _sums_of_rows(x: Tensor, g: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of g * (x - mean) * rstd and of g: matrix-vector products in float32."""
    dw, db = [], []
    for part, gradient, factor, shift, one in _blocks(
        x, g, rstd, mean * rstd, torch.ones_like(rstd)
    ):
        gradient = gradient.float()
        columns = gradient.t()
        db.append(torch.mv(columns, one))
        shifted = torch.mv(columns, shift)
        dw.append(torch.mv(part.float().mul_(gradient).t(), factor).sub_(shifted))
    return sum(dw), sum(db)


def _as_given(
    ctx: Any, dx: Tensor, dw: Tensor, db: Tensor, weight: Tensor
) -> tuple[Tensor | None, ...]:
    bias = db.reshape(weight.shape) if ctx.needs_input_grad[2] else None
    return dx, dw.view(weight.shape), bias, None, None


def scaled(x: Tensor, w: Tensor | None, rstd: Tensor, eps: float) -> Tensor:
    """RMSNorm of rows, of which each has its ``rstd``, and which ``w`` is as long as."""
    return _Scaled.apply(x, w, rstd, eps) if wanted(x, w) else _scale(x, w, rstd)


class _Scaled(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        weight, rstd, ctx.eps = rest
        ctx.save_for_backward(x, weight, rstd)
        return _scale(x, weight, rstd)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        rows, g = x.view(len(rstd), -1), g.reshape(len(rstd), -1)
        w = None if weight is None else weight.view(-1)
        if _is_differentiable(g):
            dx, dweight = _formula(g, rows, w, ctx.eps)
        else:
            dx, dweight = _in_blocks(g, rows, w, rstd)
        dx, dweight = dx.view(x.shape), None if w is None else dweight.view(weight.shape)
        return dx, dweight, None, None


def _blocks(*arrays: Tensor) -> Any:
    """Arrays of rows, of which the first is as wide as any, in blocks."""
    length = max(1, _BLOCK // arrays[0].shape[1])
    if length >= len(arrays[0]):
        return [arrays]
    return zip(*(a.split(length) for a in arrays), strict=True)


def _scale(x: Tensor, w: Tensor | None, rstd: Tensor) -> Tensor:
    w = None if w is None else w.view(-1)
    if x.dtype == rstd.dtype and x.numel() <= _BLOCK:
        y = x.view(len(rstd), -1) * rstd
        return (y if w is None else y.mul_(w)).view(x.shape)
    y = torch.empty_like(x)
    for part, out, factor in _blocks(x.view(len(rstd), -1), y.view(len(rstd), -1), rstd):
        work = out
        if x.dtype != rstd.dtype:
            part = work = part.to(rstd.dtype)
        torch.mul(part, factor, out=work)
        if w is not None:
            work.mul_(w)
        if work is not out:
            out.copy_(work)
    return y


def _formula(
    g: Tensor, x: Tensor, weight: Tensor | None, eps: float, centred: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Differentiable in its turn: rstd is a function of x."""
    dtype = x.dtype
    g, x = (a.to(torch.promote_types(dtype, torch.float32)) for a in (g, x))
    if centred:
        x = x - x.mean(-1, keepdim=True)
    rstd = torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)
    normal = x * rstd
    u = g if weight is None else g * weight
    dx = rstd * (u - normal * (u * normal).mean(-1, keepdim=True))
    if centred:
        dx = dx - rstd * u.mean(-1, keepdim=True)
    dweight = None if weight is None else (g * normal).sum(0)
    return dx.to(dtype), dweight


def _in_blocks(
    g: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor | None]:
    """dx = rstd * (u - x * rstd**2 * mean(u * x)), u = g * weight."""
    dx = torch.empty_like(x)
    w = torch.ones(x.shape[1], dtype=rstd.dtype) if weight is None else weight
    dweight = None
    share = rstd.square().div_(-x.shape[1])
    for part, gradient, out, factor, slope in _blocks(x, g, dx, rstd, share):
        if x.dtype != rstd.dtype:
            part, gradient = part.to(rstd.dtype), gradient.to(rstd.dtype)
        work = part * gradient
        # Matrix-vector products: sums along either axis at the speed of the memory.
        slope = torch.mv(work, w).unsqueeze_(1).mul_(slope)
        if weight is not None:
            found = torch.mv(work.t(), factor.squeeze(1))
            dweight = found if dweight is None else dweight.add_(found)
            torch.mul(gradient, weight, out=work)
        else:
            work.copy_(gradient)
        work.addcmul_(part, slope)
        if x.dtype == work.dtype:
            torch.mul(work, factor, out=out)
        else:
            out.copy_(work.mul_(factor))
    return dx, dweight
