"""Which parameters are those of normalization layers, for optimizers that leave them alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core import FrozenDict, freeze, unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from normkit import _freeze

from . import _portable


def labels(
    model: nn.Module, variables: Mapping[str, Any], *args: Any, **options: Any
) -> Mapping[str, Any]:
    """Name each parameter of ``model`` ``"frozen"`` if a normalization layer has it.

    That is how parameters are frozen in Flax Linen: the optimizer leaves them alone. Of statistics
    the model says itself, in each call, whether the running ones are used: apply it with
    ``use_running_average=True``, or whatever the model calls its mode, and they stay as they are;
    there is nothing to be set in advance. Nothing is computed here but shapes::

        labels = normkit.flax.linen.labels(model, variables, x)
        optax.multi_transform({"trainable": tx, "frozen": optax.set_to_zero()}, labels)

    Args:
        model: any module; it may itself be a normalization layer.
        variables: what ``model.init`` returned, or what became of it.
        args, options: what ``model.apply`` takes besides: the input, and for example ``train``.

    Returns:
        ``"frozen"`` or ``"trainable"`` for each parameter, in the structure of
        ``variables["params"]``.

    Warns:
        UserWarning: no normalization layer was called that has parameters.

    >>> import jax.numpy as jnp
    >>> model, x = nn.Sequential([nn.Dense(3), nn.LayerNorm()]), jnp.ones((2, 4))
    >>> found = labels(model, model.init(jax.random.key(0), x), x)
    >>> found["layers_0"]["kernel"], found["layers_1"]["scale"]
    ('trainable', 'frozen')
    """
    paths: set[tuple[str, ...]] = set()

    def see(next_call: Any, called_with: Any, keywords: Any, context: Any) -> Any:
        if isinstance(context.module, _portable.KINDS):
            paths.add(context.module.path)
        return next_call(*called_with, **keywords)

    with nn.intercept_methods(see):
        jax.eval_shape(lambda given: model.apply(given, *args, mutable=True, **options), variables)
    params = variables.get("params", {})
    found = {
        path: "frozen" if any(path[:end] in paths for end in range(len(path))) else "trainable"
        for path in flatten_dict(unfreeze(params))
    }
    if "frozen" not in found.values():
        _freeze.nothing(model, statistics=False, parameters=True)
    named = unflatten_dict(found)
    return freeze(named) if isinstance(params, FrozenDict) else named
