"""Which adapter a model belongs to. With ``_arrays.py``, what the core knows of frameworks."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from normkit._slot import Slot

_ADAPTERS = {
    # where the framework defines its layers -> package that adapts it. A layer of Keras may be one
    # of PyTorch as well, so that comes first.
    "keras": "normkit.keras",
    "torch": "normkit.torch",
    "flax.nnx": "normkit.flax.nnx",
    "flax.linen": "normkit.flax.linen",
    "normkit.numpy": "normkit.numpy",
}
# The names of frameworks that a layer can be made for.
NAMES = {adapter.removeprefix("normkit."): adapter for adapter in _ADAPTERS.values()}


def adapter_of(model: Any) -> str:
    """The package that adapts the framework of ``model``.

    Raises:
        TypeError: it is no model of a framework that normkit knows.
    """
    modules = [f"{base.__module__}." for base in type(model).__mro__]
    for framework, adapter in _ADAPTERS.items():
        if any(module.startswith(f"{framework}.") for module in modules):
            return adapter
    msg = (
        f"normkit takes models and layers of PyTorch, Keras, Flax (nnx and linen) and its own of "
        f"NumPy, but got a {type(model).__name__}."
    )
    raise TypeError(msg)


def slots_of(model: Any, **options: Any) -> list[Slot]:
    """The normalization layers of ``model``, each once, in its order."""
    adapter = adapter_of(model)
    given = {name: value for name, value in options.items() if value is not None}
    if given and not adapter.endswith("linen"):
        msg = f"{' and '.join(given)} belong to modules of Flax Linen, but got a {type(model)}."
        raise TypeError(msg)
    found: list[Slot] = import_module(f"{adapter}._slots").slots(model, **given)
    names = [slot.name for slot in found]
    if twice := {name for name in names if names.count(name) > 1}:
        msg = (
            f"several layers are called {' and '.join(sorted(twice))}; give each a name of its own."
        )
        raise ValueError(msg)
    return found
