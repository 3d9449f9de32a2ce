"""The edges of what a layer can be given: nothing, one value, no numbers, huge ones, tiny ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import normkit as nk
import normkit.numpy

X = np.random.default_rng(0).normal(size=(4, 6, 5)).astype(np.float32)
# Over an x of shape (4, 6, 5), and the index of all values that share statistics with x[2, 1, 3].
LAYERS = {
    "batch": (nk.BatchNorm(6), np.s_[:, 1]),
    "layer": (nk.LayerNorm(5), np.s_[2, 1]),
    "group": (nk.GroupNorm(2, 6), np.s_[2, :3]),
    "instance": (nk.InstanceNorm(6), np.s_[2, 1]),
    "instance-tracking": (nk.InstanceNorm(6, track_running_stats=True), np.s_[2, 1]),
    "rms": (nk.RMSNorm(5), np.s_[2, 1]),
}
every = pytest.mark.parametrize("name", LAYERS)


def applied(kind, name, x, **options):
    """The result and the new state, in training, as NumPy arrays."""
    d, _ = LAYERS[name]
    params, state = d.init(xp=kind.xp)
    with np.errstate(invalid="ignore"):
        y, state = d.apply(params, state, kind.make(x), **({"training": True} | options))
        return np.asarray(y), {key: np.asarray(value) for key, value in state.items()}


@every
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_group(kind, name, value):
    broken = X.copy()
    broken[2, 1, 3] = value
    y, state = applied(kind, name, broken)
    want, clean = applied(kind, name, X)
    group = np.zeros(X.shape, bool)
    group[LAYERS[name][1]] = True
    # In PyTorch kernels may have computed the one, and the engine the other.
    within = {"rtol": 0, "atol": 1e-6 if kind.name == "torch" else 0}
    np.testing.assert_allclose(y[~group], want[~group], **within)
    if name == "rms" and np.isinf(value):
        # Divided by an infinite root mean square, the others are zero.
        group = np.arange(X.size).reshape(X.shape) == np.ravel_multi_index((2, 1, 3), X.shape)
    assert not np.any(np.isfinite(y[group]))
    for key in state.keys() - {"count"}:
        others = [np.delete(s[key], 1) for s in (state, clean)]
        np.testing.assert_allclose(*others, **within)
        assert not np.isfinite(state[key][1])


@every
@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e10, 1e18, 1e20, 1e30, 1e36])
def test_any_scale(kind, name, size):
    """Squares of these are no numbers of float32, but what is asked for is one."""
    x = X * np.float32(size)
    y, _ = applied(kind, name, x)
    d, _ = LAYERS[name]
    d = replace(d, eps=2.0**-23 if d.eps is None else d.eps)
    want, _ = d.apply(*d.init(dtype=np.float64), x.astype(np.float64), training=True)
    np.testing.assert_allclose(y, want, rtol=0, atol=2e-6 * np.abs(want).max())


def test_the_variance_of_huge_values_is_infinite(kind):
    mean, var = nk.moments(kind.make(np.array([[1e30], [3e30]], np.float32)), 0)
    mean, var = np.asarray(mean), np.asarray(var)
    np.testing.assert_allclose(mean, [2e30], rtol=1e-6)
    assert var == np.inf


def test_a_variance_whose_sum_is_no_number(kind):
    """Nor a compiled function takes the square of its unit for zero."""
    x = (1e18 * np.random.default_rng(0).normal(size=(10_000, 2))).astype(np.float32)
    want = x.astype(np.float64).var(0)
    functions = [lambda a: nk.moments(a, 0)[1]]
    if kind.name == "jax":
        functions.append(kind.xp.vectorize(functions[0], signature="(n,c)->(c)"))
        functions.append(__import__("jax").jit(functions[0]))
    if kind.name == "tensorflow":
        functions.append(kind.xp.function(functions[0], jit_compile=True))
    for f in functions:
        np.testing.assert_allclose(np.asarray(f(kind.make(x))), want, rtol=1e-5)


@pytest.mark.parametrize("size", [1.0, 1e9, 1e15, 1e18, 5e18, 1e19, 1e25, 1e30])
@pytest.mark.parametrize("f", [nk.layer_norm, nk.rms_norm], ids=lambda f: f.__name__)
def test_derivatives_at_any_scale(kind, f, size):
    """Before squares overflow, powers of the variance underflow."""
    x = (size * np.random.default_rng(0).normal(size=(4, 16))).astype(np.float32)
    u = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    layer = nk.numpy.layer(nk.LayerNorm(16) if f is nk.layer_norm else nk.RMSNorm(16, eps=1e-6))
    layer.params = {name: p.astype(np.float64) for name, p in layer.params.items()}
    layer(x.astype(np.float64), training=True)
    want = layer.backward(u.astype(np.float64))
    got = gradient(kind, f, x, u)
    if got is not None:
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())


def gradient(kind, f, x, u):
    """Of sum(f(x) * u), where the library has one."""
    x, u = kind.make(x), kind.make(u)
    if kind.name == "torch":
        x.requires_grad_()
        (f(x) * u).sum().backward()
        return x.grad.numpy()
    if kind.name == "jax":
        return np.asarray(__import__("jax").grad(lambda a: (f(a) * u).sum())(x))
    if kind.name == "tensorflow":
        with kind.xp.GradientTape() as tape:
            tape.watch(x)
            y = f(x)
        return tape.gradient(y, x, output_gradients=u).numpy()
    return None


@every
def test_a_huge_group_leaves_the_others_alone(kind, name):
    x = X.copy()
    x[LAYERS[name][1]] *= np.float32(1e25)
    y, _ = applied(kind, name, x)
    want, _ = applied(kind, name, X)
    group = np.zeros(X.shape, bool)
    group[LAYERS[name][1]] = True
    np.testing.assert_allclose(y[~group], want[~group], rtol=0, atol=1e-6)
    np.testing.assert_allclose(y[group], want[group], rtol=0, atol=1e-4)  # but for eps


@pytest.mark.parametrize("eps", [1e-37, 1e-12, 1.0, 1e30])
@every
def test_eps_extremes(kind, name, eps):
    d = replace(LAYERS[name][0], eps=eps)
    y, _ = d.apply(*d.init(xp=kind.xp), kind.make(X), training=True)
    want, _ = d.apply(*d.init(dtype=np.float64), X.astype(np.float64), training=True)
    np.testing.assert_allclose(np.asarray(y), want, rtol=0, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize("n", [5, 100, 1000])
@pytest.mark.parametrize("value", [0.1, 1e5, 123456789.0])
@every
def test_constant_values_come_out_as_zero(kind, name, value, n):
    """They are their own mean, however many there are."""
    d, _ = LAYERS[name]
    if isinstance(d, nk.LayerNorm | nk.RMSNorm):
        d = replace(d, shape=n)
    x = np.full((4, 6, n), value, np.float32)
    y = np.asarray(d.apply(*d.init(xp=kind.xp), kind.make(x), training=True)[0])
    if name == "rms":
        np.testing.assert_allclose(y, x / np.sqrt(x.astype(float) ** 2 + 2.0**-23), rtol=1e-6)
    else:
        np.testing.assert_allclose(y, 0, atol=1e-9)


@pytest.mark.parametrize(
    "d", [nk.LayerNorm(1), nk.RMSNorm(1, eps=1e-30)], ids=lambda d: type(d).__name__
)
def test_a_single_feature(kind, d):
    x = np.array([[3.0], [-4.0]], np.float32)
    y, _ = d.apply(*d.init(xp=kind.xp), kind.make(x))
    want = [[0], [0]] if isinstance(d, nk.LayerNorm) else [[1], [-1]]
    np.testing.assert_allclose(np.asarray(y), want, rtol=1e-6)


def test_no_features(kind):
    """Functions take what has no positions to normalize over; a definition has one at least."""
    for shape in ((3, 0), (0, 0)):
        x = kind.make(np.zeros(shape, np.float32))
        for f in (nk.layer_norm, nk.rms_norm):
            assert tuple(f(x).shape) == shape
    mean, var = nk.moments(kind.make(np.zeros((3, 0), np.float32)), 1)
    np.testing.assert_array_equal(np.asarray(mean), np.zeros(3))
    np.testing.assert_array_equal(np.asarray(var), np.zeros(3))


@pytest.mark.parametrize("value", [300.0, 6e4])
def test_half_squares_do_not_overflow(kind, value):
    if kind.name != "array-api-strict":  # has no half type
        x = np.array([[value, -value, value / 2, 0]], np.float16)
        y = np.asarray(nk.rms_norm(kind.make(x)))
        assert y.dtype == np.float16
        want = nk.rms_norm(x.astype(np.float64))
        np.testing.assert_allclose(y, want.astype(np.float16), rtol=1e-3)


def test_counts_beyond_what_a_half_type_holds(kind):
    if kind.name != "array-api-strict":
        x = np.full((70_000, 1), 2, np.float16)
        x[::2] = 4
        every = kind.make(np.ones(x.shape, bool))
        count, mean, var, _ = nk.Moments.of(kind.make(x), 0, weights=every)
        np.testing.assert_array_equal(np.ravel(np.asarray(count)), [70_000])
        np.testing.assert_allclose(np.asarray(mean), [3], rtol=1e-6)
        np.testing.assert_allclose(np.asarray(var), [1], rtol=1e-6)


@every
@pytest.mark.parametrize("dtype", [np.int32, np.complex64, bool])
def test_what_is_no_real_number_is_refused(kind, name, dtype):
    d, _ = LAYERS[name]
    params, state = d.init(xp=kind.xp)
    with pytest.raises(TypeError, match="x must hold real floating-point numbers"):
        d.apply(params, state, kind.make(np.ones(X.shape, dtype)))


@every
def test_the_wrong_shape_is_refused(kind, name):
    d, _ = LAYERS[name]
    params, state = d.init(xp=kind.xp)
    for shape in ((), (6,), (4, 7, 4)):
        with pytest.raises(ValueError, match=r"x has shape|out of range"):
            d.apply(params, state, kind.make(np.ones(shape, np.float32)), training=True)


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("d", [nk.GroupNorm(6, 6), nk.InstanceNorm(6)], ids=["group", "instance"])
def test_one_value_per_group_is_refused_whatever_the_batch(kind, d, n):
    x = kind.make(np.ones((n, 6, 1), np.float32))
    with pytest.raises(ValueError, match="needs more than one value in each group"):
        d.apply(*d.init(xp=kind.xp), x)


def test_instances_with_too_few_values_are_not_remembered(kind):
    """The running statistics are the average over the samples that have any."""
    d = nk.InstanceNorm(2, track_running_stats=True, decay=0.0)
    params, state = d.init(xp=kind.xp)
    x = np.random.default_rng(0).normal(3, 1, (3, 2, 8)).astype(np.float32)
    mask = np.ones((3, 1, 8), bool)
    mask[1] = False
    mask[2, 0, 1:] = False  # one value: no unbiased variance
    _, new = d.apply(params, state, kind.make(x), training=True, mask=kind.make(mask))
    np.testing.assert_allclose(np.asarray(new["mean"]), x[0].mean(-1), rtol=1e-6)
    np.testing.assert_allclose(np.asarray(new["var"]), x[0].var(-1, ddof=1), rtol=1e-6)
    _, same = d.apply(params, state, kind.make(x), training=True, mask=kind.make(mask[1:2] & False))
    for key in state:
        np.testing.assert_array_equal(np.asarray(same[key]), np.asarray(state[key]))
