"""Flax Linen's layers beside normkit's, for ``python -m normkit bench`` and ``check``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import normkit.flax.linen
from normkit._commands.cases import EPS, GROUPS, Case
from normkit.flax._compared import BACKEND as BACKEND
from normkit.flax._compared import LAYOUT as LAYOUT
from normkit.flax._compared import PACKAGES as PACKAGES
from normkit.flax._compared import array as array
from normkit.flax._compared import device as device
from normkit.flax._compared import numpy as numpy
from normkit.flax._compared import peak as peak
from normkit.flax._compared import wait as wait

NATIVE, NORMKIT = nn, normkit.flax.linen


def function(library: Any, case: Case, given: dict[str, Any], mode: str) -> Callable[..., Any]:
    """A function of x and the gradient of the result: the result, and gradients in that order."""
    layer = _layer(library, case)
    params = {name: jnp.asarray(given[name]) for name in case.names}
    rest = {}
    if case.remembers:
        rest = {"batch_stats": {name: jnp.asarray(given[name]) for name in ("mean", "var")}}

    @jax.jit
    def run(params: Any, rest: Any, x: Any, g: Any) -> Any:
        def forward(params: Any, x: Any) -> Any:
            return layer.apply({"params": params, **rest}, x, mutable=["batch_stats"])

        if not case.gradient:
            return forward(params, x)
        y, pullback, state = jax.vjp(forward, params, x, has_aux=True)
        dparams, dx = pullback(g)
        return y, dx, dparams, state

    return lambda x, g: run(params, rest, x, g)


def _layer(library: Any, case: Case) -> nn.Module:
    options = {"epsilon": EPS, "dtype": jnp.dtype(case.dtype)}
    if case.layer == "GroupNorm":
        return library.GroupNorm(GROUPS, **options)
    if case.remembers:
        options["use_running_average"] = not case.training
    return getattr(library, case.layer)(**options)
