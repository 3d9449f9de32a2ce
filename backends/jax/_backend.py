"""JAX's answers to what the engine asks of an array library."""

from __future__ import annotations

import jax
import jax.numpy as xp
from normkit._backend import Array, Backend


class JaxBackend(Backend):
    def constant(self, x: Array) -> Array:
        return jax.lax.stop_gradient(x)

    def is_visible(self, x: Array) -> bool:
        return (
            isinstance(x, jax.Array)
            and not isinstance(x, jax.core.Tracer)
            and x.is_fully_addressable
            and all(device.platform == "cpu" for device in x.devices())
        )


BACKEND = JaxBackend(xp)
