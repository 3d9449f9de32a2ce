"""Models with normkit.keras in them, and its definitions, on the backend of KERAS_BACKEND."""

from __future__ import annotations

import re

import keras
import numpy as np
import pytest
from keras import layers

import normkit as nk
import normkit.keras as nkk
from harness.keras_layers import all_close, close, make, numpy, training

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

BACKEND = keras.backend.backend()
X = np.random.default_rng(0).normal(0.5, 2.0, (6, 5, 4)).astype("float32")
NATIVE = (
    layers.BatchNormalization,
    layers.LayerNormalization,
    layers.GroupNormalization,
    layers.RMSNormalization,
)
OURS = (
    nkk.BatchNormalization,
    nkk.LayerNormalization,
    nkk.GroupNormalization,
    nkk.RMSNormalization,
)


DEFINITIONS = [
    nk.BatchNorm.keras(4),
    nk.BatchNorm.torch(5),
    nk.BatchNorm(5, decay=None, scale=False),
    nk.BatchNorm.flax(4, axis=2, correction=1, bias=False),
    nk.BatchNorm(5, axis=-2, track_running_stats=False),
    nk.BatchNorm.keras(6, axis=0, decay=None, correction=0, scale=False, bias=False),
    nk.LayerNorm.torch(4),
    nk.LayerNorm.keras((5, 4)),
    nk.LayerNorm((5, 4), axes=(1, -1), eps=0.1, bias=False),
    nk.LayerNorm.flax(6, axes=0, scale=False),
    nk.LayerNorm((6, 4), axes=(-3, 2), scale=False, bias=False),
    nk.GroupNorm.keras(2, 4),
    nk.GroupNorm.torch(5, 5, scale=False),
    nk.GroupNorm.flax(1, 5, axis=-2, bias=False),
    nk.InstanceNorm.keras(4),
    nk.InstanceNorm.torch(5),
    nk.InstanceNorm.flax(4, axis=2, decay=None, correction=1, track_running_stats=True),
    nk.InstanceNorm(5, decay=0.5, track_running_stats=True, bias=True),
    nk.RMSNorm.torch(4),
    nk.RMSNorm.keras((5, 4), axes=(1, -1)),
    nk.RMSNorm.flax(6, axes=0, zero_centered=True),
    nk.RMSNorm((6, 4), axes=(-3, 2), scale=False, scale_after_cast=True),
]


@pytest.mark.parametrize("definition", DEFINITIONS, ids=repr)
def test_a_definition_becomes_a_layer_that_does_the_same_and_comes_back(definition, tmp_path):
    layer = nkk.layer(definition, name="norm")
    assert nkk.definition(layer) == definition
    params, state = definition.init()
    for step in range(3):
        x = X * (step + 1)
        expected, state = definition.apply(params, state, x, training=True)
        close(layer(x, **training(layer)), expected)
    close(layer(X), definition.apply(params, state, X)[0])
    for name, weight in {"mean": "moving_mean", "var": "moving_variance", "count": "count"}.items():
        if getattr(layer, weight, None) is not None:
            close(getattr(layer, weight), np.asarray(state[name], "float32"))
    assert nkk.definition(layer) == definition
    model = keras.Sequential([keras.Input(X.shape[1:], batch_size=6), layer])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert nkk.definition(loaded.layers[0]) == definition
    close(loaded(X), model(X), scale=0)
    assert nkk.definition(keras.models.clone_model(model).layers[0]) == definition


def test_what_has_no_statistics_leaves_the_state_alone():
    for layer in (nkk.BatchNormalization(momentum=None), nkk.layer(nk.BatchNorm(4, axis=-1))):
        layer.build(X.shape)
        before = layer.get_weights()
        assert tuple(layer(X[:0], training=True).shape) == (0, 5, 4)
        nothing = layer(X * np.nan, training=True, mask=np.zeros((6, 5), bool))
        assert not numpy(nothing).any()
        all_close(layer.get_weights(), before)
    one_value = nkk.BatchNormalization()
    assert not numpy(one_value(X[:1, 0], training=True)).any()
    close(one_value.moving_variance, np.full(4, 0.99))


