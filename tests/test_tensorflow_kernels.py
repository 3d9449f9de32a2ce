"""TensorFlow's faster paths: which call takes which, and that none can be told from the engine by
its results."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf

import normkit as nk
from normkit.tensorflow import _backend

_kernels = pytest.importorskip("normkit.tensorflow._kernels")

IMAGES, ROWS, MATRIX = (4, 6, 5, 8), (4, 5, 7), (12, 6)
COLUMNS, LAST, GIVEN = "moments of columns", "moments of rows", "fused columns"
APART = "lie apart"


def given(x, w, b, *, axis):
    """With statistics that depend on all parameters."""
    shape = [-1 if a == axis % len(x.shape) else 1 for a in range(len(x.shape))]
    w, b = (tf.reshape(p, shape) for p in (w, b))
    return nk.normalize(x, 0.3 * b, 0.5 + w * w, w, b, eps=1e-5)


# The function of x, scale and bias, the shapes of x and of the parameters, and the path, or a word
# of the reason why there is none.
PATHS = {
    "batch": (partial(nk.batch_norm, axis=-1), IMAGES, (8,), COLUMNS),
    "batch-bare": (lambda x, w, b: nk.batch_norm(x, axis=-1), IMAGES, (8,), COLUMNS),
    "batch-scale": (lambda x, w, b: nk.batch_norm(x, w, axis=-1), IMAGES, (8,), COLUMNS),
    "batch-bias": (lambda x, w, b: nk.batch_norm(x, None, b, axis=-1), IMAGES, (8,), COLUMNS),
    "batch-matrix": (nk.batch_norm, MATRIX, (6,), COLUMNS),
    "batch-many": (nk.batch_norm, (67 * 65, 2), (2,), COLUMNS),
    "batch-prime": (nk.batch_norm, (4099, 2), (2,), COLUMNS),
    "batch-second": (nk.batch_norm, IMAGES, (6,), LAST),
    "batch-first": (partial(nk.batch_norm, axis=0), ROWS, (4,), LAST),
    "batch-one-channel": (nk.batch_norm, (6, 1, 4), (1,), LAST),
    "layer": (nk.layer_norm, ROWS, (7,), LAST),
    "layer-two": (partial(nk.layer_norm, axes=(1, 2)), ROWS, (5, 7), LAST),
    "layer-bias": (lambda x, w, b: nk.layer_norm(x, None, b), ROWS, (7,), LAST),
    "layer-all": (partial(nk.layer_norm, axes=(0, 1, 2)), ROWS, ROWS, LAST),
    "layer-first": (partial(nk.layer_norm, axes=0), ROWS, (4,), APART),
    "layer-first-bare": (lambda x, w, b: nk.layer_norm(x, axes=0), ROWS, (4,), COLUMNS),
    "layer-apart": (partial(nk.layer_norm, axes=(1, 3)), IMAGES, (6, 8), APART),
    "layer-one-feature": (nk.layer_norm, (4, 5, 1), (1,), APART),
    "group": (lambda x, w, b: nk.group_norm(x, 2, w, b), IMAGES, (6,), LAST),
    "group-bare": (lambda x, w, b: nk.group_norm(x, 2), IMAGES, (6,), LAST),
    "group-last": (lambda x, w, b: nk.group_norm(x, 2, w, b, axis=-1), IMAGES, (8,), COLUMNS),
    "group-middle": (
        lambda x, w, b: nk.group_norm(x, 5, w, b, axis=2),
        (4, 6, 10, 3),
        (10,),
        APART,
    ),
    "instance": (nk.instance_norm, IMAGES, (6,), LAST),
    "instance-last": (partial(nk.instance_norm, axis=-1), IMAGES, (8,), COLUMNS),
    "instance-scale": (lambda x, w, b: nk.instance_norm(x, w, axis=-1), IMAGES, (8,), COLUMNS),
    "rms": (lambda x, w, b: nk.rms_norm(x, w), ROWS, (7,), "squares of rows"),
    "rms-bare": (lambda x, w, b: nk.rms_norm(x, axes=1), ROWS, (7,), "squares of columns"),
    "rms-second": (lambda x, w, b: nk.rms_norm(x, w, axes=1), ROWS, (5,), APART),
    "given": (partial(given, axis=-1), IMAGES, (8,), GIVEN),
    "given-second": (partial(given, axis=1), IMAGES, (6,), "channels are not last"),
}
every = pytest.mark.parametrize("name", PATHS)
fast = pytest.mark.parametrize("name", [n for n, row in PATHS.items() if row[3] in _kernels.PATHS])
HOW = {"eager": None, "graph": False, "xla": True}


@pytest.fixture(autouse=True)
def none_are_few(monkeypatch):
    monkeypatch.setattr(_kernels, "_FEW", 0)


def example(name, dtype=tf.float32, offset=0.0):
    """The function, its inputs, and a gradient of the output."""
    f, shape, along, _ = PATHS[name]
    rng = np.random.default_rng(3)
    x, g = rng.normal(offset, 1, shape), rng.normal(0.3, 1, shape)
    w, b = rng.uniform(0.5, 1.5, along), rng.normal(size=along)
    return f, [tf.constant(a, dtype) for a in (x, w, b)], tf.constant(g, dtype)


def path(call, *args):
    """The path that a call takes, or why none."""
    step = nk.explain(call, *args)[0]
    return step.path or step.why


def plain(call):
    """The same by the engine."""
    kernels, _backend._kernels = _backend._kernels, None
    try:
        return call()
    finally:
        _backend._kernels = kernels


def results(f, inputs, g):
    """Output, gradients, and second derivatives."""
    with tf.GradientTape() as outer:
        outer.watch(inputs)
        with tf.GradientTape() as inner:
            inner.watch(inputs)
            y = f(*inputs)
        first = inner.gradient(y, inputs, g, unconnected_gradients="zero")
        loss = tf.add_n([tf.reduce_sum(d * d * d) for d in first])
    return [y, *first, *outer.gradient(loss, inputs, unconnected_gradients="zero")]


def compiled(call, how):
    return call if how is None else tf.function(call, jit_compile=how, autograph=False)


def close(got, want, digits):
    for a, b in zip(got, want, strict=True):
        scale = float(np.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=0, atol=digits * scale + digits / 100)


@every
def test_each_path_is_taken(name):
    f, inputs, _ = example(name)
    want = PATHS[name][3]
    found = path(f, *inputs)
    assert found == want if want in _kernels.PATHS else want in found


def test_every_path_is_in_the_table():
    assert {row[3] for row in PATHS.values()} >= set(_kernels.PATHS)
    assert nk.explain(nk.layer_norm, tf.ones((2, 3)))[0].path in _backend.BACKEND.paths


@pytest.mark.parametrize("offset", [0.0, 1e2])
@fast
def test_results_are_those_of_the_engine(name, offset):
    dtype, digits = (tf.float32, 2e-5) if name == "given" else (tf.float64, 1e-9)
    f, inputs, g = example(name, dtype, offset)
    close(results(f, inputs, g), plain(lambda: results(f, inputs, g)), digits)


@pytest.mark.parametrize("how", ["graph", "xla"])
@pytest.mark.parametrize("name", ["batch-many", "layer", "group-last"])
def test_so_are_compiled_ones(name, how):
    f, inputs, g = example(name, tf.float64, 5.0)
    got = compiled(partial(results, f), HOW[how])(inputs, g)
    close(got, plain(lambda: results(f, inputs, g)), 1e-9)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["batch-many", "batch-second", "layer", "group-last"])
def test_float32_keeps_its_digits(name, how):
    call = compiled(PATHS[name][0], HOW[how])
    for offset in (0.0, 3.0, 4.5, 1e3, 1e5):
        f, inputs, _ = example(name, offset=offset)
        exact = plain(lambda f=f, inputs=inputs: f(*(tf.cast(a, tf.float64) for a in inputs)))
        close([call(*inputs)], [exact], 2e-6)


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16])
@fast
def test_half_types_are_rounded_once(name, dtype):
    f, inputs, g = example(name, dtype)
    inputs = [inputs[0], *(tf.cast(p, tf.float32) for p in inputs[1:])]
    assert path(f, *inputs) == PATHS[name][3]

    def rounded():
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            y = f(*inputs)
        found = [y, *tape.gradient(y, inputs, g, unconnected_gradients="zero")]
        assert [a.dtype for a in found[:2]] == [dtype, dtype]
        return [tf.cast(a, tf.float32) for a in found]

    close(rounded(), plain(rounded), 2 * float(ml_dtypes.finfo(dtype.as_numpy_dtype).eps))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["batch", "layer", "group-last", "rms"])
def test_what_is_broken_or_huge_stays_where_it_is(name, how):
    f, (x, w, b), _ = example(name)
    call = compiled(f, HOW[how])
    for value in (float("nan"), float("inf"), 1e30):
        broken = x.numpy()
        broken[..., -1, -1] = value
        broken = tf.constant(broken)
        got, want = call(broken, w, b), plain(lambda broken=broken: f(broken, w, b))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", HOW)
def test_huge_values_have_gradients(how):
    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = nk.layer_norm(x)
        return tape.gradient(y, x, x * 1e-30)

    x = tf.constant(example("layer")[1][0] * 1e30)
    call = compiled(gradient, HOW[how])
    # Beside values of 1e30 there is no digit left of what is orthogonal to them.
    assert np.abs(call(x)).max() < 1e-34


@pytest.mark.parametrize("how", HOW)
def test_equal_values_come_out_as_the_bias(how):
    """Of which the rounded mean leaves much if they are huge, and more if there are many."""
    values = tf.constant([0.1, 7.1, 1e5 + 0.1, 1e10, 1e12])
    for length in (3, 2**17 + 3):
        call = compiled(lambda x: nk.batch_norm(x, None, tf.ones(5), axis=-1), HOW[how])
        x = tf.zeros((5, length, 5)) + values
        np.testing.assert_allclose(call(x), np.ones(x.shape), atol=2e-6)


@pytest.mark.parametrize(
    ("name", "shapes", "how"),
    [
        ("batch", [None, 6, 5, 8], "graph"),
        ("batch", [None, None, None, 8], "graph"),
        ("batch-many", [None, 2], "graph"),
        ("batch-many", [None, 2], "xla"),
        ("batch-second", [None, 6, None, 8], "graph"),
        ("layer", [None, None, 7], "xla"),
        ("group", [None, 6, None, None], "graph"),
        ("group-last", [None, None, None, 8], "xla"),
        ("instance-last", [None, None, None, 8], "graph"),
        ("given", [None, None, None, 8], "graph"),
    ],
)
def test_lengths_need_not_be_known(name, shapes, how):
    f, (x, w, b), _ = example(name)
    signature = [tf.TensorSpec(shapes), *(tf.TensorSpec(p.shape) for p in (w, b))]
    call = tf.function(f, input_signature=signature, jit_compile=HOW[how], autograph=False)
    for some in (x, x[:0]):
        want = plain(lambda some=some: f(some, w, b))
        np.testing.assert_allclose(call(some, w, b), want, rtol=0, atol=2e-6)
    assert call.get_concrete_function().output_shapes.as_list() == shapes


@pytest.mark.parametrize("outer", [False, True])
def test_derivatives_pass_through_inner_functions(outer):
    f, inputs, g = example("layer")
    inner = tf.function(f, autograph=False)
    got = compiled(partial(results, inner), outer)(inputs, g)
    close(got, plain(lambda: results(f, inputs, g)), 2e-5)


@pytest.mark.parametrize("how", HOW)
def test_forward_mode(how):
    f, (x, w, b), t = example("batch")

    def jvp(x):
        with tf.autodiff.ForwardAccumulator(x, t) as forward:
            y = f(x, w, b)
        return forward.jvp(y)

    want = plain(lambda: jvp(x))
    close([compiled(jvp, HOW[how])(x)], [want], 1e-6)
    assert "forward mode" in path(jvp, x)
    inner = tf.function(f, autograph=False)
    with tf.autodiff.ForwardAccumulator(x, t) as forward:
        y = inner(x, w, b)
    close([forward.jvp(y)], [want], 1e-5)


@pytest.mark.parametrize("name", ["batch", "layer", "group-last", "rms", "given"])
def test_vectorized_map_and_jacobian(name):
    f, (x, w, b), _ = example(name)
    stacked = tf.stack([x, 3 * x + 1])
    got = tf.vectorized_map(lambda x: f(x, w, b), stacked)
    want = plain(lambda: tf.stack([f(a, w, b) for a in stacked]))
    np.testing.assert_allclose(got, want, rtol=0, atol=4e-6)

    def jacobian():
        with tf.GradientTape() as tape:
            tape.watch(w)
            y = tf.reduce_sum(f(x, w, b) ** 3, tuple(range(len(x.shape) - 1)))
        return tape.jacobian(y, w)

    close([jacobian()], [plain(jacobian)], 1e-5)


def test_a_saved_model_has_gradients(tmp_path):
    f, inputs, g = example("batch")
    module = tf.Module()
    signature = [tf.TensorSpec([None, None, None, 8]), *[tf.TensorSpec([8])] * 2]
    module.f = tf.function(f, input_signature=signature, autograph=False)
    tf.saved_model.save(module, str(tmp_path))
    loaded = tf.saved_model.load(str(tmp_path))

    def gradients(f, inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            y = f(*inputs)
        return tape.gradient(y, inputs, g)

    want = gradients(f, inputs)
    close(gradients(loaded.f, inputs), want, 2e-6)
    got = tf.function(partial(gradients, loaded.f), jit_compile=True, autograph=False)(inputs)
    close(got, want, 2e-6)


def test_running_statistics():
    bn = nk.BatchNorm(8, axis=-1, decay=0.0)
    params, state = bn.init(xp=tf)
    for offset in (1.0, 1e5, 1e30):
        x = example("batch")[1][0] * max(1.0, offset * 1e-15) + offset
        got = bn.apply(params, state, x, training=True)[1]
        want = plain(lambda x=x: bn.apply(params, state, x, training=True)[1])
        np.testing.assert_allclose(got["mean"], want["mean"], rtol=1e-6)
        np.testing.assert_allclose(got["var"], want["var"], rtol=1e-5)


def test_what_is_left_to_the_engine(monkeypatch):
    f, (x, w, b), _ = example("given")
    double = [tf.cast(a, tf.float64) for a in (x, w, b)]
    assert "float64" in path(f, *double)
    assert "XLA" in path(tf.function(f, jit_compile=True), x, w, b)
    assert "mask" in path(lambda x: nk.layer_norm(x, mask=x > 0), x)
    monkeypatch.undo()
    assert "small" in path(nk.layer_norm, x)
    assert path(nk.layer_norm, tf.ones((2**9, 2**10))) == LAST


def test_without_the_file_the_engine_does_it():
    code = """
import sys
sys.modules["normkit.tensorflow._kernels"] = None
import tensorflow as tf, normkit as nk
from normkit.tensorflow import _backend
assert _backend._kernels is None and not _backend.BACKEND.paths
y = nk.batch_norm(tf.random.normal((4, 3, 5, 5)))
assert abs(float(tf.reduce_mean(y))) < 1e-6
assert nk.explain(nk.layer_norm, y)[0].why == "there is no faster path"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
