"""What Keras expects of any layer, of each of normkit.keras, on the backend of KERAS_BACKEND."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

import normkit.keras as nkk
from harness.keras_layers import OURS, all_close, backward, close, make, numpy, training

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

BACKEND = keras.backend.backend()
X = np.random.default_rng(0).normal(0.5, 2.0, (6, 5, 3, 4)).astype("float32")
BATCH, LAYER, GROUP, RMS, INSTANCE = OURS
# The layer, its options, and how many weights it trains and does not train.
CONTRACTS = [
    (BATCH, {}, 2, 2),
    (BATCH, {"axis": 1, "scale": False, "momentum": None, "dtype": "mixed_bfloat16"}, 1, 3),
    (BATCH, {"track_running_stats": False, "num_features": 4}, 2, 0),
    (LAYER, {}, 2, 0),
    (LAYER, {"axis": [1, -1], "center": False, "shape": (5, 4), "dtype": "mixed_float16"}, 1, 0),
    (GROUP, {}, 2, 0),
    (GROUP, {"axis": 1, "groups": -1, "num_channels": 5, "center": False}, 1, 0),
    (GROUP, {"scale": False, "center": False, "dtype": "float16"}, 0, 0),
    (RMS, {}, 1, 0),
    (RMS, {"axis": 1, "use_scale": False, "epsilon": None}, 0, 0),
    (RMS, {"zero_centered": True, "scale_after_cast": True, "dtype": "mixed_bfloat16"}, 1, 0),
    (INSTANCE, {}, 2, 0),
    (INSTANCE, {"track_running_stats": True, "correction": 1, "momentum": 0.5}, 2, 2),
    (INSTANCE, {"axis": 1, "track_running_stats": True, "momentum": None, "center": False}, 1, 3),
]


@pytest.mark.parametrize(("ours", "options", "trained", "kept"), CONTRACTS)
def test_contract(ours, options, trained, kept, tmp_path):
    layer = make(ours, **options)
    config = layer.get_config()
    assert ours.from_config(config).get_config() == config

    # From a shape with unknown lengths; a symbolic call says what a real one returns.
    symbolic = layer(keras.KerasTensor((None, 5, None, 4), dtype="float32"))
    assert symbolic.shape == (None, 5, None, 4)
    y = layer(X)
    assert keras.backend.standardize_dtype(y.dtype) == symbolic.dtype == layer.compute_dtype
    assert tuple(y.shape) == layer.compute_output_shape(X.shape) == X.shape
    assert (len(layer.trainable_weights), len(layer.non_trainable_weights)) == (trained, kept)
    assert {w.dtype for w in layer.weights} <= {layer.variable_dtype, "int32", "int64"}
    config = layer.get_config()
    assert ours.from_config(config).get_config() == config
    again = ours.from_config(config)
    again.build_from_config(layer.get_build_config())
    assert [w.shape for w in again.weights] == [w.shape for w in layer.weights]

    # In a model that trains, is copied, and comes back from a file.
    model = keras.Sequential([keras.Input(X.shape[1:]), layer, layers.Flatten(), layers.Dense(1)])
    model.compile("sgd", "mse")
    losses = model.fit(X, X[:, 0, 0, :1], batch_size=4, epochs=2, verbose=0).history["loss"]
    assert np.isfinite(losses).all()
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    predicted = model.predict(X, verbose=0)
    for other in (copy, loaded):
        assert type(other.layers[0]) is ours
        assert other.layers[0].get_config() == layer.get_config()
        np.testing.assert_array_equal(other.predict(X, verbose=0), predicted)

    # With everything frozen, training changes nothing.
    layer.trainable = False
    before = layer.get_weights()
    assert not layer.trainable_weights
    frozen = layer(X, **training(layer))
    close(ops.cast(frozen, "float32"), ops.cast(layer(X), "float32"), within=0)
    all_close(layer.get_weights(), before, within=0)


JIT = {"tensorflow": [False, True], "jax": [True], "torch": [False]}[BACKEND]


@pytest.mark.parametrize("ours", OURS)
def test_compiled_or_not_it_trains_alike(ours):
    found = []
    for options in [{"run_eagerly": True}, *({"jit_compile": jit} for jit in JIT)]:
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((5, 3, 4)), make(ours), layers.Dense(1)])
        model.compile("sgd", "mse", **options)
        # The last batch is smaller than the others.
        history = model.fit(X, X[..., :1], batch_size=4, epochs=2, shuffle=False, verbose=0)
        found.append([*history.history["loss"], *map(np.asarray, model.get_weights())])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="SavedModel is TensorFlow's")
@pytest.mark.parametrize("ours", OURS)
def test_saved_models(ours, tmp_path):
    import tensorflow as tf

    inputs = keras.Input((None, 4))
    model = keras.Model(inputs, make(ours)(layers.Masking()(inputs)))
    x = X[:, :, 0].copy()
    x[2, 3:] = 0
    model.export(tmp_path, verbose=False)
    loaded = tf.saved_model.load(tmp_path)
    close(loaded.serve(x), model(x))
    close(loaded.serve(x[:1, :4]), model(x[:1, :4]))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only TensorFlow does not know its shapes")
@pytest.mark.parametrize("xla", [False, True])
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("ours", OURS)
def test_lengths_that_are_not_known(ours, axis, xla):
    import tensorflow as tf

    layer = make(ours, axis=axis, **({"groups": 2} if ours is GROUP else {}))
    x = X if axis == -1 else X.transpose(0, 3, 1, 2)
    layer.build((None, None, None, 4) if axis == -1 else (None, 4, None, None))
    shape = layer.get_build_config()["input_shape"]
    other = ours.from_config(layer.get_config())
    other.build(shape)
    upstream = np.flip(x, 2).copy()

    @tf.function(input_signature=[tf.TensorSpec(shape), tf.TensorSpec(shape)], jit_compile=xla)
    def graph(x, upstream):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, **training(layer))
            loss = tf.reduce_sum(y * upstream)
        return y, tape.gradient(loss, [x, *(v.value for v in layer.trainable_variables)])

    for n in (6, 2):
        y, gradients = graph(x[:n], upstream[:n])
        expected, others = backward(other, x[:n], upstream[:n], **training(other))
        close(y, expected)
        all_close(gradients, others)
        all_close(layer.get_weights(), other.get_weights())


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "bfloat16", "float16"])
@pytest.mark.parametrize("ours", OURS)
def test_of_half_precision_only_the_result_is(ours, policy):
    half = policy.removeprefix("mixed_")
    x = ops.cast(X, half)
    options = {"momentum": 0.0} if ours is BATCH else {}
    layer, exact = make(ours, dtype=policy, **options), make(ours, **options)
    y = layer(x, **training(layer))
    assert keras.backend.standardize_dtype(y.dtype) == half
    expected = exact(ops.cast(x, "float32"), **training(exact))
    close(
        ops.cast(y, "float32"),
        ops.cast(ops.cast(expected, half), "float32"),
        within={"bfloat16": 2.0**-9, "float16": 2.0**-12}[half],
    )


def test_weights_that_are_scaled_after_rounding_are_rounded_as_well():
    """Llama's order of operations: in the compute dtype the product is rounded twice."""
    layer = RMS(scale_after_cast=True, dtype="mixed_bfloat16")
    layer.build(X.shape)
    weights = np.random.default_rng(1).uniform(0.5, 1.5, 4).astype("float32")
    layer.scale.assign(weights)
    plain = ops.cast(RMS(use_scale=False)(X), "bfloat16")
    expected = plain * ops.cast(weights, "bfloat16")
    np.testing.assert_array_equal(
        numpy(ops.cast(layer(X), "float32")), numpy(ops.cast(expected, "float32"))
    )


def test_moving_statistics_of_instances_follow_the_rules_of_batch_norm():
    layer = INSTANCE(track_running_stats=True, momentum=0.5)
    layer(X)
    mean = X.mean((1, 2)).mean(0)
    np.testing.assert_array_equal(numpy(layer.moving_mean), np.zeros(4))
    layer(X, training=True)
    close(layer.moving_mean, mean / 2)
    close(layer.moving_variance, (1 + X.var((1, 2)).mean(0)) / 2)
    given = X - numpy(layer.moving_mean)
    close(layer(X), given / np.sqrt(numpy(layer.moving_variance) + 1e-3))
    layer.trainable = False
    before = layer.get_weights()
    close(layer(X, training=True), layer(X, training=False))
    all_close(layer.get_weights(), before)


def test_groups_of_one_channel_are_written_as_they_were_given():
    layer = GROUP(groups=-1)
    layer.build(X.shape)
    assert layer.groups == 4
    assert layer.get_config()["groups"] == -1
    assert nkk.definition(layer).num_groups == 4
    close(layer(X), INSTANCE()(X))
