"""The faster paths of NumPy: which call takes which, and that none can be told from the engine by
its results."""

from __future__ import annotations

import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

import normkit as nk
import normkit.numpy
from harness.data import DTYPES, arrange
from normkit.numpy import _backend

_kernels = pytest.importorskip("normkit.numpy._kernels", exc_type=ImportError)
_blocks = pytest.importorskip("normkit.numpy._blocks")
_space = pytest.importorskip("normkit.numpy._space")

IMAGES, ROWS, MATRIX = (4, 6, 5, 3), (4, 6, 5), (12, 6)
# A layer, the shape of an input, and the form that it is seen in (None: in none).
FORMS = {
    "batch": (nk.BatchNorm(6), IMAGES, "rows"),
    "batch-last": (nk.BatchNorm(3, axis=-1), IMAGES, "columns"),
    "batch-last-even": (nk.BatchNorm(3, axis=-1), (8, 4, 2, 3), "columns"),
    "batch-middle": (nk.BatchNorm(5, axis=2), IMAGES, "rows"),
    "batch-first": (nk.BatchNorm(4, axis=0), ROWS, "rows"),
    "batch-matrix": (nk.BatchNorm(6), MATRIX, "columns"),
    "batch-one-channel": (nk.BatchNorm(1), (8, 1, 5), "rows"),
    "batch-bare": (nk.BatchNorm(6, scale=False, bias=False), IMAGES, "rows"),
    "batch-scale": (nk.BatchNorm(6, bias=False), IMAGES, "rows"),
    "batch-bias": (nk.BatchNorm(3, axis=-1, scale=False), IMAGES, "columns"),
    "layer": (nk.LayerNorm(5), ROWS, "features"),
    "layer-two": (nk.LayerNorm((6, 5)), ROWS, "features"),
    "layer-bare": (nk.LayerNorm(5, scale=False, bias=False), ROWS, "rows"),
    "layer-scale": (nk.LayerNorm(5, bias=False), ROWS, "features"),
    "layer-bias": (nk.LayerNorm(5, scale=False), ROWS, "features"),
    "layer-first": (nk.LayerNorm(6, axes=1), ROWS, None),
    "layer-first-bare": (nk.LayerNorm(6, axes=1, scale=False, bias=False), ROWS, "columns"),
    "layer-apart": (nk.LayerNorm((6, 3), axes=(1, 3)), IMAGES, None),
    "group": (nk.GroupNorm(2, 6), IMAGES, "rows"),
    "group-last": (nk.GroupNorm(3, 6, axis=-1), (4, 5, 6), "columns"),
    "group-matrix": (nk.GroupNorm(2, 6), MATRIX, "features"),
    "group-one": (nk.GroupNorm(1, 6), ROWS, "rows"),
    "group-one-last": (nk.GroupNorm(1, 5, axis=-1), ROWS, "columns"),
    "instance": (nk.InstanceNorm(6, scale=True, bias=True), IMAGES, "rows"),
    "instance-last": (nk.InstanceNorm(3, axis=-1, scale=True, bias=True), IMAGES, "columns"),
    "instance-bare": (nk.InstanceNorm(6), IMAGES, "rows"),
    "instance-tracking": (nk.InstanceNorm(6, track_running_stats=True), IMAGES, "rows"),
    "rms": (nk.RMSNorm(5, eps=1e-5), ROWS, "features"),
    "rms-two": (nk.RMSNorm((6, 5), eps=1e-5), ROWS, "features"),
    "rms-bare": (nk.RMSNorm(5, scale=False), ROWS, "rows"),
    "rms-zero-centered": (nk.RMSNorm(5, eps=1e-5, zero_centered=True), ROWS, "features"),
    "rms-first": (nk.RMSNorm(6, eps=1e-5, axes=1, scale=False), ROWS, "columns"),
}
SEEN = [name for name, (_, _, form) in FORMS.items() if form]
every = pytest.mark.parametrize("name", SEEN)


HAS_LOOPS = _kernels._loops() is not None


@pytest.fixture(
    params=[
        "small",
        "blocks",
        pytest.param("compiled", marks=pytest.mark.skipif(not HAS_LOOPS, reason="no Numba")),
    ]
)
def path(request, monkeypatch):
    """One of the paths, taken whatever the size."""
    take(request.param, monkeypatch)
    return request.param


