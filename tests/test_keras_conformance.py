"""Each option of each native layer, together with each other one: normkit.keras does the same."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import ops

import normkit.keras as nkk
from harness.keras_layers import (
    BATCH,
    GROUP,
    LAYER,
    RMS,
    all_close,
    backward,
    close,
    pairwise,
    training,
    without_name,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

BACKEND = keras.backend.backend()
SHAPE = (3, 4, 2, 6)
# In few digits, so that no dtype policy rounds them.
RNG = np.random.default_rng(0)
X, UPSTREAM = (RNG.integers(-24, 24, SHAPE).astype("float32") / 8 for _ in range(2))

POLICIES = ["float32", "mixed_float16", "bfloat16"]
if BACKEND != "jax":  # it takes its time, and has no float64 unless it is told to
    POLICIES += ["mixed_bfloat16", "float16", "float64"]
COMMON = {"dtype": POLICIES, "trainable": [True, False], "activity_regularizer": [None, "l2"]}
AFFINE = {
    "center": [True, False],
    "scale": [True, False],
    "beta_initializer": ["zeros", keras.initializers.RandomNormal(seed=1)],
    "gamma_initializer": ["ones", keras.initializers.Constant(0.5)],
    "beta_regularizer": [None, "l2"],
    "gamma_regularizer": [None, keras.regularizers.L1(0.1)],
    "beta_constraint": [None, keras.constraints.MaxNorm(1.0)],
    "gamma_constraint": [None, "non_neg"],
}
MOVING = {
    "momentum": [0.99, 0.5, 0.0],
    "moving_mean_initializer": ["zeros", "ones"],
    "moving_variance_initializer": ["ones", keras.initializers.Constant(2.0)],
    "renorm": [False, True],
    "renorm_clipping": [None, {"rmax": 2.0, "rmin": 0.5, "dmax": 1.0}],
}
EPSILON = {"epsilon": [1e-3, 0.1]}
AXIS = {"axis": [-1, 1, 2, -2, 3, -3]}
AXES = {"axis": [-1, 1, (1, 2), [2, 3], (3, 1), [-1, -2], [1, -1], [0], (0, 1, 2, 3)]}


def cases(*options):
    choices = {name: values for group in options for name, values in group.items()}
    return [row for row in pairwise(choices) if row.get("renorm") or not row.get("renorm_clipping")]


def check(reference, layer, there=lambda x: x, back=lambda x: x, batch_first=True):
    """Two training steps, then inference; the native layer sees its input as ``there`` has it."""
    for one, shape in ((reference, there(X).shape), (layer, X.shape)):
        one.build(shape)
    assert [w.name for w in layer.weights] == [w.name for w in reference.weights]
    assert [w.dtype for w in layer.weights] == [w.dtype for w in reference.weights]
    digits = {"bfloat16": 2.0**-7, "float16": 2.0**-10}
    stored = digits.get(layer.variable_dtype, 0)
    within = {"within": max(digits.get(layer.compute_dtype, 0), 2e-6)}
    exact = {"within": max(stored, 2e-6)}
    all_close(layer.get_weights(), reference.get_weights())
    for step in (1, 2):
        x = X * step
        y, (dx, *gradients) = backward(
            layer, cast(x, layer), cast(UPSTREAM, layer), **training(layer)
        )
        expected, (expected_dx, *others) = backward(
            reference, cast(there(x), layer), cast(there(UPSTREAM), layer), **training(reference)
        )
        assert y.dtype == expected.dtype
        close(y, back(expected), **within)
        close(dx, back(expected_dx), **within)
        all_close(gradients, others, **within)
        all_close(layer.get_weights(), reference.get_weights(), **exact)
        for v, w, g in zip(
            layer.trainable_variables, reference.trainable_variables, others, strict=True
        ):
            value = ops.cast(w, "float32") - 0.05 * ops.cast(g, "float32")
            value = value if w.constraint is None else w.constraint(value)
            v.assign(value)
            w.assign(value)
    close(layer(X), back(reference(there(X))), **within)
    if batch_first:  # the activity regularizer divides by the length of the first axis
        losses = ([ops.cast(loss, "float32") for loss in a.losses] for a in (layer, reference))
        all_close(*losses, **within)


def cast(x, layer):
    return ops.cast(x, layer.compute_dtype)


def compare(pair, options):
    native, ours = pair
    layer = ours(**options)
    assert without_name(layer) == without_name(native(**options))
    assert ours.from_config(layer.get_config()).get_config() == layer.get_config()
    check(native(**options), layer)


@pytest.mark.parametrize("options", cases(AXIS, EPSILON, AFFINE, MOVING, COMMON))
def test_batch_norm(options):
    compare(BATCH, options)


@pytest.mark.parametrize("options", cases({"groups": [1, 2, -1]}, AXIS, EPSILON, AFFINE, COMMON))
def test_group_norm(options):
    compare(GROUP, options)


@pytest.mark.parametrize("options", cases(AXIS, EPSILON, AFFINE, COMMON))
def test_instance_norm(options):
    layer = nkk.InstanceNormalization(**options)
    assert layer.from_config(layer.get_config()).get_config() == layer.get_config()
    check(GROUP[0](groups=-1, **options), layer)


def compare_moved(pair, options):
    """Natively only the last axes are right everywhere, so the native layer gets them there."""
    native, kind = pair
    layer = kind(**options)
    assert without_name(layer) == without_name(native(**options))
    assert kind.from_config(layer.get_config()).get_config() == layer.get_config()
    axes = sorted(axis % len(SHAPE) for axis in np.atleast_1d(options["axis"]).tolist())
    order = [a for a in range(len(SHAPE)) if a not in axes] + axes
    last = options | {"axis": list(range(-len(axes), 0))}
    check(
        native(**last),
        layer,
        lambda x: np.transpose(x, order),
        lambda x: ops.transpose(x, np.argsort(order).tolist()),
        batch_first=order[0] == 0,
    )


@pytest.mark.parametrize("options", cases(AXES, EPSILON, AFFINE, COMMON))
def test_layer_norm(options):
    compare_moved(LAYER, options)


@pytest.mark.parametrize("options", cases(AXES, EPSILON, COMMON))
def test_rms_norm(options):
    compare_moved(RMS, options)
