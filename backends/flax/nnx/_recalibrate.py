"""Take the running statistics of a model again, from data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import jax.numpy as jnp
from flax import nnx

from normkit import _checks, _recalibrate
from normkit._recalibrate import Recalibration, Statistics
from normkit.flax import _arguments

from ._batch_norm import BatchNorm
from ._convert import _modules
from ._instance_norm import InstanceNorm

_OURS = (BatchNorm, InstanceNorm)
_MODES = ("deterministic", "use_running_average")


def recalibrate(
    model: nnx.Module,
    batches: Iterable[Any],
    *,
    call: Callable[[Any, Any], Any] | None = None,
    one_pass: bool = False,
    progress: bool = True,
) -> nnx.Module:
    """Take the running statistics of every layer in ``model`` that keeps some again, in place.

    Each layer, native or normkit's, frozen or not, gets the mean and the variance of all values
    that it sees in ``batches``, whatever their sizes are, as if they came in a single batch; an
    InstanceNorm gets the averages over all instances. They are merged in float64. The model is in
    eval mode meanwhile, and must not be compiled: leave ``nnx.jit`` out. ``momentum`` stays as it
    is, and ``count``, if there is one, becomes the number of batches. If anything is raised, also
    by Ctrl-C, the model is as it was before.

    The layers have their turn in the order in which they are called, with one pass over the data
    for each: what a layer sees depends on the statistics of those before it. Only of a layer that
    is called again on what became of its own result, it is seen with the statistics of before.

    Args:
        model: any module; it may itself be a normalization layer.
        batches: what yields the batches, each time it is iterated over: a ``tf.data.Dataset``, a
            ``DataLoader``, a list. A batch is the array to call the model with, a tuple or list
            that begins with it, or a dict of keyword arguments.
        call: for any other batch or model: ``call(model, batch)`` calls one with the other.
        one_pass: take all statistics in a single pass, with the model as it is. That is as fast as
            it can be, but a layer behind another one learns what it sees with the old statistics
            of that one.
        progress: show a bar in the terminal, if the package tqdm is installed.

    Returns:
        ``model``.

    Raises:
        ValueError: there is no batch, or one without a batch axis; no layer keeps statistics, or
            one is not called, or called in training mode, sees too few values, or NaN; an iterator
            that gives its batches only once, where several passes are needed.
        TypeError: a batch is none of those above.

    >>> bn = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
    >>> batches = [jnp.array([[1.0], [2.0], [3.0]]), jnp.array([[6.0]])]
    >>> bn = recalibrate(bn, batches)
    >>> bn.mean[...].tolist(), bn.var[...].tolist(), bn.use_running_average
    ([3.0], [3.5], False)
    """
    modules = _modules(model)
    found = {
        id(layer): (path, layer)
        for path, layer in modules
        if isinstance(layer, (nnx.BatchNorm, InstanceNorm)) and _variables(layer)
    }
    for _, layer in found.values():
        _checks.computes_as_its_class(layer, "__call__", "flax")
    passes = Recalibration(
        {
            key: Statistics(
                ".".join(map(str, path)) or type(layer).__name__,
                getattr(layer, "correction", 0),
                isinstance(layer, InstanceNorm),
                layer.mean.dtype,
            )
            for key, (path, layer) in found.items()
        },
        one_pass=one_pass,
    )
    modes = [
        (module, name, vars(module)[name])
        for _, module in modules
        for name in _MODES
        if name in vars(module)
    ]
    values = [(v, v[...]) for _, layer in found.values() for v in _variables(layer).values()]
    forward = _call if call is None else call

    def write(key: int, mean: Any, variance: Any, calls: int) -> None:
        _, layer = found[key]
        new = {"mean": mean.reshape(-1), "var": variance.reshape(-1), "count": calls}
        for name, variable in _variables(layer).items():
            variable[...] = jnp.asarray(new[name], dtype=variable.dtype)

    try:
        for module, name, _ in modes:
            setattr(module, name, True)  # what model.eval() does
        with _seen(passes, {key: layer for key, (_, layer) in found.items()}):
            passes.run(batches, lambda batch: forward(model, batch), write, progress=progress)
    except BaseException:
        for variable, value in values:
            variable[...] = value
        raise
    finally:
        for module, name, mode in modes:
            setattr(module, name, mode)
    return model


@contextmanager
def _seen(passes: Recalibration, found: dict[int, Any]) -> Iterator[None]:
    """Where ``passes`` is told of each call of a layer that was ``found``."""
    active: set[int] = set()  # so that a class that calls its base class is seen once

    def told(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def __call__(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
            key = id(self)
            if key not in found or key in active:
                return original(self, x, *args, **kwargs)
            active.add(key)
            try:
                _see(passes, key, self, x, *args, **kwargs)
                return original(self, x, *args, **kwargs)
            finally:
                active.discard(key)

        return __call__

    # A call is looked up in the class, so it cannot be caught in the layer.
    classes = {type(layer): vars(type(layer)).get("__call__") for layer in found.values()}
    try:
        for cls in classes:
            cls.__call__ = told(cls.__call__)
        yield
    finally:
        for cls, original in classes.items():
            if original is None:
                del cls.__call__
            else:
                cls.__call__ = original


def _see(
    passes: Recalibration,
    key: int,
    layer: Any,
    x: Any,
    use_running_average: bool | None = None,
    *,
    mask: Any = None,
) -> None:
    """Before ``layer`` is called with these arguments."""
    if use_running_average is False:
        raise _recalibrate.in_training(type(layer).__name__)
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        x = x.astype(jnp.float32)
    axis = layer.feature_axes if isinstance(layer, InstanceNorm) else layer.axis
    passes.see(key, x, axis, lambda: _weights(layer, x, axis, mask))


def _weights(layer: Any, x: Any, axis: Any, mask: Any) -> Any:
    if mask is None:
        return None
    if not isinstance(layer, _OURS):
        return _arguments.weights_of(x, jnp.asarray(mask, bool), None, False)
    axes = _arguments.positions(axis, x.ndim)
    return _arguments.weights_of(x, mask, axes[0] if len(axes) == 1 else None, layer.portable)


def _call(model: Any, batch: Any) -> Any:
    """``model`` with a batch of the usual kinds."""
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if isinstance(batch, Mapping):
        return model(**batch)
    if not hasattr(batch, "shape"):
        wanted = "an array, a tuple or list that begins with one, or a dict of keyword arguments"
        raise _recalibrate.no_input(batch, wanted)
    _recalibrate.has_batch_axis(batch)
    return model(jnp.asarray(batch))


def _variables(layer: Any) -> dict[str, nnx.Variable[Any]]:
    """The variables of ``layer`` that are statistics or count them, by name."""
    found = {name: getattr(layer, name, None) for name in ("mean", "var", "count")}
    return {name: variable for name, variable in found.items() if variable is not None}
