"""The seam between the engine and an array library.

The engine is written once, against the Array API. What it needs beyond the standard is
asked of a :class:`Backend`; the plain answers stand here, and ``backends/<name>/_backend.py``
overrides those for which its framework has a better one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

Array = Any
Count = Any  # an int, or an array where counts differ or are not known yet
Namespace = Any
DType = Any


class Backend:
    """What the engine asks of an array library. Every method here is the plain answer."""

    def __init__(self, xp: Namespace) -> None:
        self.xp = xp

    @property
    def library(self) -> str:
        """The name of the array library."""
        return str(self.xp.__name__).removeprefix("array_api_compat.").partition(".")[0]

    @property
    def paths(self) -> Mapping[str, str]:
        """Its faster paths: a name for each, and a line that says what it takes."""
        return {} if self.kernels is None else self.kernels.PATHS

    @property
    def kernels(self) -> Any:
        """The module of its faster paths; None if there is none. See :meth:`standardize`."""
        return None

    def check(self, x: Array) -> None:
        """Refuse an array of a kind that the engine cannot work on."""

    def total(self, x: Array, axes: tuple[int, ...]) -> Array:
        """The sum of ``x`` over ``axes``, which are kept with length 1.

        Added up in float64: a library may add one value after the other, and in float32 such a sum
        stops to grow at 2**24 values.
        """
        wide = self.xp.sum(x, axis=axes, keepdims=True, dtype=self.xp.float64)
        return wide if wide.dtype == x.dtype else self.xp.astype(wide, x.dtype)

    def quotient(self, total: Array, count: Any) -> Array:
        """``total / count``, rounded once: the same whether ``count`` is known beforehand."""
        return total / count

    def stop_gradient(self, x: Array) -> Array:
        """``x``, but no derivative passes through it."""
        return x

    def constant(self, x: Array) -> Array:
        """``x`` as one value wherever it is used, through which no derivative passes.

        A compiler that computes ``a * b - c`` in two places may round ``a * b`` in one of them
        and not in the other. What is subtracted here must be the same value in both. (A value of
        -inf may come back as NaN.)
        """
        return self.stop_gradient(x)

    def size(self, x: Array, axes: tuple[int, ...]) -> Count:
        """Number of elements along ``axes``: an int, or a scalar array where not known yet."""
        size = math.prod([x.shape[axis] for axis in axes])
        if size != size:  # lengths that are not known are NaN there
            msg = (
                f"the lengths of an array must be known, but its shape is {tuple(x.shape)}; call "
                f"compute_chunk_sizes() on a Dask array first."
            )
            raise ValueError(msg)
        return size

    def split(self, x: Array, axis: int, groups: int) -> Array:
        """``x`` with ``axis`` as two: ``groups``, and what is in each."""
        shape = tuple(x.shape)
        inner = shape[axis] // groups
        return self.xp.reshape(x, (*shape[:axis], groups, inner, *shape[axis + 1 :]))

    def join(self, x: Array, axis: int) -> Array:
        """``x`` with ``axis`` and the next as one: undoes :meth:`split`."""
        shape = tuple(x.shape)
        length = shape[axis] * shape[axis + 1]
        return self.xp.reshape(x, (*shape[:axis], length, *shape[axis + 2 :]))

    # Three operations that a backend may do faster than the engine, out of its framework's own
    # primitives: functions of these names in the module `kernels`, whose last argument is the
    # backend. Each does what the engine's function of the same name does, without weights; or
    # returns None, and the engine does it. Arguments that broadcast have the rank of x. Either way
    # it says so, for nk.explain: `taken(path)` with one of `PATHS`, or `return declined(why)`.

    def standardize(
        self,
        x: Array,
        axes: tuple[int, ...],
        scale: Array | None,
        bias: Array | None,
        eps: float,
        remember: bool,
        dtype: DType,
    ) -> tuple[Array, Array | None, Array | None] | None:
        """The result; and if they are to be remembered, mean and variance (reduced axes kept)."""
        if self.kernels is None:
            return None
        found: tuple[Array, Array | None, Array | None] | None = self.kernels.standardize(
            x, axes, scale, bias, eps, remember, dtype, self
        )
        return found

    def normalize(
        self,
        x: Array,
        mean: Array,
        variance: Array,
        scale: Array | None,
        bias: Array | None,
        eps: float,
        dtype: DType,
    ) -> Array | None:
        """The result, with statistics that are given."""
        if self.kernels is None:
            return None
        return self.kernels.normalize(x, mean, variance, scale, bias, eps, dtype, self)

    def rescale(
        self, x: Array, axes: tuple[int, ...], scale: Array | None, eps: float, dtype: DType
    ) -> Array | None:
        """``x`` divided by its root mean square over ``axes``, times ``scale``."""
        if self.kernels is None:
            return None
        return self.kernels.rescale(x, axes, scale, eps, dtype, self)

    def is_floating(self, dtype: DType) -> bool:
        """Whether ``dtype`` is a real floating-point type of this library."""
        return bool(self.xp.isdtype(dtype, "real floating"))

    def statistics_dtype(self, *dtypes: DType) -> DType:
        """The dtype in which statistics of ``dtypes`` are taken: theirs, but float32 at least."""
        return self.xp.result_type(self.xp.float32, *dtypes)

    def quiet(self) -> AbstractContextManager[Any]:
        """Where numbers beyond the largest one are expected, and nobody need be warned of them."""
        return nullcontext()

    def asarray(self, a: Any, x: Array) -> Array:
        """``a`` as an array of this library, where ``x`` is."""
        return self.xp.asarray(a)

    def is_visible(self, x: Array) -> bool:
        """Whether the values of ``x`` can be read now, without tracing or waiting for a device."""
        return False


def is_array(count: Count) -> bool:
    """Whether a count is an array. If not it is a number, which may be symbolic."""
    return not isinstance(count, int) and hasattr(count, "shape")
