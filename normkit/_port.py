"""Make a layer of one framework out of a layer of another."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from normkit._models import NAMES, slots_of


def port(layer: Any, framework: str, *, variables: Any = None, **options: Any) -> Any:
    """A layer of another framework that computes the same, now and in further training.

    Definition, parameters and running statistics are carried over, each value bit by bit. What
    reaches beyond the layer is not: statistics across replicas, constraints, hooks.

    Args:
        layer: a normalization layer, of a framework or normkit's.
        framework: ``"torch"``, ``"keras"``, ``"flax.nnx"``, ``"flax.linen"`` or ``"numpy"``.
        variables: those of ``layer`` if it is a Linen module.
        options: for the ``layer`` function of that adapter, such as ``name`` and ``dtype``. If no
            ``dtype`` (in Flax ``param_dtype``) is given, it is that of the parameters.

    Returns:
        normkit's layer of that framework; for ``"flax.linen"`` the module and its variables.

    Raises:
        TypeError: ``layer`` is no normalization layer.
        ValueError: there is no such framework; statistics are NaN or negative; or the new layer
            cannot hold a value as it is.

    >>> import normkit as nk, normkit.numpy
    >>> trained = nk.numpy.layer(nk.BatchNorm.keras(3))
    >>> nk.port(trained, "numpy").definition == trained.definition
    True
    """
    if framework not in NAMES:
        msg = f"framework is one of {', '.join(map(repr, NAMES))}, but got {framework!r}."
        raise ValueError(msg)
    slots = slots_of(layer, variables=variables)
    if [slot.name for slot in slots] != [""]:
        msg = (
            f"port takes a normalization layer, but got a {type(layer).__name__}. To move those of "
            f"a whole model, make the model in the other framework and use extract and restore."
        )
        raise TypeError(msg)
    entry = slots[0].entry()
    if trouble := entry.trouble():
        msg = f"{trouble}; such a layer is not carried over."
        raise ValueError(msg)
    made = import_module(f"{NAMES[framework]}._slots").made(entry, **options)
    new, variables = made if isinstance(made, tuple) else (made, None)
    [slot] = slots_of(new, variables=variables)
    found = slot.read()
    for name in found.keys() & entry.arrays.keys():
        if not same_values(found[name], entry.arrays[name]):
            msg = (
                f"{name!r} is {entry.arrays[name].dtype} and would be rounded to "
                f"{found[name].dtype}; nothing was made. Choose a wider dtype, or cast it first."
            )
            raise ValueError(msg)
    return made


def same_values(a: Any, b: Any) -> bool:
    """Whether two arrays hold the same numbers, whatever their dtypes."""
    wide = np.float64 if a.dtype.kind != "i" else np.int64
    return bool(np.array_equal(a.astype(wide), b.astype(wide), equal_nan=True))
