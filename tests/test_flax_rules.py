"""normkit.flax where it is more than the native layers: masks, additions, definitions, errors."""

from __future__ import annotations

import itertools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import normkit as nk
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
    random_parameters,
)


@EVERY
def test_mask(api, norm):
    """Statistics and gradients of the valid values alone; the rest, NaN or not, is the bias."""
    native, ours = pair(api, norm)
    features = jnp.asarray([True, True, False, True])
    mask = {"LayerNorm": features, "RMSNorm": features}.get(norm, MASK)
    valid = jnp.broadcast_to(mask, X[0].shape)
    spoilt = jnp.where(valid, X[0], jnp.nan)
    y, (by_params, by_x) = ours.step(spoilt, mask=mask)
    if norm == "GroupNorm":
        mask = valid  # the native one takes no other
    expected = native(X[0], mask=mask)
    bias = jnp.broadcast_to(ours.params.get("bias", 0.0), y.shape)
    close(y, jnp.where(valid, expected, bias))
    close(ours.stats, native.stats)
    (_, native_stats), pullback = jax.vjp(
        lambda p, x: native.pure(p, native.stats, x, mask=mask), native.params, X[0]
    )
    quiet = jax.tree.map(jnp.zeros_like, native_stats)
    want_params, want_x = pullback((jnp.where(valid, UPSTREAM, 0), quiet))
    if norm != "RMSNorm":  # a masked position is the bias, so it counts there
        want_params["bias"] = UPSTREAM.sum((0, 1))
    close((by_params, by_x), (want_params, jnp.where(valid, want_x, 0)))
    if norm == "BatchNorm":
        y, (by_params, by_x) = ours.step(spoilt, mask=mask, training=False)
        close(y, jnp.where(valid, ours(X[0], training=False), bias))
        assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves((by_params, by_x)))


@EVERY
def test_padding_is_as_good_as_cutting(api, norm):
    """A batch padded with NaN gives what its valid part alone gives: bit for bit, where a step is
    normalized for itself; else with a mask along the reduced axes sums have another order."""
    ours = Layer(api, NATIVE[api, norm][1])
    ours.params = random_parameters(ours)
    # Samples are padded at the end; where each is normalized for itself, whole samples may be.
    whole = norm in ("GroupNorm", "InstanceNorm")
    mask = jnp.arange(6)[:, None] < 4 if whole else jnp.arange(5) < 3
    mask = jnp.broadcast_to(mask, (6, 5))
    x = jnp.where(mask[..., None], X[0], jnp.nan)
    cut = (slice(4),) if whole else (slice(None), slice(3))
    y, (by_params, by_x) = ours.step(x, mask=mask, upstream=jnp.where(mask[..., None], UPSTREAM, 0))
    padded, ours.stats = ours.stats, Layer(api, type(ours.module)).stats
    expected, (want_params, want_x) = ours.step(X[0][cut], upstream=UPSTREAM[cut])
    bound = 2e-6 if norm == "BatchNorm" or whole else 0
    close((y[cut], by_x[cut]), (expected, want_x), bound)
    close((by_params, padded), (want_params, ours.stats))
    rest = ~mask[..., None] & jnp.ones(4, bool)
    bias = jnp.broadcast_to(ours.params.get("bias", jnp.zeros(4)), y.shape)
    close((y[rest], by_x[rest]), (bias[rest], jnp.zeros_like(bias[rest])), bound=0)


@BOTH
def test_padded_steps_of_samples(api):
    """Steps of a sample that are masked take no part in GroupNorm and InstanceNorm."""
    for norm, options in (
        ("GroupNorm", {}),
        ("InstanceNorm", {}),
        ("InstanceNorm", {"track_running_stats": True}),
    ):
        ours = Layer(api, NATIVE[api, norm][1], **options)
        mask = jnp.broadcast_to(jnp.arange(5) < 3, (6, 5))
        x = jnp.where(mask[..., None], X[0], jnp.nan)
        y, (by_params, by_x) = ours.step(x, mask=mask)
        padded, ours.stats = ours.stats, Layer(api, type(ours.module), **options).stats
        close(y[:, :3], ours(X[0][:, :3]))
        close(padded, ours.stats)
        assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves((by_params, by_x)))