def test_a_frozen_layer_is_in_inference():
    layer = nkk.BatchNormalization(momentum=0.5)
    layer(X, training=True)
    before, inference = layer.get_weights(), layer(X)
    layer.trainable = False
    close(layer(X, training=True), inference)
    all_close(layer.get_weights(), before)


class Subclassed(keras.Model):
    def __init__(self, *norms):
        super().__init__()
        self.stages = [layers.Dense(8)]
        for norm in norms:
            self.stages += [make(norm), layers.Activation("gelu")]
        self.stages.append(layers.Dense(1, kernel_initializer="ones"))

    def call(self, x, training=None):
        for stage in self.stages:
            x = stage(x)
        return x


def functional(*norms):
    inputs = keras.Input((4,))
    x = layers.Dense(8)(inputs)
    for norm in norms:
        x = layers.Activation("gelu")(make(norm)(x))
    return keras.Model(inputs, layers.Dense(1)(x))


# On PyTorch jit_compile needs a C++ compiler, and on JAX everyone has it.
JIT = {"tensorflow": [False, True], "jax": [True], "torch": [False]}[BACKEND]
KINDS = [(Subclassed, JIT[0]), *((functional, jit) for jit in JIT)]


@pytest.mark.parametrize(("make", "jit"), KINDS)
def test_a_model_trains_and_is_saved_as_with_the_native_layers(make, jit, tmp_path):
    x, y = X.reshape(30, 4), X.sum(-1).reshape(30, 1)
    found = []
    for norms in (NATIVE, OURS):
        keras.utils.set_random_seed(0)
        model = make(*norms)
        model.compile("sgd", "mse", jit_compile=jit)
        # The last batch is smaller, so TensorFlow does not know its size when it compiles.
        history = model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
        loss = model.evaluate(x, y, batch_size=8, verbose=0)
        found.append((model, np.array([*history.history["loss"], loss])))
    (native, native_losses), (ours, our_losses) = found
    np.testing.assert_allclose(our_losses, native_losses, rtol=1e-5)
    predicted = native.predict(x, verbose=0)
    # Each layer multiplies what the ones before it have rounded.
    np.testing.assert_allclose(ours.predict(x, verbose=0), predicted, rtol=0, atol=1e-4)

    for source, target in ((native, ours), (ours, native)):
        source.set_weights([w + 0.25 for w in source.get_weights()])
        source.save_weights(tmp_path / "model.weights.h5")
        target.load_weights(tmp_path / "model.weights.h5")
        close(target(x), source(x), within=1e-5)


def test_files_are_read_by_either_layer_and_without_custom_objects(tmp_path, monkeypatch):
    file = tmp_path / "model.keras"
    native, ours = functional(*NATIVE), functional(*OURS)
    for source, target in ((native, ours), (ours, native)):
        source.set_weights([w + 0.25 for w in source.get_weights()])
        source.save(file)
        assert [type(x) for x in keras.saving.load_model(file).layers] == [
            type(x) for x in source.layers
        ]
        target.load_weights(file)
        close(target(X[0]), source(X[0]), within=1e-5)
    # The last file is ours, and this is how it is read where normkit is not installed.
    names = {f"normkit>{kind.__name__}": kind for kind in NATIVE}
    for name in names:
        monkeypatch.delitem(keras.saving.get_custom_objects(), name)
    loaded = keras.saving.load_model(file, custom_objects=names)
    assert [type(x) for x in loaded.layers] == [type(x) for x in native.layers]
    close(loaded(X[0]), native(X[0]), within=1e-5)


def test_a_native_model_becomes_one_of_ours():
    native = functional(*NATIVE)
    ours = dict(zip(NATIVE, OURS, strict=True))
    model = keras.models.clone_model(
        native, clone_function=lambda x: ours.get(type(x), type(x)).from_config(x.get_config())
    )
    model.set_weights(native.get_weights())
    assert {*OURS} < {type(x) for x in model.layers}
    close(model(X[0]), native(X[0]))


