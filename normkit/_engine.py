"""The engine: standardize over some axes, then scale and shift. Every layer is this operation.

The statistics come either from the values themselves (:func:`standardize`) or from somewhere
else, such as a running average (:func:`normalize`). How they are taken is in ``_statistics.py``.
"""

from __future__ import annotations

from normkit._backend import Array, Backend, DType
from normkit._statistics import Average, Axes, Moments, cast, centre


def standardize(
    x: Array,
    axes: Axes,
    scale: Array | None,
    bias: Array | None,
    *,
    eps: float,
    weights: Array | None = None,
    dtype: DType | None = None,
    backend: Backend,
) -> tuple[Array, Moments]:
    """``(x - mean) / sqrt(variance + eps) * scale + bias`` with the statistics of ``x`` itself.

    ``scale`` and ``bias`` have the rank of ``x``, and so have the moments that are returned. A
    position whose weight is zero counts as standing at the mean: it comes out as ``bias``. The
    result has ``dtype``, that of ``x`` if None.
    """
    dtype = x.dtype if dtype is None else dtype
    x = cast(x, backend.statistics_dtype(x.dtype), backend)
    centred, found = centre(x, axes, weights, backend)
    return _affine(centred, found.variance, scale, bias, eps, dtype, backend), found


def normalize(
    x: Array,
    mean: Array,
    variance: Array,
    scale: Array | None,
    bias: Array | None,
    *,
    eps: float,
    weights: Array | None = None,
    dtype: DType | None = None,
    backend: Backend,
) -> Array:
    """``(x - mean) / sqrt(variance + eps) * scale + bias`` with the statistics that are given.

    Subtracting first, instead of folding ``mean`` into ``bias``, keeps the digits when the mean
    is large. Everything given broadcasts against ``x``; weights and dtype as above.
    """
    dtype = x.dtype if dtype is None else dtype
    compute = backend.statistics_dtype(x.dtype, mean.dtype, variance.dtype)
    centred = cast(x, compute, backend) - cast(mean, compute, backend)
    if weights is not None:
        centred = backend.xp.where(weights > 0, centred, backend.xp.zeros_like(centred))
    variance = cast(variance, compute, backend)
    return _affine(centred, variance, scale, bias, eps, dtype, backend)


def _affine(
    centred: Array,
    variance: Array,
    scale: Array | None,
    bias: Array | None,
    eps: float,
    dtype: DType,
    backend: Backend,
) -> Array:
    factor = 1 / backend.xp.sqrt(variance + eps)
    if scale is not None and scale.shape == factor.shape:
        # One pass over the data fewer, where both are small and of one shape (BatchNorm).
        factor, scale = factor * cast(scale, factor.dtype, backend), None
    y = centred * factor
    if scale is not None:
        y = y * cast(scale, y.dtype, backend)
    if bias is not None:
        y = y + cast(bias, y.dtype, backend)
    return cast(y, dtype, backend)


def derivative(u: Array, y: Array, rstd: Array, average: Average) -> Array:
    """J u, for the Jacobian J of standardization at the standardized values ``y``.

    J is symmetric, so the one formula serves both modes: with tangents of x it gives tangents of
    y (forward), with gradients of y it gives gradients of x (reverse). With weights, reverse mode
    takes the adjoint of the averaging function::

        J u = rstd * (u - mean(u) - y * mean(u * y)),     rstd = 1 / sqrt(variance + eps)
    """
    return rstd * (u - average(u) - y * average(u * y))


def with_rank(parameter: Array, axes: Axes, ndim: int, backend: Backend) -> Array:
    """A parameter that lies along ``axes`` of an ``ndim``-dimensional x, ready to broadcast."""
    if None in parameter.shape:  # a length that is not known yet
        for axis in range(ndim):
            parameter = parameter if axis in axes else backend.xp.expand_dims(parameter, axis=axis)
        return parameter
    shape = [1] * ndim
    for axis, length in zip(axes, parameter.shape, strict=True):
        shape[axis] = length
    return backend.xp.reshape(parameter, tuple(shape))
