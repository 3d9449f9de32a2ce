"""The faster paths of JAX arrays: which call takes which, and that none can be told from the engine
by its results."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import normkit as nk
import normkit.numpy
from normkit.jax import _backend

kernels = pytest.importorskip("normkit.jax._kernels")
statistics = pytest.importorskip("normkit.jax._kernel_statistics")

IMAGES, ROWS = (4, 5, 3, 6), (4, 6, 5)
BARE = {"scale": False, "bias": False}
# The definition, the shape of an input, and the path that its statistics in training take.
PATHS = {
    "batch": (nk.BatchNorm.flax(6), IMAGES, "channels"),
    "batch-first": (nk.BatchNorm(5), IMAGES, "channels"),
    "batch-bare": (nk.BatchNorm(6, axis=-1, **BARE), IMAGES, "channels"),
    "batch-bias": (nk.BatchNorm(6, axis=-1, scale=False), IMAGES, "channels"),
    "layer": (nk.LayerNorm(5), ROWS, "features"),
    "layer-apart": (nk.LayerNorm((4, 5), axes=(0, 2)), ROWS, "features"),
    "layer-bare": (nk.LayerNorm(5, **BARE), ROWS, "channels"),
    "layer-scale": (nk.LayerNorm(5, bias=False), ROWS, "features"),
    "layer-bias": (nk.LayerNorm(5, scale=False), ROWS, "features"),
    "layer-one-feature": (nk.LayerNorm(1), (8, 3, 1), None),
    "group": (nk.GroupNorm.flax(3, 6), IMAGES, "channels"),
    "group-first": (nk.GroupNorm(2, 6), (4, 6, 5, 3), "channels"),
    "group-matrix": (nk.GroupNorm(2, 6), (12, 6), "features"),
    "instance": (nk.InstanceNorm.flax(6, track_running_stats=True), IMAGES, "channels"),
    "rms": (nk.RMSNorm(5, eps=1e-5), ROWS, "features"),
    "rms-bare": (nk.RMSNorm(5, eps=1e-5, scale=False), ROWS, "channels"),
}
paths = pytest.mark.parametrize("name", PATHS)


@pytest.fixture(params=["shifted", "guarded"], scope="module")
def how(request):
    """Both ways to take statistics: that of small arrays, and that of large ones on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "guarded":
            patch.setattr(statistics, "_SMALL", 0)
        jax.clear_caches()
        yield request.param
    jax.clear_caches()


def example(name, dtype=jnp.float32, offset=0.0):
    """A function of x and the parameters, these, and a direction for each and for the result."""
    definition, shape, _ = PATHS[name]
    rng = np.random.default_rng(3)
    params, state = definition.init(xp=jnp, dtype=dtype)
    params = {key: jnp.asarray(rng.uniform(0.5, 1.5, p.shape), dtype) for key, p in params.items()}
    x = jnp.asarray(rng.normal(offset, 1, shape), dtype)
    tangents = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), dtype), (x, params))
    u = jnp.asarray(rng.normal(size=shape), dtype)

    def f(x, params):
        return definition.apply(params, state, x, training=True)

    return f, (x, params), tangents, u


def results(f, inputs, tangents, u):
    """Result and state; both first derivatives; and a second, one mode in the other.

    That of reverse mode in reverse mode is checked against differences in test_derivatives.py.
    """

    def gradient(*inputs):
        return jax.vjp(lambda *a: f(*a)[0], *inputs)[1](u)

    return (
        f(*inputs),
        jax.jvp(lambda *a: f(*a)[0], inputs, tangents)[1],
        gradient(*inputs),
        jax.jvp(gradient, inputs, tangents)[1],
    )


def plain(call, *args):
    """The same by the engine."""
    saved, _backend._kernels = _backend._kernels, None
    try:
        return call(*args)
    finally:
        _backend._kernels = saved


def close(got, want, bound):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=bound * max(np.abs(b).max(initial=0), 1e-3))


