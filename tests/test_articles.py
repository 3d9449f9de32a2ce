"""The numbers that introductions to normalization print, reproduced by every kind of array."""

from __future__ import annotations

import numpy as np
import pytest

import normkit as nk
import normkit.numpy

IMAGES = np.array(
    [
        [np.arange(1, 10).reshape(3, 3), np.arange(11, 20).reshape(3, 3)],
        [np.arange(11, 28, 2).reshape(3, 3), np.arange(21, 38, 2).reshape(3, 3)],
    ],
    dtype=np.float32,
)


def test_batch_norm_of_two_images(kind):
    """BatchNorm2d(2) on a (2, 2, 3, 3) input."""
    want = [
        [-1.3574, -1.2340, -1.1106, -0.9872, -0.8638, -0.7404, -0.6170, -0.4936, -0.3702],
        [-0.1234, 0.1234, 0.3702, 0.6170, 0.8638, 1.1106, 1.3574, 1.6042, 1.8511],
    ]
    layer = nk.BatchNorm(2)
    params, state = layer.init(xp=kind.xp)
    y, _ = layer.apply(params, state, kind.make(IMAGES), training=True)
    for image, expected in zip(np.asarray(y), want, strict=True):
        for channel in image:
            np.testing.assert_array_equal(channel.ravel().round(4), np.float32(expected))


def test_layer_norm_of_sentences(kind):
    """LayerNorm(4) on (2, 3, 4)."""
    x = np.stack([np.arange(1, 13), np.arange(21, 33)]).reshape(2, 3, 4).astype(np.float32)
    y = np.asarray(nk.layer_norm(kind.make(x)))
    want = np.broadcast_to(np.float32([-1.3416, -0.4472, 0.4472, 1.3416]), y.shape)
    np.testing.assert_array_equal(y.round(4), want)


def test_layer_norm_of_images(kind):
    """LayerNorm([2, 3, 3]) on (2, 2, 3, 3)."""
    step = np.array([0, 1, 2]) + np.array([0, 10, 20])[:, None]
    x = np.array([[1 + step, 51 + step], [81 + step, 111 + step]], np.float32)
    want = [
        [
            [-1.3682, -1.3302, -1.2922, -0.9881, -0.9501, -0.9121, -0.6081, -0.5701, -0.5321],
            [0.5321, 0.5701, 0.6081, 0.9121, 0.9501, 0.9881, 1.2922, 1.3302, 1.3682],
        ],
        [
            [-1.5207, -1.4622, -1.4037, -0.9358, -0.8773, -0.8188, -0.3509, -0.2924, -0.2339],
            [0.2339, 0.2924, 0.3509, 0.8188, 0.8773, 0.9358, 1.4037, 1.4622, 1.5207],
        ],
    ]
    layer = nk.LayerNorm((2, 3, 3))
    params, state = layer.init(xp=kind.xp)
    y, _ = layer.apply(params, state, kind.make(x))
    np.testing.assert_array_equal(np.asarray(y).reshape(2, 2, 9).round(4), np.float32(want))


def test_moments_over_one_axis_of_a_small_matrix(kind):
    """tf.nn.moments of a (2, 3) variable over axis 0."""
    x = [[0.69495416, 2.08983064, -1.08764684], [0.31431156, -0.98923939, -0.34656194]]
    mean, var = nk.moments(kind.make(np.array(x, np.float32)), [0])
    want_mean, want_var = (
        [0.50463283, 0.55029559, -0.71710438],
        [0.0362222, 2.37016821, 0.13730171],
    )
    np.testing.assert_allclose(np.asarray(mean), want_mean, rtol=0, atol=6e-8)
    np.testing.assert_allclose(np.asarray(var), want_var, rtol=3e-7, atol=0)


def test_moments_of_a_convolution(kind):
    """tf.nn.moments of (128, 32, 32, 64) over all but the channels, and normalization by them."""
    x = np.random.default_rng(0).standard_normal((128, 32, 32, 64), dtype=np.float32)
    x = kind.make(x)
    mean, var = nk.moments(x, [0, 1, 2])
    assert np.asarray(mean).shape == np.asarray(var).shape == (64,)
    exact = np.asarray(x).astype(np.float64)
    np.testing.assert_allclose(np.asarray(mean), exact.mean((0, 1, 2)), rtol=0, atol=1e-7)
    np.testing.assert_allclose(np.asarray(var), exact.var((0, 1, 2)), rtol=5e-7)
    y = nk.normalize(x, mean, var, eps=1e-3)
    again_mean, again_var = nk.moments(y, [0, 1, 2])
    np.testing.assert_allclose(np.asarray(again_mean), 0, atol=1e-6)
    np.testing.assert_allclose(np.asarray(again_var), 1, atol=2e-3)


