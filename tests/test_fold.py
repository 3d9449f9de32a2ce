"""nk.fold: one layer that does what a layer and the BatchNorm after it do, on every library."""

from __future__ import annotations

import numpy as np
import pytest

import normkit as nk

N = 8  # output channels


def dense(x, w):
    return np.einsum("nil,io->nol", x, w)


def convolution(x, w, groups=1):
    """Channels first; ``w`` is (out, in / groups, k)."""
    length, each = x.shape[2] - w.shape[2] + 1, w.shape[0] // groups
    y = np.zeros((len(x), len(w), length))
    for o in range(len(w)):
        for i in range(w.shape[1]):
            for k in range(w.shape[2]):
                y[:, o] += x[:, o // each * w.shape[1] + i, k : k + length] * w[o, i, k]
    return y


def depthwise(x, w):
    """``w`` is (k, in, multiplier), and multiplier counts fastest."""
    length = x.shape[2] - len(w) + 1
    y = np.zeros((len(x), w.shape[1] * w.shape[2], length))
    for c in range(w.shape[1]):
        for m in range(w.shape[2]):
            for k in range(len(w)):
                y[:, c * w.shape[2] + m] += x[:, c, k : k + length] * w[k, c, m]
    return y


def transposed(x, w, groups=1):
    """``w`` is (in, out / groups, k)."""
    each, length = len(w) // groups, x.shape[2]
    y = np.zeros((len(x), w.shape[1] * groups, length + w.shape[2] - 1))
    for i in range(len(w)):
        for o in range(w.shape[1]):
            for k in range(w.shape[2]):
                y[:, i // each * w.shape[1] + o, k : k + length] += x[:, i] * w[i, o, k]
    return y


# The shape of the weight, where its output channels are, and what the layer computes.
CASES = {
    "dense": ((4, N), {"channel_axis": -1}, dense),
    "dense, out first": ((N, 4), {"channel_axis": 0}, lambda x, w: dense(x, w.T)),
    "convolution": ((N, 4, 3), {"channel_axis": 0}, convolution),
    "convolution, out last": (
        (3, 4, N),
        {"channel_axis": 2},
        lambda x, w: convolution(x, w.transpose(2, 1, 0)),
    ),
    "grouped": ((N, 2, 3), {"channel_axis": 0}, lambda x, w: convolution(x, w, 2)),
    "depthwise": ((3, 4, 2), {"channel_axis": (1, 2)}, depthwise),
    "depthwise, turned": (
        (3, 2, 4),
        {"channel_axis": (-1, 1)},
        lambda x, w: depthwise(x, w.transpose(0, 2, 1)),
    ),
    "transposed": ((4, N, 3), {"channel_axis": 1}, transposed),
    "transposed, grouped": (
        (4, N // 2, 3),
        {"channel_axis": 1, "groups": 2},
        lambda x, w: transposed(x, w, 2),
    ),
    "transposed, grouped, turned": (
        (N // 2, 3, 4),
        {"channel_axis": 0, "groups": 2, "group_axis": -1},
        lambda x, w: transposed(x, w.transpose(2, 0, 1), 2),
    ),
}


def trained(definition, seed=0):
    """The parameters and statistics of a layer that has seen data of large means."""
    rng = np.random.default_rng(seed)
    shape = definition.parameter_shape
    params = {"scale": rng.uniform(0.5, 2, shape), "bias": rng.normal(size=shape)}
    params["scale"][0] *= -1
    state = {"mean": rng.uniform(1, 10, shape), "var": 10 ** rng.uniform(-2, 1, shape)}
    state["mean"][::2] *= -1
    params = {k: p.astype("float32") for k, p in params.items() if getattr(definition, k)}
    return params, {k: p.astype("float32") for k, p in state.items()} | {"count": np.asarray(9)}


def normalized(y, definition, params, state):
    """In float64, one channel after the other."""
    y = y.copy()
    for c in range(y.shape[1]):
        y[:, c] = (y[:, c] - float(state["mean"][c])) / (
            float(state["var"][c]) + definition.eps
        ) ** 0.5
        if "scale" in params:
            y[:, c] *= float(params["scale"][c])
        if "bias" in params:
            y[:, c] += float(params["bias"][c])
    return y


def on(kind, arrays):
    return {name: kind.make(array) for name, array in arrays.items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("definition", [nk.BatchNorm(N), nk.BatchNorm.keras(N, scale=False)])
def test_against_the_layer_and_then_the_norm(kind, case, definition):
    shape, where, layer = CASES[case]
    rng = np.random.default_rng(1)
    x, w = rng.normal(size=(3, 4, 6)), rng.normal(size=shape).astype("float32")
    params, state = trained(definition)
    for b in (None, rng.normal(size=N).astype("float32")):
        y = layer(x, w.astype("float64"))
        y = y if b is None else y + b.astype("float64")[:, None]
        expected = normalized(y, definition, params, state)
        weight, bias = nk.fold(
            kind.make(w),
            None if b is None else kind.make(b),
            definition,
            on(kind, params),
            on(kind, state),
            **where,
        )
        assert isinstance(weight, kind.type)
        weight, bias = np.asarray(weight), np.asarray(bias)
        assert (weight.shape, bias.shape) == (w.shape, (N,))
        assert weight.dtype == bias.dtype == np.float32
        found = layer(x, weight.astype("float64")) + bias.astype("float64")[:, None]
        assert np.abs(found - expected).max() < 1e-6 * np.abs(expected).max()


def test_the_weights_are_rounded_once():
    bn = nk.BatchNorm(N)
    params, state = trained(bn)
    w = np.random.default_rng(2).normal(size=(N, 5)).astype("float16")
    weight, bias = nk.fold(w, np.zeros(N, "float64"), bn, params, state, channel_axis=0)
    exact = {name: p.astype("float64") for name, p in (params | state).items()}
    factor = exact["scale"] / np.sqrt(exact["var"] + bn.eps)
    np.testing.assert_array_equal(weight, (w * factor[:, None]).astype("float16"))
    assert bias.dtype == np.float64
    np.testing.assert_allclose(bias, exact["bias"] - exact["mean"] * factor, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_results_too_large_for_their_dtype(kind, name):
    if kind.name in ("array-api-strict", "dask"):
        pytest.skip("it has no half types, or its values are not there yet")
    bn = nk.BatchNorm(N, eps=1.0)
    params, state = (on(kind, given) for given in bn.init())
    large = np.full(N, 3e5, "float32")
    if name == "weight":
        params["scale"] = kind.make(large)
    else:
        params["bias"] = kind.make(large)
    w, b = np.ones((N, 2)), np.zeros(N)
    half, whole = ([kind.make(a.astype(dtype)) for a in (w, b)] for dtype in ("float16", "float32"))
    with pytest.raises(ValueError, match=rf"^the folded {name} is too large for .*float16.*; "):
        nk.fold(*half, bn, params, state, channel_axis=0)
    assert np.isfinite(np.asarray(nk.fold(*whole, bn, params, state, channel_axis=0)[0])).all()
    # What was not finite before is no matter of its dtype.
    w[0, 0] = np.inf
    params["scale"] = params["bias"] = kind.make(np.ones(N, "float32"))
    weight, _ = nk.fold(kind.make(w.astype("float16")), None, bn, params, state, channel_axis=0)
    assert np.isinf(np.asarray(weight)[0, 0])


def test_nothing_given_is_changed():
    bn = nk.BatchNorm(N)
    given = trained(bn)
    before = trained(bn)
    w, b = np.ones((N, 2), "float32"), np.ones(N, "float32")
    nk.fold(w, b, bn, *given, channel_axis=0)
    for now, then in zip(given, before, strict=True):
        for name in then:
            np.testing.assert_array_equal(now[name], then[name])
    assert (w == 1).all()
    assert (b == 1).all()


def folding(definition=None, w=(N, 2), bias=None, changes=None, **where):
    definition = nk.BatchNorm(N) if definition is None else definition
    params, state = trained(nk.BatchNorm(N))
    return nk.fold(
        np.ones(w, "float32") if isinstance(w, tuple) else w,
        bias,
        definition,
        params,
        state | (changes or {}),
        **({"channel_axis": 0} | where),
    )


VAR = np.ones(N, "float32")
REFUSED = {
    "another layer": (
        lambda: folding(nk.LayerNorm(N)),
        TypeError,
        "only a BatchNorm can be folded, whose statistics in inference do not depend on the "
        "input, but got LayerNorm(shape=(8,), axes=(-1,), eps=1e-05, scale=True, bias=True).",
    ),
    "no statistics": (
        lambda: folding(nk.BatchNorm(N, track_running_stats=False)),
        ValueError,
        "a BatchNorm without running statistics takes those of its input, so it cannot be folded; "
        "define it with track_running_stats=True.",
    ),
    "negative": (
        lambda: folding(changes={"var": VAR - 2}),
        ValueError,
        "state['var'] must hold variances, but some are negative or NaN; take the running "
        "statistics again.",
    ),
    "nan": (
        lambda: folding(changes={"var": VAR * np.nan}),
        ValueError,
        "state['var'] must hold variances, but some are negative or NaN; take the running "
        "statistics again.",
    ),
    "channels": (
        lambda: folding(w=(4, 2)),
        ValueError,
        "weight must have 8 output channels, as many as the BatchNorm, but for channel_axis=0 and "
        "groups=1 its shape (4, 2) has 4.",
    ),
    "groups": (
        lambda: folding(w=(3, 4), channel_axis=1, groups=2),
        ValueError,
        "group_axis must be an axis of weight that can be divided into 2 groups, and none of the "
        "output channels, but got 0 for the shape (3, 4) with its output channels along (1,).",
    ),
    "same axis": (
        lambda: folding(w=(4, 4), channel_axis=0, groups=2),
        ValueError,
        "group_axis must be an axis of weight that can be divided into 2 groups, and none of the "
        "output channels, but got 0 for the shape (4, 4) with its output channels along (0,).",
    ),
    "no axis": (
        lambda: folding(channel_axis=()),
        ValueError,
        "channel_axis must name one axis at least, but got none.",
    ),
    "axis": (
        lambda: folding(channel_axis=2),
        ValueError,
        "axis 2 is out of range for an array of 2 dimensions; use one from -2 to 1.",
    ),
    "bias": (
        lambda: folding(bias=np.ones((N, 1))),
        ValueError,
        "bias must have shape (8,), one value for each output channel, but its shape is (8, 1).",
    ),
    "mean": (
        lambda: folding(changes={"mean": np.ones(3)}),
        ValueError,
        "state['mean'] must have shape (8,), one value for each output channel, but its shape is "
        "(3,).",
    ),
    "integers": (
        lambda: folding(w=np.ones((N, 2), int)),
        TypeError,
        "weight must hold real floating-point numbers, but its dtype is int64; convert it first, "
        "for example to float32.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, error, sentence = REFUSED[name]
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == sentence
