"""PyTorch's answers to what the engine asks of an array library."""

from __future__ import annotations

import array_api_compat.torch as xp
import torch

from normkit import _arrays
from normkit._backend import Array, Backend


class TorchBackend(Backend):
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
