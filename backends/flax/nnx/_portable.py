"""From a definition to a layer of Flax NNX, and back."""

from __future__ import annotations

from typing import Any

from flax import nnx

import normkit as nk
from normkit import _checks
from normkit._definition import Definition

from . import _batch_norm, _group_norm, _instance_norm, _layer_norm, _rms_norm

_FAMILY = (
    (nk.BatchNorm, nnx.BatchNorm, _batch_norm),
    (nk.LayerNorm, nnx.LayerNorm, _layer_norm),
    (nk.GroupNorm, nnx.GroupNorm, _group_norm),
    (nk.InstanceNorm, nnx.InstanceNorm, _instance_norm),
    (nk.RMSNorm, nnx.RMSNorm, _rms_norm),
)
# Of which each layer is one, Flax' own or normkit's.
KINDS = tuple(native for _, native, _ in _FAMILY)


def layer(definition: Definition, **options: Any) -> nnx.Module:
    """The module that ``definition`` describes, ``portable`` (see :class:`BatchNorm`).

    Args:
        definition: such as ``nk.BatchNorm(64)``.
        options: any that the class has beyond the definition, such as ``dtype``, ``param_dtype``
            and ``use_running_average``. ``rngs`` may be left out: nothing is random by default.

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


def definition(layer: nnx.Module) -> Definition:
    """The definition of ``layer``, one of Flax' own normalization layers or of normkit's.

    Raises:
        TypeError: ``layer`` is none that normkit knows.
        ValueError: it has options that no definition describes: several channel axes,
            parameters along other axes than it normalizes over, or a GroupNorm's reduction_axes.
    """
    for _, native, module in _FAMILY:
        if isinstance(layer, native):
            _checks.computes_as_its_class(layer, "__call__", "flax")
            return module.describe(layer)
    raise _checks.no_layer(layer)
