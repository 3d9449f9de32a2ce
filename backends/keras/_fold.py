"""Fold the BatchNorms of a model into the layers before them."""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import Any

import keras
import numpy as np
from keras import layers

import normkit as nk
from normkit import _unfolded
from normkit._report import Report

from . import _batch_norm
from ._calls import Calls, graph_of, layers_of, place

Layer = keras.layers.Layer

# The classes that are folded, the name of the kernel that decides on the output channels, and
# the axes of it along which they lie.
_LAYERS: dict[type[Layer], tuple[str, tuple[int, ...]]] = {
    layers.Dense: ("kernel", (-1,)),
    layers.Conv1D: ("kernel", (-1,)),
    layers.Conv2D: ("kernel", (-1,)),
    layers.Conv3D: ("kernel", (-1,)),
    layers.DepthwiseConv1D: ("kernel", (-2, -1)),
    layers.DepthwiseConv2D: ("kernel", (-2, -1)),
    layers.SeparableConv1D: ("pointwise_kernel", (-1,)),
    layers.SeparableConv2D: ("pointwise_kernel", (-1,)),
    layers.Conv1DTranspose: ("kernel", (-2,)),
    layers.Conv2DTranspose: ("kernel", (-2,)),
    layers.Conv3DTranspose: ("kernel", (-2,)),
}
_LAST_AXIS = "a last axis that may be as long as that of the channels, and gets the bias then"
_NORMS = {layers.BatchNormalization, _batch_norm.BatchNormalization}


def fold(model: keras.Model) -> tuple[keras.Model, Report]:
    """A copy of ``model`` for inference, with each BatchNorm folded into the layer before it.

    The layer, a ``Dense`` or a convolution (depthwise, separable, grouped and transposed ones
    too), then has other weights and a bias, and the BatchNorm is an ``Identity``. Predictions are
    the same, up to rounding. Folded is only what is certain to be right: where the layer has no
    activation, its output goes to the BatchNorm alone, both compute in the same dtype, and each is
    called once and shares nothing.
    Models in the model are treated alike.

    Args:
        model: a ``Sequential`` or functional model. It is left as it is.

    Returns:
        The copy, and a report that says of each BatchNorm what it was folded into, or why not.

    Raises:
        ValueError: ``model`` is of another kind, not built yet, or cannot be copied.

    >>> model = keras.Sequential(
    ...     [
    ...         keras.Input((8, 8, 3)),
    ...         keras.layers.Conv2D(4, 3, use_bias=False, name="conv"),
    ...         keras.layers.BatchNormalization(name="bn"),
    ...     ]
    ... )
    >>> folded, report = fold(model)
    >>> folded.layers[0].use_bias, type(folded.layers[1]).__name__
    (True, 'Identity')
    >>> print(report)
    | layer | folded into | why not |
    | ----- | ----------- | ------- |
    | bn    | conv        |         |
    """
    if graph_of(model) is None:
        msg = (
            f"what the layers of {model.name!r} are followed by is known of a Sequential or "
            f"functional model that is built, but it is a {type(model).__name__}; build it first, "
            f"or fold the models of these kinds that it is made of."
        )
        raise ValueError(msg)
    calls = Calls(model)
    rows, folded = [], {}
    for norm in layers_of(model):
        if not isinstance(norm, layers.BatchNormalization):
            continue
        name = calls.names.get(id(norm), norm.name)
        try:
            layer = _layer_before(norm, calls)
            folded[id(layer)] = _folded(layer, norm)
        except (TypeError, ValueError) as why:
            rows.append((name, "", str(why)))
        else:
            folded[id(norm)] = None
            rows.append((name, calls.names[id(layer)], ""))
    return _copied(model, folded), Report(_unfolded.HEADS, tuple(rows))


def _layer_before(norm: Layer, calls: Calls) -> Layer:
    """The layer that ``norm`` can be folded into; a ValueError if there is none."""
    if type(norm) not in _NORMS:
        raise ValueError(_unfolded.own_class(norm))
    if norm.moving_mean is None:
        raise ValueError(_unfolded.NO_STATISTICS)
    call = calls.calls.get(id(norm))
    if call is None:
        raise ValueError(_unfolded.NOT_FOUND)
    given = call.node.arguments
    if norm.trainable and (call.training or given.kwargs.get("training")):
        raise ValueError(_unfolded.TRAINING)
    if calls.often[id(norm)] > 1:
        raise ValueError(_unfolded.OFTEN)
    if calls.shares(norm):
        raise ValueError(_unfolded.SHARED)
    x, *others = given.keras_tensors
    # A mask that comes with x plays no part in inference, and stays with it.
    if any(other is not getattr(x, "_keras_mask", None) for other in others):
        raise ValueError(_unfolded.MASKED)
    layer = x._keras_history.operation
    if type(layer) not in _LAYERS:
        raise ValueError(_unfolded.no_layer(_said(layer)))
    name = calls.names[id(layer)]
    if calls.often[id(layer)] > 1:
        raise ValueError(_unfolded.layer_called_often(name))
    if calls.uses[call.graph, *place(x)] > 1:
        raise ValueError(_unfolded.output_elsewhere(name))
    if calls.shares(layer):
        raise ValueError(_unfolded.layer_shared(name))
    if layer.activation is not keras.activations.linear:
        raise ValueError(_unfolded.activation(name))
    for special in ("quantization_mode", "lora_enabled"):
        if getattr(layer, special, None):
            what = f"{special}={getattr(layer, special)!r}"
            raise ValueError(_unfolded.special(name, what))
    rank = len(x.shape)
    first = getattr(layer, "data_format", None) == "channels_first"
    axis, channel = norm.axis % rank, 1 if first else rank - 1
    if axis != channel:
        raise ValueError(_unfolded.other_axis(axis, name, channel))
    if first and keras.backend.backend() == "tensorflow" and x.shape[-1] in (None, x.shape[1]):
        # There Keras takes the last axis for that of the channels when it adds a bias, if it is as
        # long; so a bias of the original is not that of its channels, and a new one would not be.
        raise ValueError(_unfolded.special(name, _LAST_AXIS))
    if layer.compute_dtype != norm.compute_dtype:
        raise ValueError(_unfolded.dtypes(name, layer.compute_dtype, norm.compute_dtype))
    return layer


