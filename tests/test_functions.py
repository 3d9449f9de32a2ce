"""The functions and Moments, on every kind of array."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import normkit as nk
from harness import arrays, oracle
from harness.data import assert_near
from harness.oracle import Answer
from normkit._definition import Definition

slow = settings(deadline=None, max_examples=25, derandomize=True)


@st.composite
def cases(draw):
    """An array, some of its axes, and how its values are spread."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    axes = draw(st.lists(st.integers(0, len(shape) - 1), unique=True, max_size=len(shape)))
    signs = draw(st.lists(st.booleans(), min_size=len(axes), max_size=len(axes)))
    seed = draw(st.integers(0, 2**16))
    offset = draw(st.sampled_from([0.0, -3.0, 1e3, -1e5]))
    spread = draw(st.sampled_from([1e-3, 1.0, 1e3]))
    x = np.random.default_rng(seed).normal(offset, spread, shape).astype(np.float32)
    named = tuple(
        a - len(shape) if negative else a for a, negative in zip(axes, signs, strict=True)
    )
    return x, named, tuple(sorted(axes))


def dtypes(kind) -> list[str]:
    """The dtypes that a kind of array has (float64 in JAX only when it is asked for)."""
    without = {"array-api-strict": ["float16"], "jax": ["float64"]}.get(kind.name, [])
    return [name for name in ("float16", "float32", "float64") if name not in without]


def exact_moments(x, axes, weights=None):
    """Mean and variance with the reduced axes kept, and the scales of their terms."""
    found = oracle.forward(x, None, None, axes=axes, parameter_axes=(), eps=1.0, weights=weights)
    kept = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
    mean = np.array(list(found["mean"].values())).reshape(kept)
    var = np.array(list(found["var"].values())).reshape(kept)
    return (
        Answer(mean, float(np.max(np.abs(mean)))),
        Answer(var, float(np.max(var)) + 1e-30),
    )


@slow
@given(case=cases(), keepdims=st.booleans())
def test_moments(kind, case, keepdims):
    x, named, axes = case
    mean, var = nk.moments(kind.make(x), named, keepdims=keepdims)
    assert isinstance(mean, kind.type)
    assert isinstance(var, kind.type)
    for got, want in zip((mean, var), exact_moments(x, axes), strict=True):
        value = want.value if keepdims else np.squeeze(want.value, axis=axes)
        assert_near(got, Answer(value, want.scale), "float32", "moments")


@slow
@given(case=cases(), data=st.data())
def test_weighted_moments(kind, case, data):
    """Whole weights count a value that often; zero leaves it out, even if it is NaN."""
    x, named, axes = case
    if not x.size:
        return
    seed = data.draw(st.integers(0, 99))
    weights = np.random.default_rng(seed).integers(0, 3, x.shape).astype(np.float32)
    broken = np.where(weights > 0, x, np.float32(np.nan))
    got = nk.moments(kind.make(broken), named, weights=kind.make(weights), keepdims=True)
    for value, want in zip(got, exact_moments(x, axes, weights), strict=True):
        assert_near(value, want, "float32", "moments")


@pytest.mark.parametrize("axes", [None, 0, -1, (0, 2), (), (-1, 0)])
def test_moments_axes_as_numpy(kind, axes):
    x = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    mean, var = nk.moments(kind.make(x), axes)
    np.testing.assert_allclose(np.asarray(mean), np.mean(x, axes), rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.asarray(var), np.var(x, axes), rtol=0, atol=1e-6)


@slow
@given(case=cases(), data=st.data())
def test_layer_norm(kind, case, data):
    x, named, axes = case
    if not axes:
        return
    dtype = data.draw(st.sampled_from(dtypes(kind)))
    with np.errstate(over="ignore"):
        x = x.astype(dtype)
    if not np.all(np.isfinite(x)):  # 1e5 is none of the numbers of float16
        return
    rng = np.random.default_rng(1)
    shape = tuple(x.shape[a] for a in axes)
    scale, bias = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    y = nk.layer_norm(kind.make(x), kind.make(scale), kind.make(bias), axes=named, eps=1e-3)
    want = oracle.forward(x, scale, bias, axes=axes, parameter_axes=axes, eps=1e-3)
    assert isinstance(y, kind.type)
    assert np.asarray(y).dtype == dtype
    # With float32 parameters, as layers have them.
    assert_near(y, want["y"], dtype, "layer_norm")


@slow
@given(case=cases(), data=st.data())
def test_batch_norm(kind, case, data):
    x, _, _ = case
    if x.ndim < 2:
        return
    x = np.concatenate([x, x + 1])  # more than one value a channel, whichever axis it is
    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    channel = axis % x.ndim
    axes = tuple(a for a in range(x.ndim) if a != channel)
    if np.prod([x.shape[a] for a in axes]) == 1:
        return
    scale = np.random.default_rng(1).normal(size=x.shape[channel]).astype(np.float32)
    y = nk.batch_norm(kind.make(x), kind.make(scale), axis=axis)
    want = oracle.forward(x, scale, None, axes=axes, parameter_axes=(channel,), eps=1e-5)
    assert_near(y, want["y"], "float32", "batch_norm")