def test_a_native_layer_has_a_definition_once_it_is_built():
    for native, expected in (
        (layers.BatchNormalization(axis=1, momentum=0.5), nk.BatchNorm.keras(5, axis=1, decay=0.5)),
        (
            layers.LayerNormalization(axis=[2, 1], scale=False),
            nk.LayerNorm.keras((5, 4), axes=(1, 2), scale=False),
        ),
        (
            layers.LayerNormalization(center=False, scale=False),
            nk.LayerNorm.keras(4, bias=False, scale=False),
        ),
        (layers.GroupNormalization(2, scale=False), nk.GroupNorm.keras(2, 4, scale=False)),
        (layers.GroupNormalization(-1, axis=1), nk.GroupNorm.keras(5, 5, axis=1)),
        (layers.RMSNormalization(epsilon=0.1), nk.RMSNorm.keras(4, eps=0.1)),
        (layers.RMSNormalization((2, 1)), nk.RMSNorm.keras((5, 4), axes=(1, 2))),
    ):
        native.build((None, 5, 4))
        assert nkk.definition(native) == expected


BN, LN = nkk.BatchNormalization, nkk.LayerNormalization
# Whole sentences where they are this adapter's own, and one line of those that are the core's.
VALUE_ERRORS = {
    "renorm and synchronized are computed by the native layer, which needs a number as momentum, "
    "correction=0 and track_running_stats=True, but got momentum=None, correction=0 and "
    "track_running_stats=True; leave out one or the other.": lambda: BN(momentum=None, renorm=True),
    "the number of features is known once a layer is built, but 'norm' is not; build it first, "
    "for example by calling it once.": lambda: nkk.definition(NATIVE[0](name="norm")),
    "nk.BatchNorm has no batch renormalization, but 'norm' was made with renorm=True; make it "
    "without to read its definition.": lambda: nkk.definition(BN(renorm=True, name="norm")),
    "nk.LayerNorm always centres, but 'norm' was made with rms_scaling=True; make it without to "
    "read its definition.": lambda: nkk.definition(LN(rms_scaling=True, name="norm")),
    "<BatchNormalization name=norm, built=False> needs an x of lengths (3,) along its axes (1,), "
    "but x has shape (None, 5, 4): lengths (5,). Define the layer for these, or move the axes of "
    "x.": lambda: nkk.layer(nk.BatchNorm(3), name="norm")(keras.Input((5, 4))),
    "<LayerNormalization name=norm, built=False> needs an x of lengths (4, 5) along its axes "
    "(1, 2), but x has shape (6, 5, 4): lengths (5, 4).": lambda: nkk.layer(
        nk.LayerNorm((4, 5)), name="norm"
    )(X),
    "correction must be 0 or 1, but got 2;": lambda: BN(correction=2),
    "num_features must be a positive integer, but got 0.": lambda: BN(num_features=0),
    "each length in shape must be a positive integer, but got 0.": lambda: LN(shape=0),
    "must name the same number of axes, one at least, but got shape (4,) and axes (1, 2).": (
        lambda: LN(axis=[1, 2], shape=4)
    ),
    "axis 3 is out of range for an array of 3 dimensions;": lambda: BN(axis=3)(X),
    "axis -4 is out of range for an array of 3 dimensions;": lambda: LN(axis=-4)(X),
    "BatchNorm in training needs more than one value per channel, but got one:": lambda: nkk.layer(
        nk.BatchNorm(4)
    )(X[:1, :4, 0], training=True),
    "or lack only the channel axis, but its shape is (6, 4) and x has shape (6, 5, 4);": (
        lambda: BN()(X, mask=np.ones((6, 4), bool))
    ),
}


@pytest.mark.filterwarnings("ignore:You passed `rms_scaling=True`")
@pytest.mark.parametrize("sentence", VALUE_ERRORS)
def test_what_does_not_fit_is_refused(sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        VALUE_ERRORS[sentence]()


def test_what_is_no_layer_or_definition_is_refused():
    with pytest.raises(TypeError, match=r"built from a definition .* but got 64"):
        nkk.layer(64)
    with pytest.raises(TypeError, match="from a normalization layer, but got a keras"):
        nkk.definition(layers.Dense(3))