def take(path, monkeypatch):
    monkeypatch.setattr(_kernels, "_SMALL", 2**60 if path == "small" else 0)
    monkeypatch.setattr(_kernels, "_LARGE", 0 if path == "compiled" else 2**60)
    # So that there are several blocks, and sums in pieces.
    for module in ("_blocks", "_features", "_space"):
        monkeypatch.setattr(f"normkit.numpy.{module}.BLOCK", 24)
    monkeypatch.setattr(_space, "_PIECE", 4)


def example(name, dtype="float32", offset=0.0, layout="C"):
    """A layer with random parameters, an input and a gradient of the output."""
    rng = np.random.default_rng(3)
    d, shape, _ = FORMS[name]
    layer = nk.numpy.layer(d, dtype="float64" if dtype == "float64" else None)
    layer.params = {
        k: rng.uniform(0.5, 1.5, p.shape).astype(p.dtype) for k, p in layer.params.items()
    }
    x, g = (rng.normal(size=shape) + offset, rng.normal(size=shape))
    return layer, *(arrange(a.astype(DTYPES[dtype]), layout) for a in (x, g))


def results(layer, x, g):
    """Outputs, gradients and state: of training, and of inference afterwards."""
    found = {}
    for training in (True, False):
        found[f"y-{training}"] = layer(x, training=training)
        found[f"dx-{training}"] = layer.backward(g)
        found |= {f"d{key}-{training}": value for key, value in layer.grads.items()}
    return found | layer.state


def plain(call):
    """The same by the engine."""
    kernels, _backend._kernels = _backend._kernels, None
    try:
        return call()
    finally:
        _backend._kernels = kernels


def close(got, want, within):
    assert got.keys() == want.keys()
    for key in want:
        a, b = (np.asarray(r[key], np.float64) for r in (got, want))
        scale = np.abs(b).max(initial=1)
        np.testing.assert_allclose(a, b, rtol=0, atol=within * scale, err_msg=key)


def steps(layer, x, g):
    def call():
        layer(x, training=True)
        layer.backward(g)
        layer(x)
        layer.backward(g)

    return nk.explain(call)


@pytest.mark.parametrize("name", FORMS)
def test_each_layer_takes_the_path(name, path):
    found = steps(*example(name))
    state = bool(example(name)[0].state)
    for i, step in enumerate(found):
        if FORMS[name][2] is None and path != "small":
            assert step.why == "a group is a single value, or the axes alternate too often"
        elif path == "small" and state and i >= 2:
            assert step.why == "x is small"
        else:
            assert step.path == path, (i, step)
    operation = "rescale" if name.startswith("rms") else "standardize"
    assert [s.operation for s in found][:2] == [operation, "backward"]


@every
def test_each_is_seen_in_its_form(name, monkeypatch):
    form = FORMS[name][2]
    take("blocks", monkeypatch)
    seen = []
    function = _blocks.standardize
    monkeypatch.setattr(
        _blocks, "standardize", lambda *args: seen.append(args[2]) or function(*args)
    )
    layer, x, _ = example(name)
    layer(x, training=True)
    assert seen == [form]


def test_each_size_takes_its_path():
    def taken(x):
        return [step.path for step in nk.explain(nk.layer_norm, x)]

    assert taken(np.ones((64, 256), "float32")) == ["small"]
    assert taken(np.ones((65, 256), "float32")) == ["blocks"]
    large = ["compiled" if HAS_LOOPS else "blocks"]
    assert taken(np.ones((1024, 256), "float32")) == large
    assert taken(np.ones((512, 256))) == large
    assert taken(np.ones((2048, 256), "float16")) == ["blocks"]


@pytest.mark.parametrize("offset", [0.0, 1e3])
@every
def test_results_are_those_of_the_engine(name, path, offset):
    got = results(*example(name, "float64", offset))
    want = plain(lambda: results(*example(name, "float64", offset)))
    close(got, want, 1e-12)


