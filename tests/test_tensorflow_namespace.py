"""TensorFlow's Array API namespace against array-api-strict; and what its backend answers."""

from __future__ import annotations

import ast
import re
import warnings
from pathlib import Path

import array_api_strict as strict
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings

import normkit as nk
from harness.array_api_calls import ALL, CASES, COMPLEX, HALF, REAL, STRICT_NAMES, D, numpy_dtype
from normkit.tensorflow import namespace

DTYPES = (*ALL, *COMPLEX)
ORACLE = strict, STRICT_NAMES
TENSORS = namespace, {name: name for name in DTYPES}


def translated(value, world):
    """``value`` with NumPy arrays and dtypes as those of one of the two namespaces."""
    xp, names = world
    if isinstance(value, D):
        return getattr(xp, names[value.name])
    if isinstance(value, np.ndarray):
        return xp.asarray(value.astype(numpy_dtype(names[value.dtype.name])))
    if isinstance(value, dict):
        return {key: translated(v, world) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(translated(v, world) for v in value)
    return value


def leaves(value, kind):
    """Everything of ``kind`` in nested arguments, in order."""
    if isinstance(value, kind):
        return [value]
    inner = value.values() if isinstance(value, dict) else value
    nested = isinstance(value, dict | list | tuple)
    return [leaf for v in inner for leaf in leaves(v, kind)] if nested else []


def expected(name, call):
    """What the strict namespace returns; the dtype by the name that it should have here."""
    args, keywords = translated(call, ORACLE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of NaN and of nothing
        result = getattr(strict, name)(*args, **keywords)
    if isinstance(result, bool):
        return result, None
    dtype = str(result if name == "result_type" else result.dtype).rpartition(".")[2]
    asked, given = (leaves(call, D), leaves(call, np.ndarray))
    if dtype == "float64" and not asked and not given:
        dtype = "float32"  # the default for Python floats
    names = {d.name for d in asked} or {x.dtype.name for x in given}
    if name == "result_type":
        names |= {x.dtype.name for x in given}
    if dtype == "float32" and len(names & set(REAL)) == 1:
        (dtype,) = names & set(REAL)
    return (None if name == "result_type" else np.asarray(result)), dtype


def assert_agrees(name, call, got):
    want, dtype = expected(name, call)
    if dtype is None:
        assert got is want
    elif want is None:
        assert got is getattr(namespace, dtype)
    else:
        assert isinstance(got, tf.Tensor)
        assert got.dtype is getattr(namespace, dtype)
        assert got.shape == want.shape
        digits = 4 * float(ml_dtypes.finfo(numpy_dtype(dtype)).eps) if dtype in REAL else 0
        got, want = (np.asarray(a).astype(np.float64) for a in (got.numpy(), want))
        np.testing.assert_allclose(got, want, rtol=digits, atol=0)


def traced(name, call, **how):
    """The call made in ``tf.function``, where no length of an array is known if not compiled."""
    xs = leaves(call, np.ndarray)
    specs = [tf.TensorSpec([None] * x.ndim, x.dtype) for x in xs]

    @tf.function(autograph=False, **({} if how else {"input_signature": specs}), **how)
    def run(*tensors):
        rest = iter(tensors)

        def filled(value):
            if isinstance(value, np.ndarray):
                return next(rest)
            if isinstance(value, dict):
                return {key: filled(v) for key, v in value.items()}
            return type(value)(map(filled, value)) if type(value) in (list, tuple) else value

        args, keywords = translated(filled(call), TENSORS)
        return getattr(namespace, name)(*args, **keywords)

    return run(*(tf.constant(x) for x in xs))


@pytest.mark.parametrize("name", CASES)
def test_values_dtypes_and_shapes(name):
    @settings(deadline=None, max_examples=60, derandomize=True)
    @given(CASES[name])
    def agrees(call):
        args, keywords = translated(call, TENSORS)
        assert_agrees(name, call, getattr(namespace, name)(*args, **keywords))

    agrees()


@pytest.mark.parametrize("how", [{}, {"jit_compile": True}], ids=["graph", "xla"])
@pytest.mark.parametrize("name", sorted(set(CASES) - {"isdtype", "result_type"}))
def test_traced(name, how):
    @settings(deadline=None, max_examples=5, derandomize=True)
    @given(CASES[name])
    def agrees(call):
        assert_agrees(name, call, traced(name, call, **how))

    agrees()


NAN, ZERO = np.asarray([np.nan, 1], "float32"), np.asarray([0, 0.5], "float32")


@pytest.mark.parametrize("how", [{}, {"jit_compile": True}], ids=["graph", "xla"])
@pytest.mark.parametrize(
    ("name", "arrays"),
    [
        *((name, pair) for name in ("maximum", "minimum") for pair in ((NAN, ZERO), (ZERO, NAN))),
        *((name, (NAN,)) for name in ("max", "min", "sum", "isfinite", "all")),
        *((name, (ZERO[1:],)) for name in ("any", "all")),
    ],
)
def test_what_compilers_get_wrong(name, arrays, how):
    """NaN is neither overlooked nor false, and a fraction is not false either."""
    assert_agrees(name, (arrays, {}), traced(name, (arrays, {}), **how))


def names_in(source):
    """The names that a module takes from ``xp`` or ``backend.xp``."""
    return {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and "xp" in (getattr(node.value, "id", None), getattr(node.value, "attr", None))
        and not node.attr.startswith("__")
    }


def test_every_name_that_the_core_uses_is_here_and_has_a_case():
    assert names_in("xp.sum(x) + self.backend.xp.where(c, xp.__name__, y.xq)") == {"sum", "where"}
    core = Path(nk.__file__).parent.glob("*.py")
    used = set().union(*(names_in(path.read_text(encoding="utf-8")) for path in core))
    assert used >= {"sum", "where", "sqrt", "float32"}
    assert used <= {*CASES, *DTYPES}


def test_every_public_name_has_a_case():
    public = {
        name
        for name, value in vars(namespace).items()
        if not name.startswith("_")
        and (isinstance(value, tf.DType) or getattr(value, "__module__", "") == namespace.__name__)
    }
    assert public == {*CASES, *DTYPES}


@pytest.mark.parametrize("name", DTYPES)
def test_dtypes(name):
    dtype = getattr(namespace, name)
    assert dtype.name == name
    assert namespace.result_type(dtype, name, dtype.as_numpy_dtype) is dtype
    assert [d for d in DTYPES if namespace.isdtype(dtype, getattr(namespace, d))] == [name]


def test_half_types_together_are_float32():
    assert namespace.result_type(*HALF) is tf.float32
    assert namespace.result_type(*HALF, "float64") is tf.float64


@pytest.mark.parametrize("name", ["sum", "mean", "max", "min", "any", "all", "squeeze"])
@pytest.mark.parametrize("axis", [2, -3, (0, 2)])
def test_an_axis_out_of_range_is_refused(name, axis):
    wrong = axis[1] if isinstance(axis, tuple) else axis
    sentence = f"axis {wrong} is out of range for an array of 2 dimensions; use one from -2 to 1."
    with pytest.raises(ValueError, match=re.escape(sentence)):
        getattr(namespace, name)(tf.ones([1, 1]), axis=axis)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (
            lambda: namespace.sum(tf.ones([2, 2]), axis=(0, -2)),
            ValueError,
            "each axis may be named once, but got (0, -2) for 2 dimensions.",
        ),
        (
            lambda: namespace.squeeze(tf.ones([1, 3]), axis=(0, 1)),
            ValueError,
            "only axes of length 1 can be squeezed, but axis 1 has 3.",
        ),
        (
            lambda: namespace.mean(tf.constant([1])),
            TypeError,
            "the mean is for floating-point numbers, but the dtype is int32.",
        ),
        (
            lambda: namespace.where(tf.constant(True), tf.constant([1]), 1.5),
            TypeError,
            "there is no dtype for float and int32 together; convert one of them.",
        ),
        (
            lambda: namespace.result_type("int64", "uint64"),
            TypeError,
            "there is no dtype for int64 and uint64 together; convert one of them.",
        ),
        (
            lambda: namespace.maximum(1, 2.0),
            ValueError,
            "at least one array or dtype is needed to promote to, but got none.",
        ),
        (
            lambda: namespace.isdtype("float32", "float"),
            ValueError,
            "'float' is no kind of dtype; use one of ['bool', 'complex floating', 'integral', "
            "'numeric', 'real floating', 'signed integer', 'unsigned integer'].",
        ),
    ],
)
def test_refusals(call, error, sentence):
    with pytest.raises(error, match=f"^{re.escape(sentence)}$"):
        call()


