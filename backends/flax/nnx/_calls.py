"""Which layers a model calls, and what is done with their outputs: found out by tracing it."""

from __future__ import annotations

from collections import Counter
from contextvars import ContextVar
from functools import cache
from typing import Any

import jax
import numpy as np
from flax import nnx

from ._batch_norm import BatchNorm

NORMS = (nnx.BatchNorm, BatchNorm)
_WATCHED = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Conv, nnx.ConvTranspose, *NORMS)
# The attribute that says which layer one is, and what its computation is called in the trace.
_NAME, _MARK = "_normkit_name", "normkit_call:"
_ARRAYS = (jax.Array, jax.ShapeDtypeStruct, np.ndarray)


class Calls:
    """The calls that ``model`` makes in eval mode, of the layers that are watched.

    Attributes:
        modules: all modules, by their names.
        often: how often each layer is called.
        call: the call of each layer, as an equation of the trace, unless it is in another function
            that is traced for itself (``nnx.remat``, ``nnx.scan`` and so on).
        given, made: the shapes of its input and output, as the model sees them.
        training, masked: the BatchNorms that take the statistics of their input, or a mask.
    """

    def __init__(self, model: Any, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.modules: dict[str, Any] = {}
        self._paths: dict[str, tuple[Any, ...]] = {}
        for path, node in nnx.iter_graph(model):
            if isinstance(node, nnx.Module):
                name = ".".join(map(str, path))
                self.modules[name], self._paths[name] = node, path
        self.often: Counter[str] = Counter()
        self.call: dict[str, Any] = {}
        self.given: dict[str, tuple[int, ...]] = {}
        self.made: dict[str, tuple[int, ...]] = {}
        self.training: set[str] = set()
        self.masked: set[str] = set()
        self._readers: Counter[Any] = Counter()
        self._makers: dict[Any, Any] = {}
        self._variables: dict[tuple[Any, ...], Any] = {}
        self._trace(model, inputs, keywords)

    def before(self, name: str) -> tuple[bool, str]:
        """Whether the input of a layer comes from another one, and what that is called."""
        x = self.call[name].invars[-1]
        maker = None if _is_literal(x) else self._makers.get(x)
        if maker is None:
            return False, "an input of the model"
        called = str(maker.params.get("name", maker.primitive.name))
        return called.startswith(_MARK), called.removeprefix(_MARK)

    def uses(self, name: str) -> int:
        """How often the output of a layer is used, as a result of the model too."""
        return sum(self._readers[v] for v in self.call[name].outvars)

    def shares(self, name: str) -> bool:
        """Whether someone else uses the variables of a layer."""
        for attribute, value in vars(self.modules[name]).items():
            if isinstance(value, nnx.Variable):
                # A variable that is shared is known by its first path only.
                read = self._variables.get((*self._paths[name], attribute))
                if read is None or self._readers[read] > 1:
                    return True
        return False

    def _trace(self, model: Any, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        model = nnx.clone(model)
        model.eval()
        for path, node in nnx.iter_graph(model):
            if type(node) in _WATCHED:
                setattr(node, _NAME, ".".join(map(str, path)))
                object.__setattr__(node, "__class__", _watched(type(node)))
        graph, state = nnx.split(model)
        leaves, tree = jax.tree.flatten((inputs, keywords), is_leaf=_is_object)
        traced = [isinstance(leaf, _ARRAYS) for leaf in leaves]
        outputs = 0

        def run(state: Any, arrays: list[Any]) -> Any:
            nonlocal outputs
            model, rest = nnx.merge(graph, state), iter(arrays)
            given = [next(rest) if t else leaf for t, leaf in zip(traced, leaves, strict=True)]
            args, kwargs = jax.tree.unflatten(tree, given)
            y = model(*args, **kwargs)
            y = [leaf for leaf in jax.tree.leaves(y) if isinstance(leaf, _ARRAYS)]
            outputs = len(y)
            # What the model keeps is used as well.
            return y, jax.tree.leaves(nnx.state(model))

        arrays = [leaf for t, leaf in zip(traced, leaves, strict=True) if t]
        token = _WATCHING.set(self)
        try:
            jaxpr = jax.make_jaxpr(run)(state, arrays).jaxpr
        finally:
            _WATCHING.reset(token)
        for (path, _), v in zip(jax.tree.leaves_with_path(state), jaxpr.invars, strict=False):
            self._variables[tuple(key.key for key in path if hasattr(key, "key"))] = v
        self._read(jaxpr, outputs)

    def _read(self, jaxpr: Any, outputs: int) -> None:
        """Note who reads and makes what in the trace, whose first results are ``outputs``."""
        kept = set(jaxpr.invars)
        results = [v for v in jaxpr.outvars[:outputs] if not _is_literal(v)]
        changed = [v for v in jaxpr.outvars[outputs:] if not _is_literal(v) and v not in kept]
        self._readers.update([*results, *changed])
        for equation in jaxpr.eqns:
            self._readers.update(v for v in equation.invars if not _is_literal(v))
            self._makers.update(dict.fromkeys(equation.outvars, equation))
            name = str(equation.params.get("name", ""))
            if name.startswith(_MARK):
                self.call[name.removeprefix(_MARK)] = equation


_WATCHING: ContextVar[Calls] = ContextVar("_WATCHING")


@cache
def _watched(kind: type[nnx.Module]) -> type[nnx.Module]:
    """The class ``kind``, each call of which has a name in a trace."""

    class Watched(kind):  # type: ignore[valid-type, misc]
        def __call__(self, *args: Any, **options: Any) -> Any:
            calls, name = _WATCHING.get(), getattr(self, _NAME)
            calls.often[name] += 1
            if issubclass(kind, NORMS) and _differs(self, calls, *args, **options):
                return kind.__call__(self, *args, **options)
            if not args:
                args = (options.pop("x" if "x" in options else "inputs"),)
            x, *rest = args

            def run(x: Any) -> Any:
                return kind.__call__(self, x, *rest, **options)

            run.__name__ = _MARK + name
            y = jax.jit(run)(x)
            calls.given[name], calls.made[name] = x.shape, y.shape
            return y

    return Watched


def _differs(
    norm: Any, calls: Calls, x: Any, use_running_average: bool | None = None, *, mask: Any = None
) -> bool:
    """Whether this call is more than to multiply each channel by a number and to add another."""
    running = norm.use_running_average if use_running_average is None else use_running_average
    if not running or norm.mean is None:
        calls.training.add(getattr(norm, _NAME))
    if mask is not None:
        calls.masked.add(getattr(norm, _NAME))
    return not running or norm.mean is None or mask is not None


def _is_object(leaf: Any) -> bool:
    """Whether ``leaf`` is handed on as it is, such as ``nnx.Rngs``."""
    return isinstance(leaf, nnx.Pytree)


def _is_literal(v: Any) -> bool:
    """Whether a variable of a trace is a number."""
    return hasattr(v, "val")
