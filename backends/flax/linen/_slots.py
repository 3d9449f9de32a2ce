"""The normalization layers of a model, to be read and written."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict, freeze, unfreeze
from flax.traverse_util import flatten_dict

from normkit._bundle import Arrays, Entry
from normkit._definition import Definition
from normkit._slot import Slot
from normkit.flax import _arguments

from . import _portable

_COLLECTIONS = {
    "scale": "params",
    "bias": "params",
    "mean": "batch_stats",
    "var": "batch_stats",
    "count": "batch_stats",
}


class _Tree:
    """The variables of the whole model, which layers write their parts of."""

    def __init__(self, variables: Any) -> None:
        self.frozen = isinstance(variables, FrozenDict)
        # Dicts of its own, around the arrays that were given.
        self.found = jax.tree.map(lambda leaf: leaf, unfreeze(variables))

    def part(self, collection: str, path: tuple[str, ...]) -> dict[str, Any]:
        part: dict[str, Any] = self.found.get(collection, {})
        for name in path:
            part = part.get(name, {})
        return part

    def remembering(self) -> list[tuple[str, ...]]:
        """The paths at which there are running statistics."""
        flat = flatten_dict(self.found.get("batch_stats", {}))
        return [path[:-1] for path in flat if path[-1] == "mean" and (*path[:-1], "var") in flat]


class _Slot(Slot):
    remedy = "What a Linen module computes is written in the code of its model."

    def __init__(
        self, path: tuple[str, ...], layer: Any, tree: _Tree, shape: tuple[int, ...] = ()
    ) -> None:
        super().__init__(".".join(path), layer)
        self.path = path
        self.tree = tree
        self.shape = shape  # of what it was called with, if it was

    @property
    def variables(self) -> Any:
        return freeze(self.tree.found) if self.tree.frozen else self.tree.found

    @property
    def definition(self) -> Definition:
        own = {name: self.tree.part(name, self.path) for name in ("params", "batch_stats")}
        if not any(own.values()) and self.shape:
            # It has nothing that would tell the lengths; parameters would have these.
            axes = getattr(self.layer, "reduction_axes", None)
            axes = _arguments.positions(
                getattr(self.layer, "axis", -1) if axes is None else axes, len(self.shape)
            )
            lengths = tuple(self.shape[axis] for axis in axes)
            own = {"params": {"scale": jax.ShapeDtypeStruct(lengths, jnp.float32)}}
        return _portable.definition(self.layer, own)

    @property
    def training(self) -> bool | None:
        average = getattr(self.layer, "use_running_average", None)
        return None if average is None else not average

    def read(self) -> Arrays:
        return {
            name: np.array(nn.meta.unbox(part[name]))
            for name, collection in _COLLECTIONS.items()
            if name in (part := self.tree.part(collection, self.path))
        }

    def write(self, arrays: Arrays) -> None:
        for name, collection in _COLLECTIONS.items():
            part = self.tree.part(collection, self.path)
            if name in part and name in arrays:
                old = nn.meta.unbox(part[name])
                new = jnp.asarray(arrays[name].reshape(old.shape), old.dtype)
                part[name] = nn.meta.replace_boxed(part[name], new)

    def configure(self, definition: Definition) -> None:
        """A Linen module is a constant in the code of the one that it is in."""


def slots(model: nn.Module, variables: Any = None, inputs: Any = None) -> list[Slot]:
    """The normalization layers of ``model``, in the order in which it calls them.

    Raises:
        ValueError: ``variables`` are missing; or ``inputs`` are, and there is no telling which
            submodules the model calls.
    """
    if variables is None:
        msg = (
            f"a {type(model).__name__} of Flax Linen has no values of its own; give its "
            f"variables= as well, as init() returns them."
        )
        raise ValueError(msg)
    tree = _Tree(variables)
    if inputs is not None and not isinstance(inputs, dict):
        inputs = tuple(inputs) if isinstance(inputs, list | tuple) else (inputs,)
    if isinstance(model, _portable.KINDS):
        return [_Slot((), model, tree)]
    if inputs is None:
        msg = (
            f"the submodules of a {type(model).__name__} of Flax Linen exist while it is called; "
            f"give inputs= as well, a tuple of what it is called with (arrays of the right shape "
            f"will do)."
        )
        raise ValueError(msg)
    found: dict[tuple[str, ...], tuple[nn.Module, tuple[int, ...]]] = {}

    def note(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        layer = context.module
        if context.method_name == "__call__" and isinstance(layer, _portable.KINDS):
            x = args[0] if args else next(iter(kwargs.values()))
            found.setdefault(layer.path, (layer.clone(parent=None), x.shape))
        return call(*args, **kwargs)

    def run(variables: Any, inputs: Any) -> Any:
        args, named = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
        rngs = {name: jax.random.key(0) for name in ("params", "dropout")}
        return model.apply(variables, *args, rngs=rngs, mutable=True, **named)

    # What is compiled already (nn.jit) would be called without being seen.
    with nn.intercept_methods(note), jax.disable_jit():
        # Flags are no arrays; they are what the model decides by.
        dynamic, static = _divided(inputs)
        jax.eval_shape(lambda v, d: run(v, _joined(d, static)), variables, dynamic)
    if missed := [".".join(path) for path in tree.remembering() if path not in found]:
        msg = (
            f"the variables have running statistics of {' and '.join(missed)}, which the model "
            f"does not call with these inputs; give inputs= with which it calls every layer."
        )
        raise ValueError(msg)
    return [_Slot(path, layer, tree, shape) for path, (layer, shape) in found.items()]


def made(entry: Entry, **options: Any) -> tuple[nn.Module, Any]:
    """A new module that computes what ``entry`` does, and its variables."""
    if entry.training is not None and getattr(entry.definition, "track_running_stats", False):
        options = {"use_running_average": not entry.training} | options
    options = {"param_dtype": entry.dtype} | options
    layer = _portable.layer(entry.definition, **options)
    variables: dict[str, Any] = {}
    for name, a in entry.arrays.items():
        # A count that nothing depends on is not kept.
        if name != "count" or entry.definition.decay is None:
            dtype = jnp.int32 if name == "count" else a.dtype
            variables.setdefault(_COLLECTIONS[name], {})[name] = jnp.asarray(a, dtype)
    return layer, variables


def _divided(inputs: Any) -> tuple[Any, Any]:
    """The arrays among ``inputs``, and everything else."""
    leaves, structure = jax.tree.flatten(inputs, is_leaf=lambda leaf: leaf is None)
    arrays = [leaf if hasattr(leaf, "shape") else None for leaf in leaves]
    rest = [None if hasattr(leaf, "shape") else leaf for leaf in leaves]
    return arrays, (rest, structure)


def _joined(arrays: Any, static: Any) -> Any:
    rest, structure = static
    both = zip(arrays, rest, strict=True)
    return jax.tree.unflatten(structure, [b if a is None else a for a, b in both])
