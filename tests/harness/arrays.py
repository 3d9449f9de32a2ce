"""Every kind of array that the functions take, made from NumPy and turned back into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from harness import backends

NAMES = ["numpy", "array-api-strict", "dask", "torch", "tensorflow", "jax"]


class Kind(NamedTuple):
    """An array library: its namespace, how to make an array of it, and the array type."""

    name: str
    xp: Any
    make: Callable[[np.ndarray], Any]
    type: type


def kinds() -> list[Kind]:
    """Those of the chosen backends that are array libraries."""
    return [_kind(name) for name in NAMES if name in backends.chosen()]


def _kind(name: str) -> Kind:
    if name == "array-api-strict":
        import array_api_strict as xp

        return Kind(name, xp, xp.asarray, type(xp.asarray(0)))
    if name == "dask":
        import dask.array as xp

        return Kind(name, xp, xp.from_array, xp.Array)
    if name == "torch":
        import torch as xp

        return Kind(name, xp, lambda a: xp.from_numpy(np.array(a)), xp.Tensor)
    if name == "tensorflow":
        import tensorflow as xp

        return Kind(name, xp, xp.constant, xp.Tensor)
    if name == "jax":
        import jax
        import jax.numpy as xp

        return Kind(name, xp, xp.asarray, jax.Array)
    return Kind(name, np, np.asarray, np.ndarray)
