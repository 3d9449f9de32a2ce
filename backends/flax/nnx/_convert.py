"""Exchange the normalization layers of a model, in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import nnx

from normkit import _swap
from normkit.flax import _arguments

from ._batch_norm import BatchNorm
from ._group_norm import GroupNorm
from ._instance_norm import InstanceNorm
from ._layer_norm import LayerNorm
from ._rms_norm import RMSNorm

# The native class, and normkit's: the same attributes and variables, and a few attributes more.
_TWINS: dict[type[nnx.Module], Any] = {
    nnx.BatchNorm: BatchNorm,
    nnx.LayerNorm: LayerNorm,
    nnx.GroupNorm: GroupNorm,
    nnx.InstanceNorm: InstanceNorm,
    nnx.RMSNorm: RMSNorm,
}
_NATIVE = {ours: native for native, ours in _TWINS.items()}

# What an InstanceNorm would do with running statistics, if it had any.
_UNUSED = {"momentum": 0.99, "correction": 0, "use_running_average": False}


def convert(model: Any) -> Any:
    """Make every native normalization layer in ``model`` normkit's, in place.

    A layer stays the object that it is, with its variables, their metadata and sharding, and its
    train/eval setting, so optimizers, shared layers and references to it go on as they were.
    Functions under ``nnx.jit`` are traced anew; a graph definition that was split off before still
    names the native classes. Only exact instances of Flax' classes are exchanged, not those of
    subclasses. :func:`revert` undoes it.

    Args:
        model: any module, or lists and dicts of them; it may itself be a normalization layer.

    Returns:
        ``model``.

    Warns:
        UserWarning: there is no such layer.

    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs))
    >>> type(convert(model).layers[1]).__module__
    'normkit.flax.nnx._layer_norm'
    >>> type(revert(model).layers[1]) is nnx.LayerNorm
    True
    """
    found = [layer for _, layer in _modules(model) if type(layer) in _TWINS]
    for layer in found:
        for name, value in _added(_TWINS[type(layer)]).items():
            setattr(layer, name, value)
        _become(layer, _TWINS[type(layer)])
    if not found:
        _swap.nothing("native", model)
    return model


def revert(model: Any) -> Any:
    """Make every normalization layer of normkit's in ``model`` Flax' own, in place.

    Args:
        model: any module, or lists and dicts of them; it may itself be a normalization layer.

    Returns:
        ``model``.

    Raises:
        ValueError: a layer has an option that no native layer has; nothing is changed.

    Warns:
        UserWarning: there is no such layer.
    """
    found = []
    for path, layer in _modules(model):
        if type(layer) in _NATIVE:
            found.append(layer)
            options = _arguments.additions(layer)
            if not isinstance(getattr(layer, "num_features", 0), int):
                options.append(f"num_features={layer.num_features}")
            if options:
                name = ".".join(map(str, path)) or type(layer).__name__
                raise _swap.not_native(name, ", ".join(options))
    for layer in found:
        for name in _added(type(layer)):
            delattr(layer, name)
        _become(layer, _NATIVE[type(layer)])
    if not found:
        _swap.nothing("normkit", model)
    return model


def _modules(model: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """Each module of ``model`` once, with the path to it."""
    by_id = {id(node): (path, node) for path, node in nnx.iter_graph(model)}
    return [(path, node) for path, node in by_id.values() if isinstance(node, nnx.Module)]


def _added(cls: Any) -> Mapping[str, Any]:
    """The attributes that ``cls`` has beyond the native class, at their defaults."""
    unused = _UNUSED if cls is InstanceNorm else {}
    return {**cls._ADDED, **unused, "portable": False}


def _become(layer: nnx.Module, cls: type[nnx.Module]) -> None:
    # Past the module's own __setattr__, which would note it down as one more attribute.
    object.__setattr__(layer, "__class__", cls)
