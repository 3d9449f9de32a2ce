"""From a definition to a layer of Keras, and back."""

from __future__ import annotations

from typing import Any

import keras

import normkit as nk
from normkit import _checks
from normkit._definition import Definition

from . import _batch_norm, _group_norm, _instance_norm, _layer_norm, _rms_norm

_FAMILY = (
    (nk.BatchNorm, keras.layers.BatchNormalization, _batch_norm),
    (nk.LayerNorm, keras.layers.LayerNormalization, _layer_norm),
    # A kind of GroupNormalization, so it is asked for first.
    (nk.InstanceNorm, _instance_norm.InstanceNormalization, _instance_norm),
    (nk.GroupNorm, keras.layers.GroupNormalization, _group_norm),
    (nk.RMSNorm, keras.layers.RMSNormalization, _rms_norm),
)
# Of which each layer is one, Keras' own or normkit's.
KINDS = tuple(native for _, native, _ in _FAMILY)


def layer(definition: Definition, **options: Any) -> keras.layers.Layer:
    """The ``keras.layers.Layer`` that ``definition`` describes.

    Args:
        definition: such as ``nk.BatchNorm(64)``.
        options: those of every Keras layer, such as ``name`` and ``dtype``; initializers,
            regularizers and constraints.

    Raises:
        TypeError: ``definition`` is none.

    >>> import normkit as nk
    >>> definition(layer(nk.BatchNorm.torch(8))) == nk.BatchNorm.torch(8)
    True
    """
    for kind, _, module in _FAMILY:
        if isinstance(definition, kind):
            return module.build(definition, **options)
    raise _checks.no_definition(definition)


def definition(layer: keras.layers.Layer) -> Definition:
    """The definition of ``layer``, one of Keras' own normalization layers or of normkit's.

    Raises:
        TypeError: ``layer`` is none that normkit knows.
        ValueError: ``layer`` is not built yet, or does what no definition describes.
    """
    for _, native, module in _FAMILY:
        if isinstance(layer, native):
            _checks.computes_as_its_class(layer, "call", "keras")
            return module.describe(layer)
    raise _checks.no_layer(layer)
