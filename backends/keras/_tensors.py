"""What every layer asks of Keras: its input as a tensor, and the shape that it was built on."""

from __future__ import annotations

from typing import Any

import keras

from normkit import _checks
from normkit._arrays import backend_of
from normkit._backend import Array, Backend


def real_tensor(inputs: Any, compute_dtype: str) -> tuple[Array, Backend]:
    """``inputs`` as a floating-point tensor of Keras' backend, and what the core calls that.

    It is made wider where ``compute_dtype`` is, never narrower. Integers count as numbers.
    """
    x = keras.ops.convert_to_tensor(inputs)
    backend = backend_of(x)
    dtype = keras.backend.standardize_dtype(x.dtype)
    if dtype.startswith(("int", "uint", "bool")):
        x = keras.ops.cast(x, "float32")
    # A half type is only widened, here already, if the result is to be of another type: on its way
    # there it would be rounded twice. Keras' own result_type makes float32 of float64 on PyTorch.
    if backend.is_floating(x.dtype) and dtype != compute_dtype:
        x = keras.ops.cast(x, "float64" if "float64" in (dtype, compute_dtype) else "float32")
    _checks.floating(x, backend)
    return x, backend


def tensor(variable: Any) -> Array | None:
    """The value of a weight, through which gradients reach it; None if the layer has none."""
    return None if variable is None else keras.ops.convert_to_tensor(variable)


def built_shape(layer: keras.layers.Layer) -> tuple[int | None, ...]:
    """The input shape that ``layer`` was built on; a ValueError if it was not."""
    config = layer.get_build_config()
    if config is None:
        msg = (
            f"the number of features is known once a layer is built, but {layer.name!r} is not; "
            f"build it first, for example by calling it once."
        )
        raise ValueError(msg)
    return tuple(config["input_shape"])
