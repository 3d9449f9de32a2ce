"""RMSNorm for NumPy."""

from __future__ import annotations

from typing import Any

from numpy.typing import DTypeLike

import normkit as nk

from ._layer import Layer


class RMSNorm(Layer):
    """Root-mean-square normalization; the arguments are those of ``nk.RMSNorm``, and ``dtype``.

    ``layer(x)`` normalizes, ``layer.backward(grad)`` gives the gradient of x; ``params`` and
    ``grads`` are dicts of arrays.

    >>> import numpy as np
    >>> RMSNorm(2)(np.array([[1.0, 7.0]])).round(4).tolist()
    [[0.2, 1.4]]
    """

    def __init__(
        self,
        shape: int | tuple[int, ...],
        axes: int | tuple[int, ...] | None = None,
        *,
        dtype: DTypeLike = None,
        **options: Any,
    ) -> None:
        super().__init__(nk.RMSNorm(shape, axes, **options), dtype)
