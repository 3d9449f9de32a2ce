"""Take the running statistics of a model again, from data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.core import FrozenDict, freeze, unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from normkit import _checks, _recalibrate
from normkit._recalibrate import Recalibration, Statistics
from normkit.flax import _arguments

from ._batch_norm import BatchNorm
from ._instance_norm import InstanceNorm

Path = tuple[str, ...]

_OURS = (BatchNorm, InstanceNorm)
# What models call the mode that they are in, and what it is in inference.
_INFERENCE = {
    "train": False,
    "training": False,
    "is_training": False,
    "deterministic": True,
    "use_running_average": True,
}


def recalibrate(
    model: nn.Module,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    call: Callable[[nn.Module, Any, Any], Any] | None = None,
    one_pass: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Take the running statistics of every layer in ``model`` that keeps some again.

    Each layer, native or normkit's, gets the mean and the variance of all values that it sees in
    ``batches``, whatever their sizes are, as if they came in a single batch; an InstanceNorm gets
    the averages over all instances. They are merged in float64. The model is applied as in
    inference, and must not be compiled: leave ``jax.jit`` out. ``count``, if there is one, becomes
    the number of batches. ``variables`` stay as they are, also if anything is raised.

    The layers have their turn in the order in which they are called, with one pass over the data
    for each: what a layer sees depends on the statistics of those before it. Only of a layer that
    is called again on what became of its own result, it is seen with the statistics of before.

    Args:
        model: any module; it may itself be a normalization layer.
        variables: what ``model.init`` returned, or what became of it, with ``batch_stats``.
        batches: what yields the batches, each time it is iterated over: a ``tf.data.Dataset``, a
            ``DataLoader``, a list. A batch is the array to apply the model to, a tuple or list
            that begins with it, or a dict of keyword arguments. Of the arguments ``train``,
            ``training``, ``is_training``, ``deterministic`` and ``use_running_average``, those that
            the model has are given, as for inference.
        call: for any other batch or model: ``call(model, variables, batch)`` applies it.
        one_pass: take all statistics in a single pass, with the model as it is. That is as fast as
            it can be, but a layer behind another one learns what it sees with the old statistics
            of that one.
        progress: show a bar in the terminal, if the package tqdm is installed.

    Returns:
        New variables, with the same other collections.

    Raises:
        ValueError: there is no batch, or one without a batch axis; no layer keeps statistics, or
            one is not called, or called in training mode, sees too few values, or NaN; an iterator
            that gives its batches only once, where several passes are needed.
        TypeError: a batch is none of those above.

    >>> import jax
    >>> bn = nn.BatchNorm()
    >>> batches = [jnp.array([[1.0], [2.0], [3.0]]), jnp.array([[6.0]])]
    >>> variables = bn.init(jax.random.key(0), batches[0], use_running_average=True)
    >>> variables = recalibrate(bn, variables, batches)
    >>> {name: a.tolist() for name, a in variables["batch_stats"].items()}
    {'mean': [3.0], 'var': [3.5]}
    """
    stats = flatten_dict(unfreeze(variables.get("batch_stats", {})))
    paths = [path[:-1] for path in stats if path[-1] == "mean" and (*path[:-1], "var") in stats]
    found = {
        path: Statistics(
            "/".join(path) or type(model).__name__, 0, False, stats[*path, "mean"].dtype
        )
        for path in paths
    }
    passes = Recalibration(found, one_pass=one_pass)
    forward = _call if call is None else call

    def current() -> Any:
        new = {**variables, "batch_stats": unflatten_dict(stats)}
        return freeze(new) if isinstance(variables, FrozenDict) else new

    def write(path: Path, mean: Any, variance: Any, calls: int) -> None:
        for name, value in {"mean": mean, "var": variance, "count": calls}.items():
            old = stats.get((*path, name))
            if old is not None:
                stats[*path, name] = jnp.asarray(value, dtype=old.dtype).reshape(old.shape)

    def see(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        if context.method_name == "__call__" and layer.path in found:
            if not isinstance(layer, (nn.BatchNorm, InstanceNorm)):
                raise _unknown(layer)
            _checks.computes_as_its_class(layer, "__call__", "flax")
            statistics = found[layer.path]
            statistics.correction = getattr(layer, "correction", 0)
            statistics.apart = isinstance(layer, InstanceNorm)
            _see(passes, layer, *args, **kwargs)
        return next_call(*args, **kwargs)

    with nn.intercept_methods(see):
        passes.run(
            batches, lambda batch: forward(model, current(), batch), write, progress=progress
        )
    return current()


def _see(
    passes: Recalibration,
    layer: Any,
    x: Any,
    use_running_average: bool | None = None,
    *,
    mask: Any = None,
) -> None:
    """Before ``layer`` is called with these arguments."""
    if False in (use_running_average, layer.use_running_average):
        raise _recalibrate.in_training("/".join(layer.path) or type(layer).__name__)
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        x = x.astype(jnp.float32)
    axis = layer.feature_axes if isinstance(layer, InstanceNorm) else layer.axis
    passes.see(layer.path, x, axis, lambda: _weights(layer, x, axis, mask))


def _weights(layer: Any, x: Any, axis: Any, mask: Any) -> Any:
    if mask is None:
        return None
    if not isinstance(layer, _OURS):
        return _arguments.weights_of(x, jnp.asarray(mask, bool), None, False)
    axes = _arguments.positions(axis, x.ndim)
    return _arguments.weights_of(x, mask, axes[0] if len(axes) == 1 else None, layer.portable)


def _call(model: nn.Module, variables: Any, batch: Any) -> Any:
    """``model`` applied to a batch of the usual kinds."""
    known = inspect.signature(type(model).__call__).parameters
    mode = {name: value for name, value in _INFERENCE.items() if name in known}
    if getattr(model, "use_running_average", None) is not None:
        mode.pop("use_running_average", None)  # which is said once, and by the layer here
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if isinstance(batch, Mapping):
        return model.apply(variables, **{**mode, **batch})
    if not hasattr(batch, "shape"):
        wanted = "an array, a tuple or list that begins with one, or a dict of keyword arguments"
        raise _recalibrate.no_input(batch, wanted)
    _recalibrate.has_batch_axis(batch)
    return model.apply(variables, jnp.asarray(batch), **mode)


def _unknown(layer: nn.Module) -> ValueError:
    msg = (
        f"the batch_stats of {'/'.join(layer.path)!r} belong to a {type(layer).__name__}, which is "
        f"no BatchNorm of Flax' or normkit's, so it is not known what they mean; leave them out of "
        f"the variables, and put them back afterwards."
    )
    return ValueError(msg)
