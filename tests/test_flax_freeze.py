"""Frozen statistics and parameters: what stays as it is, and for how long."""

from __future__ import annotations

import copy
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict, freeze

import normkit.flax.linen as nkl
import normkit.flax.nnx as nkx

X = np.random.default_rng(0).normal(0.5, 2.0, (6, 5, 3)).astype("float32")
NORMS = {
    "native": nnx.BatchNorm,
    "normkit": nkx.BatchNorm,
    "instance": lambda n, rngs: nkx.InstanceNorm(n, track_running_stats=True, rngs=rngs),
}


class Network(nnx.Module):
    def __init__(self, norm=nkx.BatchNorm, **call):
        rngs = nnx.Rngs(0)
        # Without a bias, which a BatchNorm would leave without a gradient.
        self.linear = nnx.Linear(3, 4, use_bias=False, rngs=rngs)
        self.norm = norm(4, rngs=rngs)
        self.second = nnx.LayerNorm(4, rngs=rngs)
        self.call = nnx.static(tuple(call.items()))

    def __call__(self, x):
        return self.second(self.norm(self.linear(x), **dict(self.call)))


def loss(model):
    return jnp.sum(model(X) ** 2 * jnp.arange(4.0))


def update(model, optimizer):
    grads = nnx.grad(loss, argnums=nnx.DiffState(0, nkx.trainable))(model)
    optimizer.update(model, grads)


def values(model):
    state = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
    return {".".join(map(str, p)): np.asarray(v[...]) for p, v in nnx.to_flat_state(state)}


def step(model, update=update):
    """One of training; which variables it moved."""
    before = values(model)
    model.train()
    update(model, nnx.Optimizer(model, optax.sgd(0.1), wrt=nkx.trainable))
    return {
        name for name, value in values(model).items() if not np.array_equal(value, before[name])
    }


REST = {"linear.kernel"}
PARAMETERS = {f"{n}.{name}" for n in ("norm", "second") for name in ("scale", "bias")}
STATISTICS = {"norm.mean", "norm.var"}
COPIES = {
    "same": lambda m: m,
    "clone": nnx.clone,
    "merge": lambda m: nnx.merge(*nnx.split(m)),
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("statistics", "parameters"), [(1, 1), (1, 0), (0, 1)])
def test_nnx_what_a_step_of_training_moves(norm, statistics, parameters):
    model = Network(NORMS[norm])
    variables = [id(v) for _, v in nnx.to_flat_state(nnx.variables(model))]
    assert nkx.freeze(model, statistics=bool(statistics), parameters=bool(parameters)) is model
    assert [id(v) for _, v in nnx.to_flat_state(nnx.variables(model))] == variables
    expected = REST | (set() if statistics else STATISTICS)
    expected |= set() if parameters else PARAMETERS
    assert step(model) == expected
    if statistics:
        model.train()
        y = model(X)
        model.eval()
        np.testing.assert_array_equal(model(X), y)


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("norm", ["native", "normkit"])
def test_nnx_copies_are_frozen_too(norm, copied):
    model = COPIES[copied](nkx.freeze(Network(NORMS[norm])))
    assert step(model) == REST
    assert model.norm.use_running_average
    thawed = COPIES[copied](nkx.unfreeze(model))
    assert step(thawed) == REST | PARAMETERS | STATISTICS


def test_nnx_whatever_the_mode_is():
    model = nkx.freeze(Network(NORMS["normkit"], use_running_average=False))
    before = values(model)
    model(X)
    view = nnx.view(model, use_running_average=False)
    assert view.norm.use_running_average
    view(X)
    model.norm(jnp.ones((2, 4)), use_running_average=False)
    for name, value in values(model).items():
        np.testing.assert_array_equal(value, before[name])
    mask = jnp.arange(5) < 3
    y = model.norm(jnp.full((6, 5, 4), 2.0), mask=jnp.broadcast_to(mask, (6, 5)))
    np.testing.assert_array_equal(y[:, 3:], 0)


@pytest.mark.parametrize("norm", NORMS)
def test_nnx_thawed_it_is_as_it_was(norm):
    model, twin = Network(NORMS[norm]), Network(NORMS[norm])
    graph = nnx.split(model)[0]
    nkx.freeze(model)
    assert nnx.split(model)[0] != graph
    model.eval()
    model.train()
    assert nkx.unfreeze(model) is model
    assert nnx.split(model)[0] == graph
    assert not model.norm.use_running_average
    assert step(model) == step(twin)
    for name, value in values(model).items():
        np.testing.assert_array_equal(value, values(twin)[name])
    nkx.freeze(model)
    model.eval()
    assert nkx.unfreeze(model).norm.use_running_average


def test_nnx_one_after_the_other():
    model = nkx.freeze(Network())
    nkx.unfreeze(model, parameters=False)
    assert step(model) == REST | STATISTICS
    nkx.unfreeze(nkx.freeze(model), statistics=False)
    assert step(model) == REST | PARAMETERS


