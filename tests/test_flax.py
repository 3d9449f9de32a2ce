"""normkit.flax against the native layers: values, state, gradients, dtypes, transforms."""

from __future__ import annotations

import inspect
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.errors import ModifyScopeVariableError
from jax.test_util import check_grads

import normkit.flax.linen as nkl
import normkit.flax.nnx as nkx
from harness.flax_layers import (
    BOTH,
    EVERY,
    MASK,
    NATIVE,
    UPSTREAM,
    Layer,
    X,
    close,
    names,
    pair,
    product,
)

AFFINE = {"use_scale": [True, False], "use_bias": [True, False]}
MOVING = [{"momentum": 0.99, "epsilon": 1e-5}, {"momentum": 0.5, "epsilon": 0.1}]
BATCH = [a | b for a, b in itertools.product(product(axis=[-1, 1, 0], **AFFINE), MOVING)]
AXES = [(-1, -1), (1, 1), ((1, 2), -1), ((-1, -2), (1, 2)), ((0, 1), (2,)), ((0, 2, -1), 1)]
LAYER = [
    {"reduction_axes": r, "feature_axes": f, "epsilon": 0.1 if affine["use_bias"] else 1e-6}
    | affine
    for (r, f), affine in itertools.product(AXES, product(**AFFINE))
]


@BOTH
@pytest.mark.parametrize("options", BATCH, ids=names)
def test_batch_norm_trains_and_evaluates_as_the_native_one(api, options):
    native, ours = pair(api, "BatchNorm", **options)
    for x in X:
        close(ours.step(x), native.step(x))
        close(ours.stats, native.stats)
    close(ours(X[0], training=False), native(X[0], training=False))


@pytest.mark.parametrize("axis", [(1, 2), (-1, 0)], ids=str)
def test_linen_batch_norm_of_several_channel_axes(axis):
    native, ours = pair("linen", "BatchNorm", axis=axis)
    for x in X[:2]:
        close(ours.step(x), native.step(x))
        close(ours.stats, native.stats)
    close(ours(X[0], training=False), native(X[0], training=False))
    mask = jnp.ones((6, 5, 4), bool).at[0].set(False)
    if axis == (1, 2):
        y, expected = ours(X[0], mask=mask), native(X[0], mask=mask)
        close((y[1:], ours.stats), (expected[1:], native.stats))


@BOTH
@pytest.mark.parametrize("options", LAYER, ids=names)
def test_layer_norm_is_the_native_one(api, options):
    native, ours = pair(api, "LayerNorm", **options)
    close(ours.step(X[0]), native.step(X[0]))


# Two values to a group nearly cancel in gradients, unless epsilon is large.
GROUP = [
    # Two values to a group nearly cancel in gradients, unless epsilon is large.
    groups
    | {"reduction_axes": axes, "epsilon": 0.1 if i % 2 or axes == (-1,) else 1e-6}
    | {"use_scale": i % 3 > 0, "use_bias": i % 2 == 0}
    for i, (groups, axes) in enumerate(
        itertools.product(
            [{"num_groups": 1}, {"num_groups": 4}, {"num_groups": None, "group_size": 2}],
            [None, (1, 2), (-1,), (0, -1), (0, 1, 2)],
        )
    )
]


@BOTH
@pytest.mark.parametrize("options", GROUP, ids=names)
def test_group_norm_is_the_native_one(api, options):
    """That of Linen: with other reduction axes the one of NNX confuses positions."""
    native, _ = pair("linen", "GroupNorm", **options)
    ours = Layer(api, NATIVE[api, "GroupNorm"][1], **options)
    ours.params = native.params
    close(ours.step(X[0]), native.step(X[0]))
    if api == "nnx" and options["reduction_axes"] is None:
        native, ours = pair(api, "GroupNorm", **options)
        close(ours.step(X[0]), native.step(X[0]))
    if options["reduction_axes"] in [(0, -1), (-1,)]:  # as for a single sample, without its axis
        x = X[0, :, 0]
        options = options | {"reduction_axes": (0, -1)}
        native, ours = (
            Layer(a, c, x=x, **options)
            for a, c in (("linen", nn.GroupNorm), (api, NATIVE[api, "GroupNorm"][1]))
        )
        close(ours(x), native(x))


def test_native_nnx_group_norm_confuses_positions():
    """What the docstring says; if this fails, Flax has mended it."""
    native, ours = pair("nnx", "GroupNorm", reduction_axes=(-1,))
    assert float(jnp.abs(native(X[0]) - ours(X[0])).max()) > 0.1