@BOTH
def test_forms_of_a_mask(api):
    layer = Layer(api, nkx.BatchNorm if api == "nnx" else nkl.BatchNorm)
    expected = layer.pure(layer.params, layer.stats, X[0], mask=MASK)
    forms = [MASK[..., 0], jnp.broadcast_to(MASK, X[0].shape), MASK.astype(int), 2.0 * MASK]
    for mask in forms:
        close(layer.pure(layer.params, layer.stats, X[0], mask=mask), expected)
    twice = jnp.concatenate([X[0], X[0][:2]])
    weights = jnp.asarray([2, 2, 1, 1, 1, 1])[:, None, None]
    _, weighted = layer.pure(layer.params, layer.stats, X[0], mask=weights)
    close(weighted, layer.pure(layer.params, layer.stats, twice)[1])
    steps = jnp.asarray([[True] * 4] * 3 + [[False] * 4] * 2)  # (5, 4): broadcasts, as in Flax
    close(
        layer.pure(layer.params, layer.stats, X[0], mask=steps),
        layer.pure(layer.params, layer.stats, X[0], mask=steps[None]),
    )
    square, mask = jnp.ones((5, 5, 4)), jnp.ones((5, 4), bool)
    layer(square, mask=mask)  # only one reading fits
    square = jnp.ones((4, 4, 4))
    sentence = (
        "a mask of shape (4, 4) can be read in two ways for x of shape (4, 4, 4); give it the "
        "rank of x: (4, 4, 1) if it lacks the channel axis, (1, 4, 4) if it broadcasts."
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        layer(square, mask=jnp.ones((4, 4), bool))
    portable = Layer(api, type(layer.module), portable=True)
    rows = jnp.zeros((4, 4), bool).at[0].set(True)
    x = jnp.arange(64.0).reshape(4, 4, 4)
    close(
        portable.pure(portable.params, portable.stats, x, mask=rows),
        portable.pure(portable.params, portable.stats, x, mask=rows[..., None]),
    )


@BOTH
@pytest.mark.parametrize("options", [{}, {"momentum": None, "correction": 1}], ids=names)
def test_batches_without_information(api, options):
    layer = Layer(api, nkx.BatchNorm if api == "nnx" else nkl.BatchNorm, **options)
    before = layer.stats
    assert layer(jnp.zeros((0, 5, 4))).shape == (0, 5, 4)
    close(layer.stats, before, bound=0)
    layer.params = {"scale": jnp.full(4, 2.0), "bias": jnp.arange(4.0)}
    y = layer(X[0] * jnp.nan, mask=jnp.zeros((6, 5), bool))
    close((y, layer.stats), (jnp.broadcast_to(jnp.arange(4.0), y.shape), before), bound=0)
    y = layer(X[0, :1, 0])
    close(y, jnp.arange(4.0)[None], bound=0)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(layer.stats))
    if options:
        close(layer.stats, before, bound=0)  # one value has no unbiased variance


@BOTH
def test_additions_to_batch_norm(api):
    cls = nkx.BatchNorm if api == "nnx" else nkl.BatchNorm
    average = Layer(api, cls, momentum=None, correction=1)
    for x in X:
        average(x)
    assert (int(average.stats["count"]), average.stats["count"].dtype) == (3, jnp.int32)
    flat = X.reshape(3, 30, 4)
    close(average.stats["mean"], flat.mean((0, 1)))
    close(average.stats["var"], flat.var(1, ddof=1).mean(0))
    forgetful = Layer(api, cls, track_running_stats=False)
    assert forgetful.stats == {}
    close(forgetful(X[0], training=False), Layer(api, cls)(X[0]))
    if api == "linen":  # nothing to choose
        close(forgetful.module.apply({"params": forgetful.params}, X[0]), forgetful(X[0]))


# What Flax does with complex running statistics is not ours to mend.
@pytest.mark.filterwarnings("ignore:scatter inputs:FutureWarning")
@pytest.mark.filterwarnings("ignore:Casting complex values")
@EVERY
def test_what_is_left_to_the_native_layer(api, norm):
    """Statistics across replicas, and complex numbers: exactly what Flax computes."""
    reference, cls = NATIVE[api, norm]
    one = Layer(api, reference)
    found = []
    for c in (reference, cls):

        def apply(x, c=c):
            layer = Layer(api, c, axis_name="replicas")
            return layer.pure(one.params, one.stats, x)

        found.append(jax.vmap(apply, axis_name="replicas")(X))
    close(found[1], found[0], bound=0)
    layers = [Layer(api, c) for c in (reference, cls)]
    z = X[0] + 1j * X[1]
    found = [m(z) for m in layers]
    assert found[1].dtype == jnp.complex64
    np.testing.assert_array_equal(found[1], found[0])
    for text, options in ADDITIONS[norm]:
        sentence = (
            f"{norm} has {text}, which works neither across replicas (axis_name) nor on complex "
            f"numbers; leave it at its default there."
        )
        layer = Layer(api, cls, **options)
        with pytest.raises(ValueError, match=re.escape(sentence)):
            layer(z)


