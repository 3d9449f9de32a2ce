"""Models whose normalization layers are exchanged in place, on the backend of KERAS_BACKEND."""

from __future__ import annotations

import re

import keras
import numpy as np
import pytest
from keras import layers
from sklearn.datasets import load_digits

import normkit as nk
import normkit.keras as nkk
from harness.keras_layers import (
    BATCH,
    GROUP,
    LAYER,
    PAIRS,
    RMS,
    all_close,
    close,
    make,
    numpy,
    without_name,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

BACKEND = keras.backend.backend()
X = np.random.default_rng(0).normal(0.5, 2.0, (6, 5, 4)).astype("float32")
NATIVE = [native for native, _ in PAIRS]
TWINS = [ours for _, ours in PAIRS]
DIGITS = load_digits()
IMAGES = (DIGITS.images[..., None] / 16).astype("float32")
CLASSES = DIGITS.target.astype("int32")
STEPS, SIZE = 20, 32


def kinds(model):
    return [type(x) for x in model._flatten_layers()]


def small_cnn(first, second):
    """A network as its author writes it, with smooth activations: rounding errors stay small."""
    inputs = keras.Input((8, 8, 1))
    x = first()(layers.Conv2D(8, 3, padding="same")(inputs))
    x = layers.AveragePooling2D(2)(layers.Activation("gelu")(x))
    x = second()(layers.Conv2D(16, 3, padding="same")(x))
    x = layers.GlobalAveragePooling2D()(layers.Activation("gelu")(x))
    return keras.Model(inputs, layers.Dense(10)(x))


CNNS = {
    "batch": lambda: small_cnn(layers.BatchNormalization, layers.BatchNormalization),
    "group and layer": lambda: small_cnn(
        lambda: layers.GroupNormalization(4), layers.LayerNormalization
    ),
    "instance and rms": lambda: small_cnn(
        lambda: layers.GroupNormalization(-1), layers.RMSNormalization
    ),
}


def compiled(model, optimizer=None):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer or keras.optimizers.SGD(0.1), loss)
    return model


def losses(model, start=0, steps=STEPS):
    batches = (slice(i * SIZE, (i + 1) * SIZE) for i in range(start, start + steps))
    return [float(model.train_on_batch(IMAGES[b], CLASSES[b])) for b in batches]


@pytest.mark.parametrize("name", CNNS)
def test_a_converted_network_trains_as_before(name):
    keras.utils.set_random_seed(0)
    native, other = compiled(CNNS[name]()), compiled(CNNS[name]())
    other.set_weights(native.get_weights())
    before = [id(x) for x in other._flatten_layers()]
    assert nkk.convert(other) is other
    assert [id(x) for x in other._flatten_layers()] == before
    assert {*kinds(other)}.isdisjoint(NATIVE)
    expected = losses(native)
    np.testing.assert_allclose(losses(other), expected, rtol=1e-5)
    assert expected[-1] < expected[0] - 0.05
    predicted = native.predict(IMAGES[:64], verbose=0)
    np.testing.assert_allclose(other.predict(IMAGES[:64], verbose=0), predicted, rtol=0, atol=1e-4)

    ours = other.predict(IMAGES[:64], verbose=0)
    assert nkk.revert(other) is other
    assert kinds(other) == kinds(native)
    close(other.predict(IMAGES[:64], verbose=0), ours)
    np.testing.assert_allclose(losses(other, STEPS, 3), losses(native, STEPS, 3), rtol=1e-4)


def test_what_was_compiled_is_compiled_anew():
    """At a mean where the native layer has lost its digits, the exchange can be seen."""
    model = keras.Sequential([keras.Input((64,)), layers.LayerNormalization()])
    model.compile("sgd", "mse")
    x = IMAGES[:8].reshape(8, 64) + np.float32(3e4)
    exact = numpy(nkk.LayerNormalization()(x))
    # Of functions for prediction, testing and training.
    seen = [
        lambda: float(np.abs(model.predict(x, verbose=0) - exact).max()),
        lambda: float(model.test_on_batch(x, exact)),
        lambda: float(model.train_on_batch(x, exact)),
    ]
    model.optimizer.learning_rate = 0.0
    assert all(error() > 1e-7 for error in seen)
    nkk.convert(model)
    assert all(error() < 1e-7 for error in seen[1:])
    assert seen[0]() < 2e-6 * 4
    nkk.revert(model)
    assert all(error() > 1e-7 for error in seen)