@BOTH
def test_group_norm_of_a_single_vector(api):
    x = X[0, 0, 0]
    found = Layer(api, NATIVE[api, "GroupNorm"][1], x=x)(x)
    close(found, Layer("linen", nn.GroupNorm, x=x)(x))


@BOTH
@pytest.mark.parametrize(
    "options",
    product(feature_axes=[-1, 1, (1, 2), (-1, -2)], epsilon=[1e-6, 0.1], **AFFINE),
    ids=names,
)
def test_instance_norm_is_the_native_one(api, options):
    native, ours = pair(api, "InstanceNorm", **options)
    close(ours.step(X[0]), native.step(X[0]))


@BOTH
@pytest.mark.parametrize(
    "options",
    [
        {
            "reduction_axes": r,
            "feature_axes": f,
            "epsilon": 0.1 if used else 1e-6,
            "use_scale": used,
        }
        for (r, f), used in itertools.product(AXES, [True, False])
    ],
    ids=names,
)
def test_rms_norm_is_the_native_one(api, options):
    native, ours = pair(api, "RMSNorm", **options)
    close(ours.step(X[0]), native.step(X[0]))


@EVERY
def test_signature_begins_with_the_native_one(api, norm):
    native, ours = (inspect.signature(c.__init__).parameters for c in NATIVE[api, norm])
    added = set(ours) - set(native)
    assert [n for n in ours if n in native] == list(native)
    assert all(ours[name].kind is inspect.Parameter.KEYWORD_ONLY for name in added)
    for name in native:
        if not name.endswith("_init") and name != "self":
            assert ours[name].default == native[name].default, name
            assert ours[name].kind == native[name].kind, name
    native, ours = (inspect.signature(c.__call__) for c in NATIVE[api, norm])
    assert [n for n in ours.parameters if n in native.parameters] == list(native.parameters)
    for name, parameter in ours.parameters.items():
        if name in native.parameters:
            assert parameter.kind == native.parameters[name].kind
        else:
            assert parameter.kind is inspect.Parameter.KEYWORD_ONLY


@EVERY
def test_random_initial_values_and_their_types_are_the_native_ones(api, norm):
    init = jax.nn.initializers.normal()
    options = {"scale_init": init, "bias_init": init, "param_dtype": jnp.bfloat16}
    if norm == "RMSNorm":
        del options["bias_init"]
    native, ours = (Layer(api, cls, **options) for cls in NATIVE[api, norm])
    close((ours.params, ours.stats), (native.params, native.stats), bound=0)
    assert set(ours.params) == {"scale", "bias"} - ({"bias"} if norm == "RMSNorm" else set())
    assert set(ours.stats) == ({"mean", "var"} if norm == "BatchNorm" else set())
    if api == "nnx":
        types = [
            {path: type(v) for path, v in nnx.to_flat_state(nnx.state(layer.module))}
            for layer in (native, ours)
        ]
        assert types[0] == types[1]


def test_nnx_metadata_and_promote_dtype_are_honoured():
    def rounding(args, *, dtype=None):
        return tuple(a if a is None else a.astype(jnp.bfloat16) for a in args)

    options = {"scale_metadata": {"tag": 1}, "promote_dtype": rounding}
    layer = nkx.BatchNorm(4, rngs=nnx.Rngs(0), **options)
    native = nnx.BatchNorm(4, rngs=nnx.Rngs(0), use_fast_variance=False, **options)
    assert layer.scale.get_metadata("tag") == 1
    close((layer(X[0]), layer.mean[...]), (native(X[0]), native.mean[...]), bound=8e-3)
    # Statistics of the rounded input, as was asked for, not of the exact one.
    rounded = X[0].astype(jnp.bfloat16).astype(jnp.float32)
    close(layer.mean[...], 0.01 * rounded.mean((0, 1)))


DTYPES = product(
    x=["float32", "bfloat16", "int32"],
    param_dtype=["float32", "bfloat16"],
    dtype=[None, "float32", "bfloat16"],
)


@EVERY
@pytest.mark.parametrize("case", DTYPES, ids=names)
def test_dtype_of_the_result_is_the_native_one(api, norm, case):
    x = (X[0] * 3).astype(case["x"])
    options = {name: case[name] and jnp.dtype(case[name]) for name in ("param_dtype", "dtype")}
    native, ours = pair(api, norm, **options)
    y, expected = ours(x), native(x)
    assert (y.dtype, y.weak_type) == (expected.dtype, expected.weak_type)
    close(y.astype(jnp.float32), expected.astype(jnp.float32), bound=0.03)
    exact = Layer(api, NATIVE[api, norm][1])
    exact(x.astype(jnp.float32))
    close(ours.stats, exact.stats)  # nothing is rounded to dtype before statistics are taken


