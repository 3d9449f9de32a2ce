"""What the layers should compute, from the papers' formulas, in extended precision.

Group by group, and sharing nothing with the package: mean, variance and the
backward pass are those of Ioffe & Szegedy 2015, section 3, step by step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

WIDE = np.longdouble


class Answer(NamedTuple):
    """Exact values, and the size of the terms that were added up to get each (its scale)."""

    value: np.ndarray
    scale: float


def groups(shape: tuple[int, ...], axes: tuple[int, ...]):
    """An index for every group of values that share their statistics."""
    kept = [axis for axis in range(len(shape)) if axis not in axes]
    for position in np.ndindex(*[shape[axis] for axis in kept]):
        index: list[Any] = [slice(None)] * len(shape)
        for axis, i in zip(kept, position, strict=True):
            index[axis] = i
        yield tuple(index), position


def wide(a) -> np.ndarray:
    return np.asarray(a).astype(WIDE)


def along(p, axes: tuple[int, ...], shape: tuple[int, ...], missing: float) -> np.ndarray:
    """A parameter spread over a whole array; ``missing`` where the layer has none."""
    if p is None:
        return np.full(shape, missing, dtype=WIDE)
    lengths = [shape[axis] if axis in axes else 1 for axis in range(len(shape))]
    return np.broadcast_to(wide(p).reshape(lengths), shape)


def forward(
    x, scale, bias, *, axes, parameter_axes, eps, weights=None, centered=True
) -> dict[str, Any]:
    """Output and statistics with the batch's own mean and variance, or around zero."""
    x = wide(x)
    gamma = along(scale, parameter_axes, x.shape, 1.0)
    beta = along(bias, parameter_axes, x.shape, 0.0)
    w = np.ones(x.shape, WIDE) if weights is None else np.broadcast_to(wide(weights), x.shape)
    y = np.zeros(x.shape, WIDE)
    mean, var, count = {}, {}, {}
    for index, position in groups(x.shape, axes):
        value, weight = x[index].ravel(), w[index].ravel()
        value, weight = value[weight > 0], weight[weight > 0]
        n = m = v = start = WIDE(0)
        if weight.size:
            # Around one of the values, so that equal values have variance zero exactly.
            n, start = np.sum(weight), value[0] if centered else WIDE(0)
            value = value - start
            m = np.sum(weight * value) / n if centered else WIDE(0)
            v = np.sum(weight * (value - m) ** 2) / n
        normal = np.zeros(w[index].shape, WIDE)
        normal[w[index] > 0] = (value - m) / np.sqrt(v + WIDE(eps))
        y[index] = normal
        mean[position], var[position], count[position] = start + m, v, n
    out = y * gamma + beta
    return {"y": Answer(out, _size(y * gamma, beta)), "mean": mean, "var": var, "count": count}


def backward(
    g, x, scale, *, axes, parameter_axes, eps, weights=None, centered=True
) -> dict[str, Answer]:
    """Gradients of x, scale and bias when the statistics are the batch's own."""
    x, g = wide(x), wide(g)
    gamma = along(scale, parameter_axes, x.shape, 1.0)
    w = np.ones(x.shape, WIDE) if weights is None else np.broadcast_to(wide(weights), x.shape)
    options = {"axes": axes, "parameter_axes": parameter_axes, "eps": eps, "centered": centered}
    found = forward(x, None, None, weights=w, **options)
    normal, dx, size = found["y"].value, np.zeros(x.shape, WIDE), WIDE(0)
    for index, position in groups(x.shape, axes):
        weight, n = w[index].ravel(), found["count"][position]
        if not n:
            continue
        valid = weight > 0
        diff = normal[index].ravel() * np.sqrt(found["var"][position] + WIDE(eps))
        s = found["var"][position] + WIDE(eps)
        dnormal = np.where(valid, (g[index] * gamma[index]).ravel(), 0)
        dvar = np.sum(dnormal * diff) * WIDE(-0.5) * s ** WIDE(-1.5)
        dmean = -np.sum(dnormal) / np.sqrt(s) + dvar * np.sum(-2 * weight * diff) / n
        dmean = dmean if centered else WIDE(0)
        terms = dnormal / np.sqrt(s), dvar * 2 * weight * diff / n, dmean * weight / n
        dx[index] = sum(terms).reshape(x[index].shape)
        size = max([size, *(np.max(np.abs(t)) for t in terms)])
    return {"dx": Answer(dx, float(size))} | affine_gradients(g, normal, parameter_axes)


def affine_gradients(g, normal, parameter_axes) -> dict[str, Answer]:
    g = wide(g)
    others = tuple(axis for axis in range(g.ndim) if axis not in parameter_axes)
    return {
        # The unit of standardized values is 1, even of a group in which all are equal.
        "dscale": Answer(
            np.sum(g * normal, axis=others),
            _sum_size(g * np.maximum(np.abs(normal), 1), others),
        ),
        "dbias": Answer(np.sum(g, axis=others), _sum_size(g, others)),
    }


def given(x, mean, var, scale, bias, *, parameter_axes, eps) -> dict[str, Answer]:
    """Output with statistics that are given."""
    x = wide(x)
    gamma = along(scale, parameter_axes, x.shape, 1.0)
    beta = along(bias, parameter_axes, x.shape, 0.0)
    normal = (x - along(mean, parameter_axes, x.shape, 0.0)) / np.sqrt(
        along(var, parameter_axes, x.shape, 1.0) + WIDE(eps)
    )
    return {"y": Answer(normal * gamma + beta, _size(normal * gamma, beta))}


class Running:
    """The running statistics of a BatchNorm, as its options define them."""

    def __init__(self, features: int, decay: float | None, correction: int) -> None:
        self.mean, self.var = np.zeros(features, WIDE), np.ones(features, WIDE)
        self.decay, self.correction, self.count = decay, correction, 0

    def step(self, found: dict[str, Any]) -> None:
        self.count += 1
        keep = 1 - WIDE(1) / self.count if self.decay is None else WIDE(self.decay)
        # A channel has one group in BatchNorm, and one for each sample in InstanceNorm.
        for c in range(len(self.mean)):
            means, variances = [], []
            for position, m in found["mean"].items():
                n = found["count"][position]
                if position[-1] == c and n > self.correction:
                    means.append(m)
                    variances.append(found["var"][position] * n / (n - self.correction))
            if means:
                self.mean[c] = keep * self.mean[c] + (1 - keep) * np.mean(means)
                self.var[c] = keep * self.var[c] + (1 - keep) * np.mean(variances)


def _size(*terms) -> float:
    return float(max(np.max(np.abs(t), initial=0) for t in terms))


def _sum_size(terms, axes) -> float:
    """Of a sum: what random signs would leave of its terms."""
    return float(np.max(np.sqrt(np.sum(terms**2, axis=axes)), initial=0))
