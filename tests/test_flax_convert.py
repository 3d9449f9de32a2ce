"""convert and revert: the same model, its normalization layers exchanged where they are."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn.datasets import load_digits

import normkit as nk
import normkit.flax.nnx as nkx

NAMES = ["BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm"]
STEPS = 20


class Block(nnx.Module):
    """A transformer block over the 8 rows of a digit."""

    def __init__(self, rngs):
        self.embed = nnx.Linear(8, 16, rngs=rngs)
        self.first = nnx.LayerNorm(16, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 16, decode=False, normalize_qk=True, rngs=rngs)
        self.second = nnx.RMSNorm(16, rngs=rngs)
        self.mlp = nnx.Sequential(nnx.Linear(16, 32, rngs=rngs), nnx.gelu)
        self.back = nnx.Linear(32, 16, rngs=rngs)
        self.out = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x)
        x = x + self.attention(self.first(x))
        x = x + self.back(self.mlp(self.second(x)))
        return self.out(x.mean(1))


class Convolutions(nnx.Module):
    """A small network over the 8 by 8 pixels of a digit."""

    def __init__(self, rngs):
        self.layers = nnx.List(
            [
                nnx.Conv(1, 8, (3, 3), use_bias=False, rngs=rngs),
                nnx.BatchNorm(8, rngs=rngs),
                nnx.relu,
                nnx.Conv(8, 8, (3, 3), strides=2, rngs=rngs),
                nnx.GroupNorm(8, 2, rngs=rngs),
                nnx.relu,
                nnx.Conv(8, 8, (3, 3), rngs=rngs),
                nnx.InstanceNorm(8, rngs=rngs),
            ]
        )
        self.out = nnx.Linear(8, 10, rngs=rngs)

    def __call__(self, x):
        x = x[..., None]
        for layer in self.layers:
            x = layer(x)
        return self.out(nnx.relu(x).mean((1, 2)))


def digits():
    data = load_digits()
    x = jnp.asarray(data.images[: STEPS * 16] / 16, jnp.float32).reshape(STEPS, 16, 8, 8)
    return x, jnp.asarray(data.target[: STEPS * 16]).reshape(STEPS, 16)


@nnx.jit
def step(model, optimizer, x, labels):
    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


def train(model, optimizer, batches):
    return np.asarray([step(model, optimizer, *batch) for batch in zip(*batches, strict=True)])


def kinds(model):
    return {
        ".".join(map(str, path)): type(node)
        for path, node in nnx.iter_modules(model)
        if type(node).__name__ in NAMES
    }


@pytest.mark.parametrize("network", [Block, Convolutions])
def test_training_goes_on_as_it_was(network):
    """The same losses for 20 steps, beside the unconverted copy; half way there, and back."""
    x, labels = digits()
    halves = (x[:10], labels[:10]), (x[10:], labels[10:])
    model, native = network(nnx.Rngs(0)), network(nnx.Rngs(0))
    types = kinds(native)
    # Made before, and never told.
    ours_state, native_state = (
        nnx.Optimizer(m, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param) for m in (model, native)
    )
    variables = {p: id(v) for p, v in nnx.to_flat_state(nnx.variables(model))}
    assert nkx.convert(model) is model
    assert {p: id(v) for p, v in nnx.to_flat_state(nnx.variables(model))} == variables
    assert kinds(model) == {name: getattr(nkx, kind.__name__) for name, kind in types.items()}
    for half in halves:
        expected = train(native, native_state, half)
        np.testing.assert_allclose(train(model, ours_state, half), expected, rtol=1e-5)
    model.eval()
    y = model(x[0])
    nkx.revert(model)
    assert kinds(model) == types
    np.testing.assert_allclose(model(x[0]), y, rtol=1e-5, atol=1e-6)
    model.train()
    native.train()
    expected = train(native, native_state, halves[0])
    np.testing.assert_allclose(train(model, ours_state, halves[0]), expected, rtol=1e-4)


def build(name, module=nnx, **options):
    if name == "GroupNorm":
        options = {"num_groups": 2} | options
    return getattr(module, name)(4, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"use_scale": False, "dtype": jnp.bfloat16}], ids=str)
def test_a_converted_layer_is_one_that_was_built(name, options):
    """The same graph, so that either serves where a program was made for the other."""
    built, layer = build(name, nkx, **options), nkx.convert(build(name, **options))
    a, b = nnx.split(built), nnx.split(layer)
    assert (a[0], hash(a[0])) == (b[0], hash(b[0]))
    assert jax.tree.structure(built) == jax.tree.structure(layer)
    x, run = jnp.arange(24.0).reshape(2, 3, 4), nnx.jit(lambda layer, x: layer(x))
    expected = run(built, x)
    for found in (nnx.merge(*b), nnx.clone(layer), layer):
        np.testing.assert_array_equal(run(found, x), expected)
    native = nnx.split(build(name, **options))[0]
    back = nnx.split(nkx.revert(layer))[0]
    assert (back, hash(back)) == (native, hash(native))
    assert jax.tree.structure(layer) == jax.tree.structure(build(name, **options))


def test_shared_layers_and_those_in_lists_and_dicts():
    shared = nnx.LayerNorm(4, rngs=nnx.Rngs(0))
    other = nnx.BatchNorm(4, use_running_average=True, rngs=nnx.Rngs(0), scale_metadata={"tag": 1})
    model = nnx.Dict(a=shared, b=nnx.List([shared, nnx.Dict(c=other)]))
    for holder in (model, {"x": [model.a, (other,)]}):
        assert nkx.convert(holder) is holder
        assert model.a is model.b[0] is shared
        assert (type(shared), type(other)) == (nkx.LayerNorm, nkx.BatchNorm)
        assert other.use_running_average
        assert other.scale.get_metadata("tag") == 1
        nkx.revert(holder)
        assert (type(shared), type(other)) == (nnx.LayerNorm, nnx.BatchNorm)


def test_functions_that_were_compiled_before_see_the_exchange():
    model = nnx.Sequential(nnx.LayerNorm(4, rngs=nnx.Rngs(0)))
    run = nnx.jit(lambda model, x: model(x))
    x = jnp.asarray([[0, 1, 2, 3]], jnp.float32) + 1e4
    exact = np.asarray([[-1.5, -0.5, 0.5, 1.5]]) / np.sqrt(1.25)
    assert np.abs(run(model, x) - exact).max() > 1e-2
    np.testing.assert_allclose(run(nkx.convert(model), x), exact, atol=1e-5)
    assert np.abs(run(nkx.revert(model), x) - exact).max() > 1e-2


def test_nothing_to_exchange_is_a_warning():
    class Own(nnx.LayerNorm):
        pass

    model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), Own(4, rngs=nnx.Rngs(0)))
    for exchange, which in ((nkx.convert, "native"), (nkx.revert, "normkit")):
        with pytest.warns(UserWarning, match=f"^no {which} normalization layer was found in this"):
            assert exchange(model) is model
    assert type(model.layers[1]) is Own


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("BatchNorm", {"correction": 1}, "correction=1"),
        ("BatchNorm", {"momentum": None}, "momentum=None"),
        ("BatchNorm", {"track_running_stats": False}, "track_running_stats=False"),
        ("GroupNorm", {"axis": 1}, "axis=1"),
        ("InstanceNorm", {"track_running_stats": True}, "track_running_stats=True"),
        ("RMSNorm", {"zero_centered": True}, "zero_centered=True"),
        (
            "RMSNorm",
            {"scale_after_cast": True, "epsilon": None},
            "scale_after_cast=True, epsilon=None",
        ),
    ],
)
def test_what_no_native_layer_has_is_not_reverted(name, options, text):
    model = nnx.List([nkx.LayerNorm(4, rngs=nnx.Rngs(0)), build(name, nkx, **options)])
    sentence = f"'1' has {text}, for which there is no native layer; nothing was changed."
    with pytest.raises(ValueError, match=re.escape(sentence)):
        nkx.revert(model)
    assert type(model[0]) is nkx.LayerNorm


def test_lengths_that_flax_does_not_keep_are_not_reverted():
    layer = nkx.layer(nk.RMSNorm((2, 4)))
    with pytest.raises(ValueError, match=re.escape("'RMSNorm' has epsilon=None, num_features=(2,")):
        nkx.revert(layer)


def test_a_portable_layer_is_reverted():
    layer = nkx.layer(nk.GroupNorm.flax(2, 4))
    x = jax.random.normal(jax.random.key(0), (3, 5, 4))
    y = layer(x)
    assert type(nkx.revert(layer)) is nnx.GroupNorm
    np.testing.assert_allclose(layer(x), y, atol=2e-6)
    assert nkx.definition(layer) == nk.GroupNorm.flax(2, 4)
