"""JAX's answers to what the engine asks of an array library."""

from __future__ import annotations

import jax
import jax.numpy as xp
from normkit._backend import Array, Backend, DType


class JaxBackend(Backend):
    def constant(self, x: Array) -> Array:
        # Where XLA computes x more than once, it may fuse its last multiplication into whatever
        # comes next, and so have it in two roundings. It does not fuse across this operation,
        # which drops the last bit.
        info = xp.finfo(x.dtype)
        x = jax.lax.reduce_precision(x, info.nexp, info.nmant - 1)
        return jax.lax.stop_gradient(x)

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