def test_nnx_compiled():
    model, compiled = Network(), nnx.jit(update)
    assert step(model, compiled) == REST | PARAMETERS | STATISTICS
    assert step(nkx.freeze(model), compiled) == REST
    assert step(nkx.unfreeze(model, parameters=False), compiled) == REST | STATISTICS


def test_nnx_states_and_recalibration():
    model, other = nkx.freeze(Network()), Network()
    other.norm(jnp.asarray(X @ np.ones((3, 4), "float32")))
    nnx.update(model, nnx.to_pure_dict(nnx.state(other)))
    np.testing.assert_array_equal(model.norm.mean[...], other.norm.mean[...])
    assert step(model) == REST
    nkx.recalibrate(model, [X[:4], X[4:]], progress=False)
    seen = np.asarray(model.linear(X), np.float64).reshape(-1, 4)
    np.testing.assert_allclose(model.norm.mean[...], seen.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.norm.var[...], seen.var(0), rtol=1e-5)
    assert step(model) == REST


def test_nnx_derived_layers():
    class Own(nnx.BatchNorm):
        pass

    model = Network(Own)
    with pytest.raises(ValueError, match="'norm' is a Own, and only layers of exactly flax"):
        nkx.freeze(model)
    assert nkx.trainable((), model.second.scale)  # nothing was changed
    nkx.freeze(model, statistics=False)
    assert step(model) == REST | STATISTICS


def test_nnx_nothing_to_freeze():
    rngs = nnx.Rngs(0)
    for model, options, said in [
        (nnx.Linear(2, 2, rngs=rngs), {}, "parameters or running statistics"),
        (nnx.LayerNorm(2, rngs=rngs), {"parameters": False}, "with running statistics"),
    ]:
        for change in (nkx.freeze, nkx.unfreeze):
            with pytest.warns(UserWarning, match=f"no normalization layer .*{said} was found in"):
                assert change(model, **options) is model


# --- Linen ---


class Linen(nn.Module):
    norm: type[nn.Module] = nkl.BatchNorm

    @nn.compact
    def __call__(self, x, train):
        x = self.norm(use_running_average=not train, name="norm")(nn.Dense(4)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return Rows(name="rows")(x)


class Rows(nn.Module):
    """Layers over which something is mapped: within, there are no values to be seen."""

    @nn.compact
    def __call__(self, x):
        def row(module, x):
            return nn.RMSNorm(name="rms")(nn.Dense(2, name="dense")(x))

        mapped = nn.vmap(row, variable_axes={"params": None}, split_rngs={"params": False})
        return mapped(self, x)


EXPECTED = {
    "Dense_0": {"kernel": "trainable", "bias": "trainable"},
    "norm": {"scale": "frozen", "bias": "frozen"},
    "rows": {
        "dense": {"kernel": "trainable", "bias": "trainable"},
        "rms": {"scale": "frozen"},
    },
}


@pytest.mark.parametrize("norm", [nn.BatchNorm, nkl.BatchNorm])
def test_linen_labels(norm):
    model = Linen(norm)
    variables = model.init(jax.random.key(0), X, False)
    assert nkl.labels(model, variables, X, False) == EXPECTED
    training = nkl.labels(model, variables, X, train=True, rngs={"dropout": jax.random.key(1)})
    assert training == EXPECTED
    found = nkl.labels(model, freeze(variables), X, False)
    assert type(found) is FrozenDict
    assert jax.tree.structure(found) == jax.tree.structure(freeze(variables["params"]))


def test_linen_a_step_of_training():
    model = Linen()
    variables = model.init(jax.random.key(0), X, False)
    labels = nkl.labels(model, variables, X, False)
    params, rest = variables["params"], {"batch_stats": variables["batch_stats"]}
    optimizer = optax.multi_transform(
        {"trainable": optax.sgd(0.1), "frozen": optax.set_to_zero()}, labels
    )
    weights = jnp.arange(1.0, 3.0)
    grads = jax.grad(lambda p: jnp.sum(weights * model.apply({"params": p, **rest}, X, False)))(
        params
    )
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    moved = jax.tree.map(lambda g: bool(np.any(np.asarray(g) != 0)), grads)
    assert moved["norm"]["bias"]
    assert moved["rows"]["rms"]["scale"]
    now = jax.tree.map(
        lambda label, u: bool(np.any(np.asarray(u) != 0)) == (label == "trainable"), labels, updates
    )
    assert all(jax.tree.leaves(now))


def test_linen_layers_by_themselves_and_none():
    norm = nkl.LayerNorm()
    variables = norm.init(jax.random.key(0), X)
    assert nkl.labels(norm, variables, X) == {"scale": "frozen", "bias": "frozen"}
    dense = nn.Dense(2)
    with pytest.warns(UserWarning, match="no normalization layer with parameters was found in"):
        found = nkl.labels(dense, dense.init(jax.random.key(0), X), X)
    assert found == {"kernel": "trainable", "bias": "trainable"}
