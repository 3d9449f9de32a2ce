"""Definitions are values: they compare, print, make their first arrays, and change nothing."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError, replace
from functools import partial

import numpy as np
import pytest

import normkit as nk
from harness.table import ROWS

rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


@rows
def test_a_definition_is_a_value(row):
    d = row.definition
    same = eval(repr(d), vars(nk))
    assert same == d
    assert hash(same) == hash(d)
    assert pickle.loads(pickle.dumps(d)) == d
    with pytest.raises(FrozenInstanceError):
        d.eps = 1.0


def test_repr():
    assert repr(nk.BatchNorm(64)) == (
        "BatchNorm(num_features=64, axis=1, eps=1e-05, decay=0.9, correction=1, scale=True, "
        "bias=True, track_running_stats=True)"
    )
    assert (
        repr(nk.LayerNorm(8))
        == "LayerNorm(shape=(8,), axes=(-1,), eps=1e-05, scale=True, bias=True)"
    )
    assert repr(nk.GroupNorm(2, 8)) == (
        "GroupNorm(num_groups=2, num_channels=8, axis=1, eps=1e-05, scale=True, bias=True)"
    )
    assert repr(nk.InstanceNorm(8)) == (
        "InstanceNorm(num_features=8, axis=1, eps=1e-05, decay=0.9, correction=1, scale=False, "
        "bias=False, track_running_stats=False)"
    )
    assert repr(nk.RMSNorm(8)) == (
        "RMSNorm(shape=(8,), axes=(-1,), eps=None, scale=True, zero_centered=False, "
        "scale_after_cast=False)"
    )


@rows
def test_init(kind, row):
    d = row.definition
    params, state = d.init(xp=kind.xp)
    assert set(params) == {name for name in ("scale", "bias") if getattr(d, name)}
    assert set(state) == ({"mean", "var", "count"} if row.tracks else set())
    first = {"scale": d.first_scale, "bias": 0, "mean": 0, "var": 1, "count": 0}
    for name, array in (params | state).items():
        assert isinstance(array, kind.type)
        values = np.asarray(array)
        assert values.shape == (() if name == "count" else d.parameter_shape)
        assert np.all(values == first[name])
        assert values.dtype.kind == "i" if name == "count" else values.dtype == np.float32


def test_init_dtypes(kind):
    d = nk.BatchNorm(3)
    # The standard has no half type, and Dask's namespace names none.
    half = kind.xp.float32 if kind.name in ("array-api-strict", "dask") else kind.xp.float16
    params, state = d.init(xp=kind.xp, dtype=half)
    assert params["scale"].dtype == half
    assert state["mean"].dtype == kind.xp.float32
    params, state = nk.LayerNorm(3).init(xp=kind.xp)
    assert params["scale"].dtype == kind.xp.float32


def test_init_device(kind):
    devices = {"torch": "meta", "array-api-strict": None, "numpy": "cpu"}
    if kind.name == "array-api-strict":
        devices[kind.name] = kind.xp.Device("device1")
    if kind.name in devices:
        params, state = nk.BatchNorm(3).init(xp=kind.xp, device=devices[kind.name])
        for array in (params | state).values():
            assert str(array.device) == str(devices[kind.name])


@rows
def test_nothing_given_is_changed(kind, row):
    params, state = row.definition.init(xp=kind.xp)
    x = kind.make(np.random.default_rng(0).normal(size=row.shape).astype(np.float32))
    before = {k: np.array(v) for k, v in (params | state | {"x": x}).items()}
    row.definition.apply(params, state, x, training=True)
    for name, array in (params | state | {"x": x}).items():
        np.testing.assert_array_equal(np.asarray(array), before[name])


@rows
def test_an_empty_batch_is_fine(kind, row):
    params, state = row.definition.init(xp=kind.xp)
    shape = tuple(0 if a == row.batch_axis else n for a, n in enumerate(row.shape))
    x = kind.make(np.zeros(shape, np.float32))
    for training in (True, False):
        y, after = row.definition.apply(params, state, x, training=training)
        assert tuple(y.shape) == shape
        for name in state:
            np.testing.assert_array_equal(np.asarray(after[name]), np.asarray(state[name]))


@pytest.mark.parametrize(
    "row", [row for row in ROWS if hasattr(row.definition, "axis")], ids=lambda row: row.name
)
def test_the_channels_may_be_moved(kind, row):
    """The same layer over the same values, whichever axis the channels are."""
    d = row.definition
    rng = np.random.default_rng(0)
    x = rng.normal(size=row.shape).astype(np.float32)
    params = {
        k: kind.make(rng.normal(size=d.parameter_shape).astype(np.float32)) for k in d.init()[0]
    }
    _, state = d.init(xp=kind.xp)
    y, _ = d.apply(params, state, kind.make(x), training=True)
    # Samples keep the first axis where they are normalized one by one.
    first = 0 if isinstance(d, nk.BatchNorm) else 1
    for to in range(first, x.ndim):
        moved = np.moveaxis(x, d.axis, to)
        z, _ = replace(d, axis=to).apply(params, state, kind.make(moved), training=True)
        np.testing.assert_allclose(
            np.asarray(z), np.moveaxis(np.asarray(y), d.axis, to), rtol=0, atol=2e-6
        )


def test_families_meet():
    """GroupNorm with one group is LayerNorm, with a group for each channel InstanceNorm."""
    x = np.random.default_rng(0).normal(3, 2, (4, 6, 5)).astype(np.float32)
    one = nk.group_norm(x, 1)
    np.testing.assert_allclose(one, nk.layer_norm(x, axes=(1, 2)), rtol=0, atol=1e-6)
    np.testing.assert_allclose(nk.group_norm(x, 6), nk.instance_norm(x), rtol=0, atol=1e-6)
    centred = x - x.mean(-1, keepdims=True)
    np.testing.assert_allclose(
        nk.rms_norm(centred, eps=1e-5), nk.layer_norm(x, eps=1e-5), rtol=0, atol=2e-6
    )


@pytest.mark.parametrize("offset", [1.0, 1e3, 1e5])
def test_a_shift_changes_nothing(kind, offset):
    """Where adding the offset is exact, so is taking it away again."""
    x = np.random.default_rng(0).integers(-64, 64, (6, 5, 7)).astype(np.float32)
    for f in (nk.batch_norm, nk.layer_norm, nk.instance_norm, partial(nk.group_norm, num_groups=5)):
        y, z = (np.asarray(f(kind.make(a))) for a in (x, x + np.float32(offset)))
        np.testing.assert_allclose(y, z, rtol=0, atol=1e-6)


def test_the_cumulative_average_is_the_average(kind):
    d = nk.BatchNorm(2, decay=None)
    params, state = d.init(xp=kind.xp)
    batches = np.random.default_rng(0).normal(3, 2, (6, 10, 2)).astype(np.float32)
    for batch in batches:
        _, state = d.apply(params, state, kind.make(batch), training=True)
    assert int(np.asarray(state["count"])) == 6
    np.testing.assert_allclose(np.asarray(state["mean"]), batches.mean((0, 1)), rtol=1e-6)
    np.testing.assert_allclose(np.asarray(state["var"]), batches.var(1, ddof=1).mean(0), rtol=1e-6)
