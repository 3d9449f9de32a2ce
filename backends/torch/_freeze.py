"""Freeze normalization layers: their running statistics, their parameters, or both."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from normkit import _freeze

from . import _portable


def freeze(model: nn.Module, *, statistics: bool = True, parameters: bool = True) -> nn.Module:
    """Freeze the normalization layers in ``model``, native ones or normkit's, in place.

    Frozen statistics are those that a layer with running statistics uses from then on, and they
    stay as they are: ``model.train()`` leaves it in eval mode. Frozen parameters get no gradient.
    Together that is torchvision's ``FrozenBatchNorm2d``, but the layer stays the object that it
    is, and may be thawed. Both are kept by ``copy.deepcopy`` and ``pickle``; a state dict has
    nothing of it, and may be loaded as before. Freeze after ``convert``, ``revert`` and
    ``SyncBatchNorm.convert_sync_batchnorm``, some of which make new layers.

    Args:
        model: any module; it may itself be a normalization layer.
        statistics: freeze the running statistics.
        parameters: freeze ``weight`` and ``bias``, with ``requires_grad_(False)``.

    Returns:
        ``model``.

    Warns:
        UserWarning: no layer has what is to be frozen.

    >>> model = freeze(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))).train()
    >>> model[0].training, model[1].training
    (True, False)
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['0.weight', '0.bias']
    """
    return _set(model, statistics, parameters, frozen=True)


def unfreeze(model: nn.Module, *, statistics: bool = True, parameters: bool = True) -> nn.Module:
    """Undo :func:`freeze`, in place.

    The layers are then in the mode that ``model`` is in, and all their parameters get gradients.

    Args:
        model: any module; it may itself be a normalization layer.
        statistics: let the running statistics follow the batches again.
        parameters: let ``weight`` and ``bias`` get gradients again.

    Returns:
        ``model``.

    Warns:
        UserWarning: no layer has what is to be thawed.
    """
    return _set(model, statistics, parameters, frozen=False)


def _set(model: nn.Module, statistics: bool, parameters: bool, *, frozen: bool) -> nn.Module:
    found = False
    for layer in model.modules():
        if not isinstance(layer, _portable.KINDS):
            continue
        if statistics and getattr(layer, "running_mean", None) is not None:
            found = True
            if frozen:
                # In the layer itself, in place of the method of its class: it stays of that
                # class, and copies and pickles have it too.
                layer.train = partial(_stay, layer)  # type: ignore[method-assign]
                layer.eval()
            elif vars(layer).pop("train", None) is not None:
                layer.train(model.training)
        own = list(layer.parameters(recurse=False)) if parameters else []
        for parameter in own:
            found = True
            parameter.requires_grad_(not frozen)
            if frozen:
                parameter.grad = None  # an optimizer would still follow it
    if not found:
        _freeze.nothing(model, statistics=statistics, parameters=parameters)
    return model


def _stay(layer: nn.Module, mode: bool = True) -> Any:
    """``layer.train`` of a layer that stays in eval mode."""
    return type(layer).train(layer, False)