# Of the native layer, which rounds float64 to its float32 state by an implicit cast.
@pytest.mark.filterwarnings("ignore:scatter inputs:FutureWarning")
@EVERY
def test_float64_and_half_precision_state(api, norm):
    with jax.enable_x64(True):
        native, ours = pair(api, norm, param_dtype=jnp.float64, dtype=jnp.float64)
        x = jnp.asarray(np.asarray(X[0], np.float64)) + 0.1
        close(ours(x), native(x), bound=1e-13)
        assert ours.params["scale"].dtype == jnp.float64
        # Native Linen turns its float32 statistics into float64 here, which no scan can carry.
        close(ours.stats, jax.tree.map(lambda a: a.astype(jnp.float32), native.stats))
    if api == "linen":
        options = {"force_float32_reductions": False, "param_dtype": jnp.bfloat16}
        _, ours = pair(api, norm, **options)
        y = ours(X[0].astype(jnp.bfloat16))
        assert y.dtype == jnp.bfloat16
        assert {leaf.dtype for leaf in jax.tree.leaves(ours.stats)} <= {jnp.dtype("bfloat16")}


@EVERY
def test_large_offset(api, norm):
    _, ours = pair(api, norm)
    x = np.asarray(X[0] + 1e5, np.float64)
    grouped = norm == "GroupNorm"
    z = x.reshape(6, 5, 2, 2) if grouped else x
    axes = {"BatchNorm": (0, 1), "GroupNorm": (1, 3), "InstanceNorm": (1,)}.get(norm, (2,))
    eps = 1e-5 if norm == "BatchNorm" else 1e-6
    mean = 0 if norm == "RMSNorm" else z.mean(axes, keepdims=True)
    y = (z - mean) / np.sqrt(((z - mean) ** 2).mean(axes, keepdims=True) + eps)
    y = y.reshape(x.shape) * np.asarray(ours.params["scale"])
    y += np.asarray(ours.params.get("bias", 0))
    close(ours(X[0] + 1e5), jnp.asarray(y, jnp.float32))


@BOTH
def test_use_running_average(api):
    batch, running = X[0], X[0] / np.sqrt(np.float32(1 + 1e-5))  # after initialization
    if api == "nnx":
        layer = nkx.BatchNorm(4, rngs=nnx.Rngs(0), use_running_average=True)
        close(layer(batch), running)  # its own setting
        assert not np.allclose(layer(batch, use_running_average=False), running)  # the call wins
        model = nnx.Sequential(nkx.BatchNorm(4, rngs=nnx.Rngs(0)))
        model.eval()
        close(model(batch), running)
        model.train()
        assert not np.allclose(model(batch), running)
        layer = nkx.BatchNorm(4, rngs=nnx.Rngs(0), use_running_average=None)
        with pytest.raises(ValueError, match=r"^BatchNorm needs use_running_average, True or Fa"):
            layer(batch)
        assert nnx.view(layer, use_running_average=True)(batch).shape == batch.shape
        return
    layer = nkl.BatchNorm()
    variables = layer.init(jax.random.key(0), batch + 5, use_running_average=False)
    close(layer.apply(variables, batch, use_running_average=True), running)
    with pytest.raises(ValueError, match="must be passed to the constructor or at call time"):
        layer.apply(variables, batch)
    with pytest.raises(ValueError, match="was passed to the constructor and at call time"):
        nkl.BatchNorm(True).apply(variables, batch, use_running_average=True)
    for x in (batch, batch[:0]):
        with pytest.raises(ModifyScopeVariableError):
            layer.apply(variables, x, use_running_average=False)


@EVERY
def test_variables_move_between_native_layers_and_ours(api, norm):
    native, ours = pair(api, norm)
    native(X[0])
    ours(X[1])
    theirs, mine = (native.params, native.stats), (ours.params, ours.stats)
    for layer, values in ((ours, theirs), (native, mine)):
        layer.params, layer.stats = values
    options = {"training": False} if norm == "BatchNorm" else {}
    close(ours(X[2], **options), Layer.pure(native, *theirs, X[2], **options)[0])
    close(native(X[2], **options), Layer.pure(ours, *mine, X[2], **options)[0])
    if api == "nnx":
        reference, cls = NATIVE[api, norm]
        options = {"num_groups": 2} if norm == "GroupNorm" else {}
        a, b = (c(4, rngs=nnx.Rngs(0), **options) for c in (reference, cls))
        a(X[0])
        nnx.update(b, nnx.state(a))
        close(nnx.to_pure_dict(nnx.state(b)), nnx.to_pure_dict(nnx.state(a)), bound=0)
        nnx.update(a, nnx.state(cls(4, rngs=nnx.Rngs(0), **options)))


