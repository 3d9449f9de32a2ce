"""NumPy's answers to what the engine asks of an array library."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import array_api_compat.numpy as xp
import numpy as np

from normkit._backend import Array, Backend, DType

try:
    from . import _kernels
except ImportError:  # the plain engine does as well, slower
    _kernels = None

_FLOATING = frozenset(map(np.dtype, ("float16", "float32", "float64")))


class NumPyBackend(Backend):
    @property
    def kernels(self) -> Any:
        return _kernels

    def check(self, x: Array) -> None:
        if isinstance(x, np.ma.MaskedArray):
            msg = (
                "normkit does not look at the mask of a NumPy masked array; give x.data, and "
                "mask=~x.mask (or weights=~x.mask)."
            )
            raise TypeError(msg)

    def is_floating(self, dtype: DType) -> bool:
        if dtype in _FLOATING:  # to look at its name takes NumPy microseconds
            return True
        # bfloat16 comes from the ml_dtypes package, and NumPy does not count it among its own.
        return dtype.name == "bfloat16" or super().is_floating(dtype)

    def quiet(self) -> AbstractContextManager[Any]:
        return np.errstate(over="ignore", invalid="ignore")

    def is_visible(self, x: Array) -> bool:
        return True

    def backward(
        self,
        x: Array,
        grad: Array,
        axes: tuple[int, ...],
        along: tuple[int, ...],
        given: Mapping[str, Array],
        eps: float,
        centered: bool,
    ) -> tuple[Array, Array, Array] | None:
        """The gradients of x, scale and bias, for a layer; None, and the layer takes them itself.

        Parameters lie ``along`` some axes. What is ``given`` has the rank of x: ``scale``, if
        there is one; ``mean`` and ``var``, if the statistics are not those of x.
        """
        if _kernels is None:
            return None
        return _kernels.backward(x, grad, axes, along, given, eps, centered)


BACKEND = NumPyBackend(xp)
