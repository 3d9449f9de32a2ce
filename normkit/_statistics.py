"""Count, mean and variance: how they are taken, and how two of them become one.

Each statistic is taken twice: roughly, and then again around that rough value, which is where
a sum in floating point keeps its digits::

    p = mean(x)        d = x - p        c = mean(d)        mean = p + c        e = d - c
    q = mean(e*e)                       variance = q + mean(e*e - q)

The differences d are exact where it matters, since p is near x. Neither the variance nor e changes
when a constant is subtracted from x, so p and q are constants to the derivative as well: it passes
through the second, exact half of each line only.

This is the corrected two-pass algorithm on shifted data (Chan, Golub & LeVeque, "Algorithms for
Computing the Sample Variance", The American Statistician 37(3), 1983). Its error grows neither
with the mean nor with the number of values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from normkit import _checks
from normkit._arrays import backend_of
from normkit._backend import Array, Backend, Count, DType, is_array

Axes = tuple[int, ...]
Average = Callable[[Array], Array]


class Moments(NamedTuple):
    """How many values, their mean and their population variance: enough to add more values later.

    Two sets of values that never meet in memory have the same moments as their union, once
    merged. That is how statistics are taken over batches, replicas, or a data set larger than
    memory.

    Attributes:
        count: number of values behind each mean (the sum of the weights, if there were weights):
            an int, or an array that broadcasts against ``mean``.
        mean: the mean, in float32 or wider.
        variance: the population variance (divided by ``count``), same shape as ``mean``.
        remainder: what rounding left of the mean: ``mean + remainder`` is the mean with twice the
            digits. Without them merging would lose those of a variance beside a large mean.

    ``a + b`` is ``a.merge(b)``, and ``sum`` merges any number.

    Source: Chan, Golub & LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing
    Sample Variances", Stanford STAN-CS-79-773, 1979.

    >>> import numpy as np, normkit as nk
    >>> x = np.arange(12.0).reshape(6, 2)
    >>> total = nk.Moments.of(x[:4], 0).merge(nk.Moments.of(x[4:], 0))
    >>> total.count, total.mean.tolist(), total.variance.round(4).tolist()
    (6, [5.0, 6.0], [11.6667, 11.6667])
    """

    count: Count
    mean: Array
    variance: Array
    remainder: Array | float = 0.0

    @classmethod
    def of(
        cls,
        x: Array,
        axes: int | Axes | None = None,
        *,
        weights: Array | None = None,
        keepdims: bool = False,
    ) -> Moments:
        """The moments of ``x`` over ``axes``. Arguments and errors: see :func:`moments`."""
        backend = backend_of(x)
        _checks.floating(x, backend)
        reduced = _checks.axes_in_range(axes, len(x.shape))
        weights = _checks.weights_for(x, weights, None, backend)
        x = cast(x, backend.statistics_dtype(x.dtype), backend)
        _, kept = centre(x, reduced, weights, backend)
        return kept if keepdims else kept.squeezed(reduced, backend)

    @classmethod
    def over(cls, batches: Any, axes: int | Axes | None = None, *, weights: Any = None) -> Moments:
        """The moments of all ``batches`` together, or of an array larger than memory.

        Arguments and errors: see :func:`normkit._streaming.moments_over`.
        """
        from normkit._streaming import moments_over  # which is built on this module

        return moments_over(batches, axes, weights=weights)

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of values together. Merging with none of them changes nothing.

        ``other`` has the same shapes (a ValueError if not), and is of the same array library.
        """
        backend = backend_of(self.mean)
        for name, array in (("the other mean", other.mean), ("the other variance", other.variance)):
            _checks.same_library(array, self.mean, name, backend)
            _checks.same_shape(array, self.mean, name)
        a, b = self.count, other.count
        if is_array(a) and is_array(b) and a.dtype != b.dtype:
            # Values were counted in one of them, and weights added up in the other.
            a, b = (cast(n, self.mean.dtype, backend) for n in (a, b))
        count = a + b
        share = _ratio(b, count, self.mean.dtype, backend)
        delta = (other.mean - self.mean) + (other.remainder - self.remainder)
        mean, remainder = two_sum(self.mean, self.remainder + delta * share)
        # delta last, so that its square cannot overflow where its share is zero.
        between = delta * (share * (1 - share)) * delta
        variance = self.variance + (other.variance - self.variance) * share + between
        return Moments(count, mean, variance, remainder)

    def __add__(self, other: Moments) -> Moments:  # type: ignore[override]
        return self.merge(other) if isinstance(other, Moments) else NotImplemented

    def __radd__(self, other: int) -> Moments:
        # The start of a sum.
        return self if other == 0 else NotImplemented

    def estimate(self, correction: int = 1) -> Array:
        """The variance divided by ``count - correction`` instead of ``count``.

        With 1 this is the unbiased estimate of the variance of what the values were drawn from.
        Where there are no more values than ``correction`` it is not defined, and the population
        variance is returned.
        """
        if not correction:
            return self.variance
        backend = backend_of(self.mean)
        if not is_array(self.count):
            return self.variance * (
                self.count / (self.count - correction) if self.count > correction else 1
            )
        count = cast(self.count, self.variance.dtype, backend)
        enough = count > correction
        one = backend.xp.ones_like(count)
        left = backend.xp.where(enough, count - correction, one)
        return self.variance * backend.xp.where(enough, count / left, one)

    def squeezed(self, axes: Axes, backend: Backend) -> Moments:
        """Without the reduced ``axes``, which are there with length 1."""

        def squeeze(a: Array) -> Array:
            return backend.xp.squeeze(a, axis=axes) if axes else a

        scalar = not is_array(self.count) or len(self.count.shape) == 0
        count = self.count if scalar else squeeze(self.count)
        arrays = (squeeze(a) for a in (self.mean, self.variance, self.remainder))
        return Moments(count, *arrays)


