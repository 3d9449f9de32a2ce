"""Moving statistics taken again, beside float64 statistics of what each layer sees.

On the backend of KERAS_BACKEND.
"""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

import normkit as nk
import normkit.keras as nkk

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

BACKEND = keras.backend.backend()
SIZES = (7, 3, 1)
NORMS = {
    "native": layers.BatchNormalization,
    "normkit": nkk.BatchNormalization,
    "average": lambda: nkk.BatchNormalization(momentum=None, correction=1),
    "instance": lambda: nkk.InstanceNormalization(
        track_running_stats=True, momentum=None, correction=1
    ),
}


def numpy(x):
    return np.asarray(keras.ops.convert_to_numpy(x), np.float64)


def data(offset=1e3):
    rng = np.random.default_rng(0)
    return (offset + 3 * rng.standard_normal((sum(SIZES), 6, 6, 3))).astype("float32")


def in_batches(x):
    return np.split(x, np.cumsum(SIZES)[:-1])


def sequential(norm):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((6, 6, 3)),
            layers.Conv2D(4, 3),
            norm(),
            layers.ReLU(),
            layers.Dropout(0.5),
            layers.Conv2D(2, 2),
            norm(),
        ]
    )


def functional(norm):
    """With a model in the model."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 6, 3))
    block = keras.Sequential([keras.Input((4, 4, 4)), norm(), layers.Dropout(0.5)])
    x = block(layers.Conv2D(4, 3)(inputs))
    x = layers.Conv2D(2, 2)(layers.Add()([x, layers.ReLU()(x)]))
    return keras.Model(inputs, norm()(x))


class Own(keras.Model):
    """One layer after another in ``call``, as a subclass has it."""

    def __init__(self, norm):
        super().__init__()
        self.conv1, self.conv2 = layers.Conv2D(4, 3), layers.Conv2D(2, 2)
        self.norm1, self.norm2 = norm(), norm()
        self.dropout = layers.Dropout(0.5)

    def call(self, x, training=None):
        x = self.dropout(self.norm1(self.conv1(x), training=training), training=training)
        return self.norm2(self.conv2(keras.ops.relu(x)))


def subclassed(norm):
    keras.utils.set_random_seed(0)
    model = Own(norm)
    model(data())
    return model


MODELS = {"sequential": sequential, "functional": functional, "subclassed": subclassed}


def norms(model):
    return [layer for layer in nkk._convert._layers(model) if hasattr(layer, "moving_mean")]


def seen(model, batches, call=lambda model, x: model(x, training=False)):
    """What each layer with moving statistics is called with in inference, in float64."""
    found, originals = {}, {}
    for layer in norms(model):

        def noted(inputs, *args, layer=layer, original=layer.call, **kwargs):
            found.setdefault(layer, []).append(numpy(inputs))
            return original(inputs, *args, **kwargs)

        originals[layer] = noted
        vars(layer)["call"] = noted
    try:
        for batch in batches:
            call(model, batch)
    finally:
        for layer in originals:
            del vars(layer)["call"]
    return {layer: np.concatenate(parts) for layer, parts in found.items()}


def statistics(layer, x):
    """What ``layer`` is to remember of ``x``, which has channels last."""
    ddof = getattr(layer, "correction", 0)
    others = tuple(range(1, x.ndim - 1))
    if isinstance(layer, nkk.InstanceNormalization):
        return x.mean(others).mean(0), x.var(others, ddof=ddof).mean(0)
    return x.mean((0, *others)), x.var((0, *others), ddof=ddof)


def check(layer, x, calls=3, rtol=1e-6):
    mean, variance = statistics(layer, x)
    # A mean that lies around zero has no digits to be right in.
    atol = rtol * np.sqrt(variance.max())
    np.testing.assert_allclose(numpy(layer.moving_mean), mean, rtol=rtol, atol=atol)
    np.testing.assert_allclose(numpy(layer.moving_variance), variance, rtol=rtol)
    if getattr(layer, "count", None) is not None:
        assert int(layer.count) == calls


def everything(model):
    """All that an error must leave as it was."""
    flags = [(set(vars(x)), x.trainable) for x in nkk._convert._layers(model)]
    return [numpy(weight) for weight in model.weights], flags


def assert_unchanged(model, before):
    values, flags = everything(model)
    assert flags == before[1]
    assert all(np.array_equal(a, b) for a, b in zip(values, before[0], strict=True))


@pytest.mark.parametrize(
    ("written", "name"),
    [
        *(("sequential", name) for name in NORMS),
        ("functional", "native"),
        ("subclassed", "normkit"),
    ],
)
def test_each_layer_has_the_statistics_of_what_it_sees(written, name):
    model = MODELS[written](NORMS[name])
    batches = in_batches(data())
    before = everything(model)
    assert nkk.recalibrate(model, batches, progress=False) is model
    assert everything(model)[1] == before[1]
    found = seen(model, batches)
    assert len(found) == 2
    for layer, x in found.items():
        check(layer, x)
    state = {id(v) for layer in norms(model) for v in layer.non_trainable_variables}
    for weight, value in zip(model.weights, before[0], strict=True):
        assert np.array_equal(numpy(weight), value) == (id(weight) not in state)


def test_one_pass_sees_with_the_old_statistics():
    model = sequential(nkk.BatchNormalization)
    batches = in_batches(data())
    old = seen(model, batches)
    nkk.recalibrate(model, iter(batches), one_pass=True, progress=False)
    for layer, x in old.items():
        check(layer, x)
    second, x = list(seen(model, batches).items())[1]
    with pytest.raises(AssertionError):
        check(second, x)


def test_a_cumulative_average_goes_on():
    x = data()[:, 0, 0]
    norm = nkk.BatchNormalization(momentum=None)
    norm(x)
    nkk.recalibrate(norm, [x[:4], x[4:8]], progress=False)
    mean = numpy(norm.moving_mean)
    norm(x[8:], training=True)
    expected = (2 * mean + x[8:].mean(0, dtype=np.float64)) / 3
    np.testing.assert_allclose(numpy(norm.moving_mean), expected, rtol=1e-6)
    assert int(norm.count) == 3


@pytest.mark.parametrize("norm", [layers.BatchNormalization, nkk.BatchNormalization])
def test_a_mask_that_comes_with_the_input(norm):
    x = data()[:, 0]
    x[2:5, 3:] = 0
    x[7, 1:] = 0
    model = keras.Sequential([keras.Input((6, 3)), layers.Masking(0.0), norm()])
    nkk.recalibrate(model, in_batches(x), progress=False)
    rows = np.asarray(x[np.any(x != 0, axis=-1)], np.float64)
    assert len(rows) < 66
    check(model.layers[-1], rows)


def test_batch_renormalization_has_deviations_as_well():
    model = sequential(lambda: layers.BatchNormalization(renorm=True))
    nkk.recalibrate(model, in_batches(data()), progress=False)
    for layer, x in seen(model, in_batches(data())).items():
        check(layer, x)
        deviation = np.sqrt(statistics(layer, x)[1] + layer.epsilon)
        np.testing.assert_allclose(numpy(layer.moving_stddev), deviation, rtol=1e-6)


def test_mixed_precision():
    """normkit's layer sees what the native one rounds."""
    model = keras.Sequential([keras.Input((3,)), nkk.BatchNormalization(dtype="mixed_bfloat16")])
    x = data()[:, 0, 0]
    nkk.recalibrate(model, in_batches(x), progress=False)
    check(model.layers[0], x.astype(np.float64))


