"""What NNX' and Linen's layers are compared on: arrays of JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from normkit.jax._backend import BACKEND as BACKEND

LAYOUT = "channels last"
PACKAGES = ("flax", "jax")


def array(a: np.ndarray, dtype: str) -> jax.Array:
    return jnp.asarray(a, dtype=dtype)


def numpy(a: jax.Array) -> np.ndarray:
    return np.asarray(a, dtype="float32")


def wait(result: Any) -> None:
    """Until it is there."""
    jax.block_until_ready(result)


def peak(run: Callable[..., Any], x: jax.Array, g: jax.Array) -> float:
    """How many MiB a call holds at its peak, its results included, as XLA has planned it."""
    planned = jax.jit(run).lower(x, g).compile().memory_analysis()
    return (planned.temp_size_in_bytes + planned.output_size_in_bytes) / 2**20


def device() -> str:
    return ", ".join(map(str, jax.devices()))
