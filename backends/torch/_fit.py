"""Which tensors the kernels take: eager ones, dense, on a CPU or a CUDA device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normkit._explain import declined

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
