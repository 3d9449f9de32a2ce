"""The same on a device whose values nobody waits for: ``x`` less its mean is taken at once.

The mean is a constant to the derivative, and neither the result nor any of its derivatives depends
on it. Where squares would overflow, ``x`` is taken in another unit, a power of two that drops out.

Of half types the least value is taken instead of the mean, if none is twice as large. That is
exact in their own dtype; and other groups have a spread, beside which no mean is large in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normkit._explain import declined, taken

from ._moments import of_batch

Axes = tuple[int, ...]

PATHS = {
    "native_layer_norm of x - mean": "as native_layer_norm, where values cannot be read",
    "native_group_norm of x - mean": "as native_group_norm, where values cannot be read",
    "native_batch_norm of x - mean": "a batch, where values cannot be read",
    "batch_norm of x - mean": "evaluation, where values cannot be read",
    "rms_norm in units": "the root mean square, where values cannot be read",
}

# The exponent of two of what is large: such values are taken in a unit in which the largest has
# this one. Its square is finite; and no spread that values so large can have is small beside eps.
_LARGE = {torch.float16: 40, torch.bfloat16: 40, torch.float32: 40, torch.float64: 480}
_WHOLE = (torch.float32, torch.float64)


def rows(x: Tensor, shape: Axes, w: Tensor | None, b: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last axes."""
    taken("native_layer_norm of x - mean")
    axes = tuple(range(-len(shape), 0))
    values, _, _ = _moved(x, axes)
    return torch.native_layer_norm(values, shape, w, b, eps)[0]


def groups(x: Tensor, count: int, w: Tensor | None, b: Tensor | None, eps: float) -> Tensor:
    """GroupNorm where samples and channels are the first two axes."""
    taken("native_group_norm of x - mean")
    samples, width = x.shape[:2]
    values, _, _ = _moved(x.view(samples, count, -1), (-1,))
    size = x.numel() // (samples * width)
    return torch.native_group_norm(values.view(x.shape), w, b, samples, width, size, count, eps)[0]


def batch(
    x: Tensor, w: Tensor | None, b: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, int] | None:
    """BatchNorm where the channels are the second axis."""
    if x.numel() == x.shape[1]:
        return declined("there is one value a channel")
    taken("native_batch_norm of x - mean")
    values, offset, unit = _moved(x, (0, *range(2, x.ndim)))
    y, mean, spread = of_batch(values, w, b, eps)
    unit = unit.view(-1)
    return y, offset.view(-1) + mean / unit, spread / unit / unit, 1


def root_mean_square(x: Tensor, shape: Axes, w: Tensor | None, eps: float) -> Tensor:
    """RMSNorm over the last axes."""
    taken("rms_norm in units")
    wide = torch.promote_types(x.dtype, torch.float32)
    axes = tuple(range(-len(shape), 0))
    top = torch.linalg.vector_norm(x.detach(), torch.inf, axes, True, dtype=wide)
    return torch.rms_norm(x * _unit(top, x.dtype), shape, w, eps).to(x.dtype)


def less(x: Tensor, mean: Tensor) -> Tensor:
    """``x`` less the mean of each channel, along axis 1; in the dtype of that."""
    return x.to(mean.dtype) - mean.view(-1, *[1] * (x.ndim - 2))


def _moved(x: Tensor, axes: Axes) -> tuple[Tensor, Tensor, Tensor]:
    """``(x - offset) * unit``, the offset and the unit, over ``axes``."""
    top, offset = _extremes(x.detach(), axes)
    unit = _unit(top, x.dtype)
    # In half types both products and their difference are exact as well.
    values = torch.addcmul((-offset * unit).to(x.dtype), x, unit.to(x.dtype))
    return values, offset, unit


def _extremes(x: Tensor, axes: Axes) -> tuple[Tensor, Tensor]:
    """The largest magnitude, and what to subtract."""
    if x.dtype in _WHOLE:
        top = torch.linalg.vector_norm(x, torch.inf, axes, True)
        return top, x.mean(axes, keepdim=True)
    least, most = (a(x, axes, True).float() for a in (torch.amin, torch.amax))
    near, far = torch.where(least > 0, least, most), torch.where(least > 0, most, least)
    ratio = near / far
    close = (0.5 < ratio) & (ratio <= 1)
    return torch.maximum(-least, most), torch.where(close, near, torch.zeros_like(near))


def _unit(top: Tensor, dtype: torch.dtype) -> Tensor:
    large = _LARGE[dtype]
    _, exponent = torch.frexp(top)
    one = torch.ones_like(top)
    return torch.where(top < 2.0**large, one, torch.ldexp(one, large - exponent))
