"""Normalization with statistics that are given."""

from __future__ import annotations

from normkit import _checks, _engine
from normkit._arrays import backend_of
from normkit._backend import Array


def normalize(
    x: Array,
    mean: Array,
    variance: Array,
    scale: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float,
) -> Array:
    """``(x - mean) / sqrt(variance + eps) * scale + bias``.

    Args:
        x: array of real floating-point numbers.
        mean, variance, scale, bias: arrays that broadcast to the shape of ``x``: of its rank with
            lengths 1, or only the last dimensions (``(C,)`` for channels last).
        eps: added to the variance, inside the square root.

    Returns:
        An array with the shape and dtype of ``x``; the arithmetic is in float32 at least.

    Raises:
        TypeError: an array is not real floating point.
        ValueError: a shape does not broadcast to that of ``x``, or ``eps`` is not above 0.

    The same as ``tf.nn.batch_normalization(x, mean, variance, bias, scale, eps)``, but for one
    thing: the mean is subtracted first, so that no digits are lost when it is large.

    >>> import numpy as np, normkit as nk
    >>> x = np.array([[1.0, 2.0], [3.0, 6.0]])
    >>> mean, variance = nk.moments(x, axes=0)
    >>> nk.normalize(x, mean, variance, eps=1e-12).round(6).tolist()
    [[-1.0, -1.0], [1.0, 1.0]]
    """
    backend = backend_of(x)
    _checks.floating(x, backend)
    _checks.epsilon(eps)
    ndim = len(x.shape)
    given = {"mean": mean, "variance": variance, "scale": scale, "bias": bias}
    ready = {}
    for name, array in given.items():
        if array is not None:
            array = _checks.same_library(array, x, name, backend)
            _checks.floating(array, backend, name)
            _checks.broadcasts(array, x, name)
            for _ in range(ndim - len(array.shape)):
                array = backend.xp.expand_dims(array, axis=0)
        ready[name] = array
    return _engine.normalize(
        x,
        ready["mean"],
        ready["variance"],
        ready["scale"],
        ready["bias"],
        eps=eps,
        backend=backend,
    )
