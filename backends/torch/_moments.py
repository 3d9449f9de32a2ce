"""Statistics of channels and of rows, out of reductions that are fast on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Parts of so many values a channel: the kernel adds one after the other.
_BLOCK = 1024
# So many of its sums stay in the cache.
_WIDTH = 1024
_WIDE = (torch.float32, torch.float64)


def second(x: Tensor, channel: int) -> Tensor | None:
    """``x`` with the channels as second axis, if that is only another view of it.

    None if the kernels would have to copy it, or give their result another layout.
    """
    whole = x.is_contiguous()
    if channel == 1 and whole:
        return x
    if channel == x.ndim - 1 and whole:
        return x.view(-1, x.shape[-1])
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(x.ndim)
    return x if channel == 1 and last and x.is_contiguous(memory_format=last) else None


def are_rows(x: Tensor) -> bool:
    """Whether the channels, along axis 1, are next to each other in memory."""
    return x.ndim == 2 or not x.is_contiguous()


def trusted(x: Tensor) -> float:
    """Up to which |mean| / sqrt(variance + eps) :func:`moments` are right to the last digits."""
    return 1.5 if _by_norms(x) else 4.0


def _by_norms(x: Tensor) -> bool:
    return not are_rows(x) and x.dtype in _WIDE


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel, along axis 1, where the mean is near zero."""
    x = x.detach()
    if not _by_norms(x):
        return _merged(x)
    images = x.flatten(2)
    count = x.numel() // x.shape[1]
    mean = images.sum(2).sum(0).div_(count)
    squares = _squares(images, x.dtype).sum(0).div_(count)
    return mean, squares.addcmul_(mean, mean, value=-1).clamp_(min=0)


def _merged(x: Tensor) -> tuple[Tensor, Tensor]:
    """Those of parts of ``x``, merged."""
    if are_rows(x):
        return _of_rows(x.movedim(1, -1).reshape(-1, x.shape[1]))
    size = x[0, 0].numel()
    each = min(len(x), max(1, 8 * _BLOCK // size))
    whole = len(x) - len(x) % each
    return _with_rest([_kernel(part) for part in x[:whole].split(each)], x[whole:], whole / len(x))


def _of_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Those of columns. A part of them is every n-th row: one call for all n of these parts."""
    length, width = x.shape
    beside = max(1, min(_WIDTH // width, length // _BLOCK))
    calls = -(-length // (_BLOCK * beside))
    each = length // (calls * beside)
    whole = calls * beside * each
    parts = x[:whole].view(calls, each, beside * width)
    found = [[a.view(beside, width) for a in _kernel(part)] for part in parts]
    return _with_rest(found, x[whole:], whole / length)


def _kernel(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.dtype if x.dtype in _WIDE else torch.float32
    unused = torch.zeros(x.shape[1], dtype=wide)
    return torch.batch_norm_update_stats(x, unused, unused, 0.0)


def _with_rest(found: Any, rest: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Moments of parts of equal size, and of what remains."""
    means, variances = (torch.stack(a).flatten(0, -2) for a in zip(*found, strict=True))
    mean, variance = means[0], variances[0]
    if len(means) > 1:
        between, mean = torch.var_mean(means, 0, correction=0)
        variance = variances.mean(0) + between
    if len(rest):
        last, spread = _kernel(rest)
        apart = last - mean
        variance = torch.lerp(spread, variance, share) + apart * apart * (share * (1 - share))
        mean = torch.lerp(last, mean, share)
    return mean, variance


def of_batch(
    x: Tensor, w: Tensor | None, b: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernel of BatchNorm gives, mean and unbiased variance among it, in float32 at least.

    Running statistics that keep nothing of what was there before are those of the batch.
    """
    width = x.shape[1]
    wide = x.dtype if x.dtype in _WIDE else torch.float32
    mean = torch.zeros(width, dtype=wide, device=x.device)
    variance = torch.zeros(width, dtype=wide, device=x.device)
    y, _, _ = torch.native_batch_norm(x, w, b, mean, variance, True, 1.0, eps)
    return y, mean, variance


def inverse_root(rows: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x * x) + eps) of each row, in float32 at least."""
    wide = rows.dtype if rows.dtype in _WIDE else torch.float32
    return _squares(rows, wide).unsqueeze(-1).div_(rows.shape[-1]).add_(eps).rsqrt_()


def _squares(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of squares along the last axis.

    A norm adds up one value after the other: in parts, so that its error does not grow with them.
    """
    length = rows.shape[-1]
    whole = length - length % _BLOCK
    if whole <= _BLOCK:
        return torch.linalg.vector_norm(rows, dim=-1, dtype=dtype).square_()
    parts = rows[..., :whole].unflatten(-1, (-1, _BLOCK))
    squares = torch.linalg.vector_norm(parts, dim=-1, dtype=dtype).square_().sum(-1)
    if whole < length:
        squares += torch.linalg.vector_norm(rows[..., whole:], dim=-1, dtype=dtype).square_()
    return squares


def is_near(mean: Tensor, variance: Tensor, eps: float, limit: float) -> bool:
    """Whether |mean| / sqrt(variance + eps) is nowhere above ``limit``."""
    least = torch.addcmul(variance, mean, mean, value=-1 / limit**2).min().item()
    return bool(least >= -eps)


def is_usual(variance: Tensor) -> bool:
    """Whether the powers of it that derivatives need are numbers (not if it is NaN)."""
    return bool(variance.max().item() < 2.0**80)


def is_usual_inverse(rstd: Tensor) -> bool:
    """The same of 1 / sqrt(variance + eps)."""
    least, largest = torch.aminmax(rstd)
    return bool(least.item() > 2.0**-40) and bool(largest.item() < 2.0**40)


def unless(near: Tensor, mean: Tensor) -> Tensor:
    """``mean``, and zero where it is near that."""
    return torch.where(near, torch.zeros_like(mean), mean)
