"""Running statistics taken again, beside float64 statistics of what each layer sees."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict, freeze

import normkit as nk
import normkit.flax.linen as nkl
import normkit.flax.nnx as nkx

SIZES = (7, 3, 1)
NORMS = {
    "native": ("BatchNorm", False, {}),
    "normkit": ("BatchNorm", True, {}),
    "average": ("BatchNorm", True, {"momentum": None, "correction": 1}),
    "instance": (
        "InstanceNorm",
        True,
        {"track_running_stats": True, "momentum": None, "correction": 1},
    ),
}


def data(offset=1e3):
    rng = np.random.default_rng(0)
    return (offset + 3 * rng.standard_normal((sum(SIZES), 6, 3))).astype("float32")


def in_batches(x):
    return np.split(x, np.cumsum(SIZES)[:-1])


def check(found, x, ddof=0, apart=False, calls=None, rtol=1e-6):
    """Whether ``found`` are the statistics of ``x``, which has channels last."""
    x = np.asarray(x, np.float64)
    axes = tuple(range(int(apart), x.ndim - 1))
    mean, variance = x.mean(axes), x.var(axes, ddof=ddof)
    if apart:
        mean, variance = mean.mean(0), variance.mean(0)
    # A mean that lies around zero has no digits to be right in.
    atol = rtol * np.sqrt(variance.max())
    np.testing.assert_allclose(np.asarray(found["mean"], np.float64), mean, rtol=rtol, atol=atol)
    np.testing.assert_allclose(np.asarray(found["var"], np.float64), variance, rtol=rtol)
    if "count" in found:
        assert int(found["count"]) == calls


def of(name):
    """What :func:`check` is to expect of the norm ``name``."""
    ddof = NORMS[name][2].get("correction", 0)
    return {"ddof": ddof, "apart": name == "instance", "calls": 3}


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


# --- NNX ---


class Network(nnx.Module):
    def __init__(self, name="normkit"):
        kind, ours, options = NORMS[name]
        rngs = nnx.Rngs(0)
        norm = partial(getattr(nkx if ours else nnx, kind), rngs=rngs, **options)
        self.linear1, self.linear2 = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)
        self.norm1, self.norm2 = norm(4), norm(2)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(nnx.relu(self.norm1(self.linear1(x))))
        return self.norm2(self.linear2(x))

    def inputs(self, batches):
        """What the norms are called with in inference."""
        self.eval()
        firsts = [self.linear1(jnp.asarray(x)) for x in batches]
        seconds = [self.linear2(nnx.relu(self.norm1(x))) for x in firsts]
        self.train()
        return {"norm1": np.concatenate(firsts), "norm2": np.concatenate(seconds)}


def statistics(layer):
    return {
        name: getattr(layer, name)[...] for name in ("mean", "var", "count") if hasattr(layer, name)
    }


def everything(model):
    """All that an error must leave as it was."""
    graph, state, _ = nnx.split(model, nnx.Any(nnx.Param, nnx.BatchStat), ...)
    return hash(graph), jax.tree.map(np.asarray, nnx.to_pure_dict(state))


def calls():
    return [vars(kind)["__call__"] for kind in (nnx.BatchNorm, nkx.BatchNorm, nkx.InstanceNorm)]


def assert_unchanged(model, before):
    graph, state = everything(model)
    assert graph == before[0]
    jax.tree.map(np.testing.assert_array_equal, state, before[1])


@pytest.mark.parametrize("name", NORMS)
def test_nnx_each_layer_has_the_statistics_of_what_it_sees(name):
    model, methods = Network(name), calls()
    model.norm2.use_running_average = True
    graph, before = everything(model)
    batches = in_batches(data())
    assert nkx.recalibrate(model, batches, progress=False) is model
    after = everything(model)
    assert (calls(), after[0]) == (methods, graph)
    for layer in ("linear1", "linear2"):
        jax.tree.map(np.testing.assert_array_equal, after[1][layer], before[layer])
    for layer, x in model.inputs(batches).items():
        check(statistics(getattr(model, layer)), x, **of(name))


def test_nnx_one_pass_sees_with_the_old_statistics():
    model, batches = Network(), in_batches(data())
    old = model.inputs(batches)
    nkx.recalibrate(model, iter(batches), one_pass=True, progress=False)
    for layer, x in old.items():
        check(statistics(getattr(model, layer)), x)
    with pytest.raises(AssertionError):
        check(statistics(model.norm2), model.inputs(batches)["norm2"])


def test_nnx_a_cumulative_average_goes_on():
    norm, x = nkx.BatchNorm(3, momentum=None, rngs=nnx.Rngs(0)), data()[:, 0]
    nkx.recalibrate(norm, [x[:4], x[4:8]], progress=False)
    mean = np.asarray(norm.mean[...])
    norm(x[8:])
    np.testing.assert_allclose(norm.mean[...], (2 * mean + x[8:].mean(0)) / 3, rtol=1e-6)
    assert norm.count[...] == 3


class Masked(nnx.Module):
    """A native layer and one of normkit's with a mask, and one in a list that is used twice."""

    def __init__(self):
        self.native = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
        self.ours = nkx.BatchNorm(3, rngs=nnx.Rngs(0))
        self.twice = nnx.List([nkx.BatchNorm(3, momentum=None, rngs=nnx.Rngs(0))])

    def __call__(self, x, mask):
        y = self.native(x, mask=mask[..., None]) + self.ours(x, mask=mask)
        return y + self.twice[0](x) + self.twice[0](2 * x)