@pytest.mark.parametrize("offset", [0.0, 4.5, 1e5])
@every
def test_float32_keeps_its_digits(name, path, offset):
    layer, x, g = example(name, offset=offset)
    got = results(layer, x, g)
    layer, _, _ = example(name)
    layer.params = {key: p.astype(np.float64) for key, p in layer.params.items()}
    layer.state = {k: a.astype("f8") if k != "count" else a for k, a in layer.state.items()}
    want = plain(lambda: results(layer, x.astype(np.float64), g.astype(np.float64)))
    trained = {key for key in want if not key.endswith("False")}
    # In inference a running mean in float32 is what the result is as exact as.
    close({k: got[k] for k in trained}, {k: want[k] for k in trained}, 2e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("way", ["small", "blocks"])
@every
def test_half_types_are_rounded_once(name, way, dtype, monkeypatch):
    take(way, monkeypatch)
    layer, x, g = example(name, dtype, 10.0)
    got = results(layer, x, g)
    layer, _, _ = example(name)
    want = plain(lambda: results(layer, x.astype("float32"), g.astype("float32")))
    for key, exact in want.items():
        if key[:2] in ("y-", "dx"):
            assert got[key].dtype == DTYPES[dtype]
            nearest = exact.astype(DTYPES[dtype]).astype("float32")
            slack = np.abs(nearest - exact) + 2e-6 * np.abs(exact).max()
            assert np.all(np.abs(got[key].astype("float32") - exact) <= slack)
        else:
            np.testing.assert_allclose(got[key], exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["F", "channels_last", "strided"])
@every
def test_the_layout_stays(name, path, layout):
    layer, x, g = example(name, offset=10.0, layout=layout)
    before = x.copy()
    got = results(layer, x, g)
    want = plain(lambda: results(*example(name, offset=10.0)))
    close(got, want, 2e-6)
    np.testing.assert_array_equal(x, before)
    if path != "small" and all(step.path == path for step in steps(layer, x, g)):
        long = [axis for axis, n in enumerate(x.shape) if n > 1]
        for a in (got["y-True"], got["dx-True"], got["y-False"]):
            assert [a.strides[axis] for axis in long] == [x.strides[axis] for axis in long]


def test_a_gradient_may_lie_in_memory_in_another_way(path):
    layer, x, _ = example("batch")
    _, _, g = example("batch", layout="strided")
    want = plain(lambda: results(*example("batch")))
    close(results(layer, x, g), want, 2e-6)
    layer(x, training=True)
    np.testing.assert_allclose(
        layer.backward(np.broadcast_to(np.float32(1), x.shape)), 0, atol=1e-6
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30, 1e200])
@every
def test_what_is_no_number_or_has_no_square_stays_in_its_group(name, path, value):
    dtype = "float64" if value > 1e40 else "float32"
    layer, x, g = example(name, dtype)
    x[-1, -1] = value
    x[-1, 0] = -value / 2
    clean, _, _ = example(name, dtype)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got, want = layer(x, training=True), plain(lambda: clean(x, training=True))
        dx, dx_want = layer.backward(g), plain(lambda: clean.backward(g))
    for a, b in ((got, want), (dx, dx_want)):
        scale = 1 + np.abs(b[np.isfinite(b)]).max(initial=0)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * scale, equal_nan=True)


@pytest.mark.parametrize("value", [0.1, 123456789.0])
@every
def test_equal_values_come_out_as_zero(name, path, value):
    layer, x, _ = example(name)
    layer.params.pop("bias", None)
    if layer.definition.bias:
        layer.definition = replace(layer.definition, bias=False)
    y = layer(np.full_like(x, value), training=True)
    if not name.startswith("rms"):
        np.testing.assert_allclose(y, 0, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["batch", "batch-last", "group", "layer", "instance-last"])
def test_a_first_value_far_from_the_others(name, path):
    """What is subtracted before the sums are taken is moved."""
    layer, x, g = example(name)
    x[0] += 1e6 if name.startswith("batch") else 0
    x[..., 0] += 0 if name.startswith("batch") else 1e4
    clean, _, _ = example(name)
    got = layer(x, training=True), layer.backward(g)
    want = plain(lambda: (clean(x.astype("f8"), training=True), clean.backward(g.astype("f8"))))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * max(1, np.abs(b).max()))


