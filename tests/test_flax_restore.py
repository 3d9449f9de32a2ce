"""The normalization layers of Flax models, nnx and linen: their names, and what they take over."""

from __future__ import annotations

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import normkit as nk
import normkit.flax.linen
import normkit.flax.nnx
import normkit.numpy
from normkit._bundle import Bundle


def scaled(bundle: Bundle, by: float) -> Bundle:
    for entry in bundle.values():
        for a in entry.arrays.values():
            a *= a.dtype.type(by)
    return bundle


class NNX(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.stem = nnx.BatchNorm(4, rngs=rngs)
        self.blocks = nnx.List([nnx.LayerNorm(4, rngs=rngs), nnx.GroupNorm(4, 2, rngs=rngs)])
        self.again = self.stem
        self.above = nnx.Dict({"rms": nnx.RMSNorm(4, rngs=rngs)})

    def __call__(self, x):
        for layer in (self.stem, *self.blocks, self.above["rms"]):
            x = layer(x)
        return x


def test_names_in_nnx_are_attributes_in_their_order():
    bundle = nk.extract(NNX())
    assert list(bundle) == ["stem", "blocks.0", "blocks.1", "above.rms"]
    assert bundle["stem"].aliases == ("again",)
    assert bundle["stem"].training is True
    assert bundle["blocks.0"].training is None
    # Which nnx.merge does not keep.
    merged = nnx.merge(*nnx.split(NNX()))
    assert list(nk.extract(merged)) == ["above.rms", "again", "blocks.0", "blocks.1"]
    nk.restore(merged, scaled(bundle, 2))  # by an alias, for one
    assert merged.stem.var[...].tolist() == [2.0] * 4


def test_modules_that_refer_to_each_other():
    model = NNX()
    model.child = nnx.Sequential(nnx.LayerNorm(4, rngs=nnx.Rngs(0)))
    model.child.parent = model
    assert list(nk.extract(model))[-1] == "child.layers.0"


def test_a_jitted_model_sees_what_was_taken_over():
    model, x = NNX(), jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.float32)
    call = nnx.jit(lambda model, x: model(x))
    model.eval()
    before = call(model, x)
    bundle = scaled(nk.extract(model), 0.5)
    nk.restore(model, bundle)
    entry = bundle["blocks.0"]
    wide = nk.LayerNorm(4, eps=3.0)
    changed = Bundle(dict(bundle) | {"blocks.0": type(entry)(wide, entry.arrays)})
    nk.restore(model, changed, adopt=True)
    after = call(model, x)
    assert float(jnp.max(jnp.abs(after - before))) > 1e-3
    np.testing.assert_allclose(after, model(x), rtol=0, atol=1e-6)


def test_what_nnx_cannot_take_over():
    layer = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    for definition, says in (
        (nk.BatchNorm.flax(4, correction=1), "correction=1"),
        (nk.BatchNorm.flax(4, decay=None), "decay=None"),
    ):
        with pytest.raises(ValueError, match=f"a flax BatchNorm cannot take over {says}"):
            nk.restore(layer, nk.extract(nk.numpy.layer(definition)), adopt=True)
        assert nk.flax.nnx.definition(layer) == nk.BatchNorm.flax(4)


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        x = linen.BatchNorm(use_running_average=not train)(linen.Dense(4)(x))
        x = linen.Dropout(0.5, deterministic=not train)(x)
        return linen.Sequential([linen.LayerNorm(), linen.RMSNorm(name="rms")])(x)


@pytest.fixture
def module():
    x = jnp.ones((3, 4))
    return Linen(), Linen().init(jax.random.key(0), x, train=False), x


@pytest.mark.parametrize("train", [True, False])
def test_names_in_linen_are_paths(module, train):
    model, variables, x = module
    for inputs in ((x, train), {"x": x, "train": train}, (np.ones((3, 4), "f"), train)):
        bundle = nk.extract(model, variables, inputs)
        assert list(bundle) == ["BatchNorm_0", "LayerNorm_0", "rms"]
        assert bundle["BatchNorm_0"].training is train


