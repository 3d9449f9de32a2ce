"""PyTorch's layers beside normkit's, for ``python -m normkit bench`` and ``check``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import normkit.torch
from normkit._commands.cases import EPS, GROUPS, Case
from normkit._commands.timing import peak as peak

from ._backend import BACKEND as BACKEND

NATIVE, NORMKIT = nn, normkit.torch
LAYOUT = "channels first"
PACKAGES = ("torch",)


def function(library: Any, case: Case, given: dict[str, Any], mode: str) -> Callable[..., Any]:
    """A function of x and the gradient of the result: the result, and gradients in that order."""
    layer = _layer(library, case)
    parameters = list(layer.parameters())
    with torch.no_grad():
        for name, p in zip(case.names, parameters, strict=True):
            p.copy_(torch.from_numpy(given[name]))
        if case.remembers:
            layer.running_mean.copy_(torch.from_numpy(given["mean"]))
            layer.running_var.copy_(torch.from_numpy(given["var"]))
    layer.to(getattr(torch, case.dtype)).train(case.training)
    if mode == "compile":
        torch._dynamo.reset()  # one layer must not count as another's recompilation
        layer = torch.compile(layer, fullgraph=True)
    if not case.training:
        return torch.no_grad()(lambda x, g: (layer(x),))
    if not case.gradient:
        return lambda x, g: (layer(x).detach(),)

    def with_gradients(x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        y = layer(x)
        return y.detach(), *torch.autograd.grad(y, [x, *parameters], g)

    return with_gradients


def _layer(library: Any, case: Case) -> nn.Module:
    n = case.features
    match case.layer:
        case "BatchNorm":
            rank = "2d" if len(case.shape) == 4 else "1d"
            return getattr(library, f"BatchNorm{rank}")(n, EPS)
        case "InstanceNorm":
            return library.InstanceNorm2d(n, EPS, affine=True)
        case "GroupNorm":
            return library.GroupNorm(GROUPS, n, EPS)
        case _:
            return getattr(library, case.layer)(n, EPS)


def array(a: np.ndarray, dtype: str) -> Tensor:
    return torch.from_numpy(a).to(getattr(torch, dtype))


def numpy(a: Tensor) -> np.ndarray:
    return a.float().numpy()


def wait(result: Any) -> None:
    """Until it is there: on the CPU it is."""


def device() -> str:
    return f"cpu, {torch.get_num_threads()} threads"
