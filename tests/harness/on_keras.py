"""Keras layers, on whichever backend Keras has in this process."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

import normkit as nk
import normkit.keras
from harness.data import Job

POLICY = {"float16": "mixed_float16", "bfloat16": "mixed_bfloat16"}


def runner(name: str):
    return {"tensorflow": on_tensorflow, "jax": on_jax, "torch": on_torch}[keras.backend.backend()]


def native(definition) -> keras.layers.Layer:
    if isinstance(definition, nk.GroupNorm | nk.InstanceNorm):
        return keras.layers.GroupNormalization(getattr(definition, "num_groups", -1))
    kinds = {
        nk.BatchNorm: keras.layers.BatchNormalization,
        nk.LayerNorm: keras.layers.LayerNormalization,
        nk.RMSNorm: keras.layers.RMSNormalization,
    }
    return kinds[type(definition)]()


def build(job: Job):
    if job.native:
        layer = native(job.definition)
    else:
        layer = nk.keras.layer(job.definition, dtype=POLICY.get(job.dtype, job.dtype))
    layer.build(job.batches[0].shape)
    if isinstance(layer, keras.layers.RMSNormalization):
        variables = {"scale": layer.scale}
    else:
        variables = {"scale": layer.gamma, "bias": layer.beta}
    for name, p in job.params.items():
        variables[name].assign(p)
    return layer, {name: variables[name] for name in job.params}


def finish(layer, job: Job, out: dict) -> dict:
    out["eval"] = array(layer(tensor(job.batches[0])))
    for name, weight in (("mean", "moving_mean"), ("var", "moving_variance"), ("count", "count")):
        if getattr(layer, weight, None) is not None:
            out[name] = array(getattr(layer, weight))
    return out


def tensor(a: np.ndarray):
    return ops.convert_to_tensor(np.ascontiguousarray(a), dtype=a.dtype.name)


def array(t) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(t))


def options(layer, job: Job, i: int) -> dict:
    mask = {"mask": ops.convert_to_tensor(job.masks[i])} if job.masks else {}
    remembers = getattr(job.definition, "track_running_stats", False)
    return mask | ({"training": True} if remembers else {})


def on_tensorflow(job: Job) -> dict:
    import tensorflow as tf

    layer, variables = build(job)
    out: dict = {}
    for i, (x, g) in enumerate(zip(job.batches, job.grads, strict=True)):
        x = tensor(x)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, **options(layer, job, i))
        sources = [x, *(v.value for v in variables.values())]
        dx, *dparams = tape.gradient(y, sources, output_gradients=tensor(g))
        out |= {f"y{i}": array(y), f"dx{i}": array(dx)}
        out |= {f"d{n}{i}": array(d) for n, d in zip(variables, dparams, strict=True)}
    return finish(layer, job, out)


def on_jax(job: Job) -> dict:
    import jax

    with jax.enable_x64(job.dtype == "float64"):
        layer, variables = build(job)
        names = [v.path for v in layer.trainable_variables]
        assert [v.path for v in variables.values()] == names
        out: dict = {}
        for i, (x, g) in enumerate(zip(job.batches, job.grads, strict=True)):
            rest = [v.value for v in layer.non_trainable_variables]

            def forward(trainable, x, rest=rest, i=i):
                return layer.stateless_call(trainable, rest, x, **options(layer, job, i))

            trainable = [v.value for v in layer.trainable_variables]
            y, pullback, rest = jax.vjp(forward, trainable, tensor(x), has_aux=True)
            dparams, dx = pullback(tensor(g))
            for v, value in zip(layer.non_trainable_variables, rest, strict=True):
                v.assign(value)
            out |= {f"y{i}": array(y), f"dx{i}": array(dx)}
            out |= {f"d{n}{i}": array(d) for n, d in zip(variables, dparams, strict=True)}
        return finish(layer, job, out)


def on_torch(job: Job) -> dict:
    layer, variables = build(job)
    out: dict = {}
    for i, (x, g) in enumerate(zip(job.batches, job.grads, strict=True)):
        x = tensor(x).requires_grad_()
        layer.zero_grad()
        y = layer(x, **options(layer, job, i))
        y.backward(tensor(g))
        out |= {f"y{i}": array(y), f"dx{i}": array(x.grad)}
        out |= {f"d{n}{i}": array(v.value.grad) for n, v in variables.items()}
    return finish(layer, job, out)
