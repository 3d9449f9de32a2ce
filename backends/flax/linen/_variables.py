"""The variables of a Linen layer: how they are made, and what they tell of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from normkit import _checks
from normkit._definition import State
from normkit.jax._backend import BACKEND


def parameter(layer: Any, name: str, shape: Sequence[int]) -> Array | None:
    """The ``scale`` or ``bias`` of ``layer``, which is created if need be."""
    if not getattr(layer, f"use_{name}"):
        return None
    p = layer.param(name, getattr(layer, f"{name}_init"), shape, layer.param_dtype)
    return p if layer.force_float32_reductions else p.astype(layer.param_dtype)


def parameters(layer: Any, shape: Sequence[int]) -> tuple[Array | None, Array | None]:
    """``scale`` and ``bias`` of ``layer``."""
    return parameter(layer, "scale", shape), parameter(layer, "bias", shape)


def running(layer: Any, shape: Sequence[int]) -> dict[str, nn.Variable[Any]]:
    """The running statistics, which are created if need be."""
    if not layer.track_running_stats:
        return {}
    dtype = jnp.float32 if layer.force_float32_reductions else layer.param_dtype
    if layer.portable:
        dtype = BACKEND.statistics_dtype(layer.param_dtype)
    found = {
        "mean": layer.variable("batch_stats", "mean", jnp.zeros, shape, dtype),
        "var": layer.variable("batch_stats", "var", jnp.ones, shape, dtype),
    }
    for name, variable in found.items():
        value = variable.value
        _checks.parameter(value, value, tuple(shape), name, BACKEND)
    if layer.momentum is None:
        found["count"] = layer.variable("batch_stats", "count", jnp.zeros, (), jnp.int32)
    return found


def store(new: State, layer: Any, variables: dict[str, nn.Variable[Any]]) -> None:
    """Make ``new`` the running statistics. As in Flax, x at initialization is no data."""
    if not layer.is_initializing():
        for name, variable in variables.items():
            variable.value = new[name]


def trains(layer: Any, use_running_average: bool | None) -> bool:
    """Whether the statistics are those of x. That is said once, by the layer or by the call."""
    given = (layer.use_running_average, use_running_average)
    if not layer.track_running_stats and all(choice is None for choice in given):
        return True
    return not nn.merge_param("use_running_average", *given)


def shape_of(layer: nn.Module, variables: Any) -> tuple[int, ...]:
    """The shape of the parameters of ``layer``, as its variables have it."""
    if variables is None and layer.scope is not None:
        variables = layer.variables
    variables = nn.meta.unbox(variables or {})
    for collection, name in (("params", "scale"), ("params", "bias"), ("batch_stats", "mean")):
        array = variables.get(collection, {}).get(name)
        if array is not None:
            return tuple(array.shape)
    kind = type(layer).__name__
    msg = (
        f"a {kind} of Flax Linen learns the lengths of x when it is called, so its definition can "
        f"only be read together with its variables, and none were found; call definition(layer, "
        f"variables) with what layer.init() returned."
    )
    raise ValueError(msg)
