"""NumPy's answers to what the engine asks of an array library."""

from __future__ import annotations

import array_api_compat.numpy as xp

from normkit._backend import Array, Backend, DType


class NumPyBackend(Backend):
    def is_floating(self, dtype: DType) -> bool:
        # bfloat16 comes from the ml_dtypes package, and NumPy does not count it among its own.
        return dtype.name == "bfloat16" or super().is_floating(dtype)

    def is_visible(self, x: Array) -> bool:
        return True


BACKEND = NumPyBackend(xp)
