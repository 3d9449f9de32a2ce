"""Masks and weights: what is left out takes no part, whatever stands there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_agreement import check

import normkit as nk
from harness import backends
from harness.data import assert_near, job
from harness.oracle import Answer
from harness.table import BY_NAME

ROWS = ["bn-ncl", "bn-nhwc", "bn-middle", "ln-last", "ln-two", "ln-channels-first"]
ROWS += ["gn-nchw", "gn-nhwc", "in-ncl", "in-affine", "in-tracking", "rms-last", "rms-two"]


def masked(name: str, given: str, fill: tuple[float, ...] = (0.0,)):
    """A job whose batches have something left out, with the values of ``fill`` standing there."""
    row = BY_NAME[name]
    work = job(row, offset=10.0)
    rng = np.random.default_rng(3)
    channel = row.parameter_axes[-1]
    masks, batches = [], []
    for x in work.batches:
        shape = tuple(
            1 if given == "broadcast" and a == channel else n for a, n in enumerate(x.shape)
        )
        mask = rng.integers(0, 3, shape)
        mask = mask.astype(np.float32) if given == "weights" else mask > 0
        batches.append(np.where(mask > 0, x, np.resize(np.float32(fill), x.shape)))
        masks.append(np.squeeze(mask, channel) if given == "broadcast" else mask)
    return row, replace(work, batches=batches, masks=masks)


def spread(mask, x, row):
    """A mask without its channel axis, with it again."""
    channel = row.parameter_axes[-1]
    return mask if mask.ndim == x.ndim else np.expand_dims(mask, channel)


@pytest.mark.parametrize("given", ["booleans", "weights", "broadcast"])
@pytest.mark.parametrize("name", ROWS)
def test_against_the_oracle(backend, name, given):
    row, work = masked(name, given)
    got = backends.runner(backend)(work)
    full = [spread(m, x, row) for m, x in zip(work.masks, work.batches, strict=True)]
    work = replace(work, masks=full)
    check(row, work, got, backends.differentiates(backend))


@pytest.mark.parametrize("name", ROWS)
def test_what_is_masked_reaches_nothing(backend, name):
    """Not one bit changes, in values, gradients or state, whatever stands under the mask."""
    _, plain = masked(name, "booleans")
    _, broken = masked(name, "booleans", (np.nan, np.inf, 3e38, -np.inf))
    a = backends.runner(backend)(plain)
    b = backends.runner(backend)(broken)
    for key in a.keys() - {"eval"}:  # evaluated without a mask
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)
    for i, mask in enumerate(broken.masks):
        if f"dx{i}" in b:
            assert not np.any(b[f"dx{i}"][~mask])


@pytest.mark.parametrize("name", ROWS)
def test_a_mask_of_everything_is_none(backend, name):
    work = job(BY_NAME[name], offset=10.0)
    full = replace(work, masks=[np.ones(x.shape, bool) for x in work.batches])
    a, b = (backends.runner(backend)(w) for w in (work, full))
    for key in a:
        want = Answer(a[key].astype(np.float64), float(np.max(np.abs(a[key]))))
        assert_near(b[key], want, "float32", key)


def test_a_mask_of_nothing_changes_no_state(backend):
    row = BY_NAME["bn-ncl"]
    work = job(row)
    nothing = replace(work, masks=[np.zeros(x.shape, bool) for x in work.batches])
    got = backends.runner(backend)(nothing)
    np.testing.assert_array_equal(got["mean"], np.zeros(5))
    np.testing.assert_array_equal(got["var"], np.ones(5))
    assert got.get("count", 0) == 0
    for i, x in enumerate(work.batches):
        bias = work.params["bias"].reshape(1, 5, 1)
        np.testing.assert_array_equal(got[f"y{i}"], np.broadcast_to(bias, x.shape))


def test_padding_is_as_good_as_cutting(kind):
    """Padded sequences, with NaN for padding, give what their valid steps alone give."""
    rng = np.random.default_rng(0)
    lengths, x = [7, 3, 5], rng.normal(50, 2, (3, 7, 4)).astype(np.float32)
    mask = np.arange(7) < np.array(lengths)[:, None]
    x[~mask] = np.nan
    d = nk.BatchNorm(4, axis=-1)
    params, state = d.init(xp=kind.xp)
    y, padded = d.apply(params, state, kind.make(x), training=True, mask=kind.make(mask))
    z, cut = d.apply(params, state, kind.make(x[mask]), training=True)
    np.testing.assert_allclose(np.asarray(y)[mask], np.asarray(z), rtol=0, atol=2e-6)
    for key in ("mean", "var"):
        np.testing.assert_allclose(np.asarray(padded[key]), np.asarray(cut[key]), rtol=2e-7)
    assert np.all(np.asarray(y)[~mask] == 0)


def padded_sequences():
    """Three sequences of unequal lengths, padded with NaN, and which of the steps are valid."""
    x = np.random.default_rng(0).normal(50, 2, (3, 7, 4)).astype(np.float32)
    mask = np.arange(7) < np.array([7, 3, 5])[:, None]
    x[~mask] = np.nan
    return x, mask


@pytest.mark.parametrize("d", [nk.LayerNorm(4), nk.RMSNorm(4)], ids=lambda d: type(d).__name__)
def test_steps_come_out_bit_for_bit_as_without_padding(kind, d):
    """Each step is normalized alone, so its neighbours make no difference at all."""
    x, mask = padded_sequences()
    params, state = d.init(xp=kind.xp)
    y, _ = d.apply(params, state, kind.make(x), mask=kind.make(mask))
    z, _ = d.apply(params, state, kind.make(x[mask]))
    np.testing.assert_array_equal(np.asarray(y)[mask], np.asarray(z))
    assert not np.any(np.asarray(y)[~mask])


@pytest.mark.parametrize(
    "d", [nk.GroupNorm(2, 4, axis=-1), nk.InstanceNorm(4, axis=-1)], ids=lambda d: type(d).__name__
)
def test_samples_come_out_as_if_they_were_cut(kind, d):
    x, mask = padded_sequences()
    params, state = d.init(xp=kind.xp)
    y = np.asarray(d.apply(params, state, kind.make(x), mask=kind.make(mask))[0])
    for i, valid in enumerate(mask):
        z, _ = d.apply(params, state, kind.make(x[i : i + 1, valid]))
        np.testing.assert_allclose(y[i, valid], np.asarray(z)[0], rtol=0, atol=1e-6)
    assert not np.any(y[~mask])


@pytest.mark.parametrize(("correction", "moved"), [(0, True), (1, False)])
def test_one_valid_value_defines_no_sample_variance(kind, correction, moved):
    d = nk.BatchNorm(2, correction=correction)
    params, state = d.init(xp=kind.xp)
    x = np.arange(6, dtype=np.float32).reshape(3, 2) + 1
    mask = np.array([[True, True], [False, True], [False, True]])
    _, new = d.apply(params, state, kind.make(x), training=True, mask=kind.make(mask))
    mean, var = np.asarray(new["mean"]), np.asarray(new["var"])
    assert (mean[0] != 0) == moved
    assert mean[1] != 0
    assert np.all(np.isfinite(var))


def test_a_mask_in_inference_leaves_out_what_it_names(kind):
    d = nk.BatchNorm(2)
    params, state = d.init(xp=kind.xp)
    x = np.array([[1, np.nan], [3, 4]], np.float32)
    y, _ = d.apply(params, state, kind.make(x), mask=kind.make(~np.isnan(x)))
    np.testing.assert_allclose(np.asarray(y), [[1, 0], [3, 4]], rtol=1e-5)


def test_the_cumulative_average_counts_whole_batches(kind):
    """A batch in which a channel has nothing valid does not count, for any channel."""
    d = nk.BatchNorm(2, decay=None, correction=0)
    params, state = d.init(xp=kind.xp)
    x = np.random.default_rng(0).normal(10, 1, (8, 2)).astype(np.float32)
    mask = np.ones((8, 2), bool)
    mask[:, 0] = False
    _, state = d.apply(params, state, kind.make(x), training=True, mask=kind.make(mask))
    _, state = d.apply(params, state, kind.make(x), training=True)
    np.testing.assert_allclose(np.asarray(state["mean"]), x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(np.asarray(state["var"]), x.var(0), rtol=1e-5)
    assert int(np.asarray(state["count"])) == 1
