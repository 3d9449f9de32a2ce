"""Inputs at the edge of what a layer takes, on the backend of KERAS_BACKEND."""

from __future__ import annotations

import re

import keras
import numpy as np
import pytest
from keras import layers, ops

import normkit as nk
import normkit.keras as nkk
from harness.keras_layers import BATCH, GROUP, LAYER, OURS, PAIRS, RMS, close, make, numpy, training

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

BACKEND = keras.backend.backend()
RNG = np.random.default_rng(0)
X = RNG.normal(0.5, 2.0, (6, 5, 4)).astype("float32")
# The axes over which each takes its statistics, the channels being last.
REDUCED = dict(zip(OURS, [(0, 1), (2,), (1,), (2,), (1,)], strict=True))


def exact(ours, x, epsilon=None):
    """In float64, groups of two channels each."""
    x, axes = np.asarray(x, "float64"), REDUCED[ours]
    if epsilon is None:
        epsilon = 1e-6 if ours is RMS[1] else 1e-3
    if ours is GROUP[1]:
        x, axes = x.reshape(*x.shape[:-1], 2, -1), (1, 3)
    if ours is not RMS[1]:
        x = x - x.mean(axes, keepdims=True)
    y = x / np.sqrt((x * x).mean(axes, keepdims=True) + epsilon)
    return y.reshape(*y.shape[:2], -1)


@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool"])
def test_integers_count_as_numbers(ours, dtype):
    x = RNG.integers(0, 2 if dtype == "bool" else 9, X.shape).astype(dtype)
    layer = make(ours)
    y = layer(x, **training(layer))
    assert keras.backend.standardize_dtype(y.dtype) == "float32"
    close(y, exact(ours, x))


@pytest.mark.parametrize("ours", OURS)
def test_complex_numbers_are_refused(ours):
    sentence = "x must hold real floating-point numbers, but its dtype is .*complex64.*; convert it"
    with pytest.raises(TypeError, match=sentence):
        make(ours)(X.astype("complex64"))


@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e5])
def test_the_mean_of_the_input_costs_no_digits(ours, offset):
    x = X + np.float32(offset)
    layer = make(ours)
    close(layer(x, **training(layer)), exact(ours, x))


@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize("size", [1e30, 1e-15, 1e-30])
def test_numbers_of_any_size(ours, size):
    """Squares of such numbers are not numbers of float32."""
    x = X * np.float32(size)
    epsilon = 1e-30
    layer = make(ours, epsilon=epsilon)
    close(layer(x, **training(layer)), exact(ours, x, epsilon))


@pytest.mark.parametrize("policy", ["float16", "mixed_float16"])
@pytest.mark.parametrize("ours", OURS)
def test_half_numbers_whose_squares_are_none(ours, policy):
    x = ops.cast(X * 3000, "float16")
    layer = make(ours, dtype=policy)
    y = layer(x, **training(layer))
    assert keras.backend.standardize_dtype(y.dtype) == "float16"
    expected = exact(ours, numpy(x)).astype("float16").astype("float32")
    close(ops.cast(y, "float32"), expected, within=2.0**-11)