MASK = np.random.default_rng(5).integers(0, 3, (4, 6, 5)) > 0


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("function", "definition"),
    [
        (lambda x, **o: nk.batch_norm(x, **o), nk.BatchNorm(6)),
        (lambda x, **o: nk.layer_norm(x, **o), nk.LayerNorm(5)),
        (lambda x, **o: nk.group_norm(x, 3, **o), nk.GroupNorm(3, 6)),
        (lambda x, **o: nk.instance_norm(x, **o), nk.InstanceNorm(6, scale=True, bias=True)),
        (lambda x, **o: nk.rms_norm(x, **o), nk.RMSNorm(5, eps=1e-6)),
        (lambda x, **o: nk.batch_norm(x, axis=-1, **o), nk.BatchNorm(5, axis=-1)),
        (lambda x, **o: nk.group_norm(x, 5, axis=2, **o), nk.GroupNorm(5, 5, axis=-1)),
        (lambda x, **o: nk.rms_norm(x, axes=(1, 2), **o), nk.RMSNorm((6, 5), eps=1e-6)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Definition) else "",
)
def test_functions_are_the_layers(kind, function, definition, masked):
    rng = np.random.default_rng(1)
    x = kind.make(rng.normal(7, 2, (4, 6, 5)).astype(np.float32))
    names = [name for name in ("scale", "bias") if getattr(definition, name)]
    params = {
        name: kind.make(rng.normal(size=definition.parameter_shape).astype(np.float32))
        for name in names
    }
    mask = kind.make(MASK) if masked else None
    _, state = definition.init(xp=kind.xp)
    want, _ = definition.apply(params, state, x, training=True, mask=mask)
    got = function(x, **params, mask=mask)
    assert isinstance(got, kind.type)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def test_normalize(kind):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(4, 5, 3)) + 1e5).astype(np.float32)
    mean, var, scale, bias = (
        rng.uniform(0.5, 2, 3).astype(np.float32) + offset for offset in (1e5, 0, 0, 0)
    )
    mean, var = mean.astype(np.float32), var.astype(np.float32)
    want = oracle.given(x, mean, var, scale, bias, parameter_axes=(2,), eps=1e-3)["y"]
    flat = nk.normalize(*(kind.make(a) for a in (x, mean, var, scale, bias)), eps=1e-3)
    kept = nk.normalize(
        kind.make(x), *(kind.make(a.reshape(1, 1, 3)) for a in (mean, var, scale, bias)), eps=1e-3
    )
    for y in (flat, kept):
        assert isinstance(y, kind.type)
        assert_near(y, want, "float32", "normalize")


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_merged_moments_are_those_of_the_union(kind, count):
    rng = np.random.default_rng(count)
    parts = [
        rng.normal(1e3 * i, 1 + i, (n, 4)).astype(np.float32)
        for i, n in enumerate((7, 1, 12, 3, 40)[:count])
    ]
    total = nk.Moments.of(kind.make(np.zeros((0, 4), np.float32)), 0)
    for part in parts:
        total = total.merge(nk.Moments.of(kind.make(part), 0))
    mean, var = exact_moments(np.concatenate(parts), (0,))
    assert total.count == sum(len(part) for part in parts)
    assert_near(total.mean, Answer(mean.value[0], mean.scale), "float32", "mean")
    assert_near(total.variance, Answer(var.value[0], var.scale), "float32", "variance")


def test_merging_with_nothing_changes_nothing(kind):
    some = nk.Moments.of(kind.make(np.array([[1.5, 3], [2, 7.25]], np.float32)), 0)
    none = nk.Moments.of(kind.make(np.zeros((0, 2), np.float32)), 0)
    for merged in (some.merge(none), none.merge(some)):
        assert merged.count == 2
        np.testing.assert_array_equal(np.asarray(merged.mean), np.asarray(some.mean))
        np.testing.assert_array_equal(np.asarray(merged.variance), np.asarray(some.variance))


def test_weighted_moments_merge(kind):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(10, 3)).astype(np.float32)
    weights = rng.integers(0, 2, (10, 3)).astype(bool)
    parts = [
        nk.Moments.of(kind.make(x[a:b]), 0, weights=kind.make(weights[a:b]))
        for a, b in ((0, 4), (4, 10))
    ]
    whole = nk.Moments.of(kind.make(x), 0, weights=kind.make(weights))
    for got, want in zip(parts[0].merge(parts[1])[:3], whole[:3], strict=True):
        np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("correction", [0, 1])