@paths
def test_each_path_is_taken(name):
    f, inputs, *_ = example(name)
    [step] = nk.explain(f, *inputs)
    assert (step.library, step.path) == ("jax", PATHS[name][2])
    assert step.path or step.why == "there is nothing to add up"


def test_every_path_is_in_the_table():
    assert {path for *_, path in PATHS.values()} == {*_backend.BACKEND.paths, None}


def test_what_is_left_to_the_engine(monkeypatch):
    x = jnp.ones((4, 6, 5))
    (n,) = export.symbolic_shape("n")
    maybe_empty = jax.ShapeDtypeStruct((n - 1, 5), jnp.float32)
    mean = jnp.zeros(6)
    for why, call in {
        "an array is empty, or may be": lambda: nk.layer_norm(x[:0]),
        "an array is empty, or may be ": partial(jax.eval_shape, nk.layer_norm, maybe_empty),
        "a mask or weights lie along the reduced axes": lambda: nk.layer_norm(x, mask=x > 0),
        "with statistics that are given, XLA makes one pass of the engine": lambda: nk.normalize(
            x, mean[:, None], mean[:, None], eps=1e-3
        ),
    }.items():
        [step] = nk.explain(call)
        assert (step.path, step.why) == (None, why.strip())
    monkeypatch.setattr(_backend, "_kernels", None)
    for f in (nk.layer_norm, nk.rms_norm):
        [step] = nk.explain(f, x)
        assert (step.path, step.why) == (None, "there is no faster path")
    assert _backend.BACKEND.paths == {}


def test_results_are_those_of_the_engine(how):
    """In one compiled function, so that it takes less long."""
    names = PATHS if how == "shifted" else ["batch", "layer", "rms"]
    with jax.enable_x64(True):
        offset = 1e3 if how == "shifted" else 0.0
        examples = {name: example(name, jnp.float64, offset) for name in names}
        fs = {name: f for name, (f, *_) in examples.items()}
        rest = {name: given for name, (_, *given) in examples.items()}

        def compiled():
            function = jax.jit(
                lambda rest: {name: results(fs[name], *given) for name, given in rest.items()},
                compiler_options={"xla_backend_optimization_level": 0},
            )
            return function(rest)

        got, want = compiled(), plain(compiled)
        for name in names:
            close(got[name], want[name], 1e-9)


def test_float32_keeps_its_digits(how):
    for name in ("batch", "layer", "group", "instance", "rms"):
        definition = PATHS[name][0]
        f, *_ = example(name)
        compiled = jax.jit(f)
        for offset in (0.0, 1.9, 2.1, 1e2, 1e5):
            _, inputs, *_ = example(name, offset=offset)
            x, params = jax.tree.map(lambda a: np.asarray(a, np.float64), inputs)
            _, start = definition.init(dtype=np.float64)
            want = definition.apply(params, start, x, training=True)
            for call in (f, compiled):
                close(call(*inputs), want, 2e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30, 0.1])
@pytest.mark.parametrize("name", ["batch", "layer", "rms"])
def test_groups_of_other_kinds_leave_the_rest_alone(how, name, value):
    """Not finite, huge, constant: bit for bit what the others are without them."""
    f, (x, params), *_ = example(name)
    group = np.s_[..., 1] if name == "batch" else np.s_[2, 1]
    noise = 1 if np.isfinite(value) and value > 1 else 0
    broken = x.at[group].set(value * (1 + noise * x[group]))
    got, want = np.asarray(f(broken, params)[0]), np.asarray(f(x, params)[0])
    engine = np.asarray(plain(f, broken, params)[0])
    inside = np.zeros(x.shape, bool)
    inside[group] = True
    np.testing.assert_array_equal(got[~inside], want[~inside])
    np.testing.assert_allclose(got[inside], engine[inside], rtol=0, atol=3e-6)


