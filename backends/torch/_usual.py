"""The usual call of a layer, on a shorter way to the kernels than the general one.

No mask, no option that PyTorch has not, a plain tensor of the right shape: there is nothing to
convert, broadcast or refuse then. Each function gives the result, or None for any other call, which
the layer goes on with as if nothing had been tried.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from normkit._explain import settled

from . import _backend

_EPSILON = {torch.float64: 2.0**-52}


def layer_norm(layer: Any, x: Tensor) -> Tensor | None:
    kernels = _backend._kernels
    if kernels is None or layer.axes is not None:
        return None
    w, b, shape = layer.weight, layer.bias, layer.normalized_shape
    if not _fits(x, shape, w, b):
        return None
    return _told(kernels.rows(x, shape, w, b, layer.eps))


def rms_norm(layer: Any, x: Tensor) -> Tensor | None:
    kernels = _backend._kernels
    if kernels is None or layer.axes is not None or layer.zero_centered or layer.scale_after_cast:
        return None
    w, shape, eps = layer.weight, layer.normalized_shape, layer.eps
    if not _fits(x, shape, w):
        return None
    if eps is None:
        eps = _EPSILON.get(x.dtype, 2.0**-23)
    return _told(kernels.root_mean_square(x, shape, w, eps), "rescale")


def _fits(x: Any, shape: tuple[int, ...], *given: Tensor | None) -> bool:
    """Whether ``x`` is contiguous, and ends with the lengths ``shape``."""
    return (
        _backend._kernels.fit(x, None, *given)
        and x.shape[-len(shape) :] == shape
        and x.is_contiguous()
    )


def group_norm(layer: Any, x: Tensor) -> Tensor | None:
    if layer.axis != 1:
        return None
    return _groups(layer, x, layer.num_groups, layer.num_channels)


def instance_norm(layer: Any, x: Tensor) -> Tensor | None:
    """Without running statistics."""
    if layer.axis != 1 or layer.running_mean is not None or not isinstance(x, Tensor):
        return None
    layer._check_input_dim(x)
    if x.ndim == layer._get_no_batch_dim():
        return None
    return _groups(layer, x, layer.num_features, layer.num_features)


def _groups(layer: Any, x: Tensor, groups: int, width: int) -> Tensor | None:
    kernels = _backend._kernels
    if kernels is None:
        return None
    w, b = layer.weight, layer.bias
    if not kernels.fit(x, None, w, b) or x.shape[1] != width or not x.is_contiguous():
        return None
    if x.numel() == x.shape[0] * groups:  # a single value in each group, which is refused
        return None
    return _told(kernels.groups(x, groups, w, b, layer.eps))


def batch_norm(layer: Any, x: Tensor) -> Tensor | None:
    kernels = _backend._kernels
    if kernels is None or layer.axis != 1:
        return None
    w, b, mean, variance = layer.weight, layer.bias, layer.running_mean, layer.running_var
    if not kernels.fit(x, None, w, b, mean, variance) or x.shape[1] != layer.num_features:
        return None
    layer._check_input_dim(x)
    if not layer.training and mean is not None:
        if layer.eps < 0:  # which is refused
            return None
        y = kernels.given_moments(x, 1, mean, variance, w, b, layer.eps)
        return _told(y, "normalize")
    count = x.numel() // x.shape[1]
    if count == 1 or not 2.0**-126 <= layer.eps < math.inf:  # which are refused
        return None
    keeps = layer.training and layer.track_running_stats and mean is not None
    if keeps and not _averages_as_usual(layer, kernels.readable(x)):
        return None
    found = kernels.second(x, 1)
    done = None if found is None else kernels.batch(found, w, b, layer.eps)
    if done is None:
        return None
    y, batch_mean, spread, correction = done
    if keeps:
        if correction != layer.correction:
            spread = spread * ((count - correction) / (count - layer.correction))
        _average(mean, batch_mean, layer.momentum)
        _average(variance, spread, layer.momentum)
        layer.num_batches_tracked.add_(1)
    return _told(y)


def _averages_as_usual(layer: Any, readable: bool) -> bool:
    """Whether running statistics are decaying averages, finite so far, and batches are counted."""
    momentum = layer.momentum
    return (
        momentum is not None
        and 0 < momentum < 1
        and layer.num_batches_tracked is not None
        and readable
        and layer.running_var.max().item() < math.inf
    )


def _average(buffer: Tensor, batch: Tensor, share: float) -> None:
    if buffer.dtype == batch.dtype:
        buffer.lerp_(batch, share)
    else:  # a half type: rounded once
        buffer.copy_(buffer.to(batch.dtype).lerp_(batch, share))


def _told(y: Tensor | None, operation: str = "standardize") -> Tensor | None:
    """For nk.explain."""
    if y is not None:
        settled(operation, "torch", True)
    return y
