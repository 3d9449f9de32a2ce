"""From a definition to a layer of NumPy, and back."""

from __future__ import annotations

from typing import Any

from normkit import _checks
from normkit._definition import Definition

from ._layer import Layer


def layer(definition: Definition, **options: Any) -> Layer:
    """The NumPy layer that ``definition`` describes.

    Args:
        definition: such as ``nk.BatchNorm(64)``.
        options: ``dtype`` of the parameters.

    Raises:
        TypeError: ``definition`` is none.

    >>> import normkit as nk
    >>> definition(layer(nk.BatchNorm.keras(8))) == nk.BatchNorm.keras(8)
    True
    """
    if not isinstance(definition, Definition):
        raise _checks.no_definition(definition)
    return Layer(definition, **options)


def definition(layer: Layer) -> Definition:
    """The definition of ``layer``.

    Raises:
        TypeError: ``layer`` is none of normkit's.
    """
    if not isinstance(layer, Layer):
        raise _checks.no_layer(layer)
    return layer.definition
