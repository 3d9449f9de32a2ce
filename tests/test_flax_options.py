"""Every constructor option of every layer, mixed: normkit.flax against the native layers.

The values to compare with are those of Flax Linen in float32: half types round on the way there,
and NNX rounds to ``dtype`` before it takes statistics. Dtypes are compared with the layer of the
same API.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from harness.flax_layers import EVERY, NATIVE, UPSTREAM, Layer, X, close

MIXES = 6
NORMAL = jax.nn.initializers.normal(1.0)
AXES = [(-1, -1), (1, 1), ((1, 2), -1), ((-1, -2), (1, 2)), ((0, 1), (2,))]
COMMON = {
    "x": ["float32", "float32", "bfloat16", "int32"],
    "masked": [False, True],
    "dtype": [None, None, jnp.float32, jnp.bfloat16],
    "param_dtype": [jnp.float32, jnp.float32, jnp.bfloat16],
    "epsilon": [1e-3, 0.1],
    "use_scale": [True, True, False],
    "scale_init": [None, NORMAL],
    "use_fast_variance": [True, False],
}
BIAS = {"use_bias": [True, True, False], "bias_init": [None, NORMAL]}
OWN = {
    "BatchNorm": {"axis": [-1, 1], "momentum": [0.99, 0.5], "use_running_average": [None, False]},
    "GroupNorm": {
        "groups": [(1, None), (2, None), (None, 2)],
        "reduction_axes": [None, (0, -1), (1, 2), (0, 1, 2)],
    },
    "InstanceNorm": {"feature_axes": [-1, 1, (1, 2)]},
    "LayerNorm": {"axes": AXES},
    "RMSNorm": {"axes": AXES},
}
API = {
    "nnx": {"promote": [False, False, True], "scale_metadata": [{}, {"tag": 1}]},
    "linen": {"force_float32_reductions": [True, True, False]},
}


def mixes(api, norm):
    """As many mixes of options in which every value of every option occurs."""
    rng = np.random.default_rng(NORMS_SEED[api, norm])
    choices = COMMON | (BIAS if norm != "RMSNorm" else {}) | OWN[norm] | API[api]
    order = {name: rng.permutation(MIXES) for name in choices}
    return [
        {name: values[order[name][i] % len(values)] for name, values in choices.items()}
        for i in range(MIXES)
    ]


NORMS_SEED = {key: seed for seed, key in enumerate(NATIVE)}


def rounding(arrays, *, dtype=None):
    """A ``promote_dtype`` of the user's own."""
    return tuple(a if a is None else a.astype(jnp.bfloat16) for a in arrays)


def split(mix):
    """What is given to the constructor, what to the call, and what is done to the input."""
    options = {k: v for k, v in mix.items() if not (k.endswith("_init") and v is None)}
    kind, masked = options.pop("x"), options.pop("masked")
    if "groups" in options:
        options["num_groups"], options["group_size"] = options.pop("groups")
    if "axes" in options:
        options["reduction_axes"], options["feature_axes"] = options.pop("axes")
    if options.pop("promote", False):
        options["promote_dtype"] = rounding
    return options, kind, masked


@EVERY
@pytest.mark.parametrize("i", range(MIXES))
def test_mixes(api, norm, i):
    options, kind, masked = split(mixes(api, norm)[i])
    ctor = options.pop("use_running_average", None)
    reference, cls = NATIVE[api, norm]
    # With reduction axes of its own, the native GroupNorm of NNX is wrong or fails.
    without = {"reduction_axes": None} if (api, norm) == ("nnx", "GroupNorm") else {}
    ours, native = Layer(api, cls, **options), Layer(api, reference, **(options | without))
    close((ours.params, ours.stats), (native.params, native.stats), bound=0)
    if "scale_metadata" in options and options["use_scale"]:
        for layer in (ours, native):
            assert layer.module.scale.get_metadata().get("tag") == options["scale_metadata"].get(
                "tag"
            )
    if ctor is not None:  # said by the constructor, not by the call
        ours = Layer(api, cls, **options, use_running_average=ctor) if api == "nnx" else ours
    plain = {
        name: value
        for name, value in options.items()
        if name not in ("promote_dtype", "scale_metadata", "force_float32_reductions")
    } | {"use_fast_variance": False, "dtype": jnp.float32, "param_dtype": jnp.float32}
    exact = Layer("linen", NATIVE["linen", norm][0], **plain)
    shapes = {name: p.shape for name, p in exact.params.items()}
    exact.params = {name: ours.params[name].reshape(shape) for name, shape in shapes.items()}
    exact.params = jax.tree.map(lambda p: p.astype(jnp.float32), exact.params)
    masked &= options.get("feature_axes") != (1, 2)  # an InstanceNorm with one value to a channel
    mask = jnp.indices(X[0].shape).sum(0) % 3 > 0 if masked else None  # some along every axis
    valid = True if mask is None else mask
    rough = "promote_dtype" in options or not options.get("force_float32_reductions", True)
    half = rough or jnp.bfloat16 in (options["dtype"], options["param_dtype"]) or kind == "bfloat16"
    start = jax.tree.map(lambda a: (a.shape, a.dtype, a.weak_type), ours.stats)
    for x in X[:2]:
        x = (x * 3).astype(jnp.bfloat16).astype(kind)
        wide = x.astype(jnp.float32)
        upstream = jnp.where(valid, UPSTREAM, 0).astype(jnp.bfloat16).astype(jnp.float32)
        if kind == "int32":
            y, expected = ours(x, mask=mask), exact(wide, mask=mask)
        else:
            y, found = ours.step(x, mask=mask, upstream=upstream)
            expected, wanted = exact.step(wide, mask=mask, upstream=upstream)
            wanted = ({n: g.reshape(ours.params[n].shape) for n, g in wanted[0].items()}, wanted[1])
            if mask is not None:
                wanted = (wanted[0], jnp.where(mask, wanted[1], 0))
            near(found, wanted, 0.01 if half else 2e-6)
        theirs = native(x, mask=mask)
        assert (y.dtype, y.weak_type) == (theirs.dtype, theirs.weak_type)
        near(jnp.where(valid, y, 0), jnp.where(valid, expected, 0), 0.01 if half else 2e-6)
        near(ours.stats, exact.stats, 0.02 if rough else 2e-6)
        now = jax.tree.map(lambda a: (a.shape, a.dtype, a.weak_type), ours.stats)
        assert now == start
    if norm == "BatchNorm":
        y, expected = ours(x, training=False), exact(wide, training=False)
        near(y, expected, 0.03 if half else 2e-6)


def near(found, expected, bound):
    """Equal but for ``bound`` of the largest number; dtypes apart."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=bound * np.abs(b).max(initial=1))
