"""normkit.flax at the edges: nothing, one value, huge and tiny ones, NaN, and what does not fit."""

from __future__ import annotations

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.errors import ScopeParamShapeError

import normkit as nk
import normkit.flax.linen as nkl
import normkit.flax.nnx as nkx
from harness.flax_layers import BOTH, EVERY, NATIVE, Layer, X, close, random_parameters

TRACKING = {"track_running_stats": True}
AXES = {"BatchNorm": (0, 1), "GroupNorm": (1, 3), "InstanceNorm": (1,)}
REMEMBERING = pytest.mark.parametrize(
    ("norm", "options"),
    [
        (norm, options | more)
        for norm, options in (("BatchNorm", {}), ("InstanceNorm", TRACKING))
        for more in ({}, {"momentum": None, "correction": 1})
    ],
)


def ours(api, norm, **options):
    layer = Layer(api, NATIVE[api, norm][1], **options)
    layer.params = random_parameters(layer)
    return layer


def exact(layer, norm, x, eps=1e-6):
    """In float64."""
    x = np.asarray(x, np.float64)
    z = x.reshape(*x.shape[:-1], 2, 2) if norm == "GroupNorm" else x
    axes = AXES.get(norm, (2,))
    mean = 0 if norm == "RMSNorm" else z.mean(axes, keepdims=True)
    y = (z - mean) / np.sqrt(((z - mean) ** 2).mean(axes, keepdims=True) + eps)
    y = y.reshape(x.shape) * np.asarray(layer.params["scale"])
    return jnp.asarray(y + np.asarray(layer.params.get("bias", 0)), jnp.float32)


@EVERY
def test_nothing(api, norm):
    """No samples, no positions, no features: output of that shape, and nothing is remembered."""
    layer = ours(api, norm, **(TRACKING if norm == "InstanceNorm" else {}))
    before = layer.stats
    y, found = layer.step(X[0][:0], upstream=1.0)
    assert y.shape == (0, 5, 4)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(found))
    assert layer(X[0][:, :0]).shape == (6, 0, 4)
    close(layer.stats, before, bound=0)
    x = X[0][..., :0]
    assert Layer(api, NATIVE[api, norm][1], x=x)(x).shape == (6, 5, 0)


@BOTH
@REMEMBERING
def test_what_tells_nothing_is_not_remembered(api, norm, options):
    layer = ours(api, norm, **options)
    before = layer.stats
    bias = jnp.broadcast_to(layer.params["bias"], X[0].shape)
    close(layer(X[0] * jnp.nan, mask=jnp.zeros((6, 5), bool)), bias, bound=0)
    close(layer.stats, before, bound=0)
    single = X[0][:1, :1]
    close(layer(single), bias[:1, :1], bound=0)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(layer.stats))
    if options.get("correction"):
        close(layer.stats, before, bound=0)  # one value has no unbiased variance


@EVERY
def test_one_value(api, norm):
    """It is the mean, so the bias comes out; an RMSNorm leaves its sign."""
    x = X[0, :1, :1, :1] if norm != "GroupNorm" else X[0, :1, :1, :2]
    layer = Layer(api, NATIVE[api, norm][1], x=x)
    layer.params = random_parameters(layer)
    y = layer(x * 1e4)
    if norm == "RMSNorm":
        close(y, jnp.sign(x) * layer.params["scale"])
    else:
        close(y, jnp.broadcast_to(layer.params["bias"], x.shape), bound=0)
    portable = {"BatchNorm": nk.BatchNorm(1), "InstanceNorm": nk.InstanceNorm.flax(1)}
    portable["GroupNorm"] = nk.GroupNorm.flax(2, 2)
    if norm in portable:
        with pytest.raises(ValueError, match="needs more than one value"):
            called(api, portable[norm], x)


def called(api, definition, x):
    """A portable layer, called in training."""
    if api == "nnx":
        return nkx.layer(definition)(x)
    module = nkl.layer(definition)
    mode = {"use_running_average": False} if isinstance(module, nn.BatchNorm) else {}
    variables = module.init(jax.random.key(0), x, **mode)
    return module.apply(variables, x, mutable=["batch_stats"], **mode)


