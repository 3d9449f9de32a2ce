"""Standardization out of PyTorch's own kernels, for eager tensors.

A kernel loses as many units in the last place as the mean is large beside the spread. On the CPU
what it returns tells whether that was so; then it is applied again to ``x`` less its mean, which is
a constant to the derivative: neither the result nor any of its derivatives depends on it. On a
device that would have to be waited for, ``x`` less its mean is taken at once (``_unread.py``).

Of half types the kernels compute in float32, if parameters and statistics are given in it.

:func:`standardize`, :func:`normalize` and :func:`rescale` are the operations of
``normkit._backend.Backend``. Without this file the engine does all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from normkit._backend import Backend
from normkit._explain import declined, taken

from . import _unread
from ._fit import (
    WIDE,
    Axes,
    are_one_a_channel,
    fit,
    flat,
    last,
    lie_along,
    parameters,
    readable,
    values_along,
)
from ._gradients import centred_rows, scaled, standardized, wanted
from ._moments import (
    are_rows,
    inverse_root,
    is_near,
    is_usual,
    is_usual_inverse,
    moments,
    of_batch,
    second,
    trusted,
    unless,
)

Found = tuple[Tensor, Tensor | None, Tensor | None]
Batch = tuple[Tensor, Tensor, Tensor, int]
Kernel = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]

PATHS = {
    "native_layer_norm": "statistics over the last axes, contiguous, each position its parameters",
    "native_group_norm": "groups and instances with the channels second, contiguous",
    "native_batch_norm": "a batch with the channels second or last, of a few values a channel",
    "batch_norm of moments": "a batch with the channels second or last, of many values a channel",
    "batch_norm of given moments": "evaluation with the channels second or last",
    "rms_norm": "the root mean square over the last axes, contiguous, of few values",
    "vector_norm": "the root mean square over the last axes, contiguous, of many values",
    **_unread.PATHS,
}

# Up to here, |mean| / sqrt(variance + eps) costs no digit that the result would have, nor one that
# derivatives of parameters have, which are float32 beside half types as well.
_NEAR = 4.0
# Where statistics are given, the kernels subtract the mean first for these derivatives.
_NEAR_GIVEN = {
    torch.float32: _NEAR,
    torch.float64: _NEAR,
    torch.bfloat16: 256.0,
    torch.float16: 64.0,
}
# So few values a channel are added up well by the kernel of BatchNorm, one after the other; and so
# few values in all that it does not matter how slowly it does that where channels are second.
_FEW, _FEW_IN_ALL = 1024, 2**14
# With an eps from the first on, and values up to the second, the cube of 1 / sqrt(squares + eps),
# in the derivative of `rms_norm`, has all its digits.
_LEAST, _CUBABLE = 2.0**-80, 2.0**32
_UNUSUAL = "squares overflow or vanish, or a value is no number"


def standardize(
    x: Tensor,
    axes: Axes,
    scale: Tensor | None,
    bias: Tensor | None,
    eps: float,
    remember: bool,
    dtype: torch.dtype,
    backend: Backend,
) -> Found | None:
    if not fit(x, dtype, scale, bias):
        return None
    given = [p for p in (scale, bias) if p is not None]
    kept = [axis for axis in range(x.ndim) if axis not in axes]
    if len(kept) == 1 and all(tuple(p.shape) == values_along(x, kept[0]) for p in given):
        return channels(x, kept[0], flat(scale), flat(bias), eps)
    if remember:  # these give rstd, in which a variance below eps has few digits
        return declined("statistics of samples are to be remembered")
    if axes != tuple(range(x.ndim - len(axes), x.ndim)) or not x.is_contiguous():
        return declined("the axes are not the last ones of a contiguous tensor")
    y = None
    along = lie_along(axes, given)
    whole = along and all(p.shape[len(kept) :] == x.shape[len(kept) :] for p in given)
    if len(kept) == 2 and not whole and are_one_a_channel(x, given):
        size = next(p.shape[2] for p in given)
        merged = x.view(x.shape[0], x.shape[1] * size, -1)
        y = groups(merged, x.shape[1], flat(scale), flat(bias), eps)
    elif along:
        shape = x.shape[axes[0] :]
        y = rows(x, shape, last(scale, shape), last(bias, shape), eps)
    else:
        declined("parameters lie along other axes than the kernels have them")
    return None if y is None else (y.view(x.shape), None, None)


def normalize(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    backend: Backend,
) -> Tensor | None:
    if not fit(x, dtype, mean, variance, scale, bias):
        return None
    given = [p for p in (mean, variance, scale, bias) if p is not None]
    long = [axis for axis, n in enumerate(mean.shape) if n > 1] or [1]
    shape = values_along(x, long[0])
    if any(tuple(p.shape) != shape for p in given):
        return declined("what is given has not one value a channel")
    each = (flat(p) for p in (mean, variance, scale, bias))
    return given_moments(x, long[0], *each, eps)


def rescale(
    x: Tensor, axes: Axes, scale: Tensor | None, eps: float, dtype: torch.dtype, backend: Backend
) -> Tensor | None:
    if not fit(x, dtype, scale):
        return None
    if axes != tuple(range(x.ndim - len(axes), x.ndim)) or not axes or not x.is_contiguous():
        return declined("the axes are not the last ones of a contiguous tensor")
    if scale is not None and not lie_along(axes, [scale]):
        return declined("parameters lie along other axes than the kernels have them")
    shape = x.shape[axes[0] :]
    return root_mean_square(x, shape, last(scale, shape), eps)


# The same for arguments that fit, parameters without lengths 1. The usual calls of layers come
# here on a shorter way (``_usual.py``).


def rows(
    x: Tensor, shape: Axes, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor | None:
    """LayerNorm over the last axes, which have the lengths ``shape``."""
    w, b = parameters(x, shape, weight, bias)
    if not readable(x):
        return _unread.rows(x, shape, w, b, eps)

    def kernel(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if w is None or x.dtype == w.dtype:
            return torch.native_layer_norm(x, shape, w, b, eps)
        if x.numel() > _FEW_IN_ALL:
            return centred_rows(x, w, b, shape, eps)
        y, mean, rstd = torch.native_layer_norm(x.to(w.dtype), shape, w, b, eps)
        return y.to(x.dtype), mean, rstd

    return _around(x, "native_layer_norm", kernel, lambda a: a)


def groups(
    x: Tensor, count: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor | None:
    """GroupNorm of a contiguous ``x`` where samples and channels are the first two axes."""
    samples, width = x.shape[:2]
    size = x.numel() // (samples * width)
    w, b = parameters(x, (width,), weight, bias)
    if not readable(x):
        return _unread.groups(x, count, w, b, eps)

    def each(a: Tensor) -> Tensor:
        return a.repeat_interleave(width // count, 1).view(samples, width, *[1] * (x.ndim - 2))

    return _around(
        x,
        "native_group_norm",
        lambda x: torch.native_group_norm(x, w, b, samples, width, size, count, eps),
        each,
    )


def _around(
    x: Tensor, path: str, kernel: Kernel, each: Callable[[Tensor], Tensor]
) -> Tensor | None:
    """``kernel`` of ``x``, or of ``x`` less its mean, of which ``each`` value has its own."""
    y, mean, rstd = kernel(x)
    mean, rstd = mean.detach(), rstd.detach()
    if not is_usual_inverse(rstd):
        return declined(_UNUSUAL)
    far = mean.mul(rstd).abs_()
    if not far.max().item() <= _NEAR:
        # Group by group, so that none depends on the others.
        offset = each(unless(far <= _NEAR, mean))
        del y  # and what it keeps for its gradient
        y = kernel(x.to(mean.dtype) - offset)[0].to(x.dtype)
    taken(path)
    return y


def channels(
    x: Tensor, channel: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Found | None:
    """BatchNorm; mean and variance have the rank of ``x``."""
    found = second(x, channel)
    if found is None:
        return declined("the channels are neither second nor last in the layout of x")
    done = batch(found, weight, bias, eps)
    if done is None:
        return None
    y, mean, spread, correction = done
    if correction:
        count = found.numel() // found.shape[1]
        spread = spread * ((count - correction) / count)
    shape = values_along(x, channel)
    return y.view(x.shape), mean.view(shape), spread.view(shape)


def batch(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Batch | None:
    """BatchNorm where the channels are the second axis, as :func:`second` has them.

    The result, the mean, and an estimate of the variance with its correction.
    """
    w, b = parameters(x, x.shape[1:2], weight, bias)
    if not readable(x):
        return _unread.batch(x, w, b, eps)
    if _are_few(x):
        y, mean, spread = of_batch(x, w, b, eps)
        if is_near(mean, spread, eps, _NEAR) and is_usual(spread):
            taken("native_batch_norm")
            return y, mean, spread, 1
        del y
    found = x
    mean, spread = moments(x)
    offset: Tensor | float = 0.0
    if not is_near(mean, spread, eps, trusted(x)):
        offset = unless(mean * mean <= trusted(x) ** 2 * (spread + eps), mean)
        found = _unread.less(x, offset)
        mean, spread = moments(found)
        if not is_near(mean, spread, eps, trusted(x)):
            # Values beside whose mean rounding is larger than their spread: equal ones, above all.
            offset = offset + mean
            found = _unread.less(x, offset)
            mean, spread = moments(found)
            if not is_near(mean, spread, eps, trusted(x)):
                return declined("the mean is too large beside the spread, or is no number")
    if not is_usual(spread):
        return declined(_UNUSUAL)
    taken("batch_norm of moments")
    whole = offset + mean
    if found.dtype != x.dtype and is_near(whole, spread, eps, _NEAR_GIVEN[x.dtype]):
        found, mean = x, whole
    y = standardized(found, w, b, mean, spread, eps)
    return y.to(x.dtype), whole, spread, 0


def _are_few(x: Tensor) -> bool:
    """Whether the kernel of BatchNorm is as good at the statistics as :func:`moments`."""
    count = x.numel() // x.shape[1]
    return 1 < count <= _FEW and (x.numel() <= _FEW_IN_ALL or are_rows(x))


def given_moments(
    x: Tensor,
    channel: int,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor | None:
    """BatchNorm with statistics that are given."""
    if mean.requires_grad or variance.requires_grad:
        return declined("statistics are differentiated, which the kernel takes for constants")
    found = second(x, channel)
    if found is None:
        return declined("the channels are neither second nor last in the layout of x")
    near, wide = _NEAR_GIVEN[x.dtype], WIDE[x.dtype]
    given = (mean, variance, weight, bias)
    if x.dtype != wide and not all(p is None or p.dtype == x.dtype for p in given):
        # The kernel takes all of them in the half type or all in float32.
        weight, bias = parameters(x, found.shape[1:2], weight, bias)
        mean, variance = mean.to(wide), variance.to(wide)
    if x.requires_grad or wanted(weight, bias):
        # A training step may change the buffers before the gradient of this call is asked for.
        mean, variance = mean.clone(), variance.clone()
    see = readable(x)
    taken("batch_norm of given moments" if see else "batch_norm of x - mean")
    if not see or not is_near(mean, variance, eps, near):
        weight, bias = parameters(x, found.shape[1:2], weight, bias)
        mean, variance = mean.to(wide), variance.to(wide)
        offset = unless(mean * mean <= near**2 * (variance + eps), mean) if see else mean
        found, mean = _unread.less(found, offset), mean - offset
    y = torch.batch_norm(found, weight, bias, mean, variance, False, 0.0, eps, False)
    return y if found is x else y.to(x.dtype).view(x.shape)


def root_mean_square(x: Tensor, shape: Axes, weight: Tensor | None, eps: float) -> Tensor | None:
    """RMSNorm over the last axes of a contiguous ``x``, which have the lengths ``shape``."""
    w, _ = parameters(x, shape, weight, None)
    if not readable(x):
        return _unread.root_mean_square(x, shape, w, eps)
    few = x.numel() <= _FEW_IN_ALL and eps >= _LEAST
    if few and torch.linalg.vector_norm(x.detach(), torch.inf).item() < _CUBABLE:
        taken("rms_norm")
        return torch.rms_norm(x.to(WIDE[x.dtype]), shape, w, eps).to(x.dtype)
    rstd = inverse_root(x.detach().view(-1, math.prod(shape)), eps)
    if not is_usual_inverse(rstd):
        return declined(_UNUSUAL)
    taken("vector_norm")
    return scaled(x, w, rstd, eps)
