"""What symbolic tracing finds in place of a layer."""

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