def test_linen_variables_are_new(module):
    model, variables, x = module
    frozen = flax.core.freeze(variables)
    for given in (variables, frozen):
        bundle = scaled(nk.extract(model, given, (x, True)), 3)
        before = jax.tree.map(np.array, given)
        report = nk.restore(model, bundle, variables=given, inputs=(x, True))
        assert type(report.variables) is type(given)
        jax.tree.map(np.testing.assert_array_equal, given, before)
        assert report.variables["batch_stats"]["BatchNorm_0"]["var"].tolist() == [3.0] * 4
        kernel = report.variables["params"]["Dense_0"]["kernel"]
        assert kernel is given["params"]["Dense_0"]["kernel"]


def test_linen_needs_variables_and_inputs(module):
    model, variables, x = module
    with pytest.raises(ValueError, match="give its variables= as well"):
        nk.extract(model)
    with pytest.raises(ValueError, match="give inputs= as well"):
        nk.extract(model, variables)
    other = nk.extract(nk.numpy.layer(nk.BatchNorm.keras(4)))
    layer = linen.BatchNorm(use_running_average=True)
    with pytest.raises(ValueError, match=r"cannot take over eps=0\.001"):
        nk.restore(layer, other, adopt=True, variables=layer.init(jax.random.key(0), x))


def test_compiled_parts_are_seen_each_time():
    class Block(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.LayerNorm()(x)

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            for i in range(2):
                x = linen.jit(Block)(name=f"block{i}")(x)
            return linen.LayerNorm(use_scale=False, use_bias=False, name="bare")(x)

    x = jnp.ones((3, 4))
    variables = Model().init(jax.random.key(0), x)
    for _ in range(2):
        bundle = nk.extract(Model(), variables, (x,))
        assert list(bundle) == ["block0.LayerNorm_0", "block1.LayerNorm_0", "bare"]
    assert bundle["bare"].definition == nk.LayerNorm.flax(4, scale=False, bias=False)


def test_layers_that_are_not_called_are_missed():
    class Model(linen.Module):
        @linen.compact
        def __call__(self, x, aux):
            return linen.BatchNorm(True, name="aux")(x) if aux else x

    x = jnp.ones((3, 4))
    variables = Model().init(jax.random.key(0), x, True)
    with pytest.raises(ValueError, match="running statistics of aux, which the model does not"):
        nk.extract(Model(), variables, (x, False))


def test_variables_without_statistics(module):
    model, variables, x = module
    bundle = nk.extract(model, variables, (x, True))
    with pytest.raises(ValueError, match=r"BatchNorm_0: .* needs mean and var"):
        nk.restore(model, bundle, variables={"params": variables["params"]}, inputs=(x, True))


def test_what_flax_does_differently_natively():
    rms = nnx.RMSNorm(4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="cannot take over eps=None"):
        nk.restore(rms, nk.extract(nk.numpy.layer(nk.RMSNorm(4))), adopt=True)

    class Own(nnx.LayerNorm):
        def __call__(self, x):
            return x

    with pytest.raises(ValueError, match="Own has a __call__ of its own"):
        nk.extract(Own(4, rngs=nnx.Rngs(0)))

    class Holder(nnx.Pytree):
        def __init__(self):
            self.norm = nnx.LayerNorm(4, rngs=nnx.Rngs(0))

    class Model(nnx.Module):
        def __init__(self):
            self.holder = Holder()

    assert list(nk.extract(Model())) == ["holder.norm"]


def test_boxes_stay_around_parameters():
    class Boxed(linen.Module):
        @linen.compact
        def __call__(self, x):
            init = linen.with_partitioning(linen.initializers.ones, ("features",))
            return linen.LayerNorm(scale_init=init, name="ln")(x)

    x = jnp.ones((3, 4))
    variables = Boxed().init(jax.random.key(0), x)
    bundle = scaled(nk.extract(Boxed(), variables, (x,)), 2)
    new = nk.restore(Boxed(), bundle, variables=variables, inputs=(x,)).variables
    scale = new["params"]["ln"]["scale"]
    assert isinstance(scale, linen.Partitioned)
    assert scale.value.tolist() == [2.0] * 4
