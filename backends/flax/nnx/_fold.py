"""Fold the BatchNorms of a model into the layers before them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn import dtypes
from jax import Array, lax

import normkit as nk
from normkit import _unfolded
from normkit._report import Report

from . import _batch_norm
from ._calls import NORMS, Calls

# The classes that are folded.
_LAYERS = (nnx.Linear, nnx.Conv, nnx.ConvTranspose)
# What they may be told to compute with, and what they compute with if they are told nothing.
_FUNCTIONS = {
    "dot_general": lax.dot_general,
    "conv_general_dilated": lax.conv_general_dilated,
    "promote_dtype": dtypes.promote_dtype,
}


class Identity(nnx.Module):
    """What stands where a BatchNorm was, and takes the same arguments."""

    def __call__(
        self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None
    ) -> Array:
        """``x``. The layer before has normalized it, with the running statistics."""
        if mask is not None:
            msg = (
                "a BatchNorm that was folded into the layer before it takes no mask, but got one; "
                "give fold example inputs with which the model uses its mask."
            )
            raise ValueError(msg)
        return x


def fold(model: Any, *inputs: Any, **keywords: Any) -> tuple[Any, Report]:
    """A copy of ``model`` for inference, with each BatchNorm folded into the layer before it.

    The layer, an ``nnx.Linear`` or a convolution (grouped and transposed ones too), then has other
    weights and a bias, and the BatchNorm does nothing. Predictions are the same, up to rounding.
    Folded is only what is certain to be right: where, in eval mode, the output of the layer goes
    to the BatchNorm alone, and each is called once and shares nothing. A model whose own code looks
    at its layers, and would take another path without a BatchNorm, stays as it is.

    Args:
        model: any module. It is left as it is.
        inputs, keywords: of a call of ``model``, as an example: which layers follow each other is
            found out by tracing it, nothing is computed. What is no array is taken as it is.

    Returns:
        The copy, and a report that says of each BatchNorm what it was folded into, or why not.

    Raises:
        ValueError: there are no example inputs.

    >>> rngs = nnx.Rngs(0)
    >>> layers = nnx.Linear(3, 8, use_bias=False, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
    >>> folded, report = fold(nnx.Sequential(*layers), jnp.ones((1, 3)))
    >>> folded.layers[0].use_bias, type(folded.layers[1]).__name__
    (True, 'Identity')
    >>> print(report)
    | layer    | folded into | why not |
    | -------- | ----------- | ------- |
    | layers.1 | layers.0    |         |
    """
    if not inputs and not keywords:
        msg = (
            f"what the layers of this {type(model).__name__} are followed by is found out by "
            f"tracing a call of it; give fold the inputs of one, such as jax.numpy.ones((1, 8))."
        )
        raise ValueError(msg)
    folded = nnx.clone(model)
    calls = Calls(folded, inputs, keywords)
    rows = []
    for name, norm in calls.modules.items():
        if not isinstance(norm, nnx.BatchNorm):
            continue
        try:
            before = _layer_before(name, norm, calls)
            _fold_into(calls.modules[before], norm)
        except (TypeError, ValueError) as why:
            rows.append((name, "", str(why)))
        else:
            rows.append((name, before, ""))
    done = {name for name, before, _ in rows if before}
    if done and not _does_the_same(folded, calls, done, inputs, keywords):
        # Which of them it looks at is not known.
        folded = nnx.clone(model)
        rows = [(name, "", why or _unfolded.LOOKED_AT) for name, _, why in rows]
    return folded, Report(_unfolded.HEADS, tuple(rows))


def _does_the_same(folded: Any, calls: Calls, done: set[str], inputs: Any, keywords: Any) -> bool:
    """Whether the model's own code, which may look at its layers, takes the same path as before."""
    try:
        return Calls(folded, inputs, keywords).steps(set()) == calls.steps(done)
    except Exception:  # whatever a model raises that misses something
        return False


def _layer_before(name: str, norm: Any, calls: Calls) -> str:
    """The name of the layer that ``norm`` can be folded into; a ValueError if there is none."""
    if type(norm) not in NORMS:
        raise ValueError(_unfolded.own_class(norm))
    if norm.mean is None:
        raise ValueError(_unfolded.NO_STATISTICS)
    if name in calls.training:
        raise ValueError(_unfolded.TRAINING)
    if name in calls.masked:
        raise ValueError(_unfolded.MASKED)
    if calls.often[name] > 1:
        raise ValueError(_unfolded.OFTEN)
    call = calls.call.get(name)
    if call is None:
        raise ValueError(_unfolded.NOT_FOUND if not calls.often[name] else _unfolded.TRANSFORMED)
    if calls.shares(name):
        raise ValueError(_unfolded.SHARED)
    is_layer, before = calls.before(name)
    if not is_layer:
        raise ValueError(_unfolded.no_layer(before))
    layer = calls.modules[before]
    if type(layer) not in _LAYERS:
        raise ValueError(_unfolded.no_layer(f"a {type(layer).__name__}"))
    if calls.often[before] > 1:
        raise ValueError(_unfolded.layer_called_often(before))
    if calls.uses(before) > 1:
        raise ValueError(_unfolded.output_elsewhere(before))
    if calls.shares(before):
        raise ValueError(_unfolded.layer_shared(before))
    for option, usual in _FUNCTIONS.items():
        if getattr(layer, option, usual) is not usual:
            raise ValueError(_unfolded.special(before, f"a {option} of its own"))
    if calls.made[before] != calls.given[name]:
        raise ValueError(_unfolded.TRANSFORMED)
    rank = len(calls.given[name])
    axis = _batch_norm.describe(norm).axis % rank
    if axis != rank - 1:
        raise ValueError(_unfolded.other_axis(axis, before, rank - 1))
    x, y = call.invars[-1].aval, call.outvars[0].aval
    if x.dtype != y.dtype:
        raise ValueError(_unfolded.dtypes(before, x.dtype, y.dtype))
    for variable in (layer.kernel, layer.bias):
        if variable is not None and jnp.finfo(variable.dtype).bits < jnp.finfo(x.dtype).bits:
            raise ValueError(_unfolded.narrow(before, variable.dtype, x.dtype))
    return before


def _fold_into(layer: Any, norm: Any) -> None:
    """Do it, in place. Whoever holds the two still does."""
    given = {"scale": norm.scale, "bias": norm.bias}
    kernel = layer.kernel[...]
    # In NumPy there is float64.
    weight, bias = nk.fold(
        np.asarray(kernel),
        None if layer.bias is None else np.asarray(layer.bias[...]),
        _batch_norm.describe(norm),
        {key: np.asarray(p[...]) for key, p in given.items() if p is not None},
        {"mean": np.asarray(norm.mean[...]), "var": np.asarray(norm.var[...])},
        channel_axis=-2 if getattr(layer, "transpose_kernel", False) else -1,
    )
    layer.kernel[...] = jax.device_put(weight, kernel.sharding)
    if layer.bias is None:
        layer.use_bias = True
        layer.bias = nnx.Param(jnp.asarray(bias))
    else:
        layer.bias[...] = jax.device_put(bias, layer.bias[...].sharding)
    for name in [name for name in vars(norm) if not name.startswith("_pytree__")]:
        delattr(norm, name)
    # Past the module's own __setattr__, which would note it down as one more attribute.
    object.__setattr__(norm, "__class__", Identity)