class Data(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        x = in_batches(data())[index]
        return x, np.zeros(len(x))


def test_kinds_of_batches():
    x = data()
    expected = sequential(nkk.BatchNormalization)
    nkk.recalibrate(expected, in_batches(x), progress=False)
    kinds = [
        (Data(), None),
        ([(part, None) for part in in_batches(x)], None),
        ([[part, 1, 2] for part in in_batches(x)], None),
        ([{"image": x}], lambda model, batch: model(batch["image"], training=False)),
    ]
    if BACKEND == "tensorflow":
        import tensorflow as tf

        batches = tf.data.Dataset.from_tensor_slices((x, np.arange(11))).batch(4)
        kinds.append((batches, None))
    for batches, call in kinds:
        model = sequential(nkk.BatchNormalization)
        nkk.recalibrate(model, batches, call=call, progress=False)
        for a, b in zip(model.weights, expected.weights, strict=True):
            np.testing.assert_allclose(numpy(a), numpy(b), rtol=1e-5, atol=1e-6)


def test_inputs_by_name():
    inputs = {name: keras.Input((3,), name=name) for name in ("a", "b")}
    model = keras.Model(inputs, nkk.BatchNormalization()(inputs["a"] - inputs["b"]))
    x = data()[:, 0]
    batches = [{"a": part[:, 0], "b": 0.5 * part[:, 1]} for part in in_batches(x)]
    nkk.recalibrate(model, batches, progress=False)
    ((layer, found),) = seen(model, batches).items()
    check(layer, found)
    np.testing.assert_allclose(found, x[:, 0] - 0.5 * x[:, 1], rtol=1e-6)


class Interrupted(list):
    """Batches that stop with an error after so many of them."""

    def __init__(self, batches, after, error):
        super().__init__(batches)
        self.left, self.error = after, error

    def __iter__(self):
        for batch in super().__iter__():
            if not self.left:
                raise self.error
            self.left -= 1
            yield batch


@pytest.mark.parametrize("after", [0, 1, 4])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no disk")], ids=repr)
def test_whatever_is_raised_leaves_the_model_as_it_was(after, error):
    model = sequential(NORMS["average"])
    before = everything(model)
    batches = Interrupted(in_batches(data()), after, error)
    with pytest.raises(type(error)):
        nkk.recalibrate(model, batches, progress=False)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ([], "there are no batches"),
        ([np.float32(1.0)], r"the model was called with an array of shape \(\)"),
        ([data()[0]], "expected min_ndim|expected shape|incompatible|Kernel shape"),
        (iter([data()]), "passed over once for each of the 2 layers"),
        ([data() * np.inf], "the mean of what layer .* sees is NaN"),
    ],
)
def test_batches_that_are_refused(batches, said):
    model = sequential(nkk.BatchNormalization)
    before = everything(model)
    with np.errstate(all="ignore"), pytest.raises(ValueError, match=said):
        nkk.recalibrate(model, batches, progress=False)
    assert_unchanged(model, before)


