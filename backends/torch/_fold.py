"""Fold the BatchNorms of a model into the layers before them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

import normkit as nk
from normkit import _unfolded
from normkit._report import Report

from . import _batch_norm, _ranks
from ._buffers import state_of
from ._calls import LAYERS, Calls

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = {
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    _batch_norm.BatchNorm,
    _batch_norm.BatchNorm1d,
    _batch_norm.BatchNorm2d,
    _batch_norm.BatchNorm3d,
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def fold(model: nn.Module, *inputs: Any, **keywords: Any) -> tuple[nn.Module, Report]:
    """A copy of ``model`` for inference, with each BatchNorm folded into the layer before it.

    The layer, an ``nn.Linear`` or a convolution (grouped and transposed ones too), then has other
    weights and a bias, and the BatchNorm is an ``nn.Identity``. Predictions are the same, up to
    rounding. Folded is only what is in eval mode and certain to be right: where the output of the
    layer goes to the BatchNorm alone, and each is called once and shares nothing. Arguments of
    ``model`` that have a default are taken at that, unless they are among the inputs. A model whose
    own code looks at its layers, and would take another path without a BatchNorm, stays as it is.

    Args:
        model: any module that ``torch.fx`` can trace. It is left as it is.
        inputs, keywords: of a call of ``model``, as an example. A BatchNorm after an
            ``nn.Linear`` or ``nn.Conv1d`` can do two things, depending on the rank of its input;
            where the model itself does not decide it, the example does.

    Returns:
        The copy, and a report that says of each BatchNorm what it was folded into, or why not.

    Raises:
        ValueError: ``model`` cannot be traced.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    >>> folded, report = fold(model.eval())
    >>> folded
    Sequential(
      (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
      (1): Identity()
      (2): ReLU()
    )
    >>> print(report)
    | layer | folded into | why not |
    | ----- | ----------- | ------- |
    | 1     | 0           |         |
    """
    folded = copy.deepcopy(model)
    calls = Calls(folded, inputs, keywords)
    ranks = _ranks.inferred(calls.graph, folded)
    if inputs or keywords:
        ranks |= _ranks.observed(folded, tuple(LAYERS), inputs, keywords)
    rows, any_folded = [], False
    norms = [(name, norm) for name, norm in folded.named_modules() if isinstance(norm, _BatchNorm)]
    for name, norm in norms:
        try:
            before = _layer_before(norm, calls, ranks)
            _fold_into(folded.get_submodule(before), norm)
        except (TypeError, ValueError) as why:
            rows.append((name, "", str(why)))
        else:
            rows.append((name, before, ""))
            any_folded = True
    if any_folded and not _does_the_same(folded, calls, inputs, keywords):
        # Which of them it looks at is not known.
        folded = copy.deepcopy(model)
        rows = [(name, "", why or _unfolded.LOOKED_AT) for name, _, why in rows]
    return folded, Report(_unfolded.HEADS, tuple(rows))


def _does_the_same(folded: nn.Module, calls: Calls, inputs: Any, keywords: Any) -> bool:
    """Whether the model's own code, which may look at its layers, takes the same path as before."""
    try:
        return calls.same(Calls(folded, inputs, keywords))
    except ValueError:
        return False


def _layer_before(norm: nn.Module, calls: Calls, ranks: Mapping[str, int]) -> str:
    """The name of the layer that ``norm`` can be folded into; a ValueError if there is none."""
    if type(norm) not in _NORMS:
        raise ValueError(_unfolded.own_class(norm))
    if norm.training:
        raise ValueError(_unfolded.TRAINING)
    if norm.running_mean is None:
        raise ValueError(_unfolded.NO_STATISTICS)
    node = calls.node.get(id(norm))
    if node is None:
        raise ValueError(_unfolded.NOT_FOUND)
    if calls.often[id(norm)] > 1:
        raise ValueError(_unfolded.OFTEN)
    if _hooked(norm):
        raise ValueError(_unfolded.HOOKED)
    if calls.shares(norm):
        raise ValueError(_unfolded.SHARED)
    given = [*node.args, *(node.kwargs.get(name) for name in ("input", "mask"))]
    given = [value for value in given if value is not None]
    if len(given) > 1:
        raise ValueError(_unfolded.MASKED)
    (before,) = given
    layer = calls.model.get_submodule(before.target) if before.op == "call_module" else None
    if layer is None or type(layer) not in LAYERS:
        raise ValueError(_unfolded.no_layer(_said(before, layer)))
    name = before.target
    if calls.often[id(layer)] > 1:
        raise ValueError(_unfolded.layer_called_often(name))
    if len(before.users) > 1:
        raise ValueError(_unfolded.output_elsewhere(name))
    if _hooked(layer):
        raise ValueError(_unfolded.layer_hooked(name))
    if calls.shares(layer):
        raise ValueError(_unfolded.layer_shared(name))
    # The output of the layer comes out of these modules, or goes into them.
    for between in set(_around(name)) ^ set(_around(node.target)):
        if _hooked(calls.model.get_submodule(between)):
            raise ValueError(_unfolded.layer_hooked(between))
    _check_axis(norm, layer, name, ranks.get(name))
    return name


def _check_axis(norm: nn.Module, layer: nn.Module, name: str, rank: int | None) -> None:
    """The channels of ``norm`` are the output channels of ``layer``."""
    axis, channel = getattr(norm, "axis", 1), LAYERS[type(layer)]
    rank = _ranks.required(norm) or rank
    if axis < 0:
        if axis != channel:
            raise ValueError(_unfolded.other_axis(axis, name, channel))
    elif rank is not None:
        if axis != rank + channel:
            raise ValueError(_unfolded.other_axis(axis, name, rank + channel))
    # A convolution takes its input with an axis for the batch or without.
    elif isinstance(layer, nn.Linear) or axis in (0, 1):
        raise ValueError(_unfolded.unknown_rank(name))
    else:
        raise ValueError(_unfolded.other_axis(axis, name, channel))


def _fold_into(layer: nn.Module, norm: nn.Module) -> None:
    """Do it, in place. Whoever holds the two still does."""
    groups = layer.groups if isinstance(layer, _TRANSPOSED) else 1
    given = {"scale": norm.weight, "bias": norm.bias}
    # Not every device has float64.
    params = {key: p.detach().cpu() for key, p in given.items() if p is not None}
    state = {key: buffer.detach().cpu() for key, buffer in state_of(norm).items()}
    weight, bias = nk.fold(
        layer.weight.detach().cpu(),
        None if layer.bias is None else layer.bias.detach().cpu(),
        _batch_norm.describe(norm),
        params,
        state,
        channel_axis=1 if isinstance(layer, _TRANSPOSED) else 0,
        groups=groups,
    )
    layer.bias = _like(layer.weight if layer.bias is None else layer.bias, bias)
    layer.weight = _like(layer.weight, weight)
    identity = nn.Identity().train(norm.training)
    norm.__class__ = nn.Identity
    norm.__dict__.clear()
    norm.__dict__.update(identity.__dict__)


def _like(old: Tensor, new: Tensor) -> nn.Parameter:
    return nn.Parameter(new.to(old.device), requires_grad=old.requires_grad)


def _hooked(module: nn.Module) -> bool:
    """Whether a call of ``module`` does more than its class says."""
    return (
        any(getattr(module, hooks, None) for hooks in _HOOKS)
        or "forward" in vars(module)
        or parametrize.is_parametrized(module)
    )


def _around(name: str) -> Iterator[str]:
    """The names of the modules that the one of this name is in."""
    while name := name.rpartition(".")[0]:
        yield name


def _said(node: fx.Node, module: nn.Module | None) -> str:
    """A node of the graph, in words."""
    if module is not None:
        return f"a {type(module).__name__}"
    if node.op == "placeholder":
        return "an input of the model"
    return str(getattr(node.target, "__name__", node.target))
