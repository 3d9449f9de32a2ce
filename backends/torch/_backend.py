"""PyTorch's answers to what the engine asks of an array library."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import array_api_compat.torch as xp
import torch

from normkit import _arrays
from normkit._backend import Array, Backend, DType

try:
    from . import _kernels
except ImportError:  # the plain engine does as well, slower
    _kernels = None
try:
    from . import _fused
except ImportError:  # compilers take the engine to pieces
    _fused = None


class TorchBackend(Backend):
    @property
    def paths(self) -> Mapping[str, str]:
        found = [module.PATHS for module in (_kernels, _fused) if module is not None]
        return {name: line for paths in found for name, line in paths.items()}

    @property
    def kernels(self) -> Any:
        return _fused if torch.compiler.is_compiling() else _kernels

    def check(self, x: Array) -> None:
        if not isinstance(x, torch.Tensor):
            msg = (
                f"a layer of normkit.torch takes a torch.Tensor, but got a {type(x).__name__}; "
                f"convert it first, for example with torch.as_tensor(x)."
            )
            raise TypeError(msg)

    def asarray(self, a: Any, x: Array) -> Array:
        return a if isinstance(a, torch.Tensor) else torch.as_tensor(a, device=x.device)

    def total(self, x: Array, axes: tuple[int, ...]) -> Array:
        # PyTorch adds up in a tree.
        return xp.sum(x, axis=axes, keepdims=True)

    def stop_gradient(self, x: Array) -> Array:
        return x.detach()

    def constant(self, x: Array) -> Array:
        if torch.compiler.is_compiling():
            # See Backend.constant: a multiplication is not fused into a subtraction through this.
            x = torch.where(x > -torch.inf, x, torch.nan)
        return x.detach()

    def statistics_dtype(self, *dtypes: DType) -> DType:
        # Of dtypes alone: torch.result_type makes tensors of them, which Dynamo does not allow.
        return functools.reduce(torch.promote_types, dtypes, torch.float32)

    def is_visible(self, x: Array) -> bool:
        # A fake tensor is of another type; one inside vmap, jvp, make_fx or a trace is not.
        return (
            type(x) in (torch.Tensor, torch.nn.Parameter)
            and x.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and not torch._C._functorch.is_functorch_wrapped_tensor(x)
            and not torch._C._len_torch_dispatch_stack()
            and not torch._C._is_tracing()
        )


BACKEND = TorchBackend(xp)
# Known from the start: a compiled function could not look it up the first time.
for _type in (torch.Tensor, torch.nn.Parameter):
    _arrays.register(_type, BACKEND)