def test_models_that_are_refused():
    x = data()[:, 0, 0]
    norm = nkk.BatchNormalization(correction=1)
    with pytest.raises(ValueError, match="is not built, so it has no statistics"):
        nkk.recalibrate(norm, [x], progress=False)
    norm(x)
    with pytest.raises(ValueError, match="remembers an estimate with correction=1"):
        nkk.recalibrate(norm, [x[:1]], progress=False)
    for none in (layers.LayerNormalization(), nkk.BatchNormalization(track_running_stats=False)):
        with pytest.raises(ValueError, match="no layer with running statistics"):
            nkk.recalibrate(none, [x], progress=False)
    with pytest.raises(TypeError, match="a batch must be what fit takes"):
        nkk.recalibrate(norm, ["x"], progress=False)

    class Aside(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm, self.aside = norm, nkk.BatchNormalization(name="aside")
            self.aside(x)

        def call(self, x):
            return self.norm(x)

    with pytest.raises(ValueError, match=r"never seen to be called.*: aside\."):
        nkk.recalibrate(Aside(), [x], progress=False)


@pytest.mark.skipif(BACKEND == "torch", reason="nothing is compiled there")
def test_compiled_calls_cannot_be_looked_into():
    if BACKEND == "jax":
        import jax

        compiled = jax.jit
    else:
        import tensorflow as tf

        compiled = tf.function(autograph=False)
    model = keras.Sequential([keras.Input((3,)), nkk.BatchNormalization()])
    before = everything(model)
    with pytest.raises(ValueError, match="inside of a compiled or transformed function"):
        nkk.recalibrate(
            model,
            [data()[:, 0, 0]],
            call=lambda model, x: compiled(lambda x: model(x, training=False))(x),
            progress=False,
        )
    assert_unchanged(model, before)


def test_it_goes_on_training():
    """What was compiled for training works with the new statistics."""
    x = data(0)
    model = keras.Sequential(
        [sequential(nkk.BatchNormalization), layers.Flatten(), layers.Dense(1)]
    )
    model.compile("sgd", "mse")
    y = np.ones((11, 1), "float32")
    model.fit(x, y, verbose=0)
    nkk.recalibrate(model, in_batches(x), progress=False)
    for layer, found in seen(model, in_batches(x)).items():
        check(layer, found)
    expected = numpy(model(x, training=False))
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, rtol=1e-4, atol=1e-5)
    mean = numpy(norms(model)[0].moving_mean)
    model.fit(x, y, verbose=0)
    assert not np.array_equal(numpy(norms(model)[0].moving_mean), mean)


def test_it_is_in_the_package():
    assert nk.keras.recalibrate is nkk.recalibrate


def test_a_layer_that_is_called_in_training_is_refused():
    class Kept(keras.Model):
        def __init__(self):
            super().__init__()
            self.bn = keras.layers.BatchNormalization()

        def call(self, x):
            return self.bn(x, training=True)

    model = Kept()
    x = np.random.default_rng(0).normal(size=(5, 3)).astype("f")
    model(x)
    before = [np.array(keras.ops.convert_to_numpy(v)) for v in model.variables]
    with pytest.raises(ValueError, match="is called in training mode"):
        nkk.recalibrate(model, [x], progress=False)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), value)
