"""normkit.keras.fold, on the backend of KERAS_BACKEND: without BatchNorms, the same predictions."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

import normkit.keras as nkk
from harness.keras_layers import numpy
from normkit import _unfolded

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

BACKEND = keras.backend.backend()
BN = layers.BatchNormalization
fold = nkk.fold


@pytest.fixture(autouse=True)
def weights_from_numpy(monkeypatch):
    """JAX compiles the native initializers anew for every shape."""
    rng = np.random.default_rng(0)

    def initialize(self, shape, dtype=None):
        fan_in = max(np.prod(shape[:-1]), 1)
        values = rng.normal(size=shape) / np.sqrt(fan_in)
        return keras.ops.convert_to_tensor(values, dtype or "float32")

    for initializer in (keras.initializers.VarianceScaling, keras.initializers.Orthogonal):
        monkeypatch.setattr(initializer, "__call__", initialize)


def trained(model, seed=0):
    """As if it had seen data of large means."""
    rng = np.random.default_rng(seed)
    for norm in {id(x): x for x in model._flatten_layers()}.values():
        if not isinstance(norm, BN) or norm.moving_mean is None:
            continue
        n = norm.moving_mean.shape[0]
        norm.moving_mean.assign(rng.uniform(1, 10, n) * (-1) ** np.arange(n))
        norm.moving_variance.assign(10 ** rng.uniform(-2, 1, n))
        if norm.scale:
            norm.gamma.assign(rng.uniform(0.5, 1.5, n) * np.sign(np.arange(n) - 0.5))
        if norm.center:
            norm.beta.assign(rng.normal(size=n))
    return model


def data(*shape):
    return np.random.default_rng(1).normal(size=shape).astype("float32")


def predictions(model, x):
    """Compiled on JAX, where that is faster than each operation for itself."""
    y = model.predict(x, verbose=0) if BACKEND == "jax" else model(x, training=False)
    return keras.tree.map_structure(lambda y: np.asarray(numpy(y)), y)


def error(model, folded, x):
    """The largest difference of their predictions, relative to their scale."""
    expected, found = predictions(model, x), predictions(folded, x)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    return np.abs(found - expected).max() / np.abs(expected).max()


def sequential(shape, *parts):
    keras.utils.set_random_seed(0)
    return trained(keras.Sequential([keras.Input(shape), *parts]))


def ours(**options):
    return nkk.BatchNormalization(momentum=None, correction=1, **options)


PAIRS = {
    "dense": (lambda: layers.Dense(6, use_bias=False), BN, (4,)),
    "dense, rank 3": (lambda: layers.Dense(6), ours, (5, 4)),
    "conv1d": (lambda: layers.Conv1D(6, 3, padding="causal"), BN, (9, 4)),
    "conv2d": (lambda: layers.Conv2D(6, 3, use_bias=False), ours, (9, 8, 4)),
    "conv3d": (lambda: layers.Conv3D(6, 2), lambda: BN(scale=False), (5, 4, 3, 4)),
    "grouped": (lambda: layers.Conv2D(6, 3, groups=2), BN, (9, 8, 4)),
    "depthwise1d": (lambda: layers.DepthwiseConv1D(3, depth_multiplier=2), BN, (9, 4)),
    "depthwise2d": (
        lambda: layers.DepthwiseConv2D(3, depth_multiplier=3, use_bias=False),
        BN,
        (9, 8, 4),
    ),
    "separable1d": (lambda: layers.SeparableConv1D(6, 3, depth_multiplier=2), BN, (9, 4)),
    "separable2d": (
        lambda: layers.SeparableConv2D(6, 3),
        lambda: BN(center=False, axis=3),
        (9, 8, 4),
    ),
    "transposed1d": (lambda: layers.Conv1DTranspose(6, 3, strides=2), BN, (9, 4)),
    "transposed2d": (
        lambda: layers.Conv2DTranspose(6, 3, use_bias=False),
        lambda: BN(center=False, scale=False),
        (9, 8, 4),
    ),
    "transposed3d": (lambda: layers.Conv3DTranspose(6, 2), BN, (5, 4, 3, 4)),
}
if BACKEND != "tensorflow":  # which computes these on a GPU only
    first = {"data_format": "channels_first"}
    PAIRS |= {
        "first": (lambda: layers.Conv2D(6, 3, groups=2, **first), lambda: BN(axis=1), (4, 9, 8)),
        "first, depthwise": (
            lambda: layers.DepthwiseConv2D(3, depth_multiplier=2, **first),
            lambda: ours(axis=-3),
            (4, 9, 8),
        ),
        "first, transposed": (
            lambda: layers.Conv1DTranspose(6, 3, **first),
            lambda: BN(axis=1),
            (4, 9),
        ),
    }


@pytest.mark.parametrize("name", PAIRS)
def test_every_layer(name):
    layer, norm, shape = PAIRS[name]
    model = sequential(shape, layer(), norm(), layers.Activation("linear"))
    before = [np.array(numpy(w)) for w in model.weights]
    calls = [len(layer._inbound_nodes) for layer in model.layers]
    x = data(3, *shape)
    folded, report = fold(model)
    first, second, _ = model.layers
    assert report.rows == ((second.name, first.name, ""),)
    assert type(folded.layers[0]) is type(first)
    assert type(folded.layers[1]) is layers.Identity
    assert [x.name for x in folded.layers] == [x.name for x in model.layers]
    assert error(model, folded, x) < 1e-6
    # The model that was given is as it was, and stands alone.
    folded.layers[0].bias.assign(0 * folded.layers[0].bias)
    assert model.layers[1] is second
    assert [len(layer._inbound_nodes) for layer in model.layers] == calls
    assert len(model.weights) == len(before)
    for now, then in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(numpy(now), then)


def block(x, filters, stride):
    aside = x
    x = layers.Conv2D(filters, 3, stride, "same", use_bias=False)(x)
    x = layers.ReLU()(BN()(x))
    x = nkk.BatchNormalization()(layers.Conv2D(filters, 3, padding="same")(x))
    if stride > 1:
        aside = BN()(layers.Conv2D(filters, 1, stride)(aside))
    return layers.ReLU()(x + aside)


def resnet():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 1))
    x = layers.ReLU()(BN()(layers.Conv2D(8, 3, padding="same")(inputs)))
    x = block(block(x, 8, 1), 16, 2)
    x = layers.Dropout(0.1)(layers.GlobalAveragePooling2D()(x))
    return trained(keras.Model(inputs, layers.Dense(10)(x)))


def test_a_residual_network(tmp_path):
    model, x = resnet(), data(4, 8, 8, 1)
    folded, report = fold(model)
    assert [why for _, _, why in report.rows] == [""] * 6
    assert error(model, folded, x) < 2e-6
    assert not any(isinstance(layer, BN) for layer in folded.layers)
    # Each is a model like any other; what one does is nothing to the other.
    found = folded.predict(x, verbose=0)
    expected = model.predict(x, verbose=0)
    assert np.abs(found - expected).max() < 5e-6 * np.abs(expected).max()
    folded.save(tmp_path / "folded.keras")
    again = keras.saving.load_model(tmp_path / "folded.keras")
    np.testing.assert_array_equal(again.predict(x, verbose=0), found)


def test_models_in_models():
    """Even one that is called twice: each call of it is of the same two layers."""
    keras.utils.set_random_seed(0)
    inner = keras.Sequential(
        [keras.Input((8, 8, 4)), layers.Conv2D(4, 3, padding="same"), BN(), layers.ReLU()],
        name="inner",
    )
    middle = keras.Input((8, 8, 4))
    outer = keras.Model(middle, BN()(layers.Conv2D(4, 1)(inner(middle))), name="outer")
    inputs = keras.Input((8, 8, 4))
    y = layers.Lambda(lambda x: x * 2)(inner(outer(inputs)))
    last = BN()
    model = trained(keras.Model(inputs, last(inner(y))))
    folded, report = fold(model)
    norms = [inner.layers[1], outer.layers[-1]]
    convs = [inner.layers[0], outer.layers[-2]]
    assert set(report.rows) == {
        (f"inner/{norms[0].name}", f"inner/{convs[0].name}", ""),
        (f"outer/{norms[1].name}", f"outer/{convs[1].name}", ""),
        (last.name, "", _unfolded.no_layer("a Sequential")),
    }
    assert error(model, folded, data(2, 8, 8, 4)) < 2e-6
    assert folded.get_layer("inner") is folded.get_layer("outer").get_layer("inner")


def test_masks_pass():
    parts = [layers.Masking(), layers.Dense(6), BN(), layers.LSTM(3)]
    model, x = sequential((5, 4), *parts), data(3, 5, 4)
    x[:, 3:] = 0
    folded, report = fold(model)
    assert report.rows[0][1] == parts[1].name
    assert error(model, folded, x) < 5e-6


def test_what_layers_have_learned_goes_along():
    """Also where it is not a weight alone, and in layers that are inside of others."""
    x = data(9, 5, 4) * 3 + 2
    scaling, parts = layers.Normalization(), [layers.Dense(6), BN()]
    scaling.adapt(x)
    inside = layers.TimeDistributed(keras.Sequential([layers.Dense(3), BN()]))
    model = sequential((5, 4), scaling, *parts, inside, layers.Bidirectional(layers.LSTM(2)))
    folded, report = fold(model)
    assert [row[1] for row in report.rows] == [parts[0].name, ""]
    assert error(model, folded, x) < 1e-5


def test_several_inputs_and_outputs():
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    norm = BN()
    y = norm(inputs=layers.Dense(4)(layers.Concatenate()([a, b])), training=False)
    model = trained(keras.Model({"a": a, "b": b}, {"y": y, "z": layers.ReLU()(a)}))
    folded, report = fold(model)
    assert report.rows[0][1]
    x = {"a": data(3, 4), "b": data(3, 4) + 1}
    found, expected = predictions(folded, x), predictions(model, x)
    assert set(found) == {"y", "z"}
    np.testing.assert_allclose(found["y"], expected["y"], rtol=1e-4, atol=1e-4)


def test_mixed_precision():
    policy = keras.DTypePolicy("mixed_bfloat16")
    parts = [layers.Dense(6, dtype=policy), BN(dtype=policy), layers.Dense(3)]
    model, x = sequential((4,), *parts), data(3, 4)
    folded, report = fold(model)
    assert report.rows[0][1] == parts[0].name
    assert numpy(folded.layers[0].kernel).dtype == np.float32
    assert error(model, folded, x) < 0.05


@pytest.mark.parametrize("dtypes", [("mixed_bfloat16", "float32"), ("float32", "mixed_bfloat16")])
def test_another_precision_stays(dtypes):
    model = sequential((4,), layers.Dense(6, name="dense", dtype=dtypes[0]), BN(dtype=dtypes[1]))
    folded, report = fold(model)
    why = _unfolded.dtypes("dense", *(dtype.removeprefix("mixed_") for dtype in dtypes))
    assert [row[1:] for row in report.rows] == [("", why)]
    x = data(3, 4)
    np.testing.assert_array_equal(predictions(folded, x), predictions(model, x))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("length", "folds"), [(9, False), (8, True), (None, False)])
def test_where_tensorflow_adds_a_bias_to_the_last_axis(bias, length, folds):
    """Built only: TensorFlow computes these on a GPU."""
    layer = layers.Conv1D(
        9, 3, padding="same", use_bias=bias, data_format="channels_first", name="conv"
    )
    rows = fold(sequential((4, length), layer, BN(axis=1)))[1].rows
    why = _unfolded.special(
        "conv", "a last axis that may be as long as that of the channels, and gets the bias then"
    )
    expected = ("conv", "") if folds or BACKEND != "tensorflow" else ("", why)
    assert [row[1:] for row in rows] == [expected]


class Scaled(layers.Dense):
    def call(self, inputs):
        return 2 * super().call(inputs)


class MyNorm(BN):
    def call(self, inputs, training=None, mask=None):
        return super().call(inputs, training=training, mask=mask) * 2


def functional(build):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5, 4))
    return trained(keras.Model(inputs, build(inputs)))


def twice(x):
    layer = layers.Dense(4, name="dense")
    return layers.ReLU()(BN()(layer(x))) + layer(x)


def norm_twice(x):
    norm = BN()
    return norm(layers.Dense(4)(norm(layers.Dense(4)(x))))


def used_twice(x):
    y = layers.Dense(4, name="dense")(x)
    return BN()(y) + y


def put_out(x):
    y = layers.Dense(4, name="dense")(x)
    return [BN()(y), y]


def with_mask(x):
    return BN()(layers.Dense(4)(x), mask=keras.ops.all(x > 0, axis=-1))


def in_training(x):
    return BN()(layers.Dense(4)(x), training=True)


def model_in_training(x):
    inner = keras.Sequential([keras.Input((5, 4)), layers.Dense(4), BN()])
    return inner(inner(x), training=True)


def tied(x):
    first, second = layers.Dense(4, name="dense"), layers.Dense(4)
    y = second(BN()(first(x)))
    second._tracker.unlock()
    second._trainable_variables.pop(1)
    second.bias = first.bias
    return y


def with_lora(x):
    layer = layers.Dense(4, name="dense", lora_rank=2)
    return BN()(layer(x))


STAYS = {
    "layer twice": (twice, _unfolded.layer_called_often("dense")),
    "norm twice": (norm_twice, _unfolded.OFTEN),
    "used twice": (used_twice, _unfolded.output_elsewhere("dense")),
    "put out": (put_out, _unfolded.output_elsewhere("dense")),
    "mask": (with_mask, _unfolded.MASKED),
    "training": (in_training, _unfolded.TRAINING),
    "model in training": (model_in_training, _unfolded.TRAINING),
    "tied": (tied, _unfolded.layer_shared("dense")),
    "lora": (with_lora, _unfolded.special("dense", "lora_enabled=True")),
    "activation": (
        lambda x: BN()(layers.Dense(4, "relu", name="dense")(x)),
        _unfolded.activation("dense"),
    ),
    "derived layer": (lambda x: BN()(Scaled(4)(x)), _unfolded.no_layer("a Scaled")),
    "derived norm": (lambda x: MyNorm()(layers.Dense(4)(x)), _unfolded.own_class(MyNorm())),
    "input": (lambda x: BN()(x), _unfolded.no_layer("an input of the model")),
    "operation": (lambda x: BN()(layers.Dense(4)(x) + 1), _unfolded.no_layer("Add")),
    "axis": (
        lambda x: BN(axis=1)(layers.Dense(5, name="dense")(x)),
        _unfolded.other_axis(1, "dense", 2),
    ),
    "no statistics": (
        lambda x: nkk.BatchNormalization(track_running_stats=False)(layers.Dense(4)(x)),
        _unfolded.NO_STATISTICS,
    ),
    "wrapped": (
        lambda x: layers.TimeDistributed(BN())(layers.Dense(4)(x)),
        _unfolded.NOT_FOUND,
    ),
    "after a wrapper": (
        lambda x: BN()(layers.TimeDistributed(layers.Dense(4))(x)),
        _unfolded.no_layer("a TimeDistributed"),
    ),
}


@pytest.mark.parametrize("name", STAYS)
def test_why_not(name):
    build, why = STAYS[name]
    model, x = functional(build), data(3, 5, 4)
    with keras.saving.custom_object_scope({"Scaled": Scaled, "MyNorm": MyNorm}):
        folded, report = fold(model)
    assert [row[1:] for row in report.rows] == [("", why)]
    for found, expected in zip(
        *(keras.tree.flatten(predictions(m, x)) for m in (folded, model)), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


def test_a_norm_that_is_frozen_is_folded():
    """Even in training it takes the moving statistics."""

    def build(x):
        norm = BN()
        norm.trainable = False
        return norm(layers.Dense(4)(x), training=True)

    model = functional(build)
    folded, report = fold(model)
    assert report.rows[0][1]
    assert error(model, folded, data(3, 5, 4)) < 1e-6


def test_a_variance_that_is_none_is_said():
    model = functional(lambda x: BN()(layers.Dense(4)(x)))
    model.layers[-1].moving_variance.assign(-np.ones(4))
    assert "some are negative or NaN" in fold(model)[1].rows[0][2]


class Subclassed(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.bn = layers.Dense(4), BN()

    def call(self, x):
        return self.bn(self.dense(x))


class Overridden(keras.Sequential):
    def call(self, inputs, training=None, mask=None):
        return 2 * super().call(inputs, training=training, mask=mask)


def test_models_without_a_graph():
    model = Subclassed()
    model(data(2, 4))
    own = Overridden([keras.Input((4,)), layers.Dense(4), BN()])
    for refused in (model, own, keras.Sequential([layers.Dense(4), BN()]), layers.Dense(4)):
        with pytest.raises(ValueError, match=r"^what the layers of .* fold the models of these"):
            fold(refused)
    # In a model, it is one layer.
    outer = trained(keras.Sequential([keras.Input((4,)), own]))
    with keras.saving.custom_object_scope({"Overridden": Overridden}):
        folded, report = fold(outer)
    assert report.rows == ((own.layers[1].name, "", _unfolded.NOT_FOUND),)
    x = data(2, 4)
    np.testing.assert_array_equal(numpy(folded(x)), numpy(outer(x)))


def test_a_layer_that_cannot_be_copied():
    class Odd(layers.Layer):
        def __init__(self, function) -> None:
            super().__init__(name="odd")

        def call(self, x):
            return x

    with pytest.raises(ValueError, match=r"^'odd' cannot be copied from its configuration"):
        fold(functional(lambda x: Odd(len)(x)))
