"""Definitions applied to JAX arrays, under jit, with reverse-mode gradients."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from harness.data import Job


def runner(name: str):
    return run


@cache
def step(definition):
    @jax.jit
    def step(params, state, x, g, mask):
        def forward(params, x):
            return definition.apply(params, state, x, training=True, mask=mask)

        y, pullback, state = jax.vjp(forward, params, x, has_aux=True)
        return y, state, *pullback(g)

    return step


def run(job: Job) -> dict:
    with jax.enable_x64(job.dtype == "float64"):
        definition = job.definition
        dtype = jnp.float64 if job.dtype == "float64" else jnp.float32
        _, state = definition.init(xp=jnp, dtype=dtype)
        params = {name: jnp.asarray(p) for name, p in job.params.items()}
        out: dict = {}
        for i, (x, g) in enumerate(zip(job.batches, job.grads, strict=True)):
            mask = jnp.asarray(job.masks[i]) if job.masks else None
            y, state, dparams, dx = step(definition)(
                params, state, jnp.asarray(x), jnp.asarray(g), mask
            )
            out |= {f"y{i}": y, f"dx{i}": dx} | {f"d{n}{i}": d for n, d in dparams.items()}
        out |= state
        out["eval"], _ = definition.apply(params, state, jnp.asarray(job.batches[0]))
        return {name: np.asarray(value) for name, value in out.items()}
