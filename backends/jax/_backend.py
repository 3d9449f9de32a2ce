"""JAX's answers to what the engine asks of an array library."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as xp
from jax.export import is_symbolic_dim

from normkit._backend import Array, Backend, Count, DType

try:
    from . import _kernels
except ImportError:  # the plain engine does as well, slower
    _kernels = None


class JaxBackend(Backend):
    @property
    def kernels(self) -> Any:
        return _kernels

    def total(self, x: Array, axes: tuple[int, ...]) -> Array:
        # XLA adds up in parts, and in a tree of them.
        return xp.sum(x, axis=axes, keepdims=True)

    def quotient(self, total: Array, count: Any) -> Array:
        # XLA multiplies by the reciprocal of a number that it knows, or that is one for all.
        return total / jax.lax.optimization_barrier(
            xp.broadcast_to(xp.asarray(count, total.dtype), total.shape)
        )

    def stop_gradient(self, x: Array) -> Array:
        return jax.lax.stop_gradient(x)

    def constant(self, x: Array) -> Array:
        # See Backend.constant: XLA fuses a multiplication into a subtraction, but not through this.
        return jax.lax.stop_gradient(xp.where(x > -xp.inf, x, xp.nan))

    def size(self, x: Array, axes: tuple[int, ...]) -> Count:
        # Exported functions may have lengths that are symbols, and cannot be compared.
        size = super().size(x, axes)
        return xp.asarray(size) if is_symbolic_dim(size) else size

    def statistics_dtype(self, *dtypes: DType) -> DType:
        # This promotion is the package's own rule: where JAX' is strict, there is no mistake.
        with jax.numpy_dtype_promotion("standard"):
            return xp.result_type(xp.float32, *dtypes)

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
