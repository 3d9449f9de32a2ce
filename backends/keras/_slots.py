"""The normalization layers of a model, to be read and written."""

from __future__ import annotations

from typing import Any

import keras

from normkit._bundle import Arrays, Entry, differences
from normkit._definition import Definition
from normkit._slot import Slot

from . import _portable
from ._convert import forget_compiled
from ._freeze import frozen_parts

Layer = keras.layers.Layer

# The attribute for each field of a definition, of the layers that have it.
_ATTRIBUTES = {
    "eps": "epsilon",
    "decay": "momentum",
    "correction": "correction",
    "num_groups": "groups",
    "zero_centered": "zero_centered",
    "scale_after_cast": "scale_after_cast",
}
_NAMES = {
    "scale": "gamma",
    "bias": "beta",
    "mean": "moving_mean",
    "var": "moving_variance",
    "count": "count",
}


class _Slot(Slot):
    def __init__(self, name: str, layer: Layer, aliases: tuple[str, ...], model: Layer) -> None:
        super().__init__(name, layer, aliases)
        self.model = model

    @property
    def definition(self) -> Definition:
        return _portable.definition(self.layer)

    @property
    def training(self) -> bool | None:
        # One that is frozen uses its moving statistics, whatever the call says.
        remembers = getattr(self.layer, "moving_mean", None) is not None
        return False if remembers and "statistics" in frozen_parts(self.layer) else None

    def read(self) -> Arrays:
        shape = self.definition.parameter_shape
        return {
            name: keras.ops.convert_to_numpy(v).reshape(() if name == "count" else shape).copy()
            for name, v in self._variables().items()
        }

    def write(self, arrays: Arrays) -> None:
        for name, variable in self._variables().items():
            if name in arrays:
                variable.assign(arrays[name].reshape(variable.shape))

    def configure(self, definition: Definition) -> None:
        native = not type(self.layer).__module__.startswith("normkit.")
        for field, old, new in differences(self.definition, definition):
            attribute = _ATTRIBUTES.get(field)
            # A cumulative average needs a weight more, and a layer is built once; and natively
            # eps=None is another number.
            lacking = (old is None or new is None) and (field == "decay" or native)
            if attribute is not None and hasattr(self.layer, attribute) and not lacking:
                setattr(self.layer, attribute, new)
                if field == "num_groups" and not native:
                    self.layer._each_channel = False
        forget_compiled(self.model)

    def _variables(self) -> dict[str, Any]:
        if isinstance(self.layer, keras.layers.RMSNormalization):
            found = {"scale": self.layer.scale}  # which is a flag elsewhere
        else:
            found = {name: getattr(self.layer, own, None) for name, own in _NAMES.items()}
        return {name: variable for name, variable in found.items() if variable is not None}


def slots(model: Layer) -> list[Slot]:
    """The normalization layers of ``model``, in the order of its layers."""
    names: dict[int, list[str]] = {}
    layers: dict[int, Layer] = {}

    def walk(layer: Layer, path: tuple[str, ...]) -> None:
        if isinstance(layer, _portable.KINDS):
            names.setdefault(id(layer), []).append("/".join(path))
            layers[id(layer)] = layer
        for child in layer._flatten_layers(recursive=False, include_self=False):
            walk(child, (*path, child.name))

    walk(model, ())
    for layer in layers.values():
        if not layer.built:
            msg = (
                f"the weights of {layer.name!r} do not exist before it is built; build the model "
                f"first, for example by calling it once."
            )
            raise ValueError(msg)
    return [_Slot(first, layers[key], tuple(rest), model) for key, (first, *rest) in names.items()]


def made(entry: Entry, **options: Any) -> Layer:
    """A new layer that computes what ``entry`` does, on inputs of any rank."""
    d = entry.definition
    # There is one for all weights: the widest.
    floating = [entry.dtype, *(a.dtype for n, a in entry.arrays.items() if n in ("mean", "var"))]
    dtype = max(floating, key=lambda dtype: dtype.itemsize)
    layer = _portable.layer(d, **{"dtype": dtype.name} | options)
    axes = getattr(d, "axes", None) or (d.axis,)
    ndim = max(3, *(axis + 2 if axis >= 0 else -axis for axis in axes))
    shape: list[int | None] = [None] * ndim
    for axis, length in zip(axes, d.parameter_shape, strict=True):
        shape[axis] = length
    layer.build(tuple(shape))
    # That was the shape of no input: neither calls nor the layer that a file is loaded into shall
    # be held to it.
    given = dict(zip(axes, d.parameter_shape, strict=True))
    least = max(axis + 1 if axis >= 0 else -axis for axis in axes)
    layer.input_spec = keras.layers.InputSpec(min_ndim=least, axes=given)
    layer._build_shapes_dict = None
    _Slot("", layer, (), layer).write(entry.arrays)
    return layer
