"""From a definition to a layer of Flax Linen, and back."""

from __future__ import annotations

from typing import Any

import flax.linen as nn

import normkit as nk
from normkit import _checks
from normkit._definition import Definition

from . import _batch_norm, _group_norm, _instance_norm, _layer_norm, _rms_norm

_FAMILY = (
    (nk.BatchNorm, nn.BatchNorm, _batch_norm),
    (nk.LayerNorm, nn.LayerNorm, _layer_norm),
    (nk.GroupNorm, nn.GroupNorm, _group_norm),
    (nk.InstanceNorm, nn.InstanceNorm, _instance_norm),
    (nk.RMSNorm, nn.RMSNorm, _rms_norm),
)
# Of which each layer is one, Flax' own or normkit's.
KINDS = tuple(native for _, native, _ in _FAMILY)


def layer(definition: Definition, **options: Any) -> nn.Module:
    """The module that ``definition`` describes, ``portable`` (see :class:`BatchNorm`).

    Args:
        definition: such as ``nk.BatchNorm(64)``.
        options: any that the class has beyond the definition, such as ``name``, ``dtype``,
            ``param_dtype`` and ``use_running_average``.

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


def definition(layer: nn.Module, variables: Any = None) -> Definition:
    """The definition of ``layer``, one of Flax' own normalization layers or of normkit's.

    Args:
        layer: the module.
        variables: its variables, for the lengths of x. Not needed if the layer has them itself
            (``num_features``, ``shape``), or is bound.

    Raises:
        TypeError: ``layer`` is none that normkit knows.
        ValueError: the lengths are not known; or it has options that no definition describes:
            several channel axes, parameters along other axes than it normalizes over, or a
            GroupNorm's reduction_axes.

    >>> import jax, jax.numpy as jnp
    >>> ln = nn.LayerNorm()
    >>> definition(ln, ln.init(jax.random.key(0), jnp.ones((2, 8)))).shape
    (8,)
    """
    for _, native, module in _FAMILY:
        if isinstance(layer, native):
            _checks.computes_as_its_class(layer, "__call__", "flax")
            return module.describe(layer, variables)
    raise _checks.no_layer(layer)