@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize("shape", [(0, 5, 4), (6, 0, 4)])
def test_nothing_is_fine_and_leaves_the_state_alone(ours, shape):
    layer = make(ours)
    layer.build((None, None, 4))
    before = layer.get_weights()
    assert tuple(layer(np.zeros(shape, "float32"), **training(layer)).shape) == shape
    for a, b in zip(layer.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("pair", [LAYER, RMS])
def test_no_features(pair):
    x = np.zeros((3, 0), "float32")
    assert tuple(pair[1]()(x).shape) == (3, 0)


@pytest.mark.parametrize("ours", OURS)
def test_one_value_comes_out_as_beta(ours):
    x = X[:1, :1]
    options = {"groups": 4} if ours is GROUP[1] else {}
    axis = {"axis": [0, 1]} if ours in (LAYER[1], RMS[1]) else {}
    layer = ours(**options, **axis)
    y = layer(x, **training(layer))
    close(y, x / np.sqrt(x * x + 1e-6) if ours is RMS[1] else np.zeros_like(x))
    assert all(np.isfinite(w).all() for w in layer.get_weights())


STRICT = {
    "BatchNorm in training needs more than one value per channel": nk.BatchNorm.keras(4),
    "GroupNorm needs more than one value in each group": nk.GroupNorm.keras(4, 4),
    "InstanceNorm needs more than one value in each group": nk.InstanceNorm.keras(4),
}


@pytest.mark.parametrize("sentence", STRICT)
def test_one_value_is_refused_by_a_layer_of_a_definition(sentence):
    layer = nkk.layer(STRICT[sentence])
    with pytest.raises(ValueError, match=sentence):
        layer(X[:1, :1], **training(layer))
    layer(X, **training(layer))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("ours", OURS)
def test_what_is_not_finite_stays_among_its_own(ours, bad):
    x = X.copy()
    x[2, 3, 1] = bad
    layer = make(ours)
    y = numpy(layer(x, **training(layer)))
    touched = np.zeros(x.shape, bool)
    touched[2, 3, 1] = True
    if ours is GROUP[1]:
        touched[2, :, :2] = True
    else:
        touched |= touched.any(REDUCED[ours], keepdims=True)
    assert np.isfinite(y[~touched]).all()
    close(y[~touched], numpy(layer(X, **training(layer)))[~touched])
    assert np.isnan(y[2, 3, 1])


@pytest.mark.parametrize("ours", OURS)
def test_a_built_layer_refuses_other_lengths_before_it_computes(ours):
    layer = make(ours)
    layer.build((None, 5, 4))
    for x in (keras.Input((5, 3)), X[..., :3]):
        with pytest.raises(ValueError, match="expected axis -1 of input shape to have value 4"):
            layer(x)


@pytest.mark.parametrize(("native", "ours"), PAIRS)
def test_the_axes_of_a_layer_are_refused_as_soon_as_they_are_known(native, ours):
    for axis in (3, -4):
        with pytest.raises(ValueError, match=f"axis {axis} is out of range for an array of 3"):
            make(ours, axis=axis)(X)


VALUE_ERRORS = {
    "the first axis is that of the samples, which are normalized one by one, but the channel axis "
    "0 of 3 dimensions is the same; move the axes of x.": lambda: GROUP[1](2, axis=0)(X),
    "the channel axis -3 of 3 dimensions is the same;": lambda: nkk.InstanceNormalization(-3)(X),
    "<GroupNormalization name=norm, built=False> needs an x of lengths (6,) along its axes (2,), "
    "but x has shape (6, 5, 4): lengths (4,).": lambda: nkk.layer(
        nk.GroupNorm.keras(2, 6), name="norm"
    )(X),
    "<InstanceNormalization name=norm, built=False> needs an x of lengths (6,)": lambda: nkk.layer(
        nk.InstanceNorm.keras(6), name="norm"
    )(X),
    "<RMSNormalization name=norm, built=False> needs an x of lengths (6,)": lambda: nkk.layer(
        nk.RMSNorm.keras(6), name="norm"
    )(X),
    "num_channels must be a positive integer, but got 0.": lambda: GROUP[1](num_channels=0),
    "num_features must be a positive integer, but got -1.": lambda: nkk.InstanceNormalization(
        num_features=-1
    ),
    "correction must be 0 or 1, but got 2;": lambda: nkk.InstanceNormalization(correction=2),
    "decay must be a number from 0 to 1, or None for the cumulative average, but got 1.5;": (
        lambda: nkk.InstanceNormalization(momentum=1.5)
    ),
    "each length in shape must be a positive integer, but got 0.": lambda: RMS[1](shape=0),
    "must name the same number of axes, one at least, but got shape (4,) and axes (1, 2).": (
        lambda: RMS[1](axis=[1, 2], shape=4)
    ),
    "Number of groups (3) must be a multiple of the number of channels (4)": lambda: GROUP[1](3)(X),
    "Number of groups (32) cannot be more than the number of channels (4)": lambda: GROUP[1]()(X),
    "each axis may be named once, but got (1, -2) for 3 dimensions.": lambda: RMS[1]((1, -2))(X),
}


@pytest.mark.parametrize("sentence", VALUE_ERRORS)
def test_what_does_not_fit_is_refused(sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        VALUE_ERRORS[sentence]()


@pytest.mark.parametrize("axis", [1.0, [1], None])
@pytest.mark.parametrize("ours", [GROUP[1], nkk.InstanceNormalization])
def test_a_channel_axis_is_one_integer(ours, axis):
    with pytest.raises(TypeError, match="an axis must be an integer, but got"):
        ours(axis=axis)


def test_natively_integers_are_cut_and_rms_norm_multiplies_along_the_last_axis():
    """What normkit does otherwise: if a new Keras does it too, its docstrings may say so."""
    whole = np.arange(4, dtype="int32")[None]
    for native in (LAYER[0], RMS[0]):
        y = numpy(native()(whole)).astype("float64")
        assert (y == y.round()).all()
    square = X[:4, :4]
    native, ours = RMS[0](axis=1), RMS[1](axis=1)
    for layer in (native, ours):
        layer.build(square.shape)
        layer.scale.assign([1.0, 2.0, 3.0, 4.0])
    expected = exact(RMS[1], square.swapaxes(1, 2)).swapaxes(1, 2)
    close(ours(square), expected * np.arange(1, 5)[:, None])
    assert np.abs(numpy(native(square)) - numpy(ours(square))).max() > 0.1


def test_a_layer_over_channels_that_are_first_is_that_of_channels_that_are_last():
    for native, ours in PAIRS:
        x = X[..., :4]
        first, last = make(ours, axis=1), make(ours)
        y = last(x, **training(last))
        close(first(x.swapaxes(1, 2), **training(first)), ops.swapaxes(y, 1, 2))
        assert issubclass(ours, native)
    assert issubclass(nkk.InstanceNormalization, layers.GroupNormalization)
    assert BATCH[1] is nkk.BatchNormalization