def _folded(layer: Layer, norm: Layer) -> tuple[Any, Any]:
    """The kernel and the bias of ``layer`` that make up for ``norm``."""
    kernel, axes = _LAYERS[type(layer)]
    given = {"scale": norm.gamma, "bias": norm.beta}
    # In NumPy there is float64 on each backend.
    return nk.fold(
        _as_numpy(getattr(layer, kernel)),
        None if layer.bias is None else _as_numpy(layer.bias),
        _batch_norm.describe(norm),
        {key: _as_numpy(v) for key, v in given.items() if v is not None},
        {"mean": _as_numpy(norm.moving_mean), "var": _as_numpy(norm.moving_variance)},
        channel_axis=axes,
    )


def _copied(model: keras.Model, folded: dict[int, Any]) -> keras.Model:
    """A copy of ``model``, with the weights that are ``folded`` and without what is None there."""
    copies: dict[int, tuple[Any, Any]] = {}

    def copied(layer: Any) -> Any:
        if id(layer) not in copies:
            copies[id(layer)] = layer, _copy_of(layer, folded, copied)
        return copies[id(layer)][1]

    copy = copied(model)
    if not copy.built:
        copy.build(model.input_shape)
    for layer, new in copies.values():
        if not isinstance(layer, Layer) or graph_of(layer) is not None:
            continue
        if id(layer) not in folded:
            _load(layer, new)
        elif folded[id(layer)] is not None:
            for old, variable in zip(layer.weights, new.weights, strict=False):
                variable.assign(_as_numpy(old))
            weight, bias = folded[id(layer)]
            getattr(new, _LAYERS[type(layer)][0]).assign(weight)
            new.bias.assign(bias)
    return copy


def _load(layer: Layer, new: Layer) -> None:
    """What ``layer`` and the layers in it have learned, for its copy."""
    try:
        for old, copy in zip(layer._flatten_layers(), new._flatten_layers(), strict=True):
            store: dict[str, Any] = {}
            old.save_own_variables(store)
            # Copies: JAX may be told to reuse the memory of an array.
            copy.load_own_variables({name: _as_numpy(v) for name, v in store.items()})
            if hasattr(old, "save_assets"):
                with TemporaryDirectory() as folder:
                    old.save_assets(folder)
                    copy.load_assets(folder)
    except Exception as error:
        raise _uncopied(layer, f"{type(error).__name__}: {error}") from error


def _copy_of(layer: Any, folded: dict[int, Any], copied: Any) -> Any:
    """What stands for ``layer`` in the copy, its weights yet to come."""
    if graph_of(layer) is not None:
        # A graph has the mask in it that came with a tensor, and an Identity takes none.
        options = {} if isinstance(layer, keras.Sequential) else {"call_function": _called}
        return keras.models.clone_model(layer, clone_function=copied, **options)
    if id(layer) in folded and folded[id(layer)] is None:
        config = layer.get_config()
        return layers.Identity.from_config({name: config[name] for name in ("name", "dtype")})
    try:
        if isinstance(layer, layers.Lambda):
            # From its configuration it is refused: that may come from somewhere else.
            return layers.Lambda(
                layer.function,
                layer._output_shape,
                layer.mask,
                layer.arguments,
                name=layer.name,
                dtype=layer.dtype_policy,
            )
        config = layer.get_config()
        if id(layer) in folded:
            config["use_bias"] = True
        return type(layer).from_config(config)
    except Exception as error:
        raise _uncopied(layer, f"{type(error).__name__}: {error}") from error


def _as_numpy(variable: Any) -> np.ndarray:
    """A copy of the value of a weight."""
    return np.array(keras.ops.convert_to_numpy(getattr(variable, "value", variable)))


def _called(layer: Any, *args: Any, **options: Any) -> Any:
    if type(layer) is layers.Identity:
        return layer(args[0] if args else options["inputs"])
    return layer(*args, **options)


def _uncopied(layer: Any, why: str) -> ValueError:
    msg = (
        f"{layer.name!r} cannot be copied from its configuration ({why}); give its class "
        f"get_config, and register what it needs with keras.saving.register_keras_serializable."
    )
    return ValueError(msg)


def _said(layer: Any) -> str:
    """A layer or operation, in words."""
    if isinstance(layer, layers.InputLayer):
        return "an input of the model"
    kind = type(layer).__name__
    return f"a {kind}" if isinstance(layer, Layer) else kind