X = np.random.default_rng(0).normal(size=(4, 6, 5)).astype("float32")
DECLINED = {
    "empty": (nk.layer_norm, (X[:0],), "x is empty"),
    "longdouble": (nk.layer_norm, (X.astype(np.longdouble),), "x has dtype"),
    "subclass": (
        nk.layer_norm,
        (X.view(np.memmap),),
        "x is a memmap, not an array of NumPy itself",
    ),
    "gaps": (nk.layer_norm, (X[:, ::2],), "x has gaps in memory"),
    "single": (nk.layer_norm, (X[..., :1].copy(),), "a group is a single value, or the axes"),
    "shapes": (
        nk.normalize,
        (X, X.mean(0, keepdims=True), X.var(0, keepdims=True), np.ones(5, "float32")),
        "statistics and parameters are not of one shape",
    ),
}


@pytest.mark.parametrize("name", DECLINED)
def test_what_is_not_for_it(name, monkeypatch):
    take("blocks", monkeypatch)
    call, args, why = DECLINED[name]
    options = {"eps": 1e-5}
    [step] = nk.explain(call, *args, **options)
    assert step.path is None
    assert step.why.startswith(why)


def test_gradients_that_are_not_for_it(path):
    def why(g, x=X, mask=None):
        layer = nk.numpy.LayerNorm(5)
        layer(x, mask=mask)
        [step] = nk.explain(layer.backward, g)
        return step.why

    with np.errstate(all="ignore"):
        assert why(X, mask=X > 0) == "a mask or weights are given"
        assert why(X.view(np.memmap)).startswith("the gradient is not a NumPy array")
        assert why(X.astype(int)).startswith("the gradient is not a NumPy array")
        assert why(X, x=X * np.float32(1e30)) == "squares are no numbers"
        assert why(X.astype("float64")) == ""


def test_paths_are_named():
    assert set(nk.numpy._backend.BACKEND.paths) == {"small", "blocks", "compiled"}
    assert plain(lambda: dict(nk.numpy._backend.BACKEND.paths)) == {}


def run(code):
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


USE = """
import numpy as np, normkit as nk, normkit.numpy
from normkit.numpy import _backend
layer, x = nk.numpy.BatchNorm(4), np.random.default_rng(0).normal(size=(4, 4, 200, 100))
x = x.astype("float32")
def used():
    [step] = nk.explain(lambda: layer(x, training=True))
    dx = layer.backward(layer(x, training=True))
    assert abs(float(dx.mean())) < 1e-6
    return step.path
"""


def test_without_the_file_the_engine_does_it():
    run(f"import sys; sys.modules['normkit.numpy._kernels'] = None{USE}assert used() is None")


def test_without_numba_it_goes_by_blocks():
    run(f"import sys; sys.modules['numba'] = None{USE}assert used() == 'blocks'")


numba = pytest.mark.skipif(not HAS_LOOPS, reason="no Numba")


@numba
def test_numba_is_not_imported_before_it_is_needed():
    run(
        f"import sys{USE}nk.layer_norm(x[0, 0]); assert 'numba' not in sys.modules; used()\n"
        "assert 'numba' in sys.modules"
    )


@numba
def test_where_nothing_can_be_kept_it_is_compiled_again():
    run("""
import numba
real = numba.njit
def njit(*args, **options):
    if options.get("cache"):
        raise RuntimeError("no locator available")
    return real(*args, **options)
numba.njit = njit
import numpy as np, normkit as nk
[step] = nk.explain(nk.layer_norm, np.ones((512, 512), "float32"), np.ones(512, "float32"))
assert step.path == "compiled"
""")


@numba
def test_where_its_compiler_is_turned_off_it_is_not_used():
    run(f"import os; os.environ['NUMBA_DISABLE_JIT'] = '1'{USE}assert used() == 'blocks'")


@numba
def test_from_several_threads_at_once(monkeypatch):
    take("compiled", monkeypatch)
    x = np.random.default_rng(0).normal(size=(64, 32, 50)).astype("float32")
    want = nk.batch_norm(x)
    with ThreadPoolExecutor(8) as pool:
        for y in pool.map(lambda _: nk.batch_norm(x), range(40)):
            np.testing.assert_array_equal(y, want)


@numba
@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork")
def test_after_a_fork_and_at_the_end():
    run(f"""
import atexit, os
os.environ["NUMBA_NUM_THREADS"] = "3"
{USE}
used()
child = os.fork()
if child == 0:
    used()
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
atexit.register(lambda: used() == "compiled" or os._exit(1))
""")
