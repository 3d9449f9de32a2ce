"""From a definition to a layer of PyTorch, and back."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

import normkit as nk
from normkit import _checks
from normkit._definition import Definition

from . import _batch_norm, _group_norm, _instance_norm, _layer_norm, _rms_norm

_FAMILY = (
    (nk.BatchNorm, _BatchNorm, _batch_norm),
    (nk.LayerNorm, nn.LayerNorm, _layer_norm),
    (nk.GroupNorm, nn.GroupNorm, _group_norm),
    (nk.InstanceNorm, _InstanceNorm, _instance_norm),
    (nk.RMSNorm, nn.RMSNorm, _rms_norm),
)
# Of which each layer is one, PyTorch's own or normkit's.
KINDS = tuple(native for _, native, _ in _FAMILY)


def layer(definition: Definition, **options: Any) -> nn.Module:
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


def definition(layer: nn.Module) -> Definition:
    """The definition of ``layer``, one of PyTorch's own normalization layers or of normkit's.

    Raises:
        TypeError: ``layer`` is none that normkit knows.
        ValueError: it is lazy, and has seen no input yet.
    """
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        msg = (
            f"a {type(layer).__name__} learns its number of channels from its first input, so its "
            f"definition is not known yet; call it once first."
        )
        raise ValueError(msg)
    for _, native, module in _FAMILY:
        if isinstance(layer, native):
            _checks.computes_as_its_class(layer, "forward", "torch")
            return module.describe(layer)
    raise _checks.no_layer(layer)
