"""Definitions applied to TensorFlow tensors, inside tf.function or XLA, with GradientTape."""

from __future__ import annotations

from functools import cache, partial

import numpy as np
import tensorflow as tf

from harness.data import Job


def runner(name: str):
    return partial(run, xla=name == "tensorflow-xla")


@cache
def step(definition, rank, mask_rank, xla):
    @tf.function(reduce_retracing=True, jit_compile=xla)
    def step(params, state, x, g, mask):
        with tf.GradientTape() as tape:
            tape.watch([x, params])
            y, state = definition.apply(params, state, x, training=True, mask=mask)
        dx, dparams = tape.gradient(y, (x, params), output_gradients=g)
        return y, state, dx, dparams

    return step


def run(job: Job, xla: bool) -> dict:
    definition = job.definition
    dtype = tf.float64 if job.dtype == "float64" else tf.float32
    _, state = definition.init(xp=tf, dtype=dtype)
    params = {name: tf.constant(p) for name, p in job.params.items()}
    out: dict = {}
    for i, (x, g) in enumerate(zip(job.batches, job.grads, strict=True)):
        mask = tf.constant(job.masks[i]) if job.masks else None
        compiled = step(definition, x.ndim, None if mask is None else mask.ndim, xla)
        y, state, dx, dparams = compiled(params, state, tf.constant(x), tf.constant(g), mask)
        out |= {f"y{i}": y, f"dx{i}": dx} | {f"d{n}{i}": d for n, d in dparams.items()}
    out |= state
    out["eval"], _ = definition.apply(params, state, tf.constant(job.batches[0]))
    return {name: np.asarray(value) for name, value in out.items()}
