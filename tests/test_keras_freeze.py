"""Frozen statistics and parameters: what stays as it is, and for how long.

On the backend of KERAS_BACKEND.
"""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

import normkit.keras as nkk
from normkit.keras._freeze import FrozenBatchNormalization

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

freeze, unfreeze = nkk.freeze, nkk.unfreeze
RNG = np.random.default_rng(0)
X = RNG.normal(0.5, 2.0, (6, 5, 4)).astype("float32")
Y = RNG.normal(size=(6, 5, 2)).astype("float32")

NORMS = {
    "batch": nkk.BatchNormalization,
    "instance": lambda: nkk.InstanceNormalization(track_running_stats=True),
}


def numpy(x):
    return np.asarray(keras.ops.convert_to_numpy(x), np.float64)


def network(norm=nkk.BatchNormalization):
    """Weights: kernel, bias; gamma, beta, moving; gamma, beta; kernel, bias."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5, 4))
    block = keras.Sequential([keras.Input((5, 3)), norm(), layers.LayerNormalization()])
    return keras.Model(inputs, layers.Dense(2)(block(layers.Dense(3)(inputs))))


def step(model, x=X):
    """One of training; which weights it moved, by the layer they are in."""
    before = {id(w): numpy(w) for w in model.weights}
    model.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=True)
    model.train_on_batch(x, Y)
    return {
        f"{kind(layer)}.{w.name}"
        for layer in nkk._convert._layers(model)
        for w in layer.weights
        if kind(layer) and not np.array_equal(numpy(w), before[id(w)])
    }


def kind(layer):
    if isinstance(layer, layers.Dense):
        return "dense"
    if isinstance(layer, layers.LayerNormalization):
        return "layer"
    return "norm" if hasattr(layer, "moving_mean") else ""


REST = {"dense.kernel", "dense.bias"}
PARAMETERS = {f"{kind}.{name}" for kind in ("norm", "layer") for name in ("gamma", "beta")}
STATISTICS = {"norm.moving_mean", "norm.moving_variance"}


def saved(model, folder):
    model.save(folder / "model.keras")
    return keras.models.load_model(folder / "model.keras")


def cloned(model, _):
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    return clone


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("statistics", "parameters"), [(1, 1), (1, 0), (0, 1)])
@pytest.mark.parametrize("copied", [lambda m, _: m, saved, cloned], ids=["same", "saved", "cloned"])
def test_what_a_step_of_training_moves(tmp_path, norm, statistics, parameters, copied):
    model = network(NORMS[norm])
    weights, values = [id(w) for w in model.weights], model.get_weights()
    assert freeze(model, statistics=bool(statistics), parameters=bool(parameters)) is model
    assert [id(w) for w in model.weights] == weights
    assert all(np.array_equal(a, b) for a, b in zip(model.get_weights(), values, strict=True))
    model = copied(model, tmp_path)
    expected = REST | (set() if statistics else STATISTICS)
    assert step(model) == expected | (set() if parameters else PARAMETERS)
    if statistics:
        training, inference = (numpy(model(X, training=mode)) for mode in (True, False))
        np.testing.assert_array_equal(training, inference)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("statistics", "parameters"), [(1, 1), (1, 0), (0, 1)])
def test_thawed_it_is_as_it_was(norm, statistics, parameters):
    model, twin = network(NORMS[norm]), network(NORMS[norm])
    attributes = [set(vars(x)) for x in nkk._convert._layers(model)]
    kinds = [type(x) for x in nkk._convert._layers(model)]
    freeze(model, statistics=bool(statistics), parameters=bool(parameters))
    assert unfreeze(model) is model
    assert [set(vars(x)) for x in nkk._convert._layers(model)] == attributes
    assert [type(x) for x in nkk._convert._layers(model)] == kinds
    assert step(model) == step(twin) == REST | PARAMETERS | STATISTICS
    for a, b in zip(model.get_weights(), twin.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_one_after_the_other():
    model = freeze(network())
    unfreeze(model, statistics=False)
    assert step(model) == REST | PARAMETERS
    freeze(model)
    unfreeze(model, parameters=False)
    assert step(model) == REST | STATISTICS
    freeze(unfreeze(model), parameters=False)
    freeze(model, statistics=False)
    assert step(model) == REST
    assert [x.trainable for x in nkk._convert._layers(model) if kind(x) == "norm"] == [False]


def test_half_a_layer_stays_so_whatever_trainable_is_set_to():
    model = freeze(network(), parameters=False)
    model.trainable = False
    assert model.trainable_weights == []
    model.trainable = True
    assert step(model) == REST | PARAMETERS
    unfreeze(model)
    freeze(model, statistics=False)
    model.trainable = False
    model.trainable = True  # which thaws layers that have no statistics
    assert step(model) == REST | STATISTICS | {"layer.gamma", "layer.beta"}


def test_compiled_functions_are_made_anew():
    model = network()
    model.compile(keras.optimizers.SGD(0.0), "mse")
    model.train_on_batch(X, Y)
    (norm,) = (x for x in nkk._convert._layers(model) if kind(x) == "norm")
    freeze(model, parameters=False)
    mean = numpy(norm.moving_mean)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    model.train_on_batch(X, Y)
    np.testing.assert_array_equal(numpy(norm.moving_mean), mean)


def test_layers_of_keras_own():
    model = network(layers.BatchNormalization)
    for options in ({"statistics": False}, {"parameters": False}):
        with pytest.raises(ValueError, match=r"nothing was changed. Call normkit.keras.convert"):
            freeze(model, **options)
        assert model.trainable
        assert len(model.trainable_weights) == 8
    assert step(freeze(model)) == REST
    with pytest.raises(ValueError, match="not normkit's own, only the parameters would be"):
        unfreeze(model, parameters=False)
    assert step(unfreeze(model)) == REST | PARAMETERS | STATISTICS
    nkk.convert(model)
    assert step(freeze(model, parameters=False)) == REST | PARAMETERS


def test_a_frozen_layer_by_itself():
    norm = FrozenBatchNormalization(frozen="parameters", momentum=None)
    norm(X)
    assert norm.trainable_weights == []
    assert int(norm.count) == 0
    norm(X, training=True)
    assert int(norm.count) == 1
    again = FrozenBatchNormalization.from_config(norm.get_config())
    assert (again.frozen, again.momentum) == ("parameters", None)
    assert nkk.definition(norm).decay is None
    with pytest.raises(ValueError, match="frozen must be one of"):
        FrozenBatchNormalization(frozen="both")
    late = freeze(nkk.BatchNormalization(), statistics=False)
    late(X)  # built when it is frozen already
    assert late.trainable_weights == []


def test_recalibrated():
    model = freeze(network(), parameters=False)
    nkk.recalibrate(model, [X[:4], X[4:]], progress=False)
    (norm,) = (x for x in nkk._convert._layers(model) if kind(x) == "norm")
    seen = numpy(model.layers[1](X)).reshape(-1, 3)
    np.testing.assert_allclose(numpy(norm.moving_mean), seen.mean(0), rtol=1e-5, atol=1e-6)
    assert step(model) == REST | PARAMETERS


def test_nothing_to_freeze():
    for model, options, said in [
        (keras.Sequential([layers.Dense(2)]), {}, "parameters or running statistics"),
        (layers.LayerNormalization(), {"parameters": False}, "with running statistics"),
    ]:
        for change in (freeze, unfreeze):
            with pytest.warns(UserWarning, match=f"no normalization layer .*{said} was found in"):
                assert change(model, **options) is model