@EVERY
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_stay_in_their_own_group(api, norm, value):
    layer = ours(api, norm)
    x = X[0].at[2, 3, 1].set(value)
    y, (_, by_x) = layer.step(x)
    expected, (_, want) = ours(api, norm).step(X[0])
    reached = {
        "BatchNorm": np.s_[:, :, 1],
        "GroupNorm": np.s_[2, :, :2],
        "InstanceNorm": np.s_[2, :, 1],
    }.get(norm, np.s_[2, 3])
    others = np.ones(x.shape, bool)
    others[reached] = False
    close((y[others], by_x[others]), (expected[others], want[others]))
    assert bool(jnp.isnan(y[2, 3, 1]))


@EVERY
def test_integers_become_float32(api, norm):
    x = jnp.round(X[0] * 5).astype(jnp.int32)
    for options in ({}, {"use_scale": False}):
        layer = Layer(api, NATIVE[api, norm][1], **options)
        y = layer(x)
        assert y.dtype == jnp.float32
        close(y, layer(x.astype(jnp.float32)) if norm != "BatchNorm" else y)


@EVERY
@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_huge_and_tiny_values(api, norm, size):
    layer = ours(api, norm)
    x = jnp.clip(X[0], -1, 1) * np.float32(size)
    y, (by_params, by_x) = layer.step(x)
    close(y, exact(layer, norm, x, 1e-5 if norm == "BatchNorm" else 1e-6))
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves((by_params, by_x)))


@BOTH
def test_half_precision_squares_do_not_overflow(api):
    for norm in ("RMSNorm", "LayerNorm"):
        layer = ours(api, norm, dtype=jnp.float16)
        x = (X[0] * 1e4).astype(jnp.float16)
        y = layer(x)
        assert y.dtype == jnp.float16
        close(y.astype(jnp.float32), exact(layer, norm, x), bound=1e-3)


@EVERY
@pytest.mark.parametrize("eps", [1e-12, 1e3])
def test_extreme_epsilon(api, norm, eps):
    layer = ours(api, norm, epsilon=eps)
    close(layer(X[0]), exact(layer, norm, X[0], eps), bound=4e-6)


@EVERY
def test_no_epsilon_at_all(api, norm):
    """Which Flax accepts."""
    reference, cls = NATIVE[api, norm]
    a, b = Layer(api, reference, epsilon=0.0, use_fast_variance=False), Layer(api, cls, epsilon=0.0)
    close(b(X[0]), a(X[0]))


@EVERY
def test_another_number_of_channels(api, norm):
    """Refused in words, by normkit where the layer knows its length, by Flax where it does not."""
    layer = ours(api, norm)
    x = X[0][..., :2]
    if api == "linen":
        expected = (
            (ScopeParamShapeError, "expected to generate shape (2,)")
            if norm != "BatchNorm"
            else (ValueError, "mean must")
        )
    else:
        expected = (ValueError, f"{norm} needs an x of lengths (4,) along its axes (2,), but x has")
    with pytest.raises(expected[0], match=re.escape(expected[1])):
        layer(x)
    portable = getattr(nk, norm).flax(*((2, 4) if norm == "GroupNorm" else (4,)))
    with pytest.raises(ValueError, match="needs an x of lengths"):
        called(api, portable, x)


