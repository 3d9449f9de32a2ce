"""LayerNorm for NumPy."""

from __future__ import annotations

from typing import Any

from numpy.typing import DTypeLike

import normkit as nk

from ._layer import Layer


class LayerNorm(Layer):
    """Layer normalization; the arguments are those of ``nk.LayerNorm``, and ``dtype``.

    ``layer(x)`` normalizes, ``layer.backward(grad)`` gives the gradient of x; ``params`` and
    ``grads`` are dicts of arrays.

    >>> import numpy as np
    >>> LayerNorm(2)(np.array([[1.0, 3.0]])).round(4).tolist()
    [[-1.0, 1.0]]
    """

    def __init__(
        self,
        shape: int | tuple[int, ...],
        axes: int | tuple[int, ...] | None = None,
        *,
        dtype: DTypeLike = None,
        **options: Any,
    ) -> None:
        super().__init__(nk.LayerNorm(shape, axes, **options), dtype)