def test_nnx_masks_and_a_layer_in_two_places():
    model, x = Masked(), data()
    mask = np.random.default_rng(0).random((11, 6)) < 0.5
    batches = [{"x": a, "mask": b} for a, b in zip(in_batches(x), in_batches(mask), strict=True)]
    nkx.recalibrate(model, batches, progress=False)
    check(statistics(model.native), x[mask])
    check(statistics(model.ours), x[mask])
    check(statistics(model.twice[0]), np.concatenate([x, 2 * x]), calls=6)


def test_nnx_kinds_of_batches():
    x = data()
    expected = everything(nkx.recalibrate(Network(), in_batches(x), progress=False))[1]
    for batches, call in [
        ([(x[:4], "label"), [x[4:], "label"]], None),
        ([{"x": x}], None),
        ([("label", x)], lambda model, batch: model(batch[1])),
    ]:
        model = nkx.recalibrate(Network(), batches, call=call, progress=False)
        close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
        jax.tree.map(close, everything(model)[1], expected)


@pytest.mark.parametrize("after", [0, 1, 4])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no disk")], ids=repr)
def test_nnx_whatever_is_raised_leaves_the_model_as_it_was(after, error):
    model, methods = Network("average"), calls()
    model.norm1.use_running_average = True
    before = everything(model)
    batches = Interrupted(in_batches(data()), after, error)
    with pytest.raises(type(error)):
        nkx.recalibrate(model, batches, progress=False)
    assert_unchanged(model, before)
    assert calls() == methods


REFUSED = [
    ([], "there are no batches"),
    ([np.float32(1.0)], r"the model was called with an array of shape \(\)"),
    ([data()[0, 0]], r"layer 'norm1' was called with an array of shape \(4,\)"),
    (iter([data()]), "passed over once for each of the 2 layers"),
    ([data() * np.inf], "the mean of what layer 'norm1' sees is NaN"),
]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(("batches", "said"), REFUSED)
def test_nnx_batches_that_are_refused(batches, said):
    model = Network()
    before = everything(model)
    with pytest.raises(ValueError, match=said):
        nkx.recalibrate(model, batches, progress=False)
    assert_unchanged(model, before)


def test_nnx_models_that_are_refused():
    x = data()
    model = Network()
    with pytest.raises(ValueError, match="inside of a compiled or transformed function"):
        nkx.recalibrate(
            model, [x], call=lambda model, x: jax.jit(lambda x: model.norm1(model.linear1(x)))(x)
        )
    with pytest.raises(ValueError, match=r"never seen to be called.*: norm2\."):
        nkx.recalibrate(
            model, [x], call=lambda model, x: model.norm1(model.linear1(x)), progress=False
        )
    with pytest.raises(ValueError, match="'BatchNorm' is called in training mode"):
        nkx.recalibrate(
            nnx.BatchNorm(3, rngs=nnx.Rngs(0)),
            [x],
            call=lambda model, x: model(x, use_running_average=False),
            progress=False,
        )
    norm = nkx.BatchNorm(3, correction=1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="'BatchNorm' remembers an estimate with correction=1"):
        nkx.recalibrate(norm, [x[:1, 0]], progress=False)
    with pytest.raises(TypeError, match=r"a batch must be an array.*, but got a str"):
        nkx.recalibrate(norm, ["x"], progress=False)
    with pytest.raises(ValueError, match="no layer with running statistics"):
        nkx.recalibrate(nkx.InstanceNorm(3, rngs=nnx.Rngs(0)), [x], progress=False)