def test_the_state_of_the_optimizer_goes_on():
    models = [compiled(CNNS["batch"](), keras.optimizers.Adam(1e-3)) for _ in range(2)]
    models[1].set_weights(models[0].get_weights())
    for model in models:
        losses(model, 0, 3)
    slots = [v.value for v in models[1].optimizer.variables]
    nkk.convert(models[1])
    assert len(models[1].optimizer.variables) == len(slots)
    assert int(numpy(models[1].optimizer.iterations)) == 3
    expected = losses(models[0], 3, 5)
    np.testing.assert_allclose(losses(models[1], 3, 5), expected, rtol=1e-4)
    assert int(numpy(models[1].optimizer.iterations)) == 8


class Nested(keras.Model):
    """Layers wherever a model may keep them."""

    def __init__(self):
        super().__init__()
        self.blocks = [layers.Dense(6), layers.BatchNormalization()]
        self.by_name = {"norm": layers.GroupNormalization(3)}
        self.steps = layers.TimeDistributed(layers.LayerNormalization())
        self.inner = keras.Sequential([layers.RMSNormalization(), layers.Dense(6)])
        self.both = layers.Bidirectional(layers.LSTM(3, return_sequences=True))
        self.shared = layers.LayerNormalization()

    def call(self, x, training=None):
        for block in self.blocks:
            x = block(x, training=training)
        x = self.steps(self.by_name["norm"](self.shared(x)))
        return self.shared(self.both(self.inner(x)))


@pytest.mark.parametrize("built", [True, False])
def test_every_layer_of_a_subclassed_model_is_found(built):
    model = Nested()
    if built:
        before = [numpy(a) for a in (model(X), *model.get_weights())]
        weights, names = [id(w) for w in model.weights], [w.path for w in model.weights]
    flags = model.by_name["norm"], model.shared
    flags[0].trainable = False
    nkk.convert(model)
    norms = [x for x in model._flatten_layers() if isinstance(x, tuple(NATIVE))]
    assert [type(x).__module__.partition(".")[0] for x in norms] == ["normkit"] * 5
    assert [x.trainable for x in flags] == [False, True]
    y = model(X, training=False)
    if built:
        assert [id(w) for w in model.weights] == weights
        all_close([y, *model.get_weights()], before)
    else:
        # An unbuilt layer is built by its new class, in the place that Keras gives it.
        names = [w.path for w in model.weights]
        assert all(x.built and x.get_build_config() for x in norms)
        again = Nested()
        again(X)
        number = re.compile(r"_\d+")  # Keras counts the layers of a kind that it names
        assert [number.sub("", w.path) for w in again.weights] == [
            number.sub("", name) for name in names
        ]
    nkk.revert(model)
    assert [type(x) in NATIVE for x in norms] == [True] * 5
    assert [w.path for w in model.weights] == names
    close(model(X, training=False), y)


def test_a_shared_layer_and_a_nested_functional_model():
    inner_input = keras.Input((5, 4))
    norm = layers.LayerNormalization()
    inner = keras.Model(inner_input, norm(layers.Dense(4)(norm(inner_input))))
    inputs = keras.Input((5, 4))
    model = keras.Model(inputs, layers.BatchNormalization()(inner(inner(inputs))))
    expected = model(X)
    nkk.convert(model)
    assert type(norm) is nkk.LayerNormalization
    assert len(model.weights) == 8
    close(model(X), expected, within=1e-5)


@pytest.mark.parametrize(("native", "ours"), PAIRS)
@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_a_converted_layer_is_as_one_that_was_made_so(native, ours, built, policy):
    layer = make(native, dtype=policy, epsilon=0.01, trainable=False)
    before = {name: type(value) for name, value in vars(make(native)).items()}
    made = make(ours, dtype=policy, epsilon=0.01, trainable=False)
    for each in (layer, made) if built else ():
        each.build(X.shape)
    nkk.convert(layer)
    assert without_name(layer) == without_name(made)
    assert vars(layer).keys() == vars(made).keys()
    x = X + np.float32(100)
    close(*(keras.ops.cast(each(x), "float32") for each in (layer, made)))
    assert [v._autocast for v in layer.weights] == [v._autocast for v in made.weights]
    mask = np.arange(5) < 3
    masked = [numpy(keras.ops.cast(each(x, mask=mask[None]), "float32")) for each in (layer, made)]
    close(*masked)
    with pytest.raises(ValueError, match="expected axis -1 of input shape to have value 4"):
        layer(X[..., :3])
    nkk.revert(layer)
    assert type(layer) is native
    after = {name: type(value) for name, value in vars(layer).items()}
    assert before.keys() <= after.keys()
    assert {name for name in after if hasattr(ours, name)} <= {n for n in dir(native)} | {*before}
    layer(X)


