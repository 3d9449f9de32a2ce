"""How many axes the outputs of the layers of a model have, as far as that is certain."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

_ELEMENTWISE = (
    nn.Identity,
    nn.Dropout,
    nn.AlphaDropout,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Sigmoid,
    nn.Tanh,
    nn.Softplus,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Hardtanh,
)
_ELEMENTWISE_FUNCTIONS = {
    F.relu,
    F.relu6,
    F.leaky_relu,
    F.elu,
    F.gelu,
    F.silu,
    F.dropout,
    torch.relu,
    torch.tanh,
    torch.sigmoid,
    "relu",
    "relu_",
    "tanh",
    "sigmoid",
    "contiguous",
}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def required(norm: nn.Module) -> int | None:
    """The only rank of an input that ``norm`` takes, if there is one."""
    if isinstance(norm, nn.BatchNorm2d):
        return 4
    return 5 if isinstance(norm, nn.BatchNorm3d) else None


def observed(
    model: nn.Module, kinds: tuple[type[nn.Module], ...], inputs: Any, keywords: Mapping[str, Any]
) -> dict[str, int]:
    """The ranks of the outputs of the layers of ``kinds``, in a call with these inputs."""
    # A copy: what it computes may be remembered somewhere.
    model, found = copy.deepcopy(model).eval(), {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, y: Tensor) -> None:
            found[name] = y.ndim

        return hook

    for name, module in model.named_modules():
        if isinstance(module, kinds):
            module.register_forward_hook(note(name))
    with torch.no_grad():
        model(*inputs, **keywords)
    return found


def inferred(graph: fx.Graph, model: nn.Module) -> dict[str, int]:
    """The ranks of the outputs of the layers that the model itself decides.

    They follow from what flattens its input. And a BatchNorm along axis 1 takes one length of it:
    if several of them with different lengths stand where that axis would stay as long as it is,
    it is not that axis.
    """
    ranks: dict[fx.Node, int] = {}
    for node in graph.nodes:
        before = _source(node)
        module = _module(node, model)
        if (rank := _flattened(node, module)) is not None:
            ranks[node] = rank
        elif before in ranks and _keeps_rank(node, module):
            ranks[node] = ranks[before]
    # After a Linear, were there three axes or more, axis 1 would not be that of the channels;
    # after a convolution, were there no batch axis, it would be the first one of space.
    for follows, rank_of in (
        (_keeps_second, lambda module: 2 if isinstance(module, nn.Linear) else None),
        (_keeps_first_of_space, _batched),
    ):
        for node in _contradicted(graph, model, follows):
            rank = rank_of(_module(node, model))
            if rank is not None:
                ranks.setdefault(node, rank)
    return {node.target: rank for node, rank in ranks.items() if node.op == "call_module"}


def _contradicted(
    graph: fx.Graph, model: nn.Module, keeps: Callable[[fx.Node, nn.Module | None], bool]
) -> list[fx.Node]:
    """The nodes whose axis 1 cannot be what ``keeps`` its length: it would have two lengths."""
    part: dict[fx.Node, fx.Node] = {}
    lengths: dict[fx.Node, set[int]] = {}
    for node in graph.nodes:
        before, module = _source(node), _module(node, model)
        part[node] = part[before] if before is not None and keeps(node, module) else node
        if _is_norm(module) and module.running_mean is not None and getattr(module, "axis", 1) == 1:
            lengths.setdefault(part[node], set()).add(module.num_features)
    return [node for node, start in part.items() if len(lengths.get(start, ())) > 1]


def _source(node: fx.Node) -> fx.Node | None:
    """What ``node`` is computed from, its first argument."""
    first = node.args[0] if node.args else None
    return first if isinstance(first, fx.Node) else None


def _module(node: fx.Node, model: nn.Module) -> nn.Module | None:
    return model.get_submodule(node.target) if node.op == "call_module" else None


def _is_norm(module: nn.Module | None) -> bool:
    """A BatchNorm, of no class that somebody derived."""
    known = type(module).__module__.startswith(("torch.nn.", "normkit.torch."))
    return known and isinstance(module, _BatchNorm)


def _elementwise(node: fx.Node, module: nn.Module | None) -> bool:
    if module is not None:
        return type(module) in _ELEMENTWISE or _is_norm(module)
    return node.op in ("call_function", "call_method") and node.target in _ELEMENTWISE_FUNCTIONS


def _keeps_rank(node: fx.Node, module: nn.Module | None) -> bool:
    return _elementwise(node, module) or type(module) in (nn.Linear, *_CONVOLUTIONS)


def _keeps_second(node: fx.Node, module: nn.Module | None) -> bool:
    """Of three axes or more, the second stays as long as it is."""
    return _elementwise(node, module) or type(module) is nn.Linear


def _keeps_first_of_space(node: fx.Node, module: nn.Module | None) -> bool:
    """The first axis after that of the channels stays as long as it is."""
    if type(module) not in _CONVOLUTIONS:
        return _elementwise(node, module)
    if module.padding == "same":
        return True
    kept = 2 * module.padding[0] == module.dilation[0] * (module.kernel_size[0] - 1)
    return module.padding != "valid" and module.stride[0] == 1 and kept


def _batched(module: nn.Module | None) -> int | None:
    """The rank of the output of a convolution with a batch axis."""
    return len(module.kernel_size) + 2 if type(module) in _CONVOLUTIONS else None


def _flattened(node: fx.Node, module: nn.Module | None) -> int | None:
    """The rank that ``node`` gives its output, whatever comes in."""
    if type(module) is nn.Flatten:
        return 2 if (module.start_dim, module.end_dim) == (1, -1) else None
    if node.op in ("call_function", "call_method") and node.target in (torch.flatten, "flatten"):
        given = (node.args[1:], dict(node.kwargs))
        return 2 if given in (((1,), {}), ((), {"start_dim": 1})) else None
    if node.op == "call_method" and node.target in ("view", "reshape"):
        sizes = node.args[1:]
        if len(sizes) == 1 and isinstance(sizes[0], tuple | list):
            return len(sizes[0])
        # A single one may be a shape.
        return len(sizes) if len(sizes) > 1 else None
    return None
