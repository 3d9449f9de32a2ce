"""The normalization layers of a model, to be read and written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from normkit._bundle import Arrays, Entry, differences
from normkit._definition import Definition
from normkit._slot import Slot

from . import _portable

# The attribute for each field of a definition, of the layers that have it.
_ATTRIBUTES = {
    "eps": "epsilon",
    "decay": "momentum",
    "correction": "correction",
    "axis": "axis",
    "num_groups": "num_groups",
    "zero_centered": "zero_centered",
    "scale_after_cast": "scale_after_cast",
}
_NAMES = ("scale", "bias", "mean", "var", "count")


class _Slot(Slot):
    @property
    def definition(self) -> Definition:
        return _portable.definition(self.layer)

    @property
    def training(self) -> bool | None:
        average = getattr(self.layer, "use_running_average", None)
        return None if average is None else not average

    def read(self) -> Arrays:
        shape = self.definition.parameter_shape
        return {
            name: np.array(v[...]).reshape(() if name == "count" else shape)
            for name, v in self._variables().items()
        }

    def write(self, arrays: Arrays) -> None:
        for name, variable in self._variables().items():
            if name in arrays:
                old = variable[...]
                new = jnp.asarray(arrays[name].reshape(old.shape), old.dtype)
                variable[...] = jax.device_put(new, old.sharding)

    def configure(self, definition: Definition) -> None:
        native = not type(self.layer).__module__.startswith("normkit.")
        for field, old, new in differences(self.definition, definition):
            attribute = _ATTRIBUTES.get(field)
            # A cumulative average needs a variable more, which is made with the layer; and
            # natively there is no eps=None.
            lacking = (old is None or new is None) and (field == "decay" or native)
            if attribute is not None and hasattr(self.layer, attribute) and not lacking:
                setattr(self.layer, attribute, new)

    def _variables(self) -> dict[str, nnx.Variable[Any]]:
        found = {name: getattr(self.layer, name, None) for name in _NAMES}
        return {name: v for name, v in found.items() if isinstance(v, nnx.Variable)}


def slots(model: nnx.Module) -> list[Slot]:
    """The normalization layers of ``model``, in the order in which modules got their parts.

    That order is alphabetical after ``nnx.merge``, which does not keep it.
    """
    names: dict[int, list[str]] = {}
    layers: dict[int, nnx.Module] = {}

    def walk(node: Any, path: tuple[str, ...], above: tuple[int, ...]) -> None:
        if id(node) in above:  # a module that refers to one that it is in
            return
        if isinstance(node, _portable.KINDS):
            names.setdefault(id(node), []).append(".".join(path))
            layers[id(node)] = node
        for name, child in _children(node):
            walk(child, (*path, name), (*above, id(node)))

    walk(model, (), ())
    return [_Slot(first, layers[key], tuple(rest)) for key, (first, *rest) in names.items()]


def made(entry: Entry, **options: Any) -> nnx.Module:
    """A new layer that computes what ``entry`` does."""
    if entry.training is not None and getattr(entry.definition, "track_running_stats", False):
        options = {"use_running_average": not entry.training} | options
    options = {"param_dtype": entry.dtype} | options
    layer = _portable.layer(entry.definition, **options)
    _Slot("", layer).write(entry.arrays)
    return layer


def _children(node: Any) -> list[tuple[str, Any]]:
    if isinstance(node, list | tuple | nnx.List):
        return [(str(i), child) for i, child in enumerate(node)]
    if isinstance(node, Mapping | nnx.Dict):
        return [(str(name), node[name]) for name in node]
    return list(vars(node).items()) if isinstance(node, nnx.Pytree) else []
