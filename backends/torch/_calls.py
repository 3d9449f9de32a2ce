"""Which layers a model calls, and what is done with their outputs: found out by tracing it."""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Mapping
from functools import reduce
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

# The layers that a BatchNorm can be folded into, and the axis of their output channels, counted
# from the end.
LAYERS: dict[type[nn.Module], int] = {
    nn.Linear: -1,
    nn.Conv1d: -2,
    nn.Conv2d: -3,
    nn.Conv3d: -4,
    nn.ConvTranspose1d: -2,
    nn.ConvTranspose2d: -3,
    nn.ConvTranspose3d: -4,
}


class Calls:
    """Which modules a model calls, how often, and in which order."""

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.model = model
        self.graph = _traced(model, inputs, keywords)
        self.often: Counter[int] = Counter()
        self.node: dict[int, fx.Node] = {}
        self.read: set[int] = set()
        for node in self.graph.nodes:
            if node.op == "call_module":
                called = model.get_submodule(node.target)
                self.node[id(called)] = node
                self.often.update(id(module) for module in called.modules())
            elif node.op == "get_attr":
                self.read.add(id(_attribute(model, node.target)))
        self.owners = Counter(
            id(p) for module in model.modules() for p in module._parameters.values()
        )

    def shares(self, module: nn.Module) -> bool:
        """Whether someone else uses the parameters or buffers of ``module``."""
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        return any(self.owners[id(t)] > 1 or id(t) in self.read for t in tensors)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        if isinstance(module, (_BatchNorm, *LAYERS)):
            return True
        ours = type(module).__module__.startswith("normkit.torch.")
        return ours or super().is_leaf_module(module, name)


def _traced(model: nn.Module, inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> fx.Graph:
    """The calls that ``model`` makes in eval mode."""
    tracer = _Tracer()
    if tracer.is_leaf_module(model, ""):
        return fx.Graph()
    signature = inspect.signature(model.forward)
    given = signature.bind_partial(*inputs, **keywords).arguments
    fixed = {}
    for name, parameter in signature.parameters.items():
        value = given.get(name, parameter.default)
        if value is None or isinstance(value, bool | int | float | str):
            fixed[name] = value
    attributes = set(vars(model))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        if "forward" in vars(model):
            msg = "its forward is an attribute, not a method"
            raise TypeError(msg)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return tracer.trace(model, fixed)
    except Exception as error:
        msg = (
            f"torch.fx cannot trace this {type(model).__name__} ({type(error).__name__}: {error}), "
            f"so it is not known what its layers are followed by; fold the parts of it that can be "
            f"traced, for example model.backbone, and put them in its place."
        )
        raise ValueError(msg) from error
    finally:
        for module, mode in modes:
            module.training = mode
        # Constants that were met on the way.
        for name in set(vars(model)) - attributes:
            delattr(model, name)


def _attribute(model: nn.Module, path: str) -> Any:
    return reduce(lambda value, name: getattr(value, name, None), path.split("."), model)
