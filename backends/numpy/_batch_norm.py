"""BatchNorm for NumPy."""

from __future__ import annotations

from typing import Any

from numpy.typing import DTypeLike

import normkit as nk

from ._layer import Layer


class BatchNorm(Layer):
    """Batch normalization; the arguments are those of ``nk.BatchNorm``, and ``dtype``.

    ``layer(x, training=...)`` normalizes, ``layer.backward(grad)`` gives the gradient of x;
    ``params``, ``state`` and ``grads`` are dicts of arrays.

    >>> import numpy as np
    >>> BatchNorm(2, decay=0.9)(np.ones((3, 2), "float32"), training=True).tolist()
    [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    """

    def __init__(
        self, num_features: int, axis: int = 1, *, dtype: DTypeLike = None, **options: Any
    ) -> None:
        super().__init__(nk.BatchNorm(num_features, axis, **options), dtype)
