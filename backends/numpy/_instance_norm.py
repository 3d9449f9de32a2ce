"""InstanceNorm for NumPy."""

from __future__ import annotations

from typing import Any

from numpy.typing import DTypeLike

import normkit as nk

from ._layer import Layer


class InstanceNorm(Layer):
    """Instance normalization; the arguments are those of ``nk.InstanceNorm``, and ``dtype``.

    ``layer(x, training=...)`` normalizes, ``layer.backward(grad)`` gives the gradient of x;
    ``params``, ``state`` and ``grads`` are dicts of arrays.

    >>> import numpy as np
    >>> InstanceNorm(1)(np.array([[[1.0, 3.0]], [[10.0, 30.0]]])).round(3).tolist()
    [[[-1.0, 1.0]], [[-1.0, 1.0]]]
    """

    def __init__(
        self, num_features: int, axis: int = 1, *, dtype: DTypeLike = None, **options: Any
    ) -> None:
        super().__init__(nk.InstanceNorm(num_features, axis, **options), dtype)