def test_training_statistics_and_test_statistics(kind):
    """The moving averages follow the batches, and testing switches to them."""
    rng = np.random.default_rng(0)
    layer = nk.BatchNorm.keras(3, decay=0.5)
    params, state = layer.init(xp=kind.xp)
    mean, var = np.zeros(3), np.ones(3)
    for _ in range(4):
        x = rng.normal(2, 3, (16, 3)).astype(np.float32)
        y, state = layer.apply(params, state, kind.make(x), training=True)
        np.testing.assert_allclose(np.asarray(y).mean(0), 0, atol=1e-6)
        mean, var = (mean + x.mean(0)) / 2, (var + x.var(0)) / 2
    y, after = layer.apply(params, state, kind.make(x))
    np.testing.assert_allclose(np.asarray(y), (x - mean) / np.sqrt(var + 1e-3), rtol=0, atol=2e-6)
    assert after is state


def loops(x):
    """Mean and variance of each channel, one value after the other."""
    b, c, h, w = x.shape
    mean, var = np.zeros((1, c, 1, 1)), np.zeros((1, c, 1, 1))
    for channel in range(c):
        values = [x[i, channel, j, k] for i in range(b) for j in range(h) for k in range(w)]
        total = 0.0
        for value in values:
            total += value
        mean[0, channel, 0, 0] = total / len(values)
        squares = 0.0
        for value in values:
            squares += (value - mean[0, channel, 0, 0]) ** 2
        var[0, channel, 0, 0] = squares / len(values)
    return mean, var


def test_explicit_loops_and_reductions():
    """The NumPy BatchNorm2d of integers from -10 to 9, beside loops."""
    x = np.random.default_rng(0).integers(-10, 10, (4, 3, 8, 8)).astype(np.float64)
    mean, var = nk.moments(x, (0, 2, 3), keepdims=True)
    for got, want in zip((mean, var), loops(x), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)
    before = x.copy()
    layer = nk.numpy.BatchNorm(3)
    y = layer(x, training=True)
    np.testing.assert_array_equal(x, before)
    want = (x - loops(x)[0]) / np.sqrt(loops(x)[1] + 1e-5)
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-13)
    # 0.9 is kept and 0.1 is new, whichever of the two a framework calls its momentum.
    np.testing.assert_allclose(layer.state["mean"], 0.1 * mean.ravel(), rtol=1e-6)
    np.testing.assert_allclose(layer.state["var"], 0.9 + 0.1 * var.ravel() * 256 / 255, rtol=1e-6)


def test_beside_torch_to_four_digits():
    """The comparison that the NumPy class is printed with: allclose at 1e-4, here at 2e-6."""
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(1).integers(-10, 10, (4, 3, 8, 8)).astype(np.float32)
    bn = torch.nn.BatchNorm2d(3)
    layer = nk.numpy.BatchNorm(3)
    want = bn(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(layer(x, training=True), want, rtol=0, atol=2e-6)
    np.testing.assert_allclose(layer.state["mean"], bn.running_mean.numpy(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(layer.state["var"], bn.running_var.numpy(), rtol=1e-6)


def test_statistics_of_a_whole_training_set():
    """They need not be in memory together: moments of the parts merge into those of the whole."""
    rng = np.random.default_rng(0)
    parts = [rng.normal(3, 2, (n, 3, 4, 4)).astype(np.float32) for n in (32, 32, 7)]
    total = nk.Moments.of(parts[0], (0, 2, 3))
    for part in parts[1:]:
        total = total.merge(nk.Moments.of(part, (0, 2, 3)))
    whole = np.concatenate(parts).astype(np.float64)
    assert total.count == 71 * 16
    np.testing.assert_allclose(total.mean, whole.mean((0, 2, 3)), rtol=2e-7)
    np.testing.assert_allclose(total.variance, whole.var((0, 2, 3)), rtol=4e-7)
