"""JAX's answers to what the engine asks of an array library."""

from __future__ import annotations

import jax
import jax.numpy as xp

from normkit._backend import Array, Backend, DType


class JaxBackend(Backend):
    def constant(self, x: Array) -> Array:
        # See Backend.constant: XLA fuses a multiplication into a subtraction, but not through this.
        return jax.lax.stop_gradient(xp.maximum(x, xp.finfo(x.dtype).min))

    def statistics_dtype(self, dtype: DType) -> DType:
        # This promotion is the package's own rule: where JAX' is strict, there is no mistake.
        with jax.numpy_dtype_promotion("standard"):
            return xp.promote_types(dtype, xp.float32)

    def is_visible(self, x: Array) -> bool:
        return (
            isinstance(x, jax.Array)
            and not isinstance(x, jax.core.Tracer)
            and x.is_fully_addressable
            and all(device.platform == "cpu" for device in x.devices())
            # Within jit, what is computed of a concrete array is traced all the same.
            and not isinstance(xp.zeros(()), jax.core.Tracer)
        )


BACKEND = JaxBackend(xp)
