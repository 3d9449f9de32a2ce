"""The Array API standard over ``tf.Tensor``, as far as the core needs it.

TensorFlow has no namespace that follows the standard (https://data-apis.org/array-api/2024.12),
so here is one. It works eagerly, in ``tf.function`` where lengths may not be known yet, and under
XLA; tensors, variables and NumPy arrays are taken alike. Only the rank must be known.

Where the standard leaves the choice: Python floats become float32, as TensorFlow has it, and
Python integers int64, so that counts do not overflow. bfloat16 is one more real floating dtype.
Integers do not mix with floating-point numbers.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import tensorflow as tf

from normkit._checks import axes_in_range

Array = Any
DType = Any
Device = Any
Axis = int | tuple[int, ...] | None
Shape = int | Iterable[Any]

bool = tf.bool
int8, int16, int32, int64 = tf.int8, tf.int16, tf.int32, tf.int64
uint8, uint16, uint32, uint64 = tf.uint8, tf.uint16, tf.uint32, tf.uint64
float16, bfloat16, float32, float64 = tf.float16, tf.bfloat16, tf.float32, tf.float64
complex64, complex128 = tf.complex64, tf.complex128

_KINDS: dict[str, tuple[DType, ...]] = {
    "bool": (bool,),
    "signed integer": (int8, int16, int32, int64),
    "unsigned integer": (uint8, uint16, uint32, uint64),
    "real floating": (float16, bfloat16, float32, float64),
    "complex floating": (complex64, complex128),
}
_KINDS["integral"] = _KINDS["signed integer"] + _KINDS["unsigned integer"]
_KINDS["floating"] = _KINDS["real floating"] + _KINDS["complex floating"]
_KINDS["numeric"] = _KINDS["integral"] + _KINDS["floating"]

# Dtypes promote only within one of these families; a Python number joins the ones named for it.
_FAMILIES = ("bool", "integral", "floating")
_SCALARS = {
    builtins.bool: ("bool",),
    int: ("integral", "floating"),
    float: ("floating",),
}


def isdtype(dtype: DType, kind: DType | str | tuple[DType | str, ...]) -> builtins.bool:
    """Whether ``dtype`` is of a kind that the standard names, is a dtype, or any of several."""
    if isinstance(kind, tuple):
        return builtins.any(isdtype(dtype, k) for k in kind)
    if isinstance(kind, str):
        if kind == "floating" or kind not in _KINDS:
            msg = f"{kind!r} is no kind of dtype; use one of {sorted({*_KINDS} - {'floating'})}."
            raise ValueError(msg)
        return tf.as_dtype(dtype) in _KINDS[kind]
    return tf.as_dtype(dtype) == tf.as_dtype(kind)


def result_type(*arrays_and_dtypes: Array | DType | complex) -> DType:
    """The dtype that these promote to. Python numbers take the dtype of the others."""
    scalars = [a for a in arrays_and_dtypes if type(a) in _SCALARS]
    dtypes = {_dtype(a) for a in arrays_and_dtypes if type(a) not in _SCALARS}
    if not dtypes:
        msg = "at least one array or dtype is needed to promote to, but got none."
        raise ValueError(msg)
    if dtypes >= {float16, bfloat16}:  # Neither holds the other's values.
        dtypes = dtypes - {float16, bfloat16} | {float32}
    result = tf.as_dtype(np.result_type(*(dtype.as_numpy_dtype for dtype in dtypes)))
    (family,) = (name for name in _FAMILIES if result in _KINDS[name])
    if not builtins.all(dtype in _KINDS[family] for dtype in dtypes) or not builtins.all(
        family in _SCALARS[type(scalar)] for scalar in scalars
    ):
        given = [dtype.name for dtype in dtypes] + [type(scalar).__name__ for scalar in scalars]
        msg = f"there is no dtype for {' and '.join(sorted(given))} together; convert one of them."
        raise TypeError(msg)
    return result


def astype(x: Array, dtype: DType, /, *, device: Device = None) -> Array:
    return asarray(x, dtype=dtype, device=device)


def asarray(obj: Any, /, *, dtype: DType = None, device: Device = None) -> Array:
    if not hasattr(obj, "dtype"):  # Python numbers, one or nested sequences of them.
        obj = np.asarray(obj)
        dtype = _default(obj.dtype) if dtype is None else dtype
    with _placed(device):
        x = tf.convert_to_tensor(obj)
        x = x if dtype is None else tf.cast(x, dtype)
        return x if device is None else tf.identity(x)


def zeros(shape: Shape, *, dtype: DType = None, device: Device = None) -> Array:
    return full(shape, 0, dtype=float32 if dtype is None else dtype, device=device)


def ones(shape: Shape, *, dtype: DType = None, device: Device = None) -> Array:
    return full(shape, 1, dtype=float32 if dtype is None else dtype, device=device)


def full(shape: Shape, fill_value: Any, *, dtype: DType = None, device: Device = None) -> Array:
    with _placed(device):
        return broadcast_to(asarray(fill_value, dtype=dtype), shape)


def arange(
    start: float,
    /,
    stop: float | None = None,
    step: float = 1,
    *,
    dtype: DType = None,
    device: Device = None,
) -> Array:
    # NumPy counts the steps in float64, so that rounding does not add one.
    values = np.arange(start) if stop is None else np.arange(start, stop, step)
    return asarray(values, dtype=_default(values.dtype) if dtype is None else dtype, device=device)


def zeros_like(x: Array, /, *, dtype: DType = None, device: Device = None) -> Array:
    with _placed(device):
        return tf.zeros_like(x, dtype)


def ones_like(x: Array, /, *, dtype: DType = None, device: Device = None) -> Array:
    with _placed(device):
        return tf.ones_like(x, dtype)


def abs(x: Array, /) -> Array:
    return asarray(x) if x.dtype.is_unsigned else tf.abs(x)


def sqrt(x: Array, /) -> Array:
    return tf.sqrt(x)


def isfinite(x: Array, /) -> Array:
    return tf.math.is_finite(x) if isdtype(x.dtype, "real floating") else ones_like(x, dtype=bool)


def maximum(x1: Array | complex, x2: Array | complex, /) -> Array:
    return _pairwise(tf.maximum, x1, x2)


def minimum(x1: Array | complex, x2: Array | complex, /) -> Array:
    return _pairwise(tf.minimum, x1, x2)


def where(condition: Array, x1: Array | complex, x2: Array | complex, /) -> Array:
    return tf.where(condition, *_promoted(x1, x2))


def sum(
    x: Array, /, *, axis: Axis = None, dtype: DType = None, keepdims: builtins.bool = False
) -> Array:
    """The sum; of integers in 64 bits, unless ``dtype`` says otherwise."""
    if dtype is None:
        dtype = x.dtype
        for kind, wide in (("signed integer", int64), ("unsigned integer", uint64)):
            dtype = wide if isdtype(dtype, kind) else dtype
    return _reduced(tf.reduce_sum, astype(x, dtype), axis, keepdims)


def mean(x: Array, /, *, axis: Axis = None, keepdims: builtins.bool = False) -> Array:
    if not isdtype(x.dtype, ("real floating", "complex floating")):
        msg = f"the mean is for floating-point numbers, but the dtype is {x.dtype.name}."
        raise TypeError(msg)
    return _reduced(tf.reduce_mean, x, axis, keepdims)


def max(x: Array, /, *, axis: Axis = None, keepdims: builtins.bool = False) -> Array:
    return _extreme(tf.reduce_max, x, axis, keepdims)


def min(x: Array, /, *, axis: Axis = None, keepdims: builtins.bool = False) -> Array:
    return _extreme(tf.reduce_min, x, axis, keepdims)


def any(x: Array, /, *, axis: Axis = None, keepdims: builtins.bool = False) -> Array:
    return _reduced(tf.reduce_any, _truth(x), axis, keepdims)


def all(x: Array, /, *, axis: Axis = None, keepdims: builtins.bool = False) -> Array:
    return _reduced(tf.reduce_all, _truth(x), axis, keepdims)


def reshape(x: Array, /, shape: Shape) -> Array:
    return tf.reshape(x, _lengths(shape))


def broadcast_to(x: Array, /, shape: Shape) -> Array:
    return tf.broadcast_to(x, _lengths(shape))


def permute_dims(x: Array, /, axes: tuple[int, ...]) -> Array:
    return tf.transpose(x, axes)


def concat(arrays: Sequence[Array], /, *, axis: int | None = 0) -> Array:
    dtype = result_type(*arrays)
    arrays = [astype(x if axis is not None else reshape(x, -1), dtype) for x in arrays]
    return tf.concat(arrays, 0 if axis is None else axis)


def expand_dims(x: Array, /, *, axis: int | tuple[int, ...] = 0) -> Array:
    count = len(axis) if isinstance(axis, tuple) else 1
    for position in axes_in_range(axis, len(x.shape) + count):
        x = tf.expand_dims(x, position)
    return x


def squeeze(x: Array, /, axis: int | tuple[int, ...]) -> Array:
    axes = axes_in_range(axis, len(x.shape))
    long = [a for a in axes if x.shape[a] not in (1, None)]
    if long:
        msg = f"only axes of length 1 can be squeezed, but axis {long[0]} has {x.shape[long[0]]}."
        raise ValueError(msg)
    # To tf.squeeze no axes are all of them.
    return tf.squeeze(x, axes) if axes else asarray(x)


def _reduced(
    reduction: Callable[..., Array], x: Array, axis: Axis, keepdims: builtins.bool
) -> Array:
    return reduction(x, axes_in_range(axis, len(x.shape)), keepdims)


# Compiled by XLA for a CPU, TensorFlow's greatest and least overlook NaN; the standard's do not.
def _pairwise(function: Callable[..., Array], x1: Array | complex, x2: Array | complex) -> Array:
    x1, x2 = _promoted(x1, x2)
    return tf.where(x1 != x1, x1, tf.where(x2 != x2, x2, function(x1, x2)))


def _extreme(
    reduction: Callable[..., Array], x: Array, axis: Axis, keepdims: builtins.bool
) -> Array:
    result = _reduced(reduction, x, axis, keepdims)
    if not isdtype(x.dtype, "real floating"):
        return result
    return where(any(x != x, axis=axis, keepdims=keepdims), np.nan, result)


def _truth(x: Array) -> Array:
    return x if x.dtype == bool else x != 0


def _promoted(x1: Array | complex, x2: Array | complex) -> tuple[Array, Array]:
    dtype = result_type(x1, x2)
    return asarray(x1, dtype=dtype), asarray(x2, dtype=dtype)


def _dtype(array_or_dtype: Array | DType) -> DType:
    is_dtype = isinstance(array_or_dtype, tf.DType | np.dtype | type | str)
    return tf.as_dtype(array_or_dtype if is_dtype else array_or_dtype.dtype)


def _default(dtype: np.dtype[Any]) -> DType:
    """The dtype for Python numbers that NumPy would give ``dtype``."""
    return {"f": float32, "c": complex64}.get(dtype.kind)


def _lengths(shape: Shape) -> list[Any]:
    return list(shape) if isinstance(shape, Iterable) else [shape]


def _placed(device: Device) -> AbstractContextManager[Any]:
    # tf.device(None) would not leave the place as it is: it undoes the caller's own tf.device.
    return nullcontext() if device is None else tf.device(device)