def test_variance_estimates(kind, correction):
    x = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    found = nk.Moments.of(kind.make(x), 0).estimate(correction)
    np.testing.assert_allclose(np.asarray(found), x.var(0, ddof=correction), rtol=1e-6)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_moments_of_nothing_are_zero(kind, shape):
    for value in nk.moments(kind.make(np.zeros(shape, np.float32)), 0):
        np.testing.assert_array_equal(np.asarray(value), np.zeros(shape[1]))


def test_many_values_keep_their_digits(kind):
    """Sums over 100,000 rows, taken one after the other, would lose two digits."""
    x = np.random.default_rng(0).normal(1e4, 1, (100_000, 2)).astype(np.float32)
    mean, var = nk.moments(kind.make(x), 0)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(np.asarray(mean), exact.mean(0), rtol=1e-7)
    np.testing.assert_allclose(np.asarray(var), exact.var(0), rtol=5e-7)


def test_half_precision_statistics_are_float32(kind):
    x = (np.arange(12).reshape(4, 3) * 100).astype(np.float16)
    if kind.name == "array-api-strict":  # the standard has no half types
        with pytest.raises(TypeError, match="does not support"):
            kind.make(x)
        return
    mean, var = nk.moments(kind.make(x), 0)
    assert np.asarray(mean).dtype == np.asarray(var).dtype == np.float32
    np.testing.assert_allclose(np.asarray(var), x.astype(np.float64).var(0), rtol=1e-6)


def test_unknown_lengths_are_refused():
    if any(kind.name == "dask" for kind in arrays.kinds()):
        import dask.array

        x = dask.array.from_array(np.ones((6, 3), np.float32), chunks=2)
        x = x[dask.array.from_array(np.arange(6) > 2, chunks=2)]
        with pytest.raises(ValueError, match="call compute_chunk_sizes"):
            nk.moments(x, 0)
        assert nk.moments(x.compute_chunk_sizes(), 0)[0].compute().tolist() == [1, 1, 1]


@pytest.mark.parametrize("weighted", [False, True])
def test_more_values_than_float32_can_count(kind, weighted):
    """Added up one after the other in float32, these would have a mean of 3.4 instead of 4."""
    n = 20_000_000
    x = np.full((n, 1), 3, np.float32)
    x[::2] = 5
    weights = kind.make(np.ones((n, 1), bool)) if weighted else None
    count, mean, var, _ = nk.Moments.of(kind.make(x), 0, weights=weights)
    assert abs(float(np.asarray(count).item()) - n) <= 1
    np.testing.assert_allclose(np.asarray(mean), [4], rtol=2e-7)
    np.testing.assert_allclose(np.asarray(var), [1], rtol=2e-7)


def test_merging_huge_values_with_nothing_changes_nothing(kind):
    some = nk.Moments.of(kind.make(np.full((4, 2), 1e20, np.float32)), 0)
    none = nk.Moments.of(kind.make(np.zeros((0, 2), np.float32)), 0)
    for merged in (some.merge(none), none.merge(some)):
        np.testing.assert_array_equal(np.asarray(merged.mean), np.full(2, np.float32(1e20)))
        np.testing.assert_array_equal(np.asarray(merged.variance), np.zeros(2))


def test_wide_statistics_of_narrow_values(kind):
    """float64 statistics keep their digits when float32 values are normalized with them."""
    if kind.name != "jax":  # which has float64 only when it is asked for
        x = np.array([[10000.5], [10001.25]], np.float32)
        mean, var = np.array([10000.123456789]), np.array([1.0])
        y = nk.normalize(kind.make(x), kind.make(mean), kind.make(var), eps=1e-5)
        want = (x.astype(np.float64) - mean) / np.sqrt(var + 1e-5)
        np.testing.assert_allclose(np.asarray(y), want, rtol=2e-7)
        assert np.asarray(y).dtype == np.float32


@pytest.mark.parametrize("size", [1, 4, 32])
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e5])
def test_a_stream_keeps_the_digits_of_a_single_pass(kind, size, offset):
    # Dask only notes what is to be computed, and what it notes must not become too deep.
    n = 8 * size if kind.name == "dask" else 256
    x = np.random.default_rng(0).normal(offset, 1, (n, 2)).astype(np.float32)
    parts = [nk.Moments.of(kind.make(x[i : i + size]), 0) for i in range(0, len(x), size)]
    mean, var = exact_moments(x, (0,))
    total = sum(parts)
    assert total.count == len(x)
    assert_near(total.mean, Answer(mean.value[0], mean.scale), "float32", "mean")
    assert_near(total.variance, Answer(var.value[0], var.scale), "float32", "variance")


def test_moments_that_do_not_fit_are_refused():
    some = nk.Moments.of(np.ones((3, 2)), 0)
    with pytest.raises(TypeError):
        some + 1
    for other in arrays.kinds():
        if other.name != "numpy":
            with pytest.raises(TypeError, match="the other mean must be an array of the same libr"):
                some.merge(nk.Moments.of(other.make(np.ones((3, 2), np.float32)), 0))
