"""What the core refuses, in which words, and that nothing is changed by it."""

from __future__ import annotations

import numpy as np
import pytest

import normkit as nk
import normkit.numpy
from harness import arrays
from harness.sentences import BN, CASES, P, S, X


@pytest.mark.parametrize("name", CASES)
def test_sentence(name):
    call, kind, sentence = CASES[name]
    before = {k: v.copy() for k, v in (P | S).items()}
    with pytest.raises(kind) as raised:
        call()
    assert str(raised.value) == sentence
    for key, value in (P | S).items():
        np.testing.assert_array_equal(value, before[key])


@pytest.mark.parametrize(
    "refuse",
    [
        lambda n, x: n(x[:, :2], training=True),
        lambda n, x: n(x[:1, :, :1], training=True),
        lambda n, x: n(x.astype(int), training=True),
        lambda n, x: n(x, training=True, mask=np.full(x.shape, -1.0)),
    ],
)
def test_a_refused_step_changes_no_state(refuse):
    layer = nk.numpy.layer(BN)
    layer(X + 1, training=True)
    before = dict(layer.state)
    with pytest.raises((TypeError, ValueError)):
        refuse(layer, X)
    assert layer.state == before


def test_refused_alike_on_every_kind_of_array(kind):
    x = kind.make(X)
    three = kind.make(np.ones(3, np.float32))
    five = kind.make(np.ones((5, 1, 1)))
    wide = nk.BatchNorm(4)
    refusals = [
        (lambda: nk.batch_norm(x, axis=5), ValueError, "axis 5 is out of range"),
        (lambda: nk.batch_norm(x[:1, :, :1]), ValueError, "more than one value per channel"),
        (
            lambda: nk.layer_norm(x, three),
            ValueError,
            "scale must have",
        ),
        (lambda: nk.moments(kind.make(np.arange(4))), TypeError, "real floating-point"),
        (
            lambda: nk.moments(x, weights=five),
            ValueError,
            "must broadcast",
        ),
        (
            lambda: wide.apply(*wide.init(xp=kind.xp), x),
            ValueError,
            "needs an x",
        ),
    ]
    for call, error, words in refusals:
        with pytest.raises(error, match=words):
            call()


def test_parameters_of_another_library(kind):
    """NumPy's are converted; any other are refused, with a sentence."""
    x, scale = kind.make(X), np.array([2, 3], np.float32)
    y = nk.layer_norm(x, scale)
    assert isinstance(y, kind.type)
    np.testing.assert_allclose(np.asarray(y), np.asarray(nk.layer_norm(x, kind.make(scale))))
    for other in arrays.kinds():
        if other.name not in (kind.name, "numpy"):
            foreign = other.make(scale)
            with pytest.raises(TypeError) as raised:
                nk.layer_norm(x, foreign)
            assert str(raised.value) == (
                f"scale must be an array of the same library as x, but got a "
                f"{type(foreign).__name__}; convert it first."
            )
    with pytest.raises(TypeError, match="but got a value of type 'list'"):
        nk.layer_norm(x, [1.0, 2.0])


def test_negative_weights_are_seen_where_they_can_be(kind):
    weights = kind.make(np.full(X.shape, -1.0, np.float32))
    if kind.name in ("dask", "array-api-strict"):  # not known to be readable without computing
        nk.moments(kind.make(X), 0, weights=weights)
    else:
        with pytest.raises(ValueError, match="must not be negative"):
            nk.moments(kind.make(X), 0, weights=weights)
