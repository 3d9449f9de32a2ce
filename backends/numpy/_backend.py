"""NumPy's answers to what the engine asks of an array library."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import array_api_compat.numpy as xp
import numpy as np

from normkit._backend import Array, Backend, DType


class NumPyBackend(Backend):
    def is_floating(self, dtype: DType) -> bool:
        # bfloat16 comes from the ml_dtypes package, and NumPy does not count it among its own.
        return dtype.name == "bfloat16" or super().is_floating(dtype)

    def quiet(self) -> AbstractContextManager[Any]:
        return np.errstate(over="ignore", invalid="ignore")

    def is_visible(self, x: Array) -> bool:
        return True


BACKEND = NumPyBackend(xp)
