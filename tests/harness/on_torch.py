"""PyTorch modules, with autograd."""

from __future__ import annotations

import numpy as np
import torch

import normkit as nk
import normkit.torch
from harness.data import DTYPES, Job


def runner(name: str):
    return run


def tensor(a: np.ndarray) -> torch.Tensor:
    if a.dtype == DTYPES["bfloat16"]:
        return tensor(a.astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(a)  # keeps the strides


def array(t: torch.Tensor) -> np.ndarray:
    if t.dtype == torch.bfloat16:
        return array(t.float()).astype(DTYPES["bfloat16"])
    return t.detach().numpy().copy()


NATIVE = {
    nk.BatchNorm: lambda d: torch.nn.BatchNorm1d(d.num_features),
    nk.LayerNorm: lambda d: torch.nn.LayerNorm(d.shape),
    nk.GroupNorm: lambda d: torch.nn.GroupNorm(d.num_groups, d.num_channels),
    nk.InstanceNorm: lambda d: torch.nn.InstanceNorm1d(d.num_features),
    nk.RMSNorm: lambda d: torch.nn.RMSNorm(d.shape),
}


def build(job: Job) -> torch.nn.Module:
    d = job.definition
    if job.native:
        return NATIVE[type(d)](d)
    return nk.torch.layer(d, dtype=torch.float64 if job.dtype == "float64" else torch.float32)


def run(job: Job) -> dict:
    layer = build(job)
    names = {"scale": layer.weight, "bias": getattr(layer, "bias", None)}
    for name, p in job.params.items():
        names[name].data = tensor(p)
    out: dict = {}
    for i, (x, g) in enumerate(zip(job.batches, job.grads, strict=True)):
        x = tensor(x).requires_grad_()
        layer.zero_grad()
        y = layer(x, **({"mask": torch.from_numpy(job.masks[i])} if job.masks else {}))
        y.backward(tensor(g))
        out |= {f"y{i}": array(y), f"dx{i}": array(x.grad)}
        out |= {f"d{n}{i}": array(p.grad) for n, p in names.items() if p is not None}
    layer.eval()
    out["eval"] = array(layer(tensor(job.batches[0])))
    state = ("mean", "running_mean"), ("var", "running_var"), ("count", "num_batches_tracked")
    for name, buffer in state:
        if getattr(layer, buffer, None) is not None:
            out[name] = array(getattr(layer, buffer))
    return out
