"""Flax NNX' layers beside normkit's, for ``python -m normkit bench`` and ``check``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import normkit.flax.nnx
from normkit._commands.cases import EPS, GROUPS, Case
from normkit.flax._compared import BACKEND as BACKEND
from normkit.flax._compared import LAYOUT as LAYOUT
from normkit.flax._compared import PACKAGES as PACKAGES
from normkit.flax._compared import array as array
from normkit.flax._compared import device as device
from normkit.flax._compared import numpy as numpy
from normkit.flax._compared import peak as peak
from normkit.flax._compared import wait as wait

NATIVE, NORMKIT = nnx, normkit.flax.nnx


def function(library: Any, case: Case, given: dict[str, Any], mode: str) -> Callable[..., Any]:
    """A function of x and the gradient of the result: the result, and gradients in that order."""
    layer = _layer(library, case)
    for name in (*case.names, *(("mean", "var") if case.remembers else ())):
        getattr(layer, name)[...] = jnp.asarray(given[name])
    if case.remembers:
        layer.set_attributes(use_running_average=not case.training)
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    @jax.jit
    def run(params: Any, rest: Any, x: Any, g: Any) -> Any:
        def forward(params: Any, x: Any) -> Any:
            layer = nnx.merge(graph, params, rest, copy=True)
            return layer(x), nnx.state(layer, nnx.BatchStat)

        if not case.gradient:
            return forward(params, x)
        y, pullback, state = jax.vjp(forward, params, x, has_aux=True)
        dparams, dx = pullback(g)
        return y, dx, dparams, state

    return lambda x, g: run(params, rest, x, g)


def _layer(library: Any, case: Case) -> nnx.Module:
    n = case.features
    options = {"epsilon": EPS, "dtype": jnp.dtype(case.dtype), "rngs": nnx.Rngs(0)}
    if case.layer == "GroupNorm":
        return library.GroupNorm(n, GROUPS, **options)
    return getattr(library, case.layer)(n, **options)
