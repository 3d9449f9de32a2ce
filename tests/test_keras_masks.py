"""Masks that Keras makes and hands on: padding reaches nothing, whatever stands there."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

import normkit.keras as nkk
from harness.keras_layers import OURS, all_close, backward, close, make, numpy, training

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

BACKEND = keras.backend.backend()
RNG = np.random.default_rng(0)
X, UPSTREAM = (RNG.normal(3, 2, (4, 5, 6)).astype("float32") for _ in range(2))
VALID = np.arange(5) < np.array([[5], [2], [3], [1]])
# Those that see each time step of each sample by itself, and those that see all of a sample.
STEPS = [nkk.LayerNormalization, nkk.RMSNormalization]


class Marked(layers.Layer):
    """Hands on its input with a mask that it is given."""

    def __init__(self, mask):
        super().__init__()
        self.mask, self.supports_masking = mask, True

    def compute_mask(self, inputs, previous_mask=None):
        return ops.convert_to_tensor(self.mask)

    def call(self, inputs):
        return inputs + 0


class Marking(keras.Model):
    """A layer behind the mask of ``VALID``."""

    def __init__(self, layer, mask=VALID):
        super().__init__()
        self.mark, self.layer = Marked(mask), layer

    def call(self, inputs, training=None):
        return self.layer(self.mark(inputs), training=training)


def marked(layer, x, mask=VALID, **options):
    model = Marking(layer, mask)
    model(ops.zeros_like(x))
    return backward(model, x, UPSTREAM, **options)


@pytest.mark.parametrize("ours", OURS)
def test_nan_in_the_padding_reaches_nothing(ours):
    """Not one bit of values, gradients or state depends on what stands in the padding."""
    found = []
    for fill in (0.0, np.nan, 3e38):
        layer = make(ours)
        x = np.where(VALID[..., None], X, np.float32(fill))
        y, gradients = marked(layer, x, training=True)
        assert np.isfinite(numpy(y)).all()
        assert all(np.isfinite(numpy(g)).all() for g in gradients)
        assert not numpy(y)[~VALID].any()  # beta
        assert not numpy(gradients[0])[~VALID].any()
        assert np.abs(numpy(gradients[0])[VALID]).max() > 0.05
        found.append([numpy(a) for a in (y, *gradients, *layer.get_weights())])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("ours", OURS)
def test_padding_is_as_good_as_cutting(ours):
    x = np.where(VALID[..., None], X, np.float32(7))
    y = numpy(marked(make(ours), x, training=True)[0])
    if ours is nkk.BatchNormalization:
        close(y[VALID], make(ours)(X[VALID], training=True))
        return
    for i, n in enumerate(VALID.sum(1)):
        part = np.s_[i : i + 1, :n]
        layer = make(ours)
        layer.build(X[part].shape)
        alone = numpy(backward(layer, X[part], UPSTREAM[part])[0])[0]
        if ours in STEPS:
            np.testing.assert_array_equal(y[i, :n], alone)
        close(y[i, :n], alone)


@pytest.mark.parametrize("ours", OURS)
def test_a_mask_that_is_propagated_is_that_which_is_given(ours):
    layers_ = [make(ours) for _ in range(3)]
    y, gradients = marked(layers_[0], X, training=True)
    for layer, mask in zip(
        layers_[1:], (VALID, VALID[..., None] * np.ones(6, "float32")), strict=True
    ):
        layer.build(X.shape)
        found, given = backward(layer, X, UPSTREAM, mask=mask, **training(layer))
        close(found, y)
        all_close(given, gradients)
        all_close(layer.get_weights(), layers_[0].get_weights())


@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize("axis", [1, 2, -1, -2])
def test_a_propagated_mask_belongs_to_the_first_axes_whatever_the_axis(ours, axis):
    """Where all lengths are the same, nothing but this rule says which axis a mask lacks."""
    x = RNG.normal(3, 2, (4, 4, 4)).astype("float32")
    upstream = ops.convert_to_tensor(RNG.normal(size=(4, 4, 4)).astype("float32"))
    mask = RNG.random((4, 4)) < 0.6
    layer, other = (make(ours, axis=axis) for _ in range(2))
    model = Marking(layer, mask)
    model(x)
    other.build(x.shape)
    y, gradients = backward(model, x, upstream, training=True)
    expected, others = backward(other, x, upstream, mask=mask[..., None], **training(other))
    close(y, expected)
    all_close(gradients, others)
    # One that is given may lack the channel axis instead.
    channel = axis % 3
    given = other(x, mask=mask, **training(other))
    close(given, other(x, mask=np.expand_dims(mask, channel), **training(other)))
    # And one of a mask a sample belongs to the first axis.
    whole = other(x, mask=mask[:, 0], **training(other))
    close(whole, other(x, mask=mask[:, :1, None], **training(other)))


@pytest.mark.parametrize("ours", OURS)
def test_a_mask_is_handed_on_to_pooling(ours):
    ids = np.array([[3, 1, 0, 0], [2, 2, 5, 0]])
    inputs = keras.Input((None,), dtype="int32")
    x = layers.Embedding(8, 6, mask_zero=True)(inputs)
    x = make(ours)(x)
    model = keras.Model(inputs, layers.GlobalAveragePooling1D()(x))
    normalized = keras.Model(inputs, x)
    y = numpy(normalized(ids))
    assert numpy(normalized(ids)._keras_mask).tolist() == (ids != 0).tolist()
    valid = (ids != 0)[..., None]
    close(model(ids), (y * valid).sum(1) / valid.sum(1))
    # The same in the graphs that predict and evaluate compile, and however long the padding is.
    close(model.predict(ids, verbose=0), model(ids))
    longer = np.pad(ids, ((0, 0), (0, 3)))
    close(model.predict(longer, verbose=0), model(ids))


@pytest.mark.parametrize("ours", OURS)
def test_a_mask_may_be_an_input_of_a_model(ours):
    inputs, mask = keras.Input((5, 6)), keras.Input((5,), dtype="bool")
    layer = make(ours)
    model = keras.Model([inputs, mask], layer(inputs, mask=mask))
    close(model([X, VALID]), layer(X, mask=VALID))
    layer.trainable = False
    close(model([X, VALID]), layer(X, mask=VALID))


@pytest.mark.parametrize("ours", OURS)
def test_a_model_with_padding_trains(ours):
    inputs = keras.Input((5, 6))
    x = make(ours)(layers.Masking(-1.0)(inputs))
    outputs = layers.Dense(1)(layers.GlobalAveragePooling1D()(x))
    model = keras.Model(inputs, outputs)
    model.compile("sgd", "mse")
    x = np.where(VALID[..., None], X, np.float32(-1))
    history = model.fit(x, X[:, 0, :1], epochs=2, verbose=0).history["loss"]
    assert np.isfinite(history).all()
    assert all(np.isfinite(w).all() for w in model.get_weights())


@pytest.mark.parametrize("ours", OURS)
def test_under_time_distributed(ours):
    x = RNG.normal(3, 2, (2, 3, 4, 6)).astype("float32")
    mask = np.array([[True, True, False], [True, False, False]])
    layer = layers.TimeDistributed(make(ours))
    layer.build(x.shape)
    y = numpy(layer(np.where(mask[..., None, None], x, np.nan), mask=mask, training=True))
    assert np.isfinite(y).all()
    assert not y[~mask].any()


@pytest.mark.parametrize("ours", OURS[1:])
def test_with_rematerialization(ours):
    """Keras computes the layer on a copy of its input then, which has no mask."""
    with keras.RematScope(mode="full"):
        layer = make(ours)
    x = np.where(VALID[..., None], X, np.nan)
    y, gradients = marked(layer, x, training=True)
    expected, others = marked(make(ours), x, training=True)
    close(y, expected)
    all_close(gradients, others)


def test_batch_norm_in_inference_ignores_a_mask_and_others_do_not():
    for ours in OURS:
        for options in ({}, {"track_running_stats": True}):
            if options and ours is not nkk.InstanceNormalization:
                continue
            layer = make(ours, **options)
            y = numpy(Marking(layer)(X))
            ignores = ours is nkk.BatchNormalization
            assert y[~VALID].any() == ignores
            if ignores:
                close(y, layer(X))


@pytest.mark.parametrize("mask", [np.ones((4, 6), bool), np.ones((4, 5, 7), bool)])
@pytest.mark.parametrize("ours", OURS)
def test_a_mask_that_does_not_fit_is_refused(ours, mask):
    with pytest.raises(ValueError, match="a mask or weights must have the shape of x, broadcast"):
        make(ours)(X, mask=mask, **training(make(ours)))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="synchronized is TensorFlow's")
def test_a_mask_takes_synchronized_off_and_that_is_said():
    layer = nkk.BatchNormalization(synchronized=True, name="norm")
    sentence = "'norm' was made with synchronized=True, but Keras takes the statistics of masked"
    with pytest.warns(UserWarning, match=sentence):
        y = layer(X, mask=VALID, training=True)
    reference = layers.BatchNormalization()
    close(y, reference(X, mask=VALID, training=True))
    all_close(layer.get_weights(), reference.get_weights())


def test_with_renorm_a_mask_counts_as_natively():
    pair = [kind(renorm=True) for kind in (layers.BatchNormalization, nkk.BatchNormalization)]
    expected, y = (layer(X, mask=VALID, training=True) for layer in pair)
    close(y, expected)
    all_close(pair[1].get_weights(), pair[0].get_weights())
