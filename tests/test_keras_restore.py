"""The normalization layers of Keras models: their names, and what they take over."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import normkit as nk
import normkit.keras as nkk
import normkit.numpy


def trained(definition, offset=3.0):
    layer, rng = nk.numpy.layer(definition), np.random.default_rng(0)
    for _ in range(2):
        layer(rng.normal(offset, 2, (6, 5, 4)).astype("f"), training=True)
    layer.params = {n: rng.normal(size=p.shape).astype("f") for n, p in layer.params.items()}
    return layer


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        shared = keras.layers.LayerNormalization(name="shared")
        self.block = keras.Sequential([keras.layers.Dense(4, name="dense"), shared], name="block")
        self.rows = [
            keras.layers.TimeDistributed(
                keras.layers.BatchNormalization(name="bn"), name="time_distributed"
            )
        ]
        self.again = shared

    def call(self, x, training=False):
        return self.again(self.rows[0](self.block(x), training=training))


def test_names_are_paths():
    model = Subclassed()
    model(np.zeros((2, 5, 4), "f"))
    bundle = nk.extract(model)
    aliases = {name: entry.aliases for name, entry in bundle.items()}
    assert aliases == {"block/shared": ("shared",), "time_distributed/bn": ()}


def test_layers_must_be_built():
    with pytest.raises(ValueError, match="'ln' do not exist before it is built"):
        nk.extract(keras.Sequential([keras.layers.LayerNormalization(name="ln")]))


def test_two_layers_of_one_name():
    model = keras.Sequential([keras.Input((4,))])
    model.add(keras.layers.LayerNormalization(name="a"))
    model.add(keras.layers.LayerNormalization(name="b"))
    model.layers[1].name = "a"
    with pytest.raises(ValueError, match="several layers are called a; give each a name"):
        nk.extract(model)


def test_a_frozen_layer_does_not_train():
    layer = keras.layers.BatchNormalization()
    layer.build((None, 4))
    assert nk.extract(layer)[""].training is None
    layer.trainable = False
    assert nk.extract(layer)[""].training is False
    model = nkk.convert(keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()]))
    nkk.freeze(model, parameters=False)
    assert nk.extract(model.layers[0])[""].training is False
    assert nk.port(model.layers[0], "keras").trainable  # the call decides in Keras


def test_what_keras_does_differently_natively():
    rms = keras.layers.RMSNormalization(axis=1)
    rms.build((2, 4, 5))
    with pytest.raises(ValueError, match="natively it multiplies along the last axes"):
        nk.extract(rms)
    usual = keras.layers.RMSNormalization(epsilon=None)
    usual.build((2, 4))
    assert nkk.definition(usual).eps == keras.backend.epsilon()
    with pytest.raises(ValueError, match="cannot take over eps=None"):
        nk.restore(usual, nk.extract(nk.numpy.layer(nk.RMSNorm(4))), adopt=True)

    class Own(keras.layers.LayerNormalization):
        def call(self, inputs):
            return inputs

    own = Own()
    own.build((2, 4))
    with pytest.raises(ValueError, match="Own has a call of its own"):
        nk.extract(own)


def test_groups_that_were_taken_over_are_saved(tmp_path):
    model = keras.Sequential([keras.Input((5, 4)), nkk.GroupNormalization(groups=-1)])
    [name] = nk.extract(model)
    source = nk.extract(nk.numpy.layer(nk.GroupNorm.keras(2, 4)))
    nk.restore(model, source, {name: ""}, adopt=True)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert nkk.definition(loaded.layers[0]) == nk.GroupNorm.keras(2, 4)


def test_compiled_functions_see_what_was_taken_over():
    """What predict has traced before has eps in it, as a constant."""
    source = trained(nk.BatchNorm.keras(4, eps=2.0))
    model = keras.Sequential([keras.Input((5, 4)), keras.layers.BatchNormalization()])
    x = np.random.default_rng(1).normal(3, 2, (6, 5, 4)).astype("f")
    model.predict(x, verbose=0)
    [name] = nk.extract(model)
    nk.restore(model, nk.extract(source), {name: ""}, adopt=True)
    want = source(x)
    np.testing.assert_allclose(model.predict(x, verbose=0), want, rtol=0, atol=1e-5)


def test_what_cannot_be_taken_over():
    native = keras.layers.BatchNormalization()
    native.build((None, 5, 4))
    unbiased = nk.extract(trained(nk.BatchNorm.keras(4, correction=1)))
    with pytest.raises(
        ValueError, match="a keras BatchNormalization cannot take over correction=1"
    ):
        nk.restore(native, unbiased, adopt=True)
    assert float(np.max(np.abs(nk.extract(native)[""].arrays["mean"]))) == 0
    cumulative = nk.extract(trained(nk.BatchNorm.keras(4, decay=None)))
    ours = nkk.BatchNormalization()
    ours.build((None, 5, 4))
    with pytest.raises(ValueError, match="cannot take over decay=None"):
        nk.restore(ours, cumulative, adopt=True)
    first = nk.extract(nk.numpy.layer(nk.BatchNorm(4)))
    with pytest.raises(ValueError, match="axis is -1 in the model, but 1 in the bundle"):
        nk.restore(ours, first, adopt=True)
    with pytest.raises(ValueError, match="cannot take over axis=1"):
        nk.restore(ours, first, adopt=["axis", "eps", "decay", "correction"])
    assert nkk.definition(ours) == nk.BatchNorm.keras(4)
    nk.restore(ours, unbiased, adopt=True)
    assert nkk.definition(ours) == nk.BatchNorm.keras(4, correction=1)


def test_half_types():
    layer = nkk.layer(nk.LayerNorm(4), dtype="bfloat16")
    layer.build((None, 4))
    bundle = nk.extract(layer)
    assert bundle[""].arrays["scale"].dtype.name == "bfloat16"
    bundle[""].arrays["scale"][:] = 3
    nk.restore(layer, bundle)
    assert nk.extract(layer)[""].arrays["scale"].tolist() == [3] * 4
