"""normkit.flax.nnx.fold: models without their BatchNorms that predict the same."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import normkit as nk
import normkit.flax.nnx as nkx
from normkit import _unfolded

fold = nkx.fold
RNGS = nnx.Rngs(0)


def trained(model, seed=0):
    """As if it had seen data of large means."""
    rng = np.random.default_rng(seed)
    for _, norm in nnx.iter_graph(model):
        if not isinstance(norm, nnx.BatchNorm) or norm.mean is None:
            continue
        n = norm.num_features
        values = {
            "mean": rng.uniform(1, 10, n) * (-1) ** np.arange(n),
            "var": 10 ** rng.uniform(-2, 1, n),
            "scale": rng.uniform(0.5, 1.5, n) * np.sign(np.arange(n) - 0.5),
            "bias": rng.normal(size=n),
        }
        for name, value in values.items():
            variable = getattr(norm, name)
            if variable is not None:
                variable[...] = jnp.asarray(value, variable.dtype)
    return model


def data(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), dtype)


@nnx.jit
def called(model, *inputs):
    return model(*inputs)


def predictions(model, *inputs):
    model = nnx.clone(model)
    model.eval()
    return called(model, *inputs)


def error(model, folded, *inputs):
    """The largest difference of their predictions, relative to their scale."""
    expected, found = (predictions(m, *inputs) for m in (model, folded))
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    return float(jnp.abs(found - expected).max() / jnp.abs(expected).max())


def same(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def from_numpy(key, shape, dtype):
    """JAX compiles the native initializers anew for every shape."""
    return data(*shape, dtype=dtype) / np.sqrt(np.prod(shape[:-1]))


def conv(*args, **options):
    return lambda: nnx.Conv(*args, **options, kernel_init=from_numpy, rngs=RNGS)


def transposed(*args, **options):
    return lambda: nnx.ConvTranspose(*args, **options, kernel_init=from_numpy, rngs=RNGS)


def linear(*args, **options):
    return nnx.Linear(*args, **options, kernel_init=from_numpy, rngs=RNGS)


def bn(n, **options):
    return nnx.BatchNorm(n, **options, rngs=RNGS)


PAIRS = {
    "linear": (lambda: linear(4, 6, use_bias=False), lambda: bn(6), (4,)),
    "linear, rank 3": (lambda: linear(4, 6), lambda: nkx.BatchNorm(6, rngs=RNGS), (5, 4)),
    "conv1d": (conv(4, 6, 3, padding="CAUSAL"), lambda: bn(6, axis=2), (9, 4)),
    "conv2d": (conv(4, 6, (3, 3), use_bias=False), lambda: bn(6, use_scale=False), (9, 8, 4)),
    "conv3d": (conv(4, 6, (2, 2, 2)), lambda: bn(6, use_bias=False), (5, 4, 3, 4)),
    "strided, masked": (
        conv(4, 6, (3, 3), strides=2, mask=jnp.arange(9.0).reshape(3, 3, 1, 1) * jnp.ones((4, 6))),
        lambda: nkx.BatchNorm(6, momentum=None, correction=1, rngs=RNGS),
        (9, 8, 4),
    ),
    "grouped": (
        conv(4, 6, (3, 3), feature_group_count=2),
        lambda: nkx.layer(nk.BatchNorm(6, axis=-1)),
        (9, 8, 4),
    ),
    "depthwise": (conv(4, 8, (3, 3), feature_group_count=4), lambda: bn(8), (9, 8, 4)),
    "transposed": (transposed(4, 6, (3, 3), strides=(2, 2)), lambda: bn(6), (9, 8, 4)),
    "transposed kernel": (
        transposed(4, 6, (3,), transpose_kernel=True, use_bias=False),
        lambda: bn(6, use_scale=False, use_bias=False),
        (9, 4),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_every_layer(name):
    layer, norm, shape = PAIRS[name]
    model = trained(nnx.Sequential(layer(), norm()))
    before = nnx.state(nnx.clone(model))
    x = data(3, *shape)
    folded, report = fold(model, x)
    assert report.rows == (("layers.1", "layers.0", ""),)
    assert type(folded.layers[0]) is type(model.layers[0])
    assert isinstance(folded.layers[0].bias, nnx.Param)
    assert not nnx.state(folded.layers[1])
    assert error(model, folded, x) < 1e-6
    # It is a model like any other: split, merged, compiled, in either mode.
    expected = predictions(folded, x)
    again = nnx.merge(*nnx.split(folded))
    again.train()
    np.testing.assert_allclose(called(again, x), expected, rtol=1e-5, atol=1e-5)
    # The model that was given is as it was, and stands alone.
    folded.layers[0].kernel[...] = 0 * folded.layers[0].kernel
    assert not model.layers[1].use_running_average
    assert same(nnx.state(model), before)


class Block(nnx.Module):
    def __init__(self, inputs, outputs, stride) -> None:
        self.conv1 = conv(inputs, outputs, (3, 3), strides=stride, use_bias=False)()
        self.bn1 = bn(outputs, use_running_average=None)
        self.conv2 = conv(outputs, outputs, (3, 3))()
        self.bn2 = nkx.BatchNorm(outputs, rngs=RNGS)
        self.aside = nnx.data(None)
        if stride > 1:
            self.aside = nnx.Sequential(
                conv(inputs, outputs, (1, 1), strides=stride)(), bn(outputs)
            )

    def __call__(self, x, train):
        y = nnx.relu(self.bn1(self.conv1(x), use_running_average=not train))
        y = self.bn2(self.conv2(y), use_running_average=not train, mask=None)
        return nnx.relu(y + (x if self.aside is None else self.aside(x)))


class ResNet(nnx.Module):
    def __init__(self) -> None:
        self.stem, self.bn = conv(1, 8, (3, 3))(), bn(8)
        self.blocks = nnx.List([Block(8, 8, 1), Block(8, 16, 2)])
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(1))
        self.out = linear(16, 10)

    def __call__(self, x, *, train=False):
        x = nnx.relu(self.bn(self.stem(x), not train))
        for block in self.blocks:
            x = block(x, train)
        return self.out(self.dropout(x.mean((1, 2))))


def test_a_residual_network():
    model, x = trained(ResNet()), data(4, 8, 8, 1)
    folded, report = fold(model, x)
    assert set(report.rows) == {
        ("bn", "stem", ""),
        ("blocks.0.bn1", "blocks.0.conv1", ""),
        ("blocks.0.bn2", "blocks.0.conv2", ""),
        ("blocks.1.bn1", "blocks.1.conv1", ""),
        ("blocks.1.bn2", "blocks.1.conv2", ""),
        ("blocks.1.aside.layers.1", "blocks.1.aside.layers.0", ""),
    }
    assert error(model, folded, x) < 2e-6
    assert not nnx.state(folded, nnx.BatchStat)
    # The flags are as they were, and a shape is as good an example.
    assert not folded.dropout.deterministic
    for given in (jax.ShapeDtypeStruct(x.shape, x.dtype), np.asarray(x)):
        assert fold(model, given, train=False)[1] == report
    # In the call that is the example, these take the statistics of their input.
    rows = {name: why for name, _, why in fold(model, x, train=True)[1].rows}
    assert rows["bn"] == rows["blocks.1.bn2"] == _unfolded.TRAINING
    assert rows["blocks.1.aside.layers.1"] == ""


class Model(nnx.Module):
    """A function of x and layers, which are a, b and c, and norms."""

    def __init__(self, function, norm=None, layer=None) -> None:
        self.function = function
        self.a, self.b, self.c = layer or linear(4, 4), linear(4, 4), linear(4, 4)
        self.norm = norm or bn(4)

    def __call__(self, x):
        return self.function(self, x)


def tied():
    model = Model(lambda m, x: m.b(m.norm(m.a(x))))
    model.b.kernel = model.a.kernel
    return model


def keeps(m, x):
    y = m.a(x)
    m.sow(nnx.Intermediate, "kept", y)
    return m.norm(y)


class MyNorm(nnx.BatchNorm):
    def __call__(self, x, *args, **options):
        return 2 * super().__call__(x, *args, **options)


class MyLinear(nnx.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


def plain(m, x):
    return m.norm(m.a(x))


def clips(m, x):
    m.a.kernel[...] = jnp.clip(m.a.kernel[...], -0.1, 0.1)
    return m.norm(m.a(x))


def resets(m, x):
    y = m.norm(m.a(x))
    m.a.bias[...] = jnp.zeros(4)
    return y


def shifts(m, x):
    m.norm.mean[...] = m.norm.mean[...] + 1
    return m.norm(m.a(x))


def branches(m, x):
    return plain(m, x) * (2 if isinstance(m.norm, nnx.BatchNorm) else 3)


def counts(m, x):
    return plain(m, x) + len(jax.tree.leaves(nnx.state(m)))


def compiled(m, x):
    return nnx.jit(lambda x: x * (2 if m.a.bias is None else 3))(plain(m, x))


def misses(m, x):
    return plain(m, x) * m.norm.epsilon


def looped(m, x):
    return jax.lax.fori_loop(0, 2, lambda i, x: m.norm(m.a(x)), x)


@jax.jit
def a(x):
    return 2 * x


def dot_general(*args, **options):
    return jax.lax.dot_general(*args, **options)


STAYS = {
    "layer twice": (
        lambda: Model(lambda m, x: m.norm(m.a(x)) + m.a(x)),
        _unfolded.layer_called_often("a"),
    ),
    "norm twice": (lambda: Model(lambda m, x: m.norm(m.a(m.norm(m.a(x))))), _unfolded.OFTEN),
    "used twice": (
        lambda: Model(lambda m, x: (lambda y: m.norm(y) + y)(m.a(x))),
        _unfolded.output_elsewhere("a"),
    ),
    "put out": (
        lambda: Model(lambda m, x: (lambda y: (m.norm(y), y))(m.a(x))),
        _unfolded.output_elsewhere("a"),
    ),
    "kept": (lambda: Model(keeps), _unfolded.output_elsewhere("a")),
    "mask": (lambda: Model(lambda m, x: m.norm(m.a(x), mask=x > 0)), _unfolded.MASKED),
    "training": (lambda: Model(lambda m, x: m.norm(m.a(x), False)), _unfolded.TRAINING),
    "tied": (tied, _unfolded.layer_shared("a")),
    "read": (
        lambda: Model(lambda m, x: m.norm(m.a(x)) + m.a.kernel.sum()),
        _unfolded.layer_shared("a"),
    ),
    "norm is read": (
        lambda: Model(lambda m, x: m.norm(m.a(x)) + m.norm.mean[...]),
        _unfolded.SHARED,
    ),
    "changed": (lambda: Model(clips), _unfolded.layer_shared("a")),
    "changed after": (lambda: Model(resets), _unfolded.layer_shared("a")),
    "norm is changed": (lambda: Model(shifts), _unfolded.SHARED),
    "looks at a class": (lambda: Model(branches), _unfolded.LOOKED_AT),
    "looks for a bias": (
        lambda: Model(compiled, layer=linear(4, 4, use_bias=False)),
        _unfolded.LOOKED_AT,
    ),
    "looks at variables": (lambda: Model(counts), _unfolded.LOOKED_AT),
    "looks at an attribute": (lambda: Model(misses), _unfolded.LOOKED_AT),
    "narrow": (
        lambda: Model(plain, layer=linear(4, 4, param_dtype=jnp.bfloat16)),
        _unfolded.narrow("a", "bfloat16", "float32"),
    ),
    "not called": (lambda: Model(lambda m, x: m.a(x)), _unfolded.NOT_FOUND),
    "relu": (lambda: Model(lambda m, x: m.norm(m.a(x) * 2)), _unfolded.no_layer("mul")),
    "of the same name": (lambda: Model(lambda m, x: m.norm(a(m.a(x)))), _unfolded.no_layer("a")),
    "input": (
        lambda: Model(lambda m, x: m.norm(x)),
        _unfolded.no_layer("an input of the model"),
    ),
    "general": (
        lambda: Model(plain, layer=nnx.LinearGeneral(4, 4, rngs=RNGS)),
        _unfolded.no_layer("a LinearGeneral"),
    ),
    "einsum": (
        lambda: Model(plain, layer=nnx.Einsum("nlc,cd->nld", (4, 4), rngs=RNGS)),
        _unfolded.no_layer("a Einsum"),
    ),
    "derived norm": (
        lambda: Model(plain, MyNorm(4, rngs=RNGS)),
        _unfolded.own_class(MyNorm(4, rngs=RNGS)),
    ),
    "derived layer": (
        lambda: Model(plain, layer=MyLinear(4, 4, rngs=RNGS)),
        _unfolded.no_layer("mul"),
    ),
    "own function": (
        lambda: Model(plain, layer=linear(4, 4, dot_general=dot_general)),
        _unfolded.special("a", "a dot_general of its own"),
    ),
    "axis": (
        lambda: Model(lambda m, x: m.norm(m.a(x)[:, :4]), bn(4, axis=1)),
        _unfolded.no_layer("slice"),
    ),
    "other axis": (
        lambda: Model(plain, bn(5, axis=-2)),
        _unfolded.other_axis(1, "a", 2),
    ),
    "dtype": (
        lambda: Model(plain, bn(4, dtype=jnp.bfloat16)),
        _unfolded.dtypes("a", "float32", "bfloat16"),
    ),
    "no statistics": (
        lambda: Model(plain, nkx.BatchNorm(4, track_running_stats=False, rngs=RNGS)),
        _unfolded.NO_STATISTICS,
    ),
    "remat": (
        lambda: Model(lambda m, x: nnx.remat(plain)(m, x)),
        _unfolded.TRANSFORMED,
    ),
    "loop": (lambda: Model(looped), _unfolded.TRANSFORMED),
}


@pytest.mark.parametrize("name", STAYS)
def test_why_not(name):
    make, why = STAYS[name]
    model, x = trained(make()), data(3, 5, 4)
    folded, report = fold(model, x)
    assert [row[1:] for row in report.rows] == [("", why)]
    assert same(predictions(folded, x), predictions(model, x))
    assert type(folded) is type(model)
    assert not any("_normkit_name" in vars(m) for _, m in nnx.iter_modules(folded))


def test_a_variance_that_is_none_is_said():
    model = Model(plain)
    model.norm.var[...] = -jnp.ones(4)
    assert "some are negative or NaN" in fold(model, data(3, 4))[1].rows[0][2]


def test_half_precision():
    layers = (linear(4, 6, dtype=jnp.bfloat16), bn(6, dtype=jnp.bfloat16))
    model, x = trained(nnx.Sequential(*layers)), data(9, 4, dtype=jnp.bfloat16)
    folded, report = fold(model, x)
    assert report.rows[0][1] == "layers.0"
    assert folded.layers[0].kernel.dtype == jnp.float32
    assert error(model, folded, x) < 0.05


def test_layers_in_a_vmap():
    model = trained(Model(lambda m, x: jax.vmap(lambda x: plain(m, x), in_axes=1, out_axes=1)(x)))
    x = data(3, 5, 4)
    folded, report = fold(model, x)
    assert report.rows == (("norm", "a", ""),)
    assert error(model, folded, x) < 1e-6
    # Here the norm does not see the axis that the layer put its channels on.
    model = trained(Model(lambda m, x: jax.vmap(m.norm, in_axes=1, out_axes=1)(m.a(x)), bn(4)))
    assert fold(model, data(4, 4, 4))[1].rows == (("norm", "", _unfolded.TRANSFORMED),)


def test_the_classes_of_layers_are_what_they_are():
    def asks(m, x):
        y = m.a(x)
        return m.norm(y if type(m.a) is nnx.Linear else 2 * y)

    def changes_another(m, x):
        m.b.bias[...] = x.mean(0)
        return jax.jit(nnx.relu)(plain(m, x)) + jnp.arange(4.0)

    calls = nnx.Linear.__call__, nnx.BatchNorm.__call__, nkx.BatchNorm.__call__
    for function in (asks, changes_another):
        model, x = trained(Model(function)), data(3, 4)
        folded, report = fold(model, x)
        assert report.rows == (("norm", "a", ""),)
        assert error(model, folded, x) < 1e-6
    assert calls == (nnx.Linear.__call__, nnx.BatchNorm.__call__, nkx.BatchNorm.__call__)


def test_a_mask_comes_too_late():
    folded, report = fold(trained(Model(lambda m, x: m.norm(m.a(x)))), data(3, 4))
    assert report.rows[0][1] == "a"
    with pytest.raises(ValueError, match=r"^a BatchNorm that was folded .* takes no mask"):
        folded.norm(data(3, 4), mask=jnp.ones((3, 4), bool))


def test_an_example_is_needed():
    with pytest.raises(ValueError, match=r"^what the layers of this Sequential are followed by"):
        fold(nnx.Sequential(linear(4, 4)))


def test_what_the_model_raises_comes_through():
    """And nothing is left of it: the next one is folded as ever."""
    model = trained(Model(plain))
    with pytest.raises((TypeError, ValueError)):
        fold(model, data(3, 5))
    assert type(model.a) is nnx.Linear
    assert fold(model, data(3, 4))[1].rows == (("norm", "a", ""),)
