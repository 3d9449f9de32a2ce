"""What the tests of Keras layers share: comparing tensors, and going back through a layer."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops


def numpy(x):
    return ops.convert_to_numpy(x)


def close(found, expected, scale=1.0):
    """Equal to a few roundings in float32 of the largest number (or of ``scale``)."""
    found, expected = numpy(found), numpy(expected)
    assert found.shape == expected.shape
    largest = max(scale, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * largest)


def all_close(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        close(one, other)


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
