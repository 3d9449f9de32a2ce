"""Flax layers, nnx and linen, under jit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import normkit as nk
import normkit.flax.linen
import normkit.flax.nnx
from harness.data import Job


def runner(name: str):
    return {"flax-nnx": on_nnx, "flax-linen": on_linen}[name]


def dtypes(job: Job) -> dict:
    wide = jnp.float64 if job.dtype == "float64" else jnp.float32
    return {"dtype": jnp.dtype(job.dtype), "param_dtype": wide}


def build_nnx(job: Job) -> nnx.Module:
    d = job.definition
    if job.native:
        native = getattr(nnx, type(d).__name__)
        if isinstance(d, nk.GroupNorm):
            return native(d.num_channels, d.num_groups, rngs=nnx.Rngs(0))
        return native(*d.parameter_shape, rngs=nnx.Rngs(0))
    return nk.flax.nnx.layer(d, **dtypes(job))


def on_nnx(job: Job) -> dict:
    with jax.enable_x64(job.dtype == "float64"):
        layer = build_nnx(job)
        for name, p in job.params.items():
            getattr(layer, name)[...] = jnp.asarray(p)

        @nnx.jit
        def step(layer, x, g, mask):
            graph, params, rest = nnx.split(layer, nnx.Param, ...)

            def forward(params, x):
                layer = nnx.merge(graph, params, rest, copy=True)
                y = layer(x, mask=mask)
                return y, nnx.state(layer, nnx.BatchStat)

            y, pullback, stats = jax.vjp(forward, params, x, has_aux=True)
            nnx.update(layer, stats)
            return y, *pullback(g)

        out: dict = {}
        for i, (x, g) in enumerate(zip(job.batches, job.grads, strict=True)):
            mask = jnp.asarray(job.masks[i]) if job.masks else None
            y, dparams, dx = step(layer, jnp.asarray(x), jnp.asarray(g), mask)
            out |= {f"y{i}": y, f"dx{i}": dx}
            out |= {f"d{n}{i}": dparams[n][...] for n in job.params}
        layer.eval()
        out["eval"] = layer(jnp.asarray(job.batches[0]))
        for name in ("mean", "var", "count"):
            if getattr(layer, name, None) is not None:
                out[name] = getattr(layer, name)[...]
        return {name: np.asarray(value) for name, value in out.items()}


def on_linen(job: Job) -> dict:
    with jax.enable_x64(job.dtype == "float64"):
        layer = nk.flax.linen.layer(job.definition, **dtypes(job))
        switched = isinstance(job.definition, nk.BatchNorm | nk.InstanceNorm)
        options = {"use_running_average": False} if switched else {}
        variables = layer.init(jax.random.key(0), jnp.asarray(job.batches[0]), **options)
        params = {name: jnp.asarray(p) for name, p in job.params.items()}
        rest = {name: value for name, value in variables.items() if name != "params"}

        @jax.jit
        def step(params, rest, x, g, mask):
            def forward(params, x):
                return layer.apply(
                    {"params": params, **rest}, x, mask=mask, mutable=["batch_stats"], **options
                )

            y, pullback, rest = jax.vjp(forward, params, x, has_aux=True)
            return y, rest, *pullback(g)

        out: dict = {}
        for i, (x, g) in enumerate(zip(job.batches, job.grads, strict=True)):
            mask = jnp.asarray(job.masks[i]) if job.masks else None
            y, rest, dparams, dx = step(params, rest, jnp.asarray(x), jnp.asarray(g), mask)
            out |= {f"y{i}": y, f"dx{i}": dx} | {f"d{n}{i}": dparams[n] for n in job.params}
        out |= rest.get("batch_stats", {})
        options = {"use_running_average": True} if switched else {}
        out["eval"] = layer.apply(
            {"params": params, **rest}, jnp.asarray(job.batches[0]), **options
        )
        return {name: np.asarray(value) for name, value in out.items()}