def moments(
    x: Array,
    axes: int | Axes | None = None,
    *,
    weights: Array | None = None,
    keepdims: bool = False,
) -> tuple[Array, Array]:
    """Mean and population variance of ``x`` over ``axes``.

    Both are right to the last digits of their dtype whatever the mean of ``x`` is, and
    differentiable to any order.

    Args:
        x: array of real floating-point numbers.
        axes: axis or axes to reduce; all of them if None.
        weights: how often each value counts: booleans, or nonnegative numbers, of a shape that
            broadcasts to that of ``x``. A value of weight zero takes no part, even if it is NaN,
            and a weight of zero gets no gradient.
        keepdims: keep the reduced axes, with length 1.

    Returns:
        ``(mean, variance)``, in float32 at least (float16 and bfloat16 input gives float32).
        Of nothing (no elements, all weights zero) both are zero.

    Raises:
        TypeError: ``x`` is not real floating point.
        ValueError: an axis is out of range or named twice; ``weights`` do not broadcast, or
            are negative (where they cannot be read, as in a compiled function, those count as 0).

    The same as ``tf.nn.moments(x, axes)`` and ``tf.nn.weighted_moments(x, axes, weights)``.

    >>> import numpy as np, normkit as nk
    >>> mean, variance = nk.moments(np.array([[1.0, 2.0], [3.0, 6.0]]), axes=0)
    >>> mean.tolist(), variance.tolist()
    ([2.0, 4.0], [1.0, 4.0])
    """
    found = Moments.of(x, axes, weights=weights, keepdims=keepdims)
    return found.mean, found.variance


class Centred(NamedTuple):
    """Values less their mean, and how far they spread, in a unit in which squares are finite.

    Attributes:
        values: x less its mean; zero where the weight is zero.
        variance: the mean of the squared values (reduced axes kept).
        per_unit: what x was multiplied by to get values and variance in this unit: 1, or an array
            of powers of two. Standardized values do not depend on it.
    """

    values: Array
    variance: Array
    per_unit: Array | float

    def rstd(self, eps: float, backend: Backend) -> Array:
        """1 / sqrt(variance + eps), in the same unit: its product with ``values`` has none."""
        return 1 / backend.xp.sqrt(self.variance + eps * self.per_unit * self.per_unit)


