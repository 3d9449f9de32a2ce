"""normkit.keras against the native layers and the core, on the backend that KERAS_BACKEND names."""

from __future__ import annotations

import inspect
import itertools

import keras
import numpy as np
import pytest
from keras import ops

import normkit as nk
import normkit.keras as nkk
from harness.keras_layers import (
    OURS,
    PAIRS,
    RMS,
    all_close,
    backward,
    close,
    make,
    numpy,
    training,
    without_name,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

BACKEND = keras.backend.backend()
RNG = np.random.default_rng(0)
X = RNG.normal(0.5, 2.0, (6, 5, 4)).astype("float32")
UPSTREAM = RNG.normal(size=X.shape).astype("float32")


def twins(native, ours, x=X, **options):
    """The native layer and ours, built, with the same weights, none of them as at the start."""
    pair = native(**options), ours(**options)
    for layer in pair:
        layer.build(x.shape)
    rng = np.random.default_rng(1)
    values = [rng.uniform(0.5, 1.5, w.shape) for w in pair[0].get_weights()]
    for layer in pair:
        layer.set_weights(values)
    return pair


@pytest.mark.parametrize(("native", "ours"), PAIRS)
def test_the_signature_is_the_native_one_and_keyword_only_additions(native, ours):
    expected = inspect.signature(native).parameters
    found = inspect.signature(ours).parameters
    assert [(p.name, p.default, p.kind) for p in expected.values()] == [
        (p.name, p.default, p.kind) for p in found.values() if p.name in expected
    ]
    added = [p for p in found.values() if p.name not in expected]
    assert all(p.kind is p.KEYWORD_ONLY for p in added)
    assert without_name(ours()) == without_name(native())


BN_OPTIONS = [
    {"axis": axis, "momentum": momentum, "epsilon": eps, "center": center, "scale": scale}
    for axis, (momentum, eps), center, scale in itertools.product(
        (-1, 1, -2), ((0.99, 1e-3), (0.5, 0.1)), (True, False), (True, False)
    )
]


@pytest.mark.parametrize("options", BN_OPTIONS)
def test_batch_norm_computes_what_the_native_layer_does(options):
    native, ours = twins(*PAIRS[0], **options)
    assert without_name(native) == without_name(ours)
    assert [w.name for w in native.weights] == [w.name for w in ours.weights]
    for step in range(3):
        x = X * (step + 1)
        for found, expected in zip(
            backward(ours, x, UPSTREAM, training=True),
            backward(native, x, UPSTREAM, training=True),
            strict=True,
        ):
            all_close(found, expected) if isinstance(found, list) else close(found, expected)
        all_close(ours.get_weights(), native.get_weights())
    close(ours(X), native(X))
    close(ours(X, training=False), native(X, training=False))


# On PyTorch the native layer fails for an axis that is not among the last ones.
LN_AXES = [-1, [-1], [1, 2], [-2, -1], (2, 1)] + [1, [-2], [0, 2]] * (BACKEND != "torch")


@pytest.mark.parametrize("axis", LN_AXES, ids=str)
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("scale", [True, False])
def test_layer_norm_computes_what_the_native_layer_does(axis, center, scale):
    native, ours = twins(*PAIRS[1], axis=axis, center=center, scale=scale, epsilon=0.01)
    assert without_name(native) == without_name(ours)
    assert [w.name for w in native.weights] == [w.name for w in ours.weights]
    y, gradients = backward(ours, X, UPSTREAM)
    expected, expected_gradients = backward(native, X, UPSTREAM)
    close(y, expected)
    all_close(gradients, expected_gradients)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, (0, 1), (1, -1), (0, -2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_layer_norm_is_right_for_any_axes_and_mean(axis, offset):
    x = (X + np.float32(offset)).astype("float32")
    layer = nkk.LayerNormalization(axis=axis)
    layer.build(x.shape)
    values = [RNG.uniform(0.5, 1.5, w.shape) for w in layer.get_weights()]
    layer.set_weights(values)
    axes = tuple(sorted(a % 3 for a in np.atleast_1d(axis)))
    gamma, beta = (
        v.reshape([n if a in axes else 1 for a, n in enumerate(x.shape)]) for v in values
    )
    exact = x.astype("float64")
    exact = exact - exact.mean(axes, keepdims=True)
    exact /= np.sqrt((exact * exact).mean(axes, keepdims=True) + 1e-3)
    close(layer(x), exact * gamma + beta)


@pytest.mark.parametrize(
    "options",
    [
        {"beta_regularizer": "l2", "gamma_regularizer": keras.regularizers.L1(0.1)},
        {"gamma_constraint": "non_neg", "beta_constraint": keras.constraints.MaxNorm(1.0)},
        {"gamma_initializer": keras.initializers.Constant(0.5), "beta_initializer": "ones"},
        {"name": "named", "dtype": "mixed_bfloat16", "trainable": False},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize(("native", "ours"), PAIRS)
def test_options_of_the_native_layer_are_kept(native, ours, options):
    if ours is RMS[1] and "name" not in options:
        return
    layer, reference = make(ours, **options), make(native, **options)
    y, expected = layer(X), reference(X)
    assert y.dtype == expected.dtype
    all_close(layer.get_weights(), reference.get_weights())
    all_close(layer.losses, reference.losses)
    again = ours.from_config(layer.get_config())
    assert again.get_config() == layer.get_config()
    assert without_name(layer) == without_name(reference)


DELEGATED = [
    (*PAIRS[0], {"renorm": True, "renorm_clipping": {"rmax": 2.0}}),
    (*PAIRS[1], {"rms_scaling": True}),
] + [(*PAIRS[0], {"synchronized": True})] * (BACKEND == "tensorflow")


@pytest.mark.filterwarnings("ignore:You passed `rms_scaling=True`")
@pytest.mark.parametrize(("native", "ours", "options"), DELEGATED)
def test_what_the_core_does_not_do_is_left_to_the_native_layer(native, ours, options):
    reference, layer = twins(native, ours, **options)
    training = {} if ours is nkk.LayerNormalization else {"training": True}
    close(layer(X, **training), reference(X, **training))
    all_close(layer.get_weights(), reference.get_weights())


def second(layer, x, upstream, direction, **options):
    """The Hessian of sum(layer(x) * upstream), times ``direction``."""
    x, upstream, direction = (ops.convert_to_tensor(a) for a in (x, upstream, direction))
    if BACKEND == "jax":
        import jax

        def loss(x):
            values = [
                [v.value for v in w]
                for w in (layer.trainable_variables, layer.non_trainable_variables)
            ]
            return ops.sum(layer.stateless_call(*values, x, **options)[0] * upstream)

        return jax.grad(lambda x: ops.sum(jax.grad(loss)(x) * direction))(x)
    if BACKEND == "torch":
        import torch

        x = x.clone().requires_grad_()
        loss = (layer(x, **options) * upstream).sum()
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad((first * direction).sum(), x)[0]
    import tensorflow as tf

    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = ops.sum(layer(x, **options) * upstream)
        first = ops.sum(tape.gradient(loss, x) * direction)
    return outer.gradient(first, x)


@pytest.mark.parametrize("ours", OURS)
def test_second_derivatives(ours):
    layer = make(ours, axis=1, **({"groups": 1} if ours is nkk.GroupNormalization else {}))
    layer.build(X.shape)
    options = training(layer)
    direction = RNG.normal(size=X.shape).astype("float32")
    step = np.float32(1e-2)
    ahead, behind = (
        numpy(backward(layer, X + sign * step * direction, UPSTREAM, **options)[1][0])
        for sign in (1, -1)
    )
    expected = (ahead - behind) / (2 * step)
    found = numpy(second(layer, X, UPSTREAM, direction, **options))
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-3 * np.abs(expected).max())


@pytest.mark.parametrize("axis", [-1, 1, 0])
@pytest.mark.parametrize("form", ["no channel axis", "equal rank", "every value", "weights"])
def test_what_a_mask_leaves_out_reaches_nothing(axis, form):
    shape = [1 if a == axis % 3 and form != "every value" else n for a, n in enumerate(X.shape)]
    mask = RNG.random(shape) < 0.6
    x = np.where(mask, X, np.nan).astype("float32")
    if form == "weights":
        mask = mask * RNG.uniform(0.5, 2.0, shape).astype("float32")
    elif form == "no channel axis":
        mask = mask.squeeze(axis)
    layer = nkk.layer(nk.BatchNorm.keras(X.shape[axis], axis=axis, decay=0.5))
    layer.build(X.shape)
    params, state = nkk.definition(layer).init()
    expected, state = nkk.definition(layer).apply(params, state, X, training=True, mask=mask)
    y, gradients = backward(layer, x, UPSTREAM, training=True, mask=mask)
    close(y, expected)
    assert not numpy(y)[np.isnan(x)].any()
    all_close(layer.get_weights()[2:], [state["mean"], state["var"]])
    assert all(np.isfinite(numpy(g)).all() for g in gradients)
    # Where the moving statistics are used it plays no part, as natively.
    close(layer(X, mask=mask), layer(X))


@pytest.mark.parametrize("ours", OURS)
def test_statistics_are_those_of_the_input_before_it_is_rounded(ours):
    x = (X + 100).astype("float32")
    options = {"momentum": 0} if ours is nkk.BatchNormalization else {}
    exact, layer = make(ours, **options), make(ours, **options, dtype="mixed_bfloat16")
    expected, y = exact(x, **training(exact)), layer(x, **training(layer))
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    assert {w.dtype for w in layer.weights} == {"float32"}
    all_close(layer.get_weights(), exact.get_weights())
    close(ops.cast(y, "float32"), ops.cast(ops.cast(expected, "bfloat16"), "float32"))


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_half_input_is_not_rounded_twice(half):
    """Under a float32 policy the result is float32, and has all of its digits."""
    x = ops.cast(np.random.default_rng(0).normal(3, 2, (64, 4)).astype("float32"), half)
    exact = np.asarray(ops.convert_to_numpy(ops.cast(x, "float32"))).astype("float64")
    for layer, axis in ((nkk.BatchNormalization(), 0), (nkk.LayerNormalization(), 1)):
        y = layer(x, training=True) if axis == 0 else layer(x)
        mean, var = exact.mean(axis, keepdims=True), exact.var(axis, keepdims=True)
        np.testing.assert_allclose(
            ops.convert_to_numpy(y), (exact - mean) / np.sqrt(var + 1e-3), rtol=0, atol=2e-6
        )
