"""Take the running statistics of a model again, from data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import keras
import numpy as np

from normkit import _recalibrate
from normkit._recalibrate import Recalibration, Statistics

from . import _masks
from ._batch_norm import BatchNormalization
from ._convert import _layers
from ._freeze import frozen_parts
from ._instance_norm import InstanceNormalization
from ._tensors import real_tensor

Layer = keras.layers.Layer

_KINDS = (keras.layers.BatchNormalization, InstanceNormalization)
_OURS = (BatchNormalization, InstanceNormalization)
# Of batch renormalization, from whose deviation the next step derives the variance.
_VARIABLES = ("moving_mean", "moving_variance", "count", "moving_stddev")


def recalibrate(
    model: Layer,
    batches: Iterable[Any],
    *,
    call: Callable[[Layer, Any], Any] | None = None,
    one_pass: bool = False,
    progress: bool = True,
) -> Layer:
    """Take the moving statistics of every layer in ``model`` that keeps some again, in place.

    Each layer, native or normkit's, frozen or not, gets the mean and the variance of all values
    that it sees in ``batches``, whatever their sizes are, as if they came in a single batch; an
    InstanceNormalization gets the averages over all instances. They are merged in float64. The
    model is called as in inference, eagerly. ``momentum`` stays as it is, and ``count``, if there
    is one, becomes the number of batches. If anything is raised, also by Ctrl-C, the model is as
    it was before.

    The layers have their turn in the order in which they are called, with one pass over the data
    for each: what a layer sees depends on the statistics of those before it. Only of a layer that
    is called again on what became of its own result, it is seen with the statistics of before.

    Args:
        model: any model or layer that is built; it may itself be a normalization layer.
        batches: what yields the batches, each time it is iterated over: a ``tf.data.Dataset``, a
            ``PyDataset``, a ``DataLoader``, a list. A batch is what ``fit`` takes: the input of
            the model, or a tuple or list that begins with it.
        call: for any other batch or model: ``call(model, batch)`` calls one with the other, with
            ``training=False``.
        one_pass: take all statistics in a single pass, with the model as it is. That is as fast as
            it can be, but a layer behind another one learns what it sees with the old statistics
            of that one.
        progress: show a bar in the terminal, if the package tqdm is installed.

    Returns:
        ``model``.

    Raises:
        ValueError: there is no batch, or one without a batch axis; no layer keeps statistics, or
            one is not built or not called, sees too few values, or NaN; an iterator that gives its
            batches only once, where several passes are needed.
        TypeError: a batch is none of those above.

    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.BatchNormalization()])
    >>> batches = [np.array([[1.0], [2.0], [3.0]]), np.array([[6.0]])]
    >>> bn = recalibrate(model, batches).layers[0]
    >>> keras.ops.convert_to_numpy(bn.moving_mean).tolist()
    [3.0]
    >>> keras.ops.convert_to_numpy(bn.moving_variance).tolist()
    [3.5]
    """
    found = {
        id(layer): layer
        for layer in _layers(model)
        if isinstance(layer, _KINDS) and getattr(layer, "track_running_stats", True)
    }
    for layer in found.values():
        if not layer.built:
            raise _not_built(layer.name)
    passes = Recalibration(
        {
            key: Statistics(
                layer.name,
                getattr(layer, "correction", 0),
                isinstance(layer, InstanceNormalization),
                layer.moving_mean.dtype,
            )
            for key, layer in found.items()
        },
        one_pass=one_pass,
    )
    values = {
        id(variable): (variable, np.array(keras.ops.convert_to_numpy(variable)))
        for layer in found.values()
        for variable in _variables(layer).values()
    }
    forward = _call if call is None else call

    def write(key: int, mean: Any, variance: Any, calls: int) -> None:
        layer = found[key]
        new = {"moving_mean": mean, "moving_variance": variance, "count": calls}
        new["moving_stddev"] = np.sqrt(variance + layer.epsilon)
        for which, variable in _variables(layer).items():
            variable.assign(np.asarray(new[which], dtype=_numpy_dtype(variable)))

    try:
        for key, layer in found.items():
            # In the layer itself, in front of the method of its class.
            vars(layer)["call"] = _seen(passes, key, layer)
        passes.run(batches, lambda batch: forward(model, batch), write, progress=progress)
    except BaseException:
        for variable, value in values.values():
            variable.assign(value)
        raise
    finally:
        for layer in found.values():
            vars(layer).pop("call", None)
    return model


def _seen(passes: Recalibration, key: int, layer: Any) -> Callable[..., Any]:
    """``layer.call``, of which ``passes`` is told."""
    original = layer.call
    arguments = inspect.signature(original)

    @wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = arguments.bind(*args, **kwargs)
        given.apply_defaults()
        inputs, mask = given.arguments["inputs"], given.arguments["mask"]
        if given.arguments.get("training") and "statistics" not in frozen_parts(layer):
            raise _recalibrate.in_training(layer.name)
        x, backend = real_tensor(inputs, layer.compute_dtype)

        def weights() -> Any:
            found = mask
            if found is not None and not isinstance(layer, _OURS):
                # Natively it is the mask of what lies along the last axis.
                found = keras.ops.expand_dims(keras.ops.cast(found, "bool"), -1)
            return _masks.weights(inputs, found, x, layer.axis % len(x.shape), backend)

        passes.see(key, x, layer.axis, weights)
        return original(*args, **kwargs)

    return call


def _call(model: Layer, batch: Any) -> Any:
    """``model`` with a batch of the usual kinds."""
    x = keras.utils.unpack_x_y_sample_weight(batch)[0]
    for part in keras.tree.flatten(x):
        if not hasattr(part, "shape"):
            wanted = "what fit takes: arrays, or a tuple or list that begins with the input"
            raise _recalibrate.no_input(part, wanted)
        _recalibrate.has_batch_axis(part)
    return model(x, training=False)


def _variables(layer: Any) -> dict[str, Any]:
    """The variables of ``layer`` that are statistics or count them, by name."""
    found = {name: getattr(layer, name, None) for name in _VARIABLES}
    return {name: variable for name, variable in found.items() if variable is not None}


def _numpy_dtype(variable: Any) -> Any:
    """A dtype of NumPy's own, from which Keras casts to that of ``variable``."""
    return "int64" if variable.dtype.startswith("int") else "float64"


def _not_built(name: str) -> ValueError:
    msg = (
        f"layer {name!r} is not built, so it has no statistics; call the model once first, or "
        f"build it."
    )
    return ValueError(msg)