ADDITIONS = {
    "BatchNorm": [
        ("momentum=None", {"momentum": None}),
        ("correction=1", {"correction": 1}),
        ("track_running_stats=False", {"track_running_stats": False}),
        ("correction=1 and momentum=None", {"momentum": None, "correction": 1}),
    ],
    "GroupNorm": [("axis=1", {"axis": 1, "num_groups": 5})],
    "InstanceNorm": [("track_running_stats=True", {"track_running_stats": True})],
    "LayerNorm": [],
    "RMSNorm": [
        ("zero_centered=True", {"zero_centered": True}),
        ("scale_after_cast=True", {"scale_after_cast": True}),
        ("epsilon=None", {"epsilon": None}),
    ],
}


def test_nnx_group_norm_is_not_left_to_flax_where_flax_is_wrong():
    layer = nkx.GroupNorm(4, 2, reduction_axes=(-1,), axis_name="replicas", rngs=nnx.Rngs(0))
    sentence = (
        "across replicas (axis_name) and on complex numbers Flax computes, whose GroupNorm for NNX "
        "is wrong unless it keeps a single axis besides the channels', but reduction_axes=(-1,) of "
        "3 dimensions keep 2; use flax.linen.GroupNorm there."
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        layer(X[0])


DEFINITIONS = [
    *(
        nk.BatchNorm(4, **options)
        for options in product(axis=[1, -1], decay=[0.9, None], correction=[0, 1], scale=[True])
        + product(scale=[True, False], bias=[True, False], track_running_stats=[True, False])
    ),
    nk.BatchNorm.keras(4),
    *(
        nk.LayerNorm(shape, axes, scale=scale, bias=bias)
        for (shape, axes), scale, bias in itertools.product(
            [(4, None), (5, -2), ((5, 4), None), ((6, 4), (0, 2)), ((6, 5), (0, -2))],
            [True, False],
            [True, False],
        )
    ),
    nk.LayerNorm.flax(4),
    *(
        nk.GroupNorm(groups, 4, **options)
        for groups, options in itertools.product(
            [1, 2, 4], product(axis=[1, -1], scale=[True, False], bias=[True, False])
        )
    ),
    *(
        nk.InstanceNorm(4, axis=axis, track_running_stats=True, **options)
        for axis, options in itertools.product(
            [1, -1], product(decay=[0.9, None], correction=[0, 1], scale=[True, False])
        )
    ),
    nk.InstanceNorm.flax(4),
    *(
        nk.RMSNorm(shape, axes, **options)
        for (shape, axes), options in itertools.product(
            [(4, None), (5, -2), ((5, 4), None), ((6, 5), (0, -2))],
            product(scale=[True, False], eps=[None, 1e-5]),
        )
    ),
    nk.RMSNorm.flax(4, zero_centered=True, scale_after_cast=True),
]


@pytest.mark.parametrize("definition", DEFINITIONS, ids=str)
def test_definitions_and_layers(definition):
    adapters = {"nnx": nkx, "linen": nkl}
    x = jnp.swapaxes(X[0], 1, 2) if getattr(definition, "axis", 0) == 1 else X[0]
    params, state = definition.init(xp=jnp)
    expected, new = definition.apply(params, state, x, training=True)
    for api, adapter in adapters.items():
        layer = adapter.layer(definition)
        assert adapter.definition(layer) == definition
        if api == "nnx":
            close(layer(x), expected)
            assert nnx.to_pure_dict(nnx.state(layer, nnx.Param)).keys() == params.keys()
            found = nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))
        else:
            switched = getattr(definition, "track_running_stats", False)
            mode = {"use_running_average": False} if switched else {}
            variables = layer.init(jax.random.key(0), x, **mode)
            assert variables.get("params", {}).keys() == params.keys()
            y, found = layer.apply(variables, x, mutable=["batch_stats"], **mode)
            close(y, expected)
            found = found.get("batch_stats", {})
        for name, value in found.items():
            close(value, new[name].astype(new[name].dtype))


def test_definitions_of_native_layers():
    options = {"use_scale": False, "epsilon": 0.5}
    batch = nk.BatchNorm.flax(4, scale=False, eps=0.5)
    several = {"reduction_axes": (1, 2), "feature_axes": (2, 1)}
    layer = nk.LayerNorm((5, 4), (1, 2), eps=0.5, scale=False)
    rngs = nnx.Rngs(0)
    assert nkx.definition(nnx.BatchNorm(4, rngs=rngs, **options)) == batch
    assert nkx.definition(nnx.LayerNorm(4, rngs=rngs)) == nk.LayerNorm.flax(4)
    for module, expected in (
        (nn.BatchNorm(False, **options), batch),
        (nn.LayerNorm(**several, **options), layer),
        (
            nn.BatchNorm(False, use_scale=False, use_bias=False),
            nk.BatchNorm.flax(4, scale=False, bias=False),
        ),
    ):
        variables = module.init(jax.random.key(0), X[0])
        assert nkl.definition(module, variables) == expected
        assert nkl.definition(module.bind(variables)) == expected