@pytest.mark.filterwarnings("ignore:Layer .* was passed an input with a mask:UserWarning")
@pytest.mark.parametrize("ours", [*TWINS, nkk.InstanceNormalization])
def test_a_model_of_ours_reverts(ours):
    inputs = keras.Input((5, 4))
    model = keras.Model(inputs, make(ours)(layers.Masking()(inputs)))
    expected = model(X)
    nkk.revert(model)
    assert type(model.layers[-1]) in NATIVE
    close(model(X), expected)
    assert type(nkk.convert(model).layers[-1]) in TWINS
    close(model(X), expected)


def test_files_of_a_converted_model(tmp_path):
    model = nkk.convert(CNNS["batch"]())
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert kinds(loaded) == kinds(model)
    close(loaded(IMAGES[:4]), model(IMAGES[:4]))
    nkk.revert(model).save(tmp_path / "native.keras")
    loaded = keras.saving.load_model(tmp_path / "native.keras")
    assert kinds(loaded) == kinds(CNNS["batch"]())


def test_subclasses_stay_and_are_spoken_of():
    class Own(layers.BatchNormalization):
        pass

    model = keras.Sequential([keras.Input((4,)), Own(), layers.Dense(2)])
    sentence = (
        "no native normalization layer was found in this Sequential, so it was left as it is; "
        "subclasses of such layers, and layers that only exist once they are called, are not "
        "exchanged."
    )
    with pytest.warns(UserWarning, match=re.escape(sentence)) as warned:
        nkk.convert(model)
    assert warned[0].filename == __file__
    with pytest.warns(UserWarning, match="no normkit normalization layer was found"):
        nkk.revert(model)
    assert type(model.layers[0]) is Own


MORE = {
    "correction=1": lambda: BATCH[1](correction=1),
    "momentum=None": lambda: BATCH[1](momentum=None),
    "track_running_stats=False": lambda: BATCH[1](track_running_stats=False),
    "track_running_stats=True": lambda: nkk.InstanceNormalization(track_running_stats=True),
    "zero_centered=True, use_scale=False": lambda: RMS[1](zero_centered=True, use_scale=False),
    "scale_after_cast=True": lambda: RMS[1](scale_after_cast=True),
    "epsilon=None": lambda: RMS[1](epsilon=None),
    "axis=[1]": lambda: RMS[1](axis=1),
}
if BACKEND == "torch":
    MORE["axis=[-2]"] = lambda: LAYER[1](axis=-2)


@pytest.mark.parametrize("options", MORE)
def test_what_is_not_native_does_not_revert(options):
    norm = MORE[options]()
    norm.name = "norm"
    model = keras.Sequential([keras.Input((5, 4)), GROUP[1](2), norm])
    expected = model(X)
    sentence = f"'norm' has {options}, for which there is no native layer; nothing was changed"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        nkk.revert(model)
    assert type(model.layers[0]) is GROUP[1]
    close(model(X), expected)


def test_parameters_in_another_order_are_not_converted():
    layer = layers.LayerNormalization(axis=[1, -1], name="norm")
    layer.build(X.shape)
    model = keras.Sequential([layers.GroupNormalization(2), layer])
    sentence = (
        "'norm' was made with axis=[-1, 1], for which Keras lays out parameters of shape (4, 5) "
        "instead of (5, 4); nothing was changed. Make it with axes that are all positive or all "
        "negative."
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        nkk.convert(model)
    assert type(model.layers[0]) is layers.GroupNormalization


def test_a_layer_of_a_definition_reverts():
    """That it is strict about its input is forgotten, and nothing else."""
    for definition in (nk.BatchNorm.keras(4), nk.LayerNorm.keras(4), nk.GroupNorm.keras(2, 4)):
        layer = nkk.layer(definition)
        expected = layer(X)
        assert type(nkk.revert(layer)) in NATIVE
        close(layer(X), expected)
        assert nkk.definition(layer) == definition