def centre(
    x: Array, axes: Axes, weights: Array | None, backend: Backend
) -> tuple[Centred, Moments]:
    """``x`` less its mean over ``axes``, and the moments it has (reduced axes kept).

    ``x`` and ``weights`` have the statistics dtype and the same rank. Where a weight is zero,
    ``x`` is replaced before any arithmetic, so that NaN or infinity there reaches nothing.
    """
    x = select(x, weights, backend)
    count, average = averaging(x, axes, weights, backend)
    rough_mean = backend.constant(average(x))
    shifted = select(x - rough_mean, weights, backend)
    rest = average(shifted)
    found = spread(select(shifted - rest, weights, backend), average, backend)
    mean, remainder = two_sum(rough_mean, rest)
    return found, Moments(count, mean, _in_units_of_x(found, backend), remainder)


def spread(values: Array, average: Average, backend: Backend) -> Centred:
    """How far ``values`` lie from zero.

    Where squares would overflow, or the powers of the variance that derivatives are made of, the
    values are taken in another unit, a power of two.
    """
    xp = backend.xp
    with backend.quiet():
        squares = values * values
        rough = backend.constant(average(squares))
        large, per_unit_of_large = LARGE["float32" if rough.dtype == xp.float32 else "float64"]
        usual = rough < large
        per_unit: Array | float = 1.0
        if not (backend.is_visible(usual) and bool(xp.all(usual))):
            one = xp.ones_like(rough)
            per_unit = xp.where(usual, one, one * per_unit_of_large)
            rough = xp.where(usual, rough, xp.zeros_like(rough))
            values = values * per_unit
            squares = values * values
    return Centred(values, rough + average(squares - rough), per_unit)


# The variance from which on there is another unit, and what values are multiplied by to be in it.
# Their squares are then finite, and far from zero.
LARGE = {"float32": (2.0**80, 2.0**-80), "float64": (2.0**640, 2.0**-640)}


def _in_units_of_x(found: Centred, backend: Backend) -> Array:
    """The variance, infinite where it is no number of this dtype."""
    if not is_array(found.per_unit):
        return found.variance
    xp = backend.xp
    usual = found.per_unit == 1
    # Not divided twice by the unit: a compiler would divide once, by a square that is zero.
    one = xp.ones_like(found.variance)
    deviation = xp.sqrt(xp.where(usual, one, found.variance)) / found.per_unit
    with backend.quiet():
        return xp.where(usual, found.variance, deviation * deviation)


def select(a: Array, weights: Array | None, backend: Backend) -> Array:
    """``a`` where it counts, else zero."""
    return a if weights is None else backend.xp.where(weights > 0, a, backend.xp.zeros_like(a))


def averaging(
    x: Array, axes: Axes, weights: Array | None, backend: Backend, *, adjoint: bool = False
) -> tuple[Count, Average]:
    """The number of values along ``axes`` of ``x``, and the function that averages over them.

    The average of nothing (an empty batch, weights that are all zero) is zero, never NaN. The
    ``adjoint`` of averaging, as a linear map, carries gradients back: the same without weights.
    """
    if weights is None:
        count = backend.size(x, axes)
        divisor = _positive(count, x.dtype, backend)
        return count, lambda a: backend.quotient(backend.total(a, axes), divisor)
    weights = weights + backend.xp.zeros_like(x)
    total = backend.total(weights, axes)
    divisor = _positive(total, x.dtype, backend)
    if adjoint:
        return total, lambda a: weights * backend.quotient(backend.total(a, axes), divisor)
    return total, lambda a: backend.quotient(backend.total(a * weights, axes), divisor)


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """``a + b`` as it is rounded, and what rounding left, where ``a`` is the larger one."""
    total = a + b
    return total, b - (total - a)


def _ratio(part: Count, count: Count, dtype: DType, backend: Backend) -> Any:
    """``part / count``, and zero where ``count`` is zero."""
    divisor = _positive(count, dtype, backend)
    return (cast(part, dtype, backend) if is_array(part) else part) / divisor


def _positive(count: Count, dtype: DType, backend: Backend) -> Any:
    """``count`` as a divisor: of nothing there is nothing to divide.

    Sums are divided, not multiplied by a reciprocal that has been rounded: equal values have
    themselves as their mean.
    """
    if not is_array(count):
        return (count if count else 1) / 1  # a float: integers may be too large for a library
    positive = backend.xp.where(count > 0, count, backend.xp.ones_like(count))
    return cast(positive, dtype, backend)


def cast(x: Array, dtype: DType, backend: Backend) -> Array:
    """``x`` in ``dtype``; itself if it has it already."""
    return x if x.dtype == dtype else backend.xp.astype(x, dtype)
