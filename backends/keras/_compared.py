"""Keras' layers beside normkit's, for ``python -m normkit bench`` and ``check``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

import normkit.keras
from normkit._arrays import backend_of
from normkit._commands import timing
from normkit._commands.cases import EPS, GROUPS, Case

NATIVE, NORMKIT = keras.layers, normkit.keras
LAYOUT = "channels last"
PACKAGES = ("keras", keras.backend.backend())
BACKEND = backend_of(ops.zeros(()))


def function(library: Any, case: Case, given: dict[str, Any], mode: str) -> Callable[..., Any]:
    """A function of x and the gradient of the result: the result, and gradients in that order."""
    layer = _layer(library, case)
    layer.build(given["x"].shape)
    names = {"scale": "scale" if case.layer == "RMSNorm" else "gamma", "bias": "beta"}
    for name in case.names:
        getattr(layer, names[name]).assign(given[name])
    options = {}
    if case.remembers:
        layer.moving_mean.assign(given["mean"])
        layer.moving_variance.assign(given["var"])
        options = {"training": case.training}
    return _RUNS[keras.backend.backend()](layer, case.gradient, mode, options)


def _layer(library: Any, case: Case) -> keras.layers.Layer:
    options = {"epsilon": EPS, "dtype": "mixed_bfloat16" if case.dtype == "bfloat16" else "float32"}
    match case.layer:
        case "BatchNorm":
            return library.BatchNormalization(**options)
        case "LayerNorm":
            return library.LayerNormalization(**options)
        case "RMSNorm":
            return library.RMSNormalization(**options)
        case "GroupNorm":
            return library.GroupNormalization(GROUPS, **options)
        case _:
            return library.GroupNormalization(-1, **options)


def _on_tensorflow(layer: Any, gradient: bool, mode: str, options: Any) -> Callable[..., Any]:
    import tensorflow as tf

    @tf.function(jit_compile=mode == "xla")
    def run(x: Any, g: Any) -> Any:
        if not gradient:
            return (layer(x, **options),)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, **options)
        sources = [x, *(v.value for v in layer.trainable_variables)]
        return y, *tape.gradient(y, sources, output_gradients=g)

    return run


def _on_jax(layer: Any, gradient: bool, mode: str, options: Any) -> Callable[..., Any]:
    import jax

    trainable = [v.value for v in layer.trainable_variables]
    rest = [v.value for v in layer.non_trainable_variables]

    @jax.jit
    def run(trainable: Any, rest: Any, x: Any, g: Any) -> Any:
        def forward(trainable: Any, x: Any) -> Any:
            return layer.stateless_call(trainable, rest, x, **options)

        if not gradient:
            return forward(trainable, x)
        y, pullback, state = jax.vjp(forward, trainable, x, has_aux=True)
        dtrainable, dx = pullback(g)
        return y, dx, dtrainable, state

    return lambda x, g: run(trainable, rest, x, g)


def _on_torch(layer: Any, gradient: bool, mode: str, options: Any) -> Callable[..., Any]:
    import torch

    def run(x: Any, g: Any) -> Any:
        if not gradient:
            return (layer(x, **options).detach(),)
        x = x.detach().requires_grad_()
        y = layer(x, **options)
        sources = [x, *(v.value for v in layer.trainable_variables)]
        return y.detach(), *torch.autograd.grad(y, sources, g)

    return run


_RUNS = {"tensorflow": _on_tensorflow, "jax": _on_jax, "torch": _on_torch}


def array(a: np.ndarray, dtype: str) -> Any:
    return ops.convert_to_tensor(np.ascontiguousarray(a), dtype=dtype)


def numpy(a: Any) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(ops.cast(a, "float32")))


def wait(result: Any) -> None:
    """Until it is there."""
    match keras.backend.backend():
        case "tensorflow":
            import tensorflow as tf

            tf.test.experimental.sync_devices()
        case "jax":
            import jax

            jax.block_until_ready(result)


def peak(run: Callable[..., Any], x: Any, g: Any) -> float | None:
    """How many MiB a call holds at its peak (see ``timing.peak``)."""
    match keras.backend.backend():
        case "tensorflow":
            # It keeps what is freed, but it counts.
            import tensorflow as tf

            before = tf.config.experimental.get_memory_info("CPU:0")["current"]
            tf.config.experimental.reset_memory_stats("CPU:0")
            run(x, g)
            return (tf.config.experimental.get_memory_info("CPU:0")["peak"] - before) / 2**20
        case "jax":
            import jax

            planned = jax.jit(run).lower(x, g).compile().memory_analysis()  # by XLA
            return (planned.temp_size_in_bytes + planned.output_size_in_bytes) / 2**20
    return timing.peak(run, x, g)


def device() -> str:
    return str(ops.zeros(()).device)
