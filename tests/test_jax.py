"""Definitions in the ways that JAX uses functions: exported, scanned, mapped, strictly typed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

import normkit as nk

D = nk.BatchNorm(3)
PARAMS, STATE = D.init(xp=jnp)
BATCHES = jnp.asarray(np.random.default_rng(0).normal(2, 3, (6, 8, 3)), jnp.float32)


def step(state, x):
    y, state = D.apply(PARAMS, state, x, training=True)
    return state, y


def test_exported_for_any_batch_size():
    n, *_ = export.symbolic_shape("n", constraints=["n >= 2"])
    exported = export.export(jax.jit(step))(STATE, jax.ShapeDtypeStruct((n, 3), jnp.float32))
    for x in (BATCHES[0], BATCHES[1, :5]):
        for got, want in zip(
            jax.tree.leaves(exported.call(STATE, x)), jax.tree.leaves(step(STATE, x)), strict=True
        ):
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_scanned():
    """The state that comes out has the types of the one that went in, and nothing is retraced."""
    state, ys = jax.lax.scan(step, STATE, BATCHES)
    want = STATE
    for x, y in zip(BATCHES, ys, strict=True):
        want, z = step(want, x)
        np.testing.assert_allclose(y, z, rtol=0, atol=1e-6)
    assert jax.typeof(state["count"]) == jax.typeof(STATE["count"])
    assert not state["count"].weak_type
    for name in STATE:
        np.testing.assert_allclose(state[name], want[name], rtol=1e-6)


def test_mapped():
    _, ys = jax.vmap(step, in_axes=(None, 0))(STATE, BATCHES)
    for x, y in zip(BATCHES, ys, strict=True):
        np.testing.assert_allclose(y, step(STATE, x)[1], rtol=0, atol=1e-6)


def test_evaluated_for_its_shape():
    state, y = jax.eval_shape(step, STATE, BATCHES[0])
    assert y.shape == (8, 3)
    assert state["mean"].dtype == jnp.float32


def test_strict_promotion_and_ranks():
    mask = jnp.ones((8, 3), bool)
    with (
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.enable_x64(True),
    ):
        for dtype in (jnp.bfloat16, jnp.float32, jnp.float64):
            params, state = D.init(xp=jnp, dtype=dtype)
            x = BATCHES[0].astype(dtype)
            y, state = D.apply(params, state, x, training=True, mask=mask)
            assert y.dtype == dtype
            assert D.apply(params, state, x)[0].dtype == dtype
            assert nk.layer_norm(x).dtype == dtype


def test_weights_that_a_compiled_function_closes_over():
    weights = jnp.asarray([[1.0], [0.0]] * 4)
    f = jax.jit(lambda x: nk.moments(x, 0, weights=weights))
    mean, _ = f(BATCHES[0])
    np.testing.assert_allclose(mean, BATCHES[0, ::2].mean(0), rtol=1e-6)
