"""Flax layers of either API, native and normkit's, called alike."""

from __future__ import annotations

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import normkit.flax.linen as nkl
import normkit.flax.nnx as nkx

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(3, 6, 5, 4)), jnp.float32)  # three batches
UPSTREAM = jnp.asarray(RNG.normal(size=X.shape[1:]), jnp.float32)
MASK = jnp.asarray(RNG.random((6, 5, 1)) < 0.6)
NORMS = ["BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm"]
NATIVE = {
    (api, norm): (getattr(flax, norm), getattr(ours, norm))
    for api, flax, ours in (("nnx", nnx, nkx), ("linen", nn, nkl))
    for norm in NORMS
}
EVERY = pytest.mark.parametrize(("api", "norm"), NATIVE)
BOTH = pytest.mark.parametrize("api", ["nnx", "linen"])


class Layer:
    """A layer of either API with its variables, called alike; it keeps what training changes."""

    def __init__(self, api, cls, x=X[0], features=None, **options):
        self.batch = issubclass(cls, nnx.BatchNorm | nn.BatchNorm) or bool(
            options.get("track_running_stats")
        )
        self.nnx = api == "nnx"
        if issubclass(cls, nnx.GroupNorm | nn.GroupNorm):
            options = {"num_groups": 2} | options
        if self.nnx:
            axis = options.get("axis", options.get("feature_axes", -1))
            features = features or int(np.prod([x.shape[a] for a in np.atleast_1d(axis)]))
            self.module = cls(features, rngs=nnx.Rngs(params=3), **options)
            self.graph, params, stats = nnx.split(self.module, nnx.Param, ...)
            self.params, self.stats = nnx.to_pure_dict(params), nnx.to_pure_dict(stats)
            self.param_state, self.stat_state = params, stats
        else:
            self.module = cls(**options)
            mode = {"use_running_average": False} if self.batch else {}
            variables = self.module.init(jax.random.key(3), x, **mode)
            self.params = variables.get("params", {})
            self.stats = variables.get("batch_stats", {})

    def pure(self, params, stats, x, training=True, **call):
        """``(y, stats)`` as a function."""
        if self.batch:
            call["use_running_average"] = not training
        if not self.nnx:
            variables = {"params": params, "batch_stats": stats}
            y, changed = self.module.apply(variables, x, mutable=["batch_stats"], **call)
            return y, changed.get("batch_stats", stats)
        states = []
        for state, values in ((self.param_state, params), (self.stat_state, stats)):
            state = jax.tree.map(lambda leaf: leaf, state)
            nnx.replace_by_pure_dict(state, values)
            states.append(state)
        module = nnx.merge(self.graph, *states, copy=True)
        y = module(x, **call)
        return y, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))

    def __call__(self, x, training=True, **call):
        y, self.stats = self.pure(self.params, self.stats, x, training, **call)
        return y

    def step(self, x, upstream=UPSTREAM, **call):
        """``y``, and the gradients of sum(y * upstream), by parameter and by ``x``."""

        def loss(params, x):
            y, stats = self.pure(params, self.stats, x, **call)
            return (y * upstream).sum(), (y, stats)

        (_, (y, self.stats)), found = jax.value_and_grad(loss, (0, 1), has_aux=True)(self.params, x)
        return y, found


def pair(api, norm, native=None, **options):
    """The native layer, in its accurate mode, and normkit's, with the same random parameters."""
    reference, cls = NATIVE[api, norm]
    layers = (
        Layer(api, reference, use_fast_variance=False, **options, **(native or {})),
        Layer(api, cls, **options),
    )
    params = random_parameters(layers[0])
    for layer in layers:
        layer.params = params
    return layers


def random_parameters(layer):
    rng = np.random.default_rng(1)
    return {k: jnp.asarray(rng.uniform(0.5, 2, p.shape), p.dtype) for k, p in layer.params.items()}


def close(found, expected, bound=2e-6):
    """The same trees, equal to a few roundings of the largest number."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=bound * np.abs(b).max(initial=1))


def product(**choices):
    return [
        dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())
    ]


def names(options):
    return "-".join(f"{key}={value}" for key, value in options.items()).replace(" ", "")
