"""Exchange the normalization layers of a model, in place."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.lazy import LazyModuleMixin

from normkit import _swap

from . import _batch_norm, _group_norm, _instance_norm, _layer_norm, _rms_norm
from ._buffers import know_features

# The native class, and normkit's: the same attributes, parameters and buffers.
_TWINS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: _batch_norm.BatchNorm1d,
    nn.BatchNorm2d: _batch_norm.BatchNorm2d,
    nn.BatchNorm3d: _batch_norm.BatchNorm3d,
    nn.LazyBatchNorm1d: _batch_norm.LazyBatchNorm1d,
    nn.LazyBatchNorm2d: _batch_norm.LazyBatchNorm2d,
    nn.LazyBatchNorm3d: _batch_norm.LazyBatchNorm3d,
    nn.LayerNorm: _layer_norm.LayerNorm,
    nn.GroupNorm: _group_norm.GroupNorm,
    nn.InstanceNorm1d: _instance_norm.InstanceNorm1d,
    nn.InstanceNorm2d: _instance_norm.InstanceNorm2d,
    nn.InstanceNorm3d: _instance_norm.InstanceNorm3d,
    nn.LazyInstanceNorm1d: _instance_norm.LazyInstanceNorm1d,
    nn.LazyInstanceNorm2d: _instance_norm.LazyInstanceNorm2d,
    nn.LazyInstanceNorm3d: _instance_norm.LazyInstanceNorm3d,
    nn.RMSNorm: _rms_norm.RMSNorm,
}
_NATIVE = {ours: native for native, ours in _TWINS.items()}

# What a layer of normkit may have beyond the native one, and what it is if it has not.
_ADDED = {
    "axis": 1,
    "axes": None,
    "correction": 1,
    "zero_centered": False,
    "scale_after_cast": False,
}


def convert(model: nn.Module) -> nn.Module:
    """Make every native normalization layer in ``model`` normkit's, in place.

    A layer stays the object that it is, with its parameters, buffers, hooks, training flag, device
    and dtype, so optimizers, shared layers and averaged copies go on as they were. Only exact
    instances of PyTorch's classes are exchanged, not those of subclasses (``SyncBatchNorm``,
    parametrized layers). An InstanceNorm with ``momentum=None``, which PyTorch never updates, takes
    the cumulative average from then on. :func:`revert` undoes it.

    Args:
        model: any module; it may itself be a normalization layer.

    Returns:
        ``model``.

    Warns:
        UserWarning: there is no such layer.

    >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8))
    >>> convert(model)[1].__class__.__module__
    'normkit.torch._batch_norm'
    >>> type(revert(model)[1]) is nn.BatchNorm2d
    True
    """
    found = [layer for layer in model.modules() if type(layer) in _TWINS]
    for layer in found:
        layer.__class__ = _TWINS[type(layer)]
        if isinstance(layer, _NormBase) and not isinstance(layer, LazyModuleMixin):
            know_features(layer)
    if not found:
        _swap.nothing("native", model)
    return model


def revert(model: nn.Module) -> nn.Module:
    """Make every normalization layer of normkit's in ``model`` PyTorch's own, in place.

    Args:
        model: any module; it may itself be a normalization layer.

    Returns:
        ``model``.

    Raises:
        ValueError: a layer has an option that no native layer has; nothing is changed.

    Warns:
        UserWarning: there is no such layer.
    """
    found = []
    for name, layer in model.named_modules():
        if type(layer) in _NATIVE:
            found.append(layer)
        elif not type(layer).__module__.startswith("normkit.torch."):
            continue
        options = [
            f"{option}={getattr(layer, option)!r}"
            for option, usual in _ADDED.items()
            if getattr(layer, option, usual) != usual
            and not (option == "axes" and layer.axes == tuple(range(-len(layer.axes), 0)))
        ]
        if getattr(layer, "weight", 0) is None and getattr(layer, "bias", None) is not None:
            options.append("scale=False")
        if type(layer) not in _NATIVE:
            options.append("no rank of its own, as BatchNorm1d, 2d and 3d have")
        if options:
            raise _swap.not_native(name or type(layer).__name__, ", ".join(options))
    for layer in found:
        layer.__class__ = _NATIVE[type(layer)]
    if not found:
        _swap.nothing("normkit", model)
    return model
