"""The engine: standardize over some axes, then scale and shift. Every layer is this operation.

The statistics come either from the values themselves (:func:`standardize`) or from somewhere
else, such as a running average (:func:`normalize`). How they are taken is in ``_statistics.py``.
"""

from __future__ import annotations

from normkit._backend import Array, Backend, DType
from normkit._explain import declined, settled
from normkit._statistics import Average, Axes, Moments, averaging, cast, centre, select, spread

_WEIGHTS = "a mask or weights lie along the reduced axes"


def standardize(
    x: Array,
    axes: Axes,
    scale: Array | None,
    bias: Array | None,
    *,
    eps: float,
    weights: Array | None = None,
    remember: bool = False,
    dtype: DType | None = None,
    backend: Backend,
) -> tuple[Array, Moments | None]:
    """``(x - mean) / sqrt(variance + eps) * scale + bias`` with the statistics of ``x`` itself.

    ``scale`` and ``bias`` have the rank of ``x``, and so have the moments that are returned, if
    anyone is to ``remember`` them. A position whose weight is zero counts as standing at the mean:
    it comes out as ``bias``. The result has ``dtype``, that of ``x`` if None.
    """
    dtype = x.dtype if dtype is None else dtype
    if not remember:
        x, weights = _whole(x, axes, weights, backend)
    fast = None
    if weights is None:
        fast = backend.standardize(x, axes, scale, bias, eps, remember, dtype)
    else:
        declined(_WEIGHTS)
    settled("standardize", backend.library, fast is not None)
    if fast is not None:
        y, mean, variance = fast
        return y, Moments(backend.size(x, axes), mean, variance) if remember else None
    x = cast(x, backend.statistics_dtype(x.dtype), backend)
    centred, found = centre(x, axes, weights, backend)
    rstd = centred.rstd(eps, backend)
    y = _affine(centred.values, rstd, scale, bias, dtype, backend)
    return y, found if remember else None


def rescale(
    x: Array,
    axes: Axes,
    scale: Array | None,
    *,
    eps: float | None,
    weights: Array | None = None,
    scale_after_cast: bool = False,
    dtype: DType | None = None,
    backend: Backend,
) -> Array:
    """``x / sqrt(mean(x * x) + eps) * scale``: standardization that does not centre.

    ``eps`` may be None, for the machine epsilon of the dtype that is computed in; with
    ``scale_after_cast`` the last product is one of the dtype of the result. The rest as above.
    """
    dtype = x.dtype if dtype is None else dtype
    wide = backend.statistics_dtype(x.dtype)
    eps = epsilon(eps, wide, backend)
    x, weights = _whole(x, axes, weights, backend)
    fast = None
    if scale_after_cast:
        declined("the last product is one of the dtype of the result")
    elif weights is None:
        fast = backend.rescale(x, axes, scale, eps, dtype)
    else:
        declined(_WEIGHTS)
    settled("rescale", backend.library, fast is not None)
    if fast is not None:
        return fast
    x = cast(x, wide, backend)
    x = select(x, weights, backend)
    _, average = averaging(x, axes, weights, backend)
    found = spread(x, average, backend)
    rstd = found.rstd(eps, backend)
    if scale_after_cast:
        y = cast(found.values * rstd, dtype, backend)
        return y if scale is None else y * cast(scale, dtype, backend)
    return _affine(found.values, rstd, scale, None, dtype, backend)


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
    if weights is not None:
        # What counts is computed as it is without a mask, to the last bit.
        x = select(x, weights, backend)
        y = normalize(x, mean, variance, scale, bias, eps=eps, dtype=dtype, backend=backend)
        rest = backend.xp.zeros_like(y) if bias is None else cast(bias, y.dtype, backend)
        return backend.xp.where(weights > 0, y, rest)
    fast = backend.normalize(x, mean, variance, scale, bias, eps, dtype)
    settled("normalize", backend.library, fast is not None)
    if fast is not None:
        return fast
    compute = backend.statistics_dtype(x.dtype, mean.dtype, variance.dtype)
    centred = cast(x, compute, backend) - cast(mean, compute, backend)
    rstd = 1 / backend.xp.sqrt(cast(variance, compute, backend) + eps)
    return _affine(centred, rstd, scale, bias, dtype, backend)


def _whole(
    x: Array, axes: Axes, weights: Array | None, backend: Backend
) -> tuple[Array, Array | None]:
    """Values whose groups count as a whole or not at all need no weights: zeros come out as bias.

    So what counts is computed as it is without a mask, to the last bit.
    """
    if weights is None or any(weights.shape[axis] != 1 for axis in axes):
        return x, weights
    return select(x, weights, backend), None


def _affine(
    centred: Array,
    rstd: Array,
    scale: Array | None,
    bias: Array | None,
    dtype: DType,
    backend: Backend,
) -> Array:
    if scale is not None and scale.shape == rstd.shape:
        # One pass over the data fewer, where both are small and of one shape (BatchNorm).
        rstd, scale = rstd * cast(scale, rstd.dtype, backend), None
    y = centred * rstd
    if scale is not None:
        y = y * cast(scale, y.dtype, backend)
    if bias is not None:
        y = y + cast(bias, y.dtype, backend)
    return cast(y, dtype, backend)


def epsilon(eps: float | None, dtype: DType, backend: Backend) -> float:
    """``eps``; if None, the machine epsilon of ``dtype``, which is float32 or float64."""
    if eps is not None:
        return eps
    return 2.0**-23 if dtype == backend.xp.float32 else 2.0**-52


def derivative(
    u: Array, y: Array, rstd: Array, average: Average, *, centered: bool = True
) -> Array:
    """J u, for the Jacobian J of standardization at the standardized values ``y``.

    J is symmetric, so the one formula serves both modes: with tangents of x it gives tangents of
    y (forward), with gradients of y it gives gradients of x (reverse). With weights, reverse mode
    takes the adjoint of the averaging function::

        J u = rstd * (u - mean(u) - y * mean(u * y)),     rstd = 1 / sqrt(variance + eps)

    Where the mean is not subtracted from x, neither is that of u.
    """
    rest = y * average(u * y)
    return rstd * (u - average(u) - rest if centered else u - rest)


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
