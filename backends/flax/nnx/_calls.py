"""Which layers a model calls, and what is done with their outputs: found out by tracing it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from threading import RLock
from typing import Any

import jax
import numpy as np
from flax import nnx

from ._batch_norm import BatchNorm

NORMS = (nnx.BatchNorm, BatchNorm)
_WATCHED = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Conv, nnx.ConvTranspose, *NORMS)
# The attribute that says which layer one is, and what its computation is called in the trace.
_NAME, _MARK = "_normkit_name", "normkit_call:"
# The variables of a layer that are used in each of its calls.
_USED = ("kernel", "bias", "mean", "var", "scale")
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
        self._kept: set[Any] = set()
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
        """Whether someone else uses or changes the variables of a layer."""
        for attribute, value in vars(self.modules[name]).items():
            if isinstance(value, nnx.Variable):
                # A variable that is shared is known by its first path only.
                read = self._variables.get((*self._paths[name], attribute))
                if read is None or self._readers[read] > 1 or read not in self._kept:
                    return True
                # What it is called with was made of that variable.
                if attribute in _USED and read not in self.call[name].invars:
                    return True
        return False

    def steps(self, left_out: set[str]) -> list[Any]:
        """What the model does, step by step, but for the layers that are ``left_out``."""
        names: dict[Any, Any] = {v: path for path, v in self._variables.items()}
        for v in (*self._jaxpr.constvars, *self._jaxpr.invars):
            names.setdefault(v, f"input {len(names) - len(self._variables)}")
        found = []
        for equation in self._jaxpr.eqns:
            called = _called(equation)
            if called in left_out:
                names[equation.outvars[0]] = _name_of(equation.invars[-1], names)
                continue
            for i, v in enumerate(equation.outvars):
                names[v] = (len(found), i)
            # A layer may have other variables than before, and compute something else with them.
            given = equation.invars[-1:] if called is not None else equation.invars
            params = "" if called is not None else _ADDRESS.sub("", str(equation.params))
            made = [str(v.aval) for v in equation.outvars]
            given = [_name_of(v, names) for v in given]
            found.append((called, equation.primitive.name, params, given, made))
        return [*found, [_name_of(v, names) for v in self._results]]

    def _trace(self, model: Any, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        model = nnx.clone(model)
        model.eval()
        for path, node in nnx.iter_graph(model):
            if type(node) in _WATCHED:
                setattr(node, _NAME, ".".join(map(str, path)))
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
        with _watched(self):
            self._jaxpr = jaxpr = jax.make_jaxpr(run)(state, arrays).jaxpr
        for (path, _), v in zip(jax.tree.leaves_with_path(state), jaxpr.invars, strict=False):
            self._variables[tuple(key.key for key in path if hasattr(key, "key"))] = v
        self._read(jaxpr, outputs)

    def _read(self, jaxpr: Any, outputs: int) -> None:
        """Note who reads and makes what in the trace, whose first results are ``outputs``."""
        kept = set(jaxpr.invars)
        results = [v for v in jaxpr.outvars[:outputs] if not _is_literal(v)]
        changed = [v for v in jaxpr.outvars[outputs:] if not _is_literal(v) and v not in kept]
        self._results = [*jaxpr.outvars[:outputs], *changed]
        self._kept.update(v for v in jaxpr.outvars[outputs:] if not _is_literal(v))
        self._readers.update([*results, *changed])
        for equation in jaxpr.eqns:
            self._readers.update(v for v in equation.invars if not _is_literal(v))
            self._makers.update(dict.fromkeys(equation.outvars, equation))
            if (name := _called(equation)) is not None:
                self.call[name] = equation


_LOCK = RLock()  # the classes are everybody's


@contextmanager
def _watched(calls: Calls) -> Iterator[None]:
    """Where each call of a layer that has a name has it in a trace."""

    def named(kind: type[nnx.Module], original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def __call__(self: Any, *args: Any, **options: Any) -> Any:
            name = vars(self).get(_NAME) if type(self) is kind else None
            if name is None:
                return original(self, *args, **options)
            calls.often[name] += 1
            if issubclass(kind, NORMS) and _differs(self, calls, *args, **options):
                return original(self, *args, **options)
            if not args:
                args = (options.pop("x" if "x" in options else "inputs"),)
            x, *rest = args

            def run(x: Any) -> Any:
                return original(self, x, *rest, **options)

            run.__name__ = _MARK + name
            y = jax.jit(run)(x)
            calls.given[name], calls.made[name] = x.shape, y.shape
            return y

        return __call__

    with _LOCK:
        # A call is looked up in the class. The class itself stays: the model may ask for it.
        originals = {kind: vars(kind).get("__call__") for kind in _WATCHED}
        found = {kind: kind.__call__ for kind in _WATCHED}
        try:
            for kind, original in found.items():
                kind.__call__ = named(kind, original)
            yield
        finally:
            for kind, own in originals.items():
                if own is None:
                    del kind.__call__
                else:
                    kind.__call__ = own


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


def _called(equation: Any) -> str | None:
    """The name of the layer whose call an equation is."""
    name = str(equation.params.get("name", ""))
    return name.removeprefix(_MARK) if name.startswith(_MARK) else None


_ADDRESS = re.compile(r"\b0x[0-9a-f]+")


def _name_of(v: Any, names: dict[Any, Any]) -> Any:
    """What is said of a variable of a trace: where it comes from, or the number that it is."""
    return repr(v.val) if _is_literal(v) else names[v]
