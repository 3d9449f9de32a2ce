"""GroupNorm for NumPy."""

from __future__ import annotations

from typing import Any

from numpy.typing import DTypeLike

import normkit as nk

from ._layer import Layer


class GroupNorm(Layer):
    """Group normalization; the arguments are those of ``nk.GroupNorm``, and ``dtype``.

    ``layer(x)`` normalizes, ``layer.backward(grad)`` gives the gradient of x; ``params`` and
    ``grads`` are dicts of arrays.

    >>> import numpy as np
    >>> GroupNorm(2, 4)(np.array([[1.0, 3.0, 10.0, 30.0]])).round(3).tolist()
    [[-1.0, 1.0, -1.0, 1.0]]
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        axis: int = 1,
        *,
        dtype: DTypeLike = None,
        **options: Any,
    ) -> None:
        super().__init__(nk.GroupNorm(num_groups, num_channels, axis, **options), dtype)