TRANSFORMED = {
    "BatchNorm": {"momentum": None, "correction": 1},
    "GroupNorm": {"reduction_axes": (0, -1)},
    "InstanceNorm": {"track_running_stats": True, "momentum": None, "correction": 1},
    "LayerNorm": {"reduction_axes": (1, -1), "feature_axes": -1},
    "RMSNorm": {"zero_centered": True, "scale_after_cast": True},
}


@EVERY
@pytest.mark.parametrize("more", [False, True])
def test_transforms(api, norm, more):
    options = TRANSFORMED[norm] if more else {}
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        layer = Layer(api, NATIVE[api, norm][1], **options)

        def step(stats, x, mask=None):
            y, stats = layer.pure(layer.params, stats, x, mask=mask)
            return stats, y

        for mask in (MASK.astype(jnp.float32) * 2,) if more else (None, MASK):
            start = layer.stats
            stats, ys = jax.lax.scan(lambda s, x, mask=mask: step(s, x, mask), start, X)
            for x, y in zip(X, ys, strict=True):
                start, expected = step(start, x, mask)
                close(y, expected)
            close(stats, start)
        abstract = jax.eval_shape(step, layer.stats, X[0])
        concrete = step(layer.stats, X[0])
        assert jax.tree.map(lambda a: (a.shape, a.dtype), abstract) == jax.tree.map(
            lambda a: (a.shape, a.dtype), concrete
        )
        mapped = jax.jit(jax.vmap(lambda x: step(layer.stats, x)))(X)
        close(jax.tree.map(lambda a: a[0], mapped), concrete)
        again = jax.checkpoint(lambda x: step(layer.stats, x)[1].sum())
        close(jax.grad(again)(X[0]), jax.grad(lambda x: step(layer.stats, x)[1].sum())(X[0]))
        half = step(layer.stats, X[0].astype(jnp.bfloat16))[1]
        assert half.dtype == jnp.float32


@pytest.mark.parametrize(
    ("norm", "api", "masked"),
    [
        ("BatchNorm", "nnx", False),
        ("GroupNorm", "linen", True),
        ("InstanceNorm", "nnx", True),
        ("LayerNorm", "linen", False),
        ("RMSNorm", "nnx", True),
    ],
)
def test_derivatives_to_second_order(norm, api, masked):
    with jax.enable_x64(True):
        layer = Layer(api, NATIVE[api, norm][1], param_dtype=jnp.float64)
        rng = np.random.default_rng(2)
        x = jnp.asarray(rng.normal(size=(3, 2, 4)))
        mask = jnp.asarray(rng.random((3, 2, 4)) < 0.7) if masked else None

        @jax.jit
        def f(params, x):
            return layer.pure(params, layer.stats, x, mask=mask)[0]

        check_grads(f, (layer.params, x), order=2, modes=["fwd", "rev"], atol=1e-5, rtol=1e-5)


def test_nnx_transforms_update_the_layer_itself():
    layer = nkx.BatchNorm(4, momentum=None, rngs=nnx.Rngs(0))
    same = nnx.clone(layer)

    @nnx.jit
    def train(layer, x):
        return nnx.grad(lambda layer: (layer(x) * UPSTREAM).sum())(layer)

    for x in X:
        by_jit = train(layer, x)
        by_hand = nnx.grad(lambda layer, x: (layer(x) * UPSTREAM).sum())(same, x)
        assert set(by_jit) == {"scale", "bias"}
        close(nnx.to_pure_dict(by_jit), nnx.to_pure_dict(by_hand))
    close(*(nnx.to_pure_dict(nnx.state(m, nnx.BatchStat)) for m in (layer, same)))
    assert int(layer.count[...]) == 3
    abstract = nnx.eval_shape(lambda: nkx.BatchNorm(4, momentum=None, rngs=nnx.Rngs(0)))
    assert jax.tree.map(jnp.shape, nnx.state(abstract)) == jax.tree.map(jnp.shape, nnx.state(same))
