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


def decay_of(layer: _NormBase, state: dict[str, Tensor]) -> float | None:
    """What ``layer`` keeps of its running statistics, None for the cumulative average."""
    if layer.momentum is not None:
        return 1 - layer.momentum
    # As natively, there is no cumulative average without a counter.
    return None if "count" in state else 1.0


def store(new: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Write ``new`` to the buffers in ``state``, if it is another state.

    In place, so that whoever holds the buffers (DDP, an averaged model) sees the update.
    """
    if new is not state:
        with torch.no_grad():
            for name, buffer in state.items():
                _alike_in_vmap(new[name], buffer)
                buffer.copy_(new[name])


def _alike_in_vmap(new: Tensor, buffer: Tensor) -> None:
    """One buffer cannot follow many batches that do not know of each other."""
    if not torch.compiler.is_compiling() and _in_vmap(new) and not _in_vmap(buffer):
        msg = (
            "inside vmap each batch needs running statistics of its own, but these are shared; "
            "map over the buffers too (torch.func.stack_module_state), or build the layer with "
            "track_running_stats=False."
        )
        raise RuntimeError(msg)


def _in_vmap(x: Tensor) -> bool:
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):  # by vmap, or by a derivative inside of it
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def know_features(layer: _NormBase, x: Tensor | None = None) -> None:
    """Tell a layer that was lazy its number of channels.

    It comes with the parameters, which may have been loaded; if there are none, with ``x``. (In
    both cases the native layers stay at 0 channels, which their own checks then stumble over.)
    """
    if layer.num_features == 0:
        known = layer.weight if layer.weight is not None else layer.running_mean
        if known is not None:
            layer.num_features = known.shape[0]
        elif x is not None:
            layer.num_features = x.shape[1]


def know_whether_it_tracks(layer: _NormBase) -> None:
    """Refuse a layer whose flag was changed after it was made: it does a bit of both."""
    if layer.track_running_stats != (layer.running_mean is not None):
        msg = (
            f"a {type(layer).__name__} has track_running_stats={layer.track_running_stats}, but it "
            f"was made otherwise, and no definition describes that; make it with what it is to do."
        )
        raise ValueError(msg)