# --- Linen ---


class Linen(nn.Module):
    name_of_norm: str = "normkit"

    @nn.compact
    def __call__(self, x, train: bool):
        kind, ours, options = NORMS[self.name_of_norm]
        norm = partial(getattr(nkl if ours else nn, kind), use_running_average=not train, **options)
        x = norm(name="norm1")(nn.Dense(4)(x))
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        return Block(norm, name="block")(x)


class Block(nn.Module):
    norm: object

    @nn.compact
    def __call__(self, x):
        return self.norm(name="norm2")(nn.Dense(2)(x))


PATHS = {"norm1": ("norm1",), "norm2": ("block", "norm2")}


def linen(name="normkit"):
    model = Linen(name)
    return model, model.init(jax.random.key(0), data(), train=False)


def linen_statistics(variables, layer):
    found = variables["batch_stats"]
    for name in PATHS[layer]:
        found = found[name]
    return found


def linen_inputs(model, variables, batches):
    """What the norms are called with in inference."""
    found = {}

    def see(next_call, args, kwargs, context):
        if isinstance(context.module, (nn.BatchNorm, nkl.InstanceNorm)):
            found.setdefault(context.module.name, []).append(args[0])
        return next_call(*args, **kwargs)

    with nn.intercept_methods(see):
        for batch in batches:
            model.apply(variables, batch, train=False)
    return {name: np.concatenate(parts) for name, parts in found.items()}


@pytest.mark.parametrize("name", NORMS)
def test_linen_each_layer_has_the_statistics_of_what_it_sees(name):
    model, variables = linen(name)
    before = jax.tree.map(np.asarray, variables)
    batches = in_batches(data())
    new = nkl.recalibrate(model, variables, batches, progress=False)
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    assert jax.tree.structure(new) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, new["params"], variables["params"])
    inputs = linen_inputs(model, new, batches)
    assert list(inputs) == ["norm1", "norm2"]
    for layer, x in inputs.items():
        check(linen_statistics(new, layer), x, **of(name))


def test_linen_one_pass_sees_with_the_old_statistics():
    (model, variables), batches = linen(), in_batches(data())
    new = nkl.recalibrate(model, variables, iter(batches), one_pass=True, progress=False)
    for layer, x in linen_inputs(model, variables, batches).items():
        check(linen_statistics(new, layer), x)
    with pytest.raises(AssertionError):
        check(linen_statistics(new, "norm2"), linen_inputs(model, new, batches)["norm2"])


class LinenMasked(nn.Module):
    """A native layer and one of normkit's with a mask, and one that is used twice."""

    @nn.compact
    def __call__(self, x, mask, use_running_average):
        twice = nkl.BatchNorm(use_running_average=use_running_average, momentum=None, name="twice")
        y = nn.BatchNorm(name="native")(x, use_running_average, mask=mask[..., None])
        y += nkl.BatchNorm(name="ours")(x, use_running_average, mask=mask)
        return y + twice(x) + twice(2 * x)


def test_linen_masks_and_a_layer_in_two_places():
    model, x = LinenMasked(), data()
    mask = np.random.default_rng(0).random((11, 6)) < 0.5
    variables = freeze(model.init(jax.random.key(0), x, mask, True))
    batches = [{"x": a, "mask": b} for a, b in zip(in_batches(x), in_batches(mask), strict=True)]
    new = nkl.recalibrate(model, variables, batches, progress=False)
    assert type(new) is FrozenDict
    check(new["batch_stats"]["native"], x[mask])
    check(new["batch_stats"]["ours"], x[mask])
    check(new["batch_stats"]["twice"], np.concatenate([x, 2 * x]), calls=6)


