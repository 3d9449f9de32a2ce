"""Which tensors the kernels take: eager ones, dense, on a CPU or a CUDA device; and parameters as
they need them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normkit._explain import declined

Axes = tuple[int, ...]

# What the kernels compute in.
WIDE = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
_PLAIN = (Tensor, torch.nn.Parameter)
_functorch = torch._C._functorch


def plain(x: Any, *given: Tensor | None) -> bool:
    """Whether these are eager tensors, of which no transformation and no trace wants to know."""
    # Subclasses, fake tensors among them, have rules of their own.
    if torch.compiler.is_compiling() or type(x) not in _PLAIN:
        return False
    for p in given:
        if p is not None and type(p) not in _PLAIN:
            return False
    return (
        _functorch.peek_interpreter_stack() is None
        and not _functorch.is_functorch_wrapped_tensor(x)
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._is_tracing()
        # The kernels have no forward-mode derivative.
        and forward_ad._current_level < 0
    )


def readable(x: Tensor) -> bool:
    """Whether values can be read without waiting for a device."""
    return x.is_cpu


def fit(x: Any, dtype: torch.dtype | None, *given: Tensor | None) -> bool:
    """Whether the kernels take ``x`` with these parameters and give ``dtype`` (None: its own)."""
    if not plain(x, *given):
        declined("the call is traced, transformed or differentiated forward")
        return False
    if not (x.is_cpu or x.is_cuda) or x.layout is not torch.strided or x.is_nested:
        declined("the kernels are for dense tensors on a CPU or a CUDA device")
        return False
    own = x.dtype
    if own not in WIDE or (dtype is not None and dtype != own):
        declined("the kernels do not give that dtype")
        return False
    wide = WIDE[own]
    for p in given:
        if p is not None and p.dtype != wide and p.dtype != own:
            declined("parameters have another dtype than x")
            return False
    if x.ndim < 2 or not x.numel():
        declined("x has one axis only, or no values")
        return False
    return True


def parameters(
    x: Tensor, shape: Axes, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """``weight`` and ``bias`` as kernels need them: in float32 at least.

    Some derivatives of a bias need a weight, and without one the statistics of half types would be
    given in these.
    """
    wide = WIDE[x.dtype]
    if weight is not None and weight.dtype == wide and bias is not None and bias.dtype == wide:
        return weight, bias
    if weight is None and (bias is not None or x.dtype != wide):
        weight = torch.ones(shape, dtype=wide, device=x.device)
    given = (p if p is None or p.dtype == wide else p.to(wide) for p in (weight, bias))
    w, b = given
    return w, b


def values_along(x: Tensor, axis: int) -> Axes:
    """Of one value for each position along ``axis``, with the rank of ``x``."""
    return tuple(n if a == axis else 1 for a, n in enumerate(x.shape))


def flat(p: Tensor | None) -> Tensor | None:
    return None if p is None else p.reshape(-1)


def last(p: Tensor | None, shape: Axes) -> Tensor | None:
    """A parameter that lies along the last axes, without the others."""
    return None if p is None else p[(0,) * (p.ndim - len(shape))].expand(shape).contiguous()


def lie_along(axes: Iterable[int], given: list[Tensor]) -> bool:
    return all(n == 1 or axis in axes for p in given for axis, n in enumerate(p.shape))


def are_one_a_channel(x: Tensor, given: list[Tensor]) -> bool:
    """Whether parameters are those of the channels, which axes 1 and 2 are split into."""
    channels = (1, *x.shape[1:3], *[1] * (x.ndim - 3))
    instances = (1, x.shape[1], *[1] * (x.ndim - 2))
    shapes = {tuple(p.shape) for p in given}
    return shapes in ({channels}, {instances})
