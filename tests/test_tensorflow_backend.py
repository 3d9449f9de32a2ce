"""What TensorFlow's backend answers to the engine."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf

import normkit as nk
from harness.array_api_calls import REAL, STRICT_NAMES, numpy_dtype
from normkit._arrays import backend_of, backend_of_namespace
from normkit.tensorflow import namespace
from normkit.tensorflow._backend import BACKEND


@pytest.mark.parametrize("name", [*STRICT_NAMES, "float8_e5m2", "qint8", "string"])
def test_real_floating_types(name):
    assert BACKEND.is_floating(tf.as_dtype(name)) is (name in REAL)


def test_every_kind_of_tensor_finds_the_backend():
    assert backend_of(tf.ones(2)) is backend_of(tf.Variable([1.0])) is BACKEND
    assert backend_of_namespace(tf) is backend_of_namespace(namespace) is BACKEND
    found = []
    tf.function(lambda x: found.append(backend_of(x)))(tf.ones(2))
    assert found == [BACKEND]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_size(batch, compiled):
    x = tf.ones([batch, 3, 4])
    assert BACKEND.size(x, (0, 2)) == 4 * batch
    kinds = []

    @tf.function(input_signature=[tf.TensorSpec([None, 3, 4])], jit_compile=compiled)
    def sizes(x):
        known, unknown = BACKEND.size(x, (1, 2)), BACKEND.size(x, (0, 2))
        kinds.extend([type(known), unknown.dtype, unknown.shape])
        return known, unknown

    assert [int(n) for n in sizes(x)] == [12, 4 * batch]
    assert kinds == [int, tf.int64, []]


def test_values_are_visible_eagerly_only():
    x, seen = tf.ones(2), []
    tf.function(lambda y: seen.extend([BACKEND.is_visible(x), BACKEND.is_visible(y)]))(x)
    assert seen == [False, False]
    assert BACKEND.is_visible(x)


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("how", [None, {}, {"jit_compile": True}], ids=["eager", "graph", "xla"])
def test_constant_keeps_the_value_and_stops_the_derivative(dtype, how):
    def slope(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            kept = BACKEND.constant(x)
            y = x * kept
        return kept, tape.gradient(y, x)

    x = tf.constant([-3.14159, 0.0, 1e-3, np.inf, 7.0], dtype)
    kept, gradient = (slope if how is None else tf.function(slope, **how))(x)
    assert kept.dtype == x.dtype
    digits = 2 * float(ml_dtypes.finfo(numpy_dtype(dtype)).eps)
    got, want = (a.numpy().astype(np.float64) for a in (kept, x))
    np.testing.assert_allclose(got, want, rtol=digits)
    np.testing.assert_array_equal(gradient.numpy(), kept.numpy())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_compiled_gradients_are_as_right_as_eager_ones(dtype):
    """Two roundings of the rough mean, one in y and one in its gradient, would be far apart."""
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(1e5, 1, (3, 5, 7)), dtype)
    g = tf.constant(rng.normal(size=x.shape), dtype)

    def gradient(x, g):
        scale = tf.ones(7, dtype)
        with tf.GradientTape() as tape:
            tape.watch(scale)
            y = nk.layer_norm(x, scale)
        return tape.gradient(y, scale, output_gradients=g)

    digits = 50 * np.finfo(dtype).eps
    want = gradient(x, g).numpy()
    got = tf.function(gradient, jit_compile=True)(x, g).numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=digits)


def test_a_parameter_of_unknown_length():
    @tf.function(input_signature=[tf.TensorSpec([None, 4, 3]), tf.TensorSpec([None])])
    def normalized(x, scale):
        return nk.batch_norm(x, scale)

    x, scale = tf.random.normal((2, 4, 3)), tf.constant([1.0, 2.0, 3.0, 4.0])
    np.testing.assert_allclose(normalized(x, scale), nk.batch_norm(x, scale), rtol=0, atol=4e-6)


def of_unknown_rank():
    tf.function(nk.moments, input_signature=[tf.TensorSpec(None)], autograph=False)(1.0)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (
            lambda: nk.moments(tf.ragged.constant([[1.0], [2.0, 3.0]])),
            TypeError,
            "normkit works on dense tensors, but got a RaggedTensor; convert it first, for example "
            "with to_tensor(), and give a mask of what is valid.",
        ),
        (
            of_unknown_rank,
            ValueError,
            "the rank of a tensor must be known, but its shape is <unknown>; set it first, for "
            "example with tf.ensure_shape.",
        ),
    ],
)
def test_what_it_cannot_work_on(call, error, sentence):
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == sentence
