"""First and second derivatives, forward and reverse, against differences in float64."""

from __future__ import annotations

import numpy as np
import pytest

import normkit as nk
import normkit.numpy
from harness import backends
from normkit._arrays import backend_of
from normkit._engine import derivative
from normkit._statistics import averaging

RNG = np.random.default_rng(0)
X = RNG.normal(2, 1.5, (3, 4, 2))
MASK = RNG.integers(0, 4, X.shape) > 0
LAYERS = {
    "batch": nk.BatchNorm(4),
    "batch-eval": nk.BatchNorm(4),
    "layer": nk.LayerNorm(2),
    "layer-two": nk.LayerNorm((4, 2)),
    "layer-first": nk.LayerNorm(3, axes=0),
    "group": nk.GroupNorm(2, 4),
    "instance": nk.InstanceNorm(4, scale=True, bias=True),
    "rms": nk.RMSNorm(2, eps=1e-5),
    "rms-first": nk.RMSNorm(4, axes=1, eps=1e-5, zero_centered=True),
}
SCALES = {name: RNG.uniform(0.5, 1.5, d.parameter_shape) for name, d in LAYERS.items()}
BIASES = {name: RNG.normal(size=d.parameter_shape) for name, d in LAYERS.items()}
DIRECTION = RNG.normal(size=X.shape)


def layer(name, xp, mask=None):
    """A function of (x, scale, bias) in float64."""
    d = LAYERS[name]
    _, state = d.init(xp=xp, dtype=xp.float64)

    def f(x, scale, bias):
        params = {"scale": scale, "bias": bias} if d.bias else {"scale": scale}
        return d.apply(params, state, x, training=name == "batch", mask=mask)[0]

    return f


cases = pytest.mark.parametrize("masked", [False, True])
every = pytest.mark.parametrize("name", LAYERS)


if "torch" in backends.chosen():
    import torch

    @every
    @cases
    def test_torch(name, masked):
        f = layer(name, torch, torch.from_numpy(MASK) if masked else None)
        inputs = [torch.tensor(a, requires_grad=True) for a in (X, SCALES[name], BIASES[name])]
        assert torch.autograd.gradcheck(
            f, inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=False
        )
        assert torch.autograd.gradgradcheck(f, inputs, check_fwd_over_rev=True)


if "jax" in backends.chosen():
    import jax
    import jax.numpy as jnp
    from jax.test_util import check_grads

    @every
    @cases
    def test_jax(name, masked):
        with jax.enable_x64(True):
            of_arrays = layer(name, jnp, jnp.asarray(MASK) if masked else None)

            def f(x, scale, bias):
                # The differences that gradients are compared with are taken in NumPy.
                return of_arrays(jnp.asarray(x), scale, bias)

            inputs = tuple(jnp.asarray(a) for a in (X, SCALES[name], BIASES[name]))
            check_grads(f, inputs, order=2, modes=("fwd", "rev"), atol=1e-6, rtol=1e-6)
            check_grads(jax.jit(f), inputs, order=2, modes=("fwd", "rev"), atol=1e-6, rtol=1e-6)


if "tensorflow" in backends.chosen():
    import tensorflow as tf

    @every
    @cases
    @pytest.mark.parametrize("how", ["eager", "graph", "xla"])
    def test_tensorflow(name, masked, how):
        f = layer(name, tf, tf.constant(MASK) if masked else None)
        weight = tf.constant(DIRECTION)
        rest = tf.constant(SCALES[name]), tf.constant(BIASES[name])

        def value(x):
            return tf.reduce_sum(f(x, *rest) * weight + tf.sin(f(x, *rest)))

        def gradient(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = value(x)
            return tape.gradient(y, x)

        def hessian(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                g = gradient(x)
            return tape.jacobian(g, x, experimental_use_pfor=how != "xla")

        if how != "eager":
            gradient_of = tf.function(gradient, jit_compile=how == "xla")
            hessian_of = tf.function(hessian)
        else:
            gradient_of, hessian_of = gradient, hessian
        x = tf.constant(X)
        want = differences(lambda a: value(tf.constant(a)).numpy(), X)
        np.testing.assert_allclose(gradient_of(x).numpy(), want, rtol=0, atol=1e-7)
        want = differences(lambda a: gradient_of(tf.constant(a)).numpy(), X)
        np.testing.assert_allclose(
            hessian_of(x).numpy(), np.moveaxis(want, (0, 1, 2), (3, 4, 5)), rtol=0, atol=1e-7
        )


def differences(f, x, step=1e-5):
    """Central differences of ``f`` along each coordinate of ``x``, which come first."""
    out = []
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        out.append((f(up) - f(down)) / (2 * step))
    return np.array(out).reshape(*x.shape, *np.shape(out[0]))


@every
@cases
def test_numpy_backward(name, masked):
    mask = MASK if masked else None
    state = {}

    def value(x, scale, bias):
        n = nk.numpy.layer(LAYERS[name], dtype="float64")
        n.params = {"scale": scale, "bias": bias} if n.definition.bias else {"scale": scale}
        y = n(x, training=name == "batch", mask=mask)
        state["layer"] = n
        return float(np.sum(y * DIRECTION))

    inputs = [X, SCALES[name], BIASES[name]]
    value(*inputs)
    n = state["layer"]
    got = [n.backward(DIRECTION), *n.grads.values()]
    for i, g in enumerate(got):
        want = differences(lambda a, i=i: value(*[*inputs[:i], a, *inputs[i + 1 :]]), inputs[i])
        np.testing.assert_allclose(g, want, rtol=0, atol=1e-8)


@pytest.mark.parametrize("weighted", [False, True])
def test_one_formula_is_both_modes(weighted):
    """J u is the tangent of y along u; and J is symmetric, in the inner product of the weights."""
    backend, axes, eps = backend_of(X), (0, 2), 1e-3
    u, v = DIRECTION, RNG.normal(size=X.shape)
    weights = MASK.astype(float) if weighted else None
    if weighted:
        u, v = u * MASK, v * MASK

    def standard(a):
        return nk.batch_norm(a, eps=eps, mask=weights)

    _, variance = nk.moments(X, axes, weights=weights, keepdims=True)
    rstd = 1 / np.sqrt(variance + eps)
    _, average = averaging(X, axes, weights, backend)
    y, valid = standard(X), MASK if weighted else True
    ju, jv = (derivative(a, y, rstd, average) * valid for a in (u, v))
    step = 1e-6
    want = (standard(X + step * u) - standard(X - step * u)) / (2 * step)
    np.testing.assert_allclose(ju, want, rtol=0, atol=1e-8)
    np.testing.assert_allclose(np.sum(ju * v), np.sum(jv * u), rtol=1e-10)
