"""Textbook formulas beside normkit's layers, for ``python -m normkit bench`` and ``check``.

NumPy has no layers: these formulas are what is written instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

import normkit as nk
from normkit._commands.cases import EPS, GROUPS, Case
from normkit._commands.timing import peak as peak

from . import _portable
from ._backend import BACKEND as BACKEND
from ._layer import Layer

LAYOUT = "channels first"
PACKAGES = ("numpy",)
_SHAPES = {  # of x with an axis for the groups, and its axes that statistics are taken over
    "BatchNorm": lambda n, c, *rest: ((n, c, *rest), (0, *range(2, 2 + len(rest)))),
    "GroupNorm": lambda n, c, h, w: ((n, GROUPS, c // GROUPS, h, w), (2, 3, 4)),
    "InstanceNorm": lambda n, c, h, w: ((n, c, h, w), (2, 3)),
    "LayerNorm": lambda *shape: (shape, (len(shape) - 1,)),
    "RMSNorm": lambda *shape: (shape, (len(shape) - 1,)),
}


class Formulas:
    """A layer as it is commonly written in NumPy."""

    def __init__(self, case: Case, given: dict[str, Any]) -> None:
        self.case = case
        self.inner, self.axes = _SHAPES[case.layer](*case.shape)
        shape = [1] * len(case.shape)
        shape[case.along] = case.features
        self.others = tuple(axis for axis, n in enumerate(shape) if n == 1)
        names = (*case.names, "mean", "var")
        self.given = {name: given[name].reshape(shape) for name in names}
        self.centered = case.layer != "RMSNorm"

    def __call__(self, x: NDArray[Any]) -> NDArray[Any]:
        axes = self.axes
        if not self.case.training:
            mean, var = self.given["mean"], self.given["var"]
            self.normal = (x - mean) / np.sqrt(var + EPS)
        else:
            x = x.reshape(self.inner)
            centred = x - x.mean(axes, keepdims=True) if self.centered else x
            var = (centred**2).mean(axes, keepdims=True)
            self.std = np.sqrt(var + EPS)
            self.normal = (centred / self.std).reshape(self.case.shape)
            if self.case.remembers:
                self.given["var"] = 0.9 * self.given["var"] + 0.1 * var
        y = self.given["scale"] * self.normal
        return y + self.given["bias"] if self.centered else y

    def backward(self, g: NDArray[Any]) -> NDArray[Any]:
        self.grads = {"scale": (g * self.normal).sum(self.others), "bias": g.sum(self.others)}
        u = (g * self.given["scale"]).reshape(self.inner)
        normal = self.normal.reshape(self.inner)
        dx = u - normal * (u * normal).mean(self.axes, keepdims=True)
        if self.centered:
            dx = dx - u.mean(self.axes, keepdims=True)
        return (dx / self.std).reshape(self.case.shape)


def _layer(case: Case, given: dict[str, Any]) -> Layer:
    n = case.features
    definition: Any
    match case.layer:
        case "GroupNorm":
            definition = nk.GroupNorm(GROUPS, n, eps=EPS)
        case "InstanceNorm":
            definition = nk.InstanceNorm(n, eps=EPS, scale=True, bias=True)
        case _:
            definition = getattr(nk, case.layer)(n, eps=EPS)
    layer = _portable.layer(definition)
    layer.params = {name: given[name] for name in case.names}
    if case.remembers:
        layer.state |= {"mean": given["mean"], "var": given["var"]}
    return layer


NATIVE, NORMKIT = Formulas, _layer


def function(library: Any, case: Case, given: dict[str, Any], mode: str) -> Callable[..., Any]:
    """A function of x and the gradient of the result: the result, and gradients in that order."""
    layer = library(case, given)
    options = {"training": case.training} if isinstance(layer, Layer) else {}
    if not case.gradient:
        return lambda x, g: (layer(x, **options),)

    def with_gradients(x: NDArray[Any], g: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        y = layer(x, **options)
        dx = layer.backward(g)
        return y, dx, *layer.grads.values()

    return with_gradients


def array(a: NDArray[Any], dtype: str) -> NDArray[Any]:
    return a.astype(dtype, copy=False)


def numpy(a: NDArray[Any]) -> NDArray[Any]:
    return a


def wait(result: Any) -> None:
    """Until it is there: it is."""


def device() -> str:
    return "cpu"
