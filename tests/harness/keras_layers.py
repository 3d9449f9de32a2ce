"""What the tests of Keras layers share: comparing tensors, and going back through a layer."""

from __future__ import annotations

import itertools

import keras
import numpy as np
from keras import layers, ops

import normkit.keras as nkk

# The native layers and ours.
BATCH = (layers.BatchNormalization, nkk.BatchNormalization)
LAYER = (layers.LayerNormalization, nkk.LayerNormalization)
GROUP = (layers.GroupNormalization, nkk.GroupNormalization)
RMS = (layers.RMSNormalization, nkk.RMSNormalization)
PAIRS = [BATCH, LAYER, GROUP, RMS]
OURS = [*(ours for _, ours in PAIRS), nkk.InstanceNormalization]


def make(kind, **options):
    """A layer of ``kind`` for few channels: all but GroupNormalization need no other arguments."""
    return kind(**({"groups": 2} if kind in GROUP else {}) | options)


def training(layer):
    """How to call it for training."""
    return {"training": True} if layer._call_has_training_arg else {}


def without_name(layer):
    return {key: value for key, value in layer.get_config().items() if key != "name"}


def pairwise(choices):
    """Few combinations of the ``choices``, in which any two values of two options meet."""
    names = list(choices)
    left = {
        frozenset([(a, i), (b, j)])
        for a, b in itertools.combinations(names, 2)
        for i in range(len(choices[a]))
        for j in range(len(choices[b]))
    }
    found = []
    while left:
        row = dict(min(left, key=sorted))
        for name in sorted(set(names) - set(row)):

            def meets(i, name=name, row=row, left=left):
                return sum(frozenset([(name, i), pair]) in left for pair in row.items())

            row[name] = max(range(len(choices[name])), key=meets)
        left -= {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
        found.append({name: choices[name][row[name]] for name in names})
    return found


def numpy(x):
    return ops.convert_to_numpy(x)


def close(found, expected, scale=1.0, within=2e-6):
    """Equal to a few roundings in float32 of the largest number (or of ``scale``)."""
    found, expected = (np.asarray(numpy(a), "float64") for a in (found, expected))
    assert found.shape == expected.shape
    largest = max(scale, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=within * largest)


def all_close(found, expected, within=2e-6):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        close(one, other, within=within)


def backward(layer, x, upstream, **options):
    """The output, and the gradients of sum(output * upstream) by x and the trainable weights."""
    variables = layer.trainable_variables
    x, upstream = ops.convert_to_tensor(x), ops.convert_to_tensor(upstream)
    if keras.backend.backend() == "jax":
        import jax

        def loss(x, values):
            others = [v.value for v in layer.non_trainable_variables]
            y, others = layer.stateless_call(values, others, x, **options)
            return ops.sum(y * upstream), (y, others)

        differentiated = jax.grad(loss, argnums=(0, 1), has_aux=True)
        (by_x, by_weights), (y, others) = differentiated(x, [v.value for v in variables])
        for variable, value in zip(layer.non_trainable_variables, others, strict=True):
            variable.assign(value)
        return y, [by_x, *by_weights]
    if keras.backend.backend() == "torch":
        import torch

        x = x.clone().requires_grad_()
        y = layer(x, **options)
        return y, list(
            torch.autograd.grad((y * upstream).sum(), [x, *(v.value for v in variables)])
        )
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, **options)
        loss = ops.sum(y * upstream)
    return y, tape.gradient(loss, [x, *(v.value for v in variables)])
