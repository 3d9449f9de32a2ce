"""From a definition to a layer of PyTorch, and back."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import normkit as nk
from normkit import _checks

from . import _batch_norm, _layer_norm

_FAMILY = (
    (nk.BatchNorm, _BatchNorm, _batch_norm),
    (nk.LayerNorm, nn.LayerNorm, _layer_norm),
)


def layer(definition: nk.BatchNorm | nk.LayerNorm, **options: Any) -> nn.Module:
    """The ``torch.nn.Module`` that ``definition`` describes.

    Args:
        definition: such as ``nk.BatchNorm(64)``.
        options: ``device`` and ``dtype`` of the parameters.

    Raises:
        TypeError: ``definition`` is none.

    >>> import normkit as nk
    >>> definition(layer(nk.BatchNorm.keras(8))) == nk.BatchNorm.keras(8)
    True
    """
    for kind, _, module in _FAMILY:
        if isinstance(definition, kind):
            return module.build(definition, **options)
    raise _checks.no_definition(definition)


def definition(layer: nn.Module) -> nk.BatchNorm | nk.LayerNorm:
    """The definition of ``layer``, one of PyTorch's own normalization layers or of normkit's.

    Raises:
        TypeError: ``layer`` is none that normkit knows.
    """
    for _, native, module in _FAMILY:
        if isinstance(layer, native):
            return module.describe(layer)
    raise _checks.no_layer(layer)