@pytest.mark.parametrize(
    "create",
    [
        lambda **k: namespace.asarray(1, **k),
        lambda **k: namespace.astype(tf.ones(1), tf.float16, **k),
        lambda **k: namespace.zeros(1, **k),
        lambda **k: namespace.ones(1, **k),
        lambda **k: namespace.full(1, 2, **k),
        lambda **k: namespace.arange(3, **k),
        lambda **k: namespace.zeros_like(tf.ones(1), **k),
        lambda **k: namespace.ones_like(tf.ones(1), **k),
    ],
)
def test_device(create):
    # In a graph every operation has the device that was asked for, even one that is not there.
    with tf.Graph().as_default(), tf.device("CPU:5"):
        assert create(device="CPU:7").device == "/device:CPU:7"
        assert create().device == "/device:CPU:5"


@pytest.mark.parametrize("name", ["asarray", "sum", "all", "sqrt", "squeeze", "zeros_like", "abs"])
def test_variables_give_tensors(name):
    options = {"axis": ()} if name in ("sum", "all", "squeeze") else {}
    value = tf.Variable([1.0, 4.0])
    got = getattr(namespace, name)(value, **options)
    assert isinstance(got, tf.Tensor)
    want = getattr(namespace, name)(tf.constant([1.0, 4.0]), **options)
    np.testing.assert_array_equal(got.numpy(), want.numpy())
