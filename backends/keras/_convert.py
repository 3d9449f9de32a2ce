"""Exchange the normalization layers of a model, in place."""

from __future__ import annotations

from types import MethodType
from typing import Any

import keras

from normkit import _swap

from . import _axes, _batch_norm, _group_norm, _instance_norm, _layer_norm, _rms_norm
from ._tensors import built_shape

Layer = keras.layers.Layer

# The native class, and normkit's: the same attributes and weights.
_TWINS: dict[type[Layer], type[Layer]] = {
    keras.layers.BatchNormalization: _batch_norm.BatchNormalization,
    keras.layers.LayerNormalization: _layer_norm.LayerNormalization,
    keras.layers.GroupNormalization: _group_norm.GroupNormalization,
    keras.layers.RMSNormalization: _rms_norm.RMSNormalization,
}
_NATIVE = {ours: native for native, ours in _TWINS.items()}
_NATIVE[_instance_norm.InstanceNormalization] = keras.layers.GroupNormalization

# What a layer of normkit may have beyond the native one, and what it is if it has not.
_ADDED: dict[type[Layer], dict[str, Any]] = {
    _batch_norm.BatchNormalization: {"correction": 0, "track_running_stats": True},
    _instance_norm.InstanceNormalization: {"track_running_stats": False},
    _rms_norm.RMSNormalization: {
        "zero_centered": False,
        "scale_after_cast": False,
        "use_scale": True,
    },
}

_ALONG_AXES = (keras.layers.LayerNormalization, keras.layers.RMSNormalization)

# What Keras finds out about the class of a layer, and writes down in the layer.
_OF_THE_CLASS = {
    "autocast",
    "call_signature_parameters",
    "_call_signature",
    "_call_has_context_arg",
    "_call_has_mask_arg",
    "_call_has_training_arg",
    "_supports_masking",
}


def convert(model: Layer) -> Layer:
    """Make every native normalization layer in ``model`` normkit's, in place.

    A layer stays the object that it is, with its weights, name, place in the graph, ``trainable``
    flag and dtype policy, so optimizers, shared layers and models around it go on as they were.
    Only exact instances of Keras' classes are exchanged, not those of subclasses. What ``model``
    and the models in it have compiled is compiled anew; of a model around it that has been trained
    or used before, call ``compile`` again. :func:`revert` undoes it.

    Args:
        model: any model or layer; it may itself be a normalization layer.

    Returns:
        ``model``.

    Raises:
        ValueError: the parameters of a layer lie along its axes in another order than those axes
            have; nothing is changed.

    Warns:
        UserWarning: there is no such layer.

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.BatchNormalization()])
    >>> convert(model).layers[0].__class__.__module__
    'normkit.keras._batch_norm'
    >>> type(revert(model).layers[0]) is keras.layers.BatchNormalization
    True
    """
    found = [layer for layer in _layers(model) if type(layer) in _TWINS]
    for layer in found:
        _check_layout(layer)
    for layer in found:
        _become(layer, _TWINS[type(layer)])
    if not found:
        _swap.nothing("native", model)
    forget_compiled(model)
    return model


def revert(model: Layer) -> Layer:
    """Make every normalization layer of normkit's in ``model`` Keras' own, in place.

    ``InstanceNormalization`` becomes a ``GroupNormalization`` with a group for each channel. That a
    layer was told the shape of its input, and is strict about it, is forgotten.

    Args:
        model: any model or layer; it may itself be a normalization layer.

    Returns:
        ``model``.

    Raises:
        ValueError: a layer has an option that the native layer has not; nothing is changed.

    Warns:
        UserWarning: there is no such layer.
    """
    found = [layer for layer in _layers(model) if type(layer) in _NATIVE]
    for layer in found:
        options = _beyond_native(layer)
        if options:
            raise _swap.not_native(layer.name, ", ".join(options))
    for layer in found:
        _become(layer, _NATIVE[type(layer)])
    if not found:
        _swap.nothing("normkit", model)
    forget_compiled(model)
    return model


def _layers(model: Layer) -> list[Layer]:
    """``model`` and every layer in it, however deep, each once."""
    return list({id(layer): layer for layer in model._flatten_layers()}.values())


def _become(layer: Layer, kind: type[Layer]) -> None:
    """Make ``layer`` one of the class ``kind``, as if it had been made as one."""
    old, new = (vars(each(name=layer.name)) for each in (type(layer), kind))
    layer.__class__ = kind
    for name in old.keys() - new.keys():
        delattr(layer, name)
    for name in new.keys() - old.keys():
        setattr(layer, name, new[name])
    for name in _OF_THE_CLASS & new.keys():
        setattr(layer, name, new[name])
    # Every layer has a build of its own, around that of the class that it was made as.
    made_as = layer.build.__wrapped__
    layer.build.__wrapped__ = MethodType(kind.build, layer)
    for cell in layer.build.__closure__:
        if cell.cell_contents == made_as:
            cell.cell_contents = layer.build.__wrapped__
    ours = kind in _NATIVE
    if isinstance(layer, _ALONG_AXES) and layer.built:
        layer.input_spec = _axes.input_spec(layer, built_shape(layer)) if ours else None
    if isinstance(layer, keras.layers.RMSNormalization) and layer.built:
        # Natively the weight is rounded to the compute dtype before it is used.
        layer.scale._autocast = not ours


def _check_layout(layer: Layer) -> None:
    """Natively the axes are sorted by number, so that -1 comes before 1."""
    if isinstance(layer, _ALONG_AXES) and layer.built:
        lengths, _ = _axes.described(layer)
        for weight in layer.weights:
            if tuple(weight.shape) != lengths:
                msg = (
                    f"{layer.name!r} was made with axis={layer.axis!r}, for which Keras lays out "
                    f"parameters of shape {tuple(weight.shape)} instead of {lengths}; nothing was "
                    f"changed. Make it with axes that are all positive or all negative."
                )
                raise ValueError(msg)


def _beyond_native(layer: Layer) -> list[str]:
    """The options of ``layer``, one of normkit's, without which it would compute something else."""
    options = [
        f"{name}={getattr(layer, name)!r}"
        for name, usual in _ADDED.get(type(layer), {}).items()
        if getattr(layer, name) != usual
    ]
    if isinstance(layer, _batch_norm.BatchNormalization) and layer.momentum is None:
        options.append("momentum=None")
    if isinstance(layer, keras.layers.RMSNormalization) and layer.epsilon is None:
        options.append("epsilon=None")
    # Natively RMSNormalization multiplies along the last axes, and so does LayerNormalization
    # on PyTorch.
    if isinstance(layer, _ALONG_AXES) and layer.built and not _axes.are_last(layer):
        if isinstance(layer, keras.layers.RMSNormalization) or keras.backend.backend() == "torch":
            options.append(f"axis={layer.axis!r}")
    return options


def forget_compiled(model: Layer) -> None:
    """What ``model`` and the models in it have compiled is compiled anew."""
    for layer in _layers(model):
        for name in ("train_function", "test_function", "predict_function"):
            if getattr(layer, name, None) is not None:
                setattr(layer, name, None)
