"""The variables of a Linen layer: how they are made, and what they tell of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
from jax import Array


def parameters(layer: Any, shape: Sequence[int]) -> tuple[Array | None, Array | None]:
    """``scale`` and ``bias`` of ``layer``, which are created if need be."""

    def parameter(name: str, used: bool, init: Any) -> Array | None:
        if not used:
            return None
        p = layer.param(name, init, shape, layer.param_dtype)
        return p if layer.force_float32_reductions else p.astype(layer.param_dtype)

    return (
        parameter("scale", layer.use_scale, layer.scale_init),
        parameter("bias", layer.use_bias, layer.bias_init),
    )


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
