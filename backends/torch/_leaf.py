"""Inputs that are no plain tensors: what symbolic tracing finds, and nested tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn


def traced(x: Tensor | fx.Proxy) -> bool:
    """Whether ``x`` is no tensor, but stands for one in ``torch.fx.symbolic_trace``."""
    return isinstance(x, fx.Proxy)


def leaf(layer: nn.Module, x: Any, mask: Any) -> Any:
    """A call of ``layer`` in the graph, as the layers of ``torch.nn`` have one.

    Their own code is left out of it because of where it is written. That of others is traced, and
    checks of shapes cannot be.
    """
    path = x.tracer.path_of_module(layer)
    return x.tracer.create_proxy("call_module", path, (x,), {} if mask is None else {"mask": mask})


def nested(x: Tensor, layer: Any, mask: Tensor | None) -> bool:
    """Whether ``x`` is a nested tensor, which only PyTorch's own layers can take."""
    if not x.is_nested:
        return False
    options = (getattr(layer, name, False) for name in ("zero_centered", "scale_after_cast"))
    if mask is not None or layer.axes is not None or any(options):
        msg = (
            "a nested tensor is normalized by PyTorch's own layer, which has no mask and no "
            "options of normkit's; pad it first, with x.to_padded_tensor(0.0), and give a mask."
        )
        raise TypeError(msg)
    return True