def test_linen_kinds_of_batches():
    (model, variables), x = linen(), data()
    expected = nkl.recalibrate(model, variables, in_batches(x), progress=False)
    for batches, call in [
        ([(x[:4], "label"), [x[4:], "label"]], None),
        ([{"x": x}], None),
        ([("label", x)], lambda model, v, batch: model.apply(v, batch[1], train=False)),
    ]:
        new = nkl.recalibrate(model, variables, batches, call=call, progress=False)
        close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
        jax.tree.map(close, new, expected)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no disk")], ids=repr)
def test_linen_whatever_is_raised_leaves_the_variables_as_they_were(error):
    model, variables = linen("average")
    before = jax.tree.map(np.asarray, variables)
    with pytest.raises(type(error)):
        nkl.recalibrate(model, variables, Interrupted(in_batches(data()), 4, error), progress=False)
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    assert len(linen_inputs(model, variables, [data()])) == 2  # with no other method in between


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(("batches", "said"), REFUSED)
def test_linen_batches_that_are_refused(batches, said):
    model, variables = linen()
    with pytest.raises(ValueError, match=said):
        nkl.recalibrate(model, variables, batches, progress=False)


def test_linen_models_that_are_refused():
    (model, variables), x = linen(), data()

    class Other(nn.Module):
        @nn.compact
        def __call__(self, x):
            for name in ("mean", "var"):
                self.variable("batch_stats", name, jnp.zeros, (3,))
            return x

    def recalibrate(**options):
        return nkl.recalibrate(model, variables, [x], progress=False, **options)

    options = {"rngs": {"dropout": jax.random.key(0)}, "mutable": ["batch_stats"]}
    with pytest.raises(ValueError, match="'norm1' is called in training mode"):
        recalibrate(call=lambda m, v, x: m.apply(v, x, train=True, **options))
    with pytest.raises(ValueError, match="inside of a compiled or transformed function"):
        recalibrate(call=lambda m, v, x: jax.jit(lambda x: m.apply(v, x, train=False))(x))
    stats = variables["batch_stats"]
    more = {**variables, "batch_stats": {**stats, "aside": {"last": stats["norm1"]}}}
    with pytest.raises(ValueError, match=r"never seen to be called.*: aside/last\."):
        nkl.recalibrate(model, more, [x], progress=False)
    for single in (nn.BatchNorm(), nkl.BatchNorm(), nkl.BatchNorm(use_running_average=True)):
        mode = {} if single.use_running_average else {"use_running_average": True}
        given = single.init(jax.random.key(0), x, **mode)
        new = nkl.recalibrate(single, given, in_batches(x), progress=False)
        check(new["batch_stats"], x)
    norm = nkl.BatchNorm(correction=1)
    with pytest.raises(ValueError, match="'BatchNorm' remembers an estimate with correction=1"):
        nkl.recalibrate(norm, given, [x[:1, 0]], progress=False)
    with pytest.raises(TypeError, match=r"a batch must be an array.*, but got a str"):
        nkl.recalibrate(norm, given, ["x"], progress=False)
    with pytest.raises(ValueError, match="no layer with running statistics"):
        nkl.recalibrate(nn.LayerNorm(), nn.LayerNorm().init(jax.random.key(0), x), [x])
    with pytest.raises(ValueError, match="belong to a Other, which is no BatchNorm"):
        nkl.recalibrate(Other(), Other().init(jax.random.key(0), x), [x], progress=False)


def test_they_are_in_the_package():
    assert nk.flax.nnx.recalibrate is nkx.recalibrate
    assert nk.flax.linen.recalibrate is nkl.recalibrate


def test_subclasses_with_a_call_of_their_own_are_refused():
    """Which may normalize anything."""

    class Linen(nn.BatchNorm):
        @nn.compact
        def __call__(self, x, use_running_average=None):
            return super().__call__(x * 2, use_running_average=use_running_average)

    class NNX(nnx.BatchNorm):
        def __call__(self, x, use_running_average=None):
            return super().__call__(x * 2, use_running_average=use_running_average)

    x = jnp.ones((5, 3))
    module = Linen()
    variables = module.init(jax.random.key(0), x, use_running_average=True)
    with pytest.raises(ValueError, match="Linen has a __call__ of its own"):
        nkl.recalibrate(module, variables, [x], progress=False)
    with pytest.raises(ValueError, match="NNX has a __call__ of its own"):
        nkx.recalibrate(NNX(3, rngs=nnx.Rngs(0)), [x], progress=False)
