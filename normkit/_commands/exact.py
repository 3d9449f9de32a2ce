"""The layers' formulas in float64, for nothing but comparison."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from normkit._commands.cases import EPS, GROUPS, Case

Arrays = dict[str, NDArray[Any]]


def results(case: Case, given: Arrays) -> Arrays:
    """``y``, and ``dx`` if the case has gradients, of the arrays of :func:`cases.arrays`."""
    wide = {name: a.astype(np.float64) for name, a in given.items()}
    shape = [1] * len(case.shape)
    shape[case.along] = case.features
    scale, bias, mean, var = (
        wide[name].reshape(shape) for name in ("scale", "bias", "mean", "var")
    )
    x, u = wide["x"], wide["g"] * scale
    if case.layer == "RMSNorm":
        bias = np.zeros_like(bias)
    if not case.training:
        rstd = 1 / np.sqrt(var + EPS)
        return {"y": (x - mean) * rstd * scale + bias, "dx": u * rstd}

    axes = _axes(case)
    inner = _inner(case)
    x, u = x.reshape(inner), u.reshape(inner)
    centre = 0 if case.layer == "RMSNorm" else x.mean(axes, keepdims=True)
    rstd = 1 / np.sqrt(((x - centre) ** 2).mean(axes, keepdims=True) + EPS)
    normal = (x - centre) * rstd
    dx = u - normal * (u * normal).mean(axes, keepdims=True)
    if case.layer != "RMSNorm":
        dx = dx - u.mean(axes, keepdims=True)
    y = normal.reshape(case.shape) * scale + bias
    return {"y": y, "dx": (rstd * dx).reshape(case.shape)}


def _inner(case: Case) -> tuple[int, ...]:
    """The shape of x with an axis for the groups, where there are any."""
    n, c, *rest = case.shape
    return (n, GROUPS, c // GROUPS, *rest) if case.layer == "GroupNorm" else case.shape


def _axes(case: Case) -> tuple[int, ...]:
    """The axes of that to take statistics over."""
    ndim = len(_inner(case))
    return {
        "BatchNorm": (0, *range(2, ndim)),
        "LayerNorm": (ndim - 1,),
        "RMSNorm": (ndim - 1,),
        "GroupNorm": tuple(range(2, ndim)),
        "InstanceNorm": tuple(range(2, ndim)),
    }[case.layer]