@pytest.mark.parametrize("shape", [(20_000, 3), (3, 20_000), (40, 300, 4)])
def test_large_arrays(shape):
    """Those for which the branch is there; near and far groups side by side."""
    rng = np.random.default_rng(0)
    offsets = 10.0 ** np.arange(shape[-1]) if shape[-1] < 9 else 10.0 ** np.arange(3)[:, None]
    x = (rng.normal(size=shape) + offsets).astype(np.float32)
    g = rng.normal(size=shape).astype(np.float32)
    c = shape[-1]
    for definition in (nk.LayerNorm(c, **BARE), nk.BatchNorm(c, axis=-1, **BARE)):
        params, state = definition.init(xp=jnp)

        def f(a, definition=definition, params=params, state=state):
            return definition.apply(params, state, a, training=True)[0]

        y, pullback = jax.jit(lambda a, f=f: jax.vjp(f, a))(jnp.asarray(x))
        exact = normkit.numpy.layer(definition, dtype="float64")
        close(y, exact(x.astype(np.float64), training=True), 2e-6)
        close(pullback(jnp.asarray(g)), [exact.backward(g.astype(np.float64))], 3e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_types_are_rounded_once(how, dtype):
    for name in ("batch", "layer", "rms"):
        f, (x, params), *_ = example(name, offset=30.0)
        half = x.astype(dtype)
        y, state = f(half, params)
        want, wide = f(half.astype(jnp.float32), params)
        assert y.dtype == dtype
        close(y, want.astype(dtype), float(jnp.finfo(dtype).eps))
        close(state, wide, 1e-6)


def test_transformations(how):
    """Mapped over batches, over devices, and checkpointed, as without."""
    for name in ("group", "rms"):
        f, (x, params), _, u = example(name)

        def gradient(x, f=f, params=params, u=u):
            return jax.grad(lambda a: (f(a, params)[0] * u).sum())(x)

        xs = jnp.stack([x, 3 * x + 5])
        want = jnp.stack([gradient(x) for x in xs])
        close(jax.vmap(gradient)(xs), want, 2e-6)
        close(jax.lax.map(jax.checkpoint(gradient), xs), want, 2e-6)
        mesh = jax.make_mesh((1,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
        here = jax.sharding.PartitionSpec("devices")
        each = jax.shard_map(jax.vmap(gradient), mesh=mesh, in_specs=here, out_specs=here)
        close(jax.jit(each)(xs), want, 2e-6)


def test_the_input_is_all_that_is_kept_for_the_gradient(how):
    for name in ("batch", "layer", "group", "instance", "rms"):
        f, (x, params), *_ = example(name)
        _, pullback = jax.vjp(jax.jit(lambda *a, f=f: f(*a)[0]), x, params)
        large = [a for a in jax.tree.leaves(pullback) if a.size >= x.size]
        assert [a.dtype for a in large] == [x.dtype], name
        np.testing.assert_array_equal(large[0].ravel(), x.ravel())


def test_exported_for_other_platforms_and_any_length():
    n, m = export.symbolic_shape("n, m")
    for name in ("batch", "layer", "rms"):
        f, (x, params), *_ = example(name)
        shape = (n, m, 3, 6) if name == "batch" else (n, m, 5)
        arguments = jax.ShapeDtypeStruct(shape, x.dtype), params
        exported = export.export(jax.jit(f), platforms=["cpu", "cuda", "tpu"])(*arguments)
        close(exported.call(x + 1e3, params), f(x + 1e3, params), 2e-6)


def test_without_the_file_the_engine_does_it():
    code = """
import sys
sys.modules["normkit.jax._kernels"] = None
import jax, normkit as nk
from normkit.jax import _backend
assert _backend._kernels is None
y = nk.layer_norm(jax.numpy.arange(12.0).reshape(3, 4))
assert abs(float(y.mean())) < 1e-6 and abs(float(y.var()) - 1) < 1e-4
"""
    subprocess.run([sys.executable, "-c", code], check=True)
