"""Definitions applied to plain arrays: NumPy, array-api-strict, Dask."""

from __future__ import annotations

import numpy as np

import normkit as nk
import normkit.numpy
from harness.data import Job


def runner(name: str):
    return {"numpy": on_numpy, "array-api-strict": on_strict, "dask": on_dask}[name]


def on_numpy(job: Job) -> dict:
    layer = nk.numpy.layer(job.definition, dtype="float64" if job.dtype == "float64" else None)
    layer.params = dict(job.params)
    out: dict = {}
    for i, (x, g) in enumerate(zip(job.batches, job.grads, strict=True)):
        mask = job.masks[i] if job.masks else None
        out[f"y{i}"] = layer(x, training=True, mask=mask)
        out[f"dx{i}"] = layer.backward(g)
        out |= {f"d{name}{i}": grad for name, grad in layer.grads.items()}
    return out | layer.state | {"eval": layer(job.batches[0])}


def on_strict(job: Job) -> dict:
    import array_api_strict as xp

    return forward_only(job, xp, xp.asarray)


def on_dask(job: Job) -> dict:
    import dask.array

    def halves(a):
        chunks = [max(a.shape[0] // 2, 1), *a.shape[1:-1], max(a.shape[-1] // 2, 1)]
        return dask.array.from_array(a, chunks=chunks[-a.ndim :])

    out = forward_only(job, dask.array, halves)
    (out,) = dask.compute(out, scheduler="synchronous")
    return out


def forward_only(job: Job, xp, array) -> dict:
    _, state = job.definition.init(
        xp=xp, dtype=xp.float64 if job.dtype == "float64" else xp.float32
    )
    params = {name: array(p) for name, p in job.params.items()}
    out: dict = {}
    for i, x in enumerate(job.batches):
        mask = array(job.masks[i]) if job.masks else None
        out[f"y{i}"], state = job.definition.apply(
            params, state, array(x), training=True, mask=mask
        )
    out |= state
    out["eval"], _ = job.definition.apply(params, state, array(job.batches[0]))
    return out if xp.__name__ == "dask.array" else {k: np.asarray(v) for k, v in out.items()}
