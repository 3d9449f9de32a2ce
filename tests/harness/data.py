"""Inputs for a row of the table, and how far an answer may be from the exact one."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from harness.oracle import Answer
from harness.table import Row

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
# Of the size of the terms that make up an answer.
BOUND = {"float16": 2e-6, "bfloat16": 2e-6, "float32": 2e-6, "float64": 1e-13}


@dataclass(frozen=True)
class Job:
    """A layer trained for a few steps on given batches and then evaluated."""

    definition: object
    dtype: str
    params: dict[str, np.ndarray]
    batches: list[np.ndarray]
    grads: list[np.ndarray]
    masks: list[np.ndarray] | None = None
    native: bool = False  # the framework's own layer, at its own defaults


def job(
    row: Row,
    *,
    dtype: str = "float32",
    offset: float = 0.0,
    spread: float = 1.0,
    layout: str = "C",
) -> Job:
    """Five batches for ``row``, drawn from N(offset, spread), with random parameters."""
    rng = np.random.default_rng(zlib.crc32(f"{row.name} {offset} {spread}".encode()))
    kind = DTYPES[dtype]
    wide = np.float64 if dtype == "float64" else np.float32
    params = {}
    if row.definition.scale:
        params["scale"] = rng.uniform(0.5, 1.5, row.definition.parameter_shape).astype(wide)
    if row.definition.bias:
        params["bias"] = rng.normal(size=row.definition.parameter_shape).astype(wide)
    batches = [
        arrange((rng.normal(size=s) * spread + offset).astype(kind), layout) for s in row.shapes()
    ]
    grads = [rng.normal(size=b.shape).astype(kind) for b in batches]
    return Job(row.definition, dtype, params, batches, grads)


def arrange(x: np.ndarray, layout: str) -> np.ndarray:
    """The same values, laid out in memory another way."""
    if layout == "F":
        return np.asfortranarray(x)
    if layout == "strided":
        wider = np.zeros((2 * x.shape[0], *x.shape[1:-1], x.shape[-1] + 3), x.dtype)
        wider[::2, ..., 1:-2] = x
        return wider[::2, ..., 1:-2]
    if layout == "channels_last":
        return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
    return x


def assert_near(got, want: Answer, dtype: str, what: str) -> None:
    """Within the bound of ``dtype``; half types within one unit in the last place as well."""
    got = np.asarray(got)
    assert got.shape == want.value.shape, f"{what}: shape {got.shape} for {want.value.shape}"
    slack = np.full(want.value.shape, BOUND[dtype] * want.scale)
    exact = want.value
    if got.dtype in (DTYPES["float16"], DTYPES["bfloat16"]):
        exact = want.value.astype(np.float64).astype(got.dtype)
        slack = slack + np.abs(np.spacing(exact).astype(np.float64))
    error = np.abs(got.astype(np.longdouble) - exact.astype(np.longdouble))
    worst = np.max(error - slack, initial=-np.inf)
    largest = np.max(error, initial=0)
    assert worst <= 0, f"{what}: error {float(largest):.3e}, of scale {want.scale:.3e}"