def test_refusals():
    rngs, key = nnx.Rngs(0), jax.random.key(0)
    lengths = (
        "{} needs an x of lengths (3,) along its axes (2,), but x has shape (6, 5, 4): lengths "
        "(4,). Define the layer for these, or move the axes of x."
    )
    one = (
        "BatchNorm in training needs more than one value per channel, but got one: its variance "
        "is not defined. Use a larger batch, or the running statistics."
    )
    axes = "nk.BatchNorm has one channel axis, but the layer has axes (1, 2); no definition descri"
    apart = (
        "nk.LayerNorm normalizes over the axes of its parameters, but the layer has reduction_axes"
        "=(1, 2) and feature_axes=-1; no definition describes it."
    )
    flat = (
        "the length of x along each of the axes (1, 2) is not known: the layer keeps flat "
        "parameters of 20 features. Give num_features= the lengths, as a tuple."
    )
    unknown = (
        "a LayerNorm of Flax Linen learns the lengths of x when it is called, so its definition "
        "can only be read together with its variables, and none were found; call "
        "definition(layer, variables) with what layer.init() returned."
    )
    integer = "x must hold real floating-point numbers, but its dtype is int32"
    several = {"reduction_axes": (1, 2), "feature_axes": (1, 2)}
    portable = nkl.layer(nk.BatchNorm(4, axis=-1))
    variables = portable.init(key, X[0, :1, 0], use_running_average=False)  # of one row: fine
    single = {"mutable": ["batch_stats"], "use_running_average": False}
    for error, sentence, refused in (
        (ValueError, lengths.format("BatchNorm"), lambda: nkx.BatchNorm(3, rngs=rngs)(X[0])),
        (ValueError, lengths.format("LayerNorm"), lambda: nkx.LayerNorm(3, rngs=rngs)(X[0])),
        (ValueError, lengths.format("LayerNorm"), lambda: nkl.LayerNorm(shape=3).init(key, X[0])),
        (
            ValueError,
            lengths.format("BatchNorm"),
            lambda: nkl.BatchNorm(False, num_features=3).init(key, X[0]),
        ),
        (ValueError, one, lambda: nkx.layer(nk.BatchNorm(4))(X[0, :1, 0])),
        (ValueError, one, lambda: portable.apply(variables, X[0, :1, 0], **single)),
        (ValueError, axes, lambda: nkl.definition(nn.BatchNorm(axis=(1, 2)))),
        (ValueError, axes, lambda: nkl.BatchNorm(axis=(1, 2), num_features=4)),
        (ValueError, apart, lambda: nkl.definition(nn.LayerNorm(reduction_axes=(1, 2)))),
        (
            ValueError,
            apart,
            lambda: nkx.definition(nnx.LayerNorm(4, reduction_axes=(1, 2), rngs=rngs)),
        ),
        (ValueError, flat, lambda: nkx.definition(nnx.LayerNorm(20, rngs=rngs, **several))),
        (ValueError, unknown, lambda: nkl.definition(nn.LayerNorm())),
        (ValueError, "correction must be 0 or 1", lambda: nkl.BatchNorm(correction=2)),
        (ValueError, "correction must be", lambda: nkx.BatchNorm(4, correction=2, rngs=rngs)),
        (ValueError, "must name the same number", lambda: nkl.LayerNorm(shape=(2, 3))),
        (ValueError, "must name the same", lambda: nkx.LayerNorm((2, 3), rngs=rngs)),
        (TypeError, integer, lambda: nkx.layer(nk.LayerNorm(4))(jnp.ones((2, 4), int))),
        (TypeError, integer, lambda: nkl.layer(nk.LayerNorm(4)).init(key, jnp.ones((2, 4), int))),
        (TypeError, "a layer is built from a definition", lambda: nkx.layer(4)),
        (TypeError, "a layer is built from a definition", lambda: nkl.layer(4)),
        (TypeError, "but got a flax", lambda: nkx.definition(nnx.Dropout(0.5))),
        (TypeError, "but got a flax", lambda: nkl.definition(nn.Dropout(0.5))),
    ):
        with pytest.raises(error, match=re.escape(sentence)):
            refused()
