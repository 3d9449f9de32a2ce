"""The variables of an NNX layer: parameters to compute with, and running statistics."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.module import first_from
from jax import Array

from normkit._definition import State
from normkit.jax._backend import BACKEND


def parameter(p: nnx.Param[Array] | None, lengths: tuple[int, ...]) -> Array | None:
    """The value of ``p``, which Flax keeps flat, with the lengths of x along its axes."""
    return None if p is None else p[...].reshape(lengths)


def remember(layer: Any) -> None:
    """Give ``layer`` running statistics: a mean of 0 and a variance of 1, of no batch so far."""
    dtype = BACKEND.statistics_dtype(layer.param_dtype) if layer.portable else jnp.float32
    layer.mean = nnx.BatchStat(jnp.zeros((layer.num_features,), dtype))
    layer.var = nnx.BatchStat(jnp.ones((layer.num_features,), dtype))
    if layer.momentum is None:
        layer.count = nnx.BatchStat(jnp.zeros((), jnp.int32))


def state_of(layer: Any) -> State:
    """The running statistics of ``layer``, if it has any."""
    if not layer.track_running_stats:
        return {}
    names = ("mean", "var", "count") if layer.momentum is None else ("mean", "var")
    return {name: getattr(layer, name)[...] for name in names}


def store(new: State, layer: Any) -> None:
    """Make ``new`` the running statistics of ``layer``."""
    for name, value in new.items():
        variable = getattr(layer, name)
        variable[...] = value.reshape(variable.shape)


def trains(layer: Any, use_running_average: bool | None) -> bool:
    """Whether the statistics are those of x: what the call says, or else the layer's setting."""
    kind = type(layer).__name__
    return not first_from(
        use_running_average,
        layer.use_running_average,
        None if layer.track_running_stats else False,
        error_msg=f"{kind} needs use_running_average, True or False, but it was given neither to "
        "the layer nor to the call; give it to either.",
    )
