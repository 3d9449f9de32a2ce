"""JAX's answers to what the engine asks of an array library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as xp
from jax.export import is_symbolic_dim

from normkit._backend import Array, Backend, Count, DType
from normkit._explain import declined

try:
    from . import _kernels
except ImportError:  # the plain engine does as well, slower
    _kernels = None

_WITHOUT = "normkit.jax._kernels is missing"


class JaxBackend(Backend):
    @property
    def paths(self) -> Mapping[str, str]:
        return {} if _kernels is None else _kernels.PATHS

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

    def standardize(
        self,
        x: Array,
        axes: tuple[int, ...],
        scale: Array | None,
        bias: Array | None,
        eps: float,
        remember: bool,
        dtype: DType,
    ) -> tuple[Array, Array | None, Array | None] | None:
        if _kernels is None:
            return declined(_WITHOUT)
        wide = self.statistics_dtype(x.dtype)
        return _kernels.standardize(x, axes, scale, bias, eps, remember, dtype, wide)

    def normalize(
        self,
        x: Array,
        mean: Array,
        variance: Array,
        scale: Array | None,
        bias: Array | None,
        eps: float,
        dtype: DType,
    ) -> Array | None:
        return declined("with statistics that are given, XLA makes one pass of the engine")

    def rescale(
        self, x: Array, axes: tuple[int, ...], scale: Array | None, eps: float, dtype: DType
    ) -> Array | None:
        if _kernels is None:
            return declined(_WITHOUT)
        return _kernels.rescale(x, axes, scale, eps, dtype, self.statistics_dtype(x.dtype))

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
