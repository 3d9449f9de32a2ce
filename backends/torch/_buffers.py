"""Running statistics in the buffers of a module."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase


def state_of(layer: _NormBase) -> dict[str, Tensor]:
    """The buffers of ``layer``, by the names that the core has for them."""
    state = {"mean": layer.running_mean, "var": layer.running_var}
    # Old checkpoints and other packages have layers without it.
    if layer.num_batches_tracked is not None:
        state["count"] = layer.num_batches_tracked
    return state


def store(new: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Write ``new`` to the buffers in ``state``, if it is another state.

    In place, so that whoever holds the buffers (DDP, an averaged model) sees the update.
    """
    if new is not state:
        with torch.no_grad():
            for name, buffer in state.items():
                buffer.copy_(new[name])
