"""Every layer on every backend against the oracle: outputs, gradients, statistics, evaluation."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest

from harness import backends, oracle
from harness.data import DTYPES, Job, assert_near, job
from harness.exact import Exact
from harness.oracle import Answer
from harness.table import BY_NAME, ROWS, Row

OFFSETS = [0.0, 1e5]
# (offset, spread): each of both, at least with an ordinary one of the other.
SCALES = [(0.0, 1.0), (10.0, 1.0), (1e3, 1.0), (1e5, 1.0), (0.0, 1e-3), (1e3, 1e-3), (1e5, 1e3)]
LAYOUTS = ["F", "strided", "channels_last"]
LIKELY = ["bn-ncl", "bn-nhwc", "ln-last", "ln-two", "gn-nchw", "in-affine", "rms-last"]


def check(row: Row, work: Job, got: dict, differentiates: bool) -> None:
    """Everything that a job returns against the oracle."""
    d, dtype = row.definition, work.dtype
    exact = Exact(row, work.params, dtype)
    running = None
    if row.tracks:
        running = oracle.Running(d.num_features, d.decay, d.correction)
    masks = work.masks or [None] * len(work.batches)
    for i, (x, g, mask) in enumerate(zip(work.batches, work.grads, masks, strict=True)):
        found = exact.forward(x, mask)
        assert_near(got[f"y{i}"], found["y"], dtype, f"y{i}")
        assert got[f"y{i}"].dtype == DTYPES[dtype]
        if differentiates:
            want = exact.backward(g, x, mask)
            assert_near(got[f"dx{i}"], want["dx"], dtype, f"dx{i}")
            for name in work.params:
                assert_near(got[f"d{name}{i}"], want[f"d{name}"], dtype, f"d{name}{i}")
        if running:
            running.step(found)
    if running:
        mean, var = got["mean"], got["var"]
        assert mean.dtype == var.dtype == np.result_type(DTYPES[dtype], np.float32)
        assert_near(mean, Answer(running.mean, float(np.max(np.abs(running.mean)))), dtype, "mean")
        assert_near(var, Answer(running.var, float(np.max(np.abs(running.var)))), dtype, "var")
        if "count" in got:
            assert got["count"] == running.count
        want = exact.given(work.batches[0], mean, var)
    else:
        want = exact.forward(work.batches[0], None)["y"]
    assert_near(got["eval"], want, dtype, "eval")


def names(rows):
    return [row.name for row in rows]


@pytest.mark.parametrize("row", ROWS, ids=names(ROWS))
def test_every_layer(backend, row):
    work = job(row)
    check(row, work, backends.runner(backend)(work), backends.differentiates(backend))


@pytest.mark.parametrize(("offset", "spread"), SCALES)
@pytest.mark.parametrize("name", LIKELY)
def test_offsets_and_spreads(backend, name, offset, spread):
    work = job(BY_NAME[name], offset=offset, spread=spread)
    check(BY_NAME[name], work, backends.runner(backend)(work), backends.differentiates(backend))


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("name", LIKELY)
def test_dtypes(backend, name, dtype):
    if dtype in backends.dtypes(backend):
        work = job(BY_NAME[name], dtype=dtype, offset=10.0)
        got = backends.runner(backend)(work)
        check(BY_NAME[name], work, got, backends.differentiates(backend))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name", ["bn-nchw", "bn-nhwc", "ln-two", "ln-channels-first", "gn-nchw", "in-affine", "rms-two"]
)
def test_layouts(backend, name, layout):
    work = job(BY_NAME[name], offset=10.0, layout=layout)
    before = [x.copy() for x in work.batches]
    check(BY_NAME[name], work, backends.runner(backend)(work), backends.differentiates(backend))
    for x, was in zip(work.batches, before, strict=True):
        np.testing.assert_array_equal(x, was)


@cache
def likely(backend: str, name: str, offset: float) -> dict:
    return backends.runner(backend)(job(BY_NAME[name], offset=offset))


@pytest.mark.parametrize(
    "pair", list(itertools.combinations(backends.chosen(), 2)), ids=lambda pair: " ".join(pair)
)
@pytest.mark.parametrize("offset", OFFSETS)
def test_pairs(pair, offset):
    """Any two backends agree with each other as closely as each does with the oracle."""
    for name in LIKELY:
        a, b = (likely(backend, name, offset) for backend in pair)
        for key in sorted(a.keys() & b.keys() - {"count"}):
            want = Answer(oracle.wide(a[key]), float(np.max(np.abs(a[key]))))
            assert_near(b[key], want, "float32", f"{name} {key}")