def test_refusals():
    rngs, key = nnx.Rngs(0), jax.random.key(0)
    first = (
        "the first axis is that of the samples, which are normalized one by one, but the channel "
        "axis {} of 3 dimensions is the same; move the axes of x."
    )
    channel = (
        "reduction_axes must include the channel axis, -1, but they are (0, 1) for an x of 3 "
        "dimensions; add it to them."
    )
    groups = (
        "either num_groups or group_size must be given, but they are {} and {}; with a group_size, "
        "num_groups=None takes back its default of 32."
    )
    divisible = "num_channels (4) must be divisible by num_groups (32), so that the groups are of"
    size = "the number of channels (4) must be a multiple of group_size (3), so that the groups"
    alone = (
        "nk.GroupNorm normalizes over all axes but the first, but the layer has reduction_axes="
        "(1, 2); no definition describes it."
    )
    several = "nk.InstanceNorm has one channel axis, but the layer has axes (1, 2); no definition"
    apart = "nk.RMSNorm normalizes over the axes of its parameters, but the layer has reduction_ax"
    running = "was passed to the constructor and at call time"
    tracking = nkl.InstanceNorm(track_running_stats=True, use_running_average=True)
    x = X[0]
    for error, sentence, refused in (
        (ValueError, first.format(0), lambda: nkx.InstanceNorm(6, feature_axes=0, rngs=rngs)(x)),
        (ValueError, first.format(0), lambda: nkl.InstanceNorm(feature_axes=(0, 1)).init(key, x)),
        (ValueError, first.format(0), lambda: nkx.GroupNorm(6, 2, axis=0, rngs=rngs)(x)),
        (ValueError, first.format(-3), lambda: nkl.GroupNorm(2, axis=-3).init(key, x)),
        (
            ValueError,
            channel,
            lambda: nkx.GroupNorm(4, 2, reduction_axes=(0, 1), rngs=rngs)(x),
        ),
        (ValueError, channel, lambda: nkl.GroupNorm(2, reduction_axes=(0, 1)).init(key, x)),
        (ValueError, groups.format(32, 2), lambda: nkl.GroupNorm(group_size=2).init(key, x)),
        (ValueError, groups.format(None, None), lambda: nkl.GroupNorm(None).init(key, x)),
        (ValueError, divisible, lambda: nkl.GroupNorm().init(key, x)),
        (ValueError, "does not divide", lambda: nkx.GroupNorm(4, rngs=rngs)),
        (ValueError, size, lambda: nkl.GroupNorm(None, 3).init(key, x)),
        (ValueError, alone, lambda: nkl.definition(nn.GroupNorm(2, reduction_axes=(1, 2)))),
        (
            ValueError,
            alone,
            lambda: nkx.definition(nnx.GroupNorm(4, 2, reduction_axes=(1, 2), rngs=rngs)),
        ),
        (ValueError, several, lambda: nkl.definition(nn.InstanceNorm(feature_axes=(1, 2)))),
        (ValueError, several, lambda: nkl.InstanceNorm(feature_axes=(1, 2), num_features=4)),
        (ValueError, apart, lambda: nkl.definition(nn.RMSNorm(reduction_axes=(1, 2)))),
        (ValueError, running, lambda: tracking.init(key, x, use_running_average=True)),
        (
            ValueError,
            "must be passed to the constructor or at call time",
            lambda: nkl.InstanceNorm(track_running_stats=True).init(key, x),
        ),
        (ValueError, "correction must be 0 or 1", lambda: nkl.InstanceNorm(correction=2)),
        (ValueError, "correction must be", lambda: nkx.InstanceNorm(4, correction=2, rngs=rngs)),
        (TypeError, "an axis must be an integer", lambda: nkl.GroupNorm(axis=0.5)),
        (TypeError, "an axis must be an integer", lambda: nkx.GroupNorm(4, axis=None, rngs=rngs)),
    ):
        with pytest.raises(error, match=re.escape(sentence)):
            refused()


@BOTH
def test_definitions_of_native_layers(api):
    x, rngs = X[0], nnx.Rngs(0)
    for kind, options, expected in (
        ("GroupNorm", {"num_groups": None, "group_size": 2}, nk.GroupNorm.flax(2, 4)),
        ("InstanceNorm", {"use_bias": False}, nk.InstanceNorm.flax(4, bias=False)),
        ("RMSNorm", {"epsilon": 1e-3}, nk.RMSNorm.flax(4, eps=1e-3)),
    ):
        native = NATIVE[api, kind][0]
        if api == "nnx":
            assert nkx.definition(native(4, rngs=rngs, **options)) == expected
        else:
            module = native(**options)
            variables = module.init(jax.random.key(0), x)
            assert nkl.definition(module, variables) == expected
            assert nkl.definition(module.bind(variables)) == expected
