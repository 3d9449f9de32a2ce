"""The ``promote_dtype`` option, which only the layers of NNX have."""

from __future__ import annotations

from typing import Any

from flax.nnx.nn import dtypes
from jax import Array

from normkit._backend import DType
from normkit.flax import _arguments


def promoted(layer: Any, *arrays: Array | None) -> tuple[Any, DType]:
    """``arrays`` (x, the running statistics, scale, bias) to compute with; the result's dtype.

    By default none is rounded on the way, unlike in Flax. A function that the user gave may.
    """
    x, *others = arrays
    if layer.promote_dtype is dtypes.promote_dtype:
        deciding = others
    else:
        x, *others = layer.promote_dtype(arrays, dtype=layer.dtype)
        deciding = others[-2:]
    x, dtype = _arguments.promoted(x, *deciding, dtype=layer.dtype)
    return (x, *others), dtype
