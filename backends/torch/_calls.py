"""Which layers a model calls, and what is done with their outputs: found out by tracing it."""

from __future__ import annotations

import copy
import inspect
import math
import operator
import warnings
from collections import Counter
from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx, nn
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


# What is asked of a tensor and is none itself, and the modules whose functions of such are none.
_NUMBERS = {"size", "shape", "dim", "ndim", "ndimension", "numel", "nelement", "stride", "item"}
_NUMBERS |= {"tolist", "dtype", "device", "requires_grad"}
_OPERATORS = {operator.__name__, math.__name__, "_operator", "builtins"}


class Calls:
    """Which modules a model calls, how often, and in which order.

    It is a copy of the model that is called: what forward keeps, it keeps there.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.model = model
        self._called = copy.deepcopy(model).eval()
        self.graph = _traced(self._called, inputs, keywords)
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

    def same(self, other: Calls) -> bool:
        """Whether both models do the same, module by module, whatever those modules compute."""
        pairs = list(zip(self.graph.nodes, other.graph.nodes, strict=False))
        return len(self.graph.nodes) == len(other.graph.nodes) and all(
            _words(a) == _words(b)
            and (a.op != "get_attr" or _equal(self._value(a), other._value(b)))
            for a, b in pairs
        )

    def _value(self, node: fx.Node) -> Any:
        """What a node reads: a parameter, or a constant that was met on the way."""
        return _attribute(self._called, node.target)


class _Proxy(fx.Proxy):
    """What stands for a tensor in a trace, or for an input, and says that it is one."""

    __class__ = property(lambda self: self.tracer.kind_of(self.node))  # type: ignore[assignment]
    _is_param = property(lambda self: self.node.op == "get_attr")
    _is_buffer = False


class _Tracer(fx.Tracer):
    def __init__(self, inputs: Mapping[str, Any]) -> None:
        super().__init__()
        self.inputs = inputs

    def kind_of(self, node: fx.Node) -> type:
        given = self.inputs.get(str(node.target)) if node.op == "placeholder" else None
        return Tensor if given is None else type(given)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self) if _is_tensor(node) else fx.Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        return a.node if type(a) is _Proxy else super().create_arg(a)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        if isinstance(module, (_BatchNorm, *LAYERS)):
            return True
        ours = type(module).__module__.startswith("normkit.torch.")
        return ours or super().is_leaf_module(module, name)


def _traced(model: nn.Module, inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> fx.Graph:
    """The calls that ``model`` makes; what it keeps of them stays in it."""
    signature = inspect.signature(model.forward)
    given = signature.bind_partial(*inputs, **keywords).arguments
    tracer = _Tracer(given)
    if tracer.is_leaf_module(model, ""):
        return fx.Graph()
    fixed = {}
    for name, parameter in signature.parameters.items():
        value = given.get(name, parameter.default)
        if value is None or isinstance(value, bool | int | float | str):
            fixed[name] = value
    try:
        if "forward" in vars(model):
            msg = "its forward is an attribute, not a method"
            raise TypeError(msg)
        # Random constants are the same each time, and nobody else's random numbers change.
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            return tracer.trace(model, fixed)
    except Exception as error:
        msg = (
            f"torch.fx cannot trace this {type(model).__name__} ({type(error).__name__}: {error}), "
            f"so it is not known what its layers are followed by; fold the parts of it that can be "
            f"traced, for example model.backbone, and put them in its place."
        )
        raise ValueError(msg) from error


def _is_tensor(node: fx.Node) -> bool:
    """Whether ``node`` is a tensor, as most are, and not a size or a dtype of one."""
    if node.op == "call_method":
        return node.target not in _NUMBERS
    if node.op != "call_function":
        return True
    if node.target is getattr:
        return node.args[1] not in _NUMBERS
    if getattr(node.target, "__module__", None) not in _OPERATORS:
        return True
    return any(_is_tensor(given) for given in node.all_input_nodes)


def _words(node: fx.Node) -> tuple[Any, ...]:
    """What ``node`` does, and with what; the names of nodes follow from their order."""
    return node.op, node.name, node.target, repr(node.args), repr(node.kwargs)


def _equal(a: Any, b: Any) -> bool:
    """Whether what two models read is the same."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and not isinstance(a, Tensor)


def _attribute(model: nn.Module, path: str) -> Any:
    return reduce(lambda value, name: getattr(value, name, None), path.split("."), model)
