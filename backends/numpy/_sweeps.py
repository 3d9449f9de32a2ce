"""Standardization in sweeps over an array: one takes the statistics, another computes the result.

With d = x - p, where p is a rough mean, rounded as x is::

    c = mean(d)        mean = p + c        variance = mean(d*d) - c*c

so d is exact where it matters, and c is not large beside the spread, so that little cancels.
Where it is, p is moved by c, and the sums are taken again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from ._layout import Axes

Given = NDArray | None

# The squared mean, in units of the variance, up to which it costs no digit of a result.
_NEAR = 4.0


class View(ABC):
    """An array of the five axes of ``_layout.py``, and how to sweep over it.

    Statistics have the axes apart and channels; sums, and what is multiplied and added, also that
    of the places within a channel.
    """

    far = _NEAR  # the same of d, up to which it costs no digit of the variance

    def __init__(self, shape: Axes, compute: np.dtype) -> None:
        apart, over, channels, within, positions = self.shape = shape
        self.groups = (apart, channels)
        self.count = over * within * positions
        self.compute = compute

    @abstractmethod
    def rough_mean(self, x: NDArray) -> NDArray:
        """Of some values of each group."""

    @abstractmethod
    def sums(self, x: NDArray, g: Given, near: NDArray, own: bool, centered: bool) -> list[NDArray]:
        """With d = x - near: of d*d, and of d if ``centered``, if ``own``; of g*d and g, if any."""

    @abstractmethod
    def affine(
        self, x: NDArray, y: NDArray, near: NDArray, factor: NDArray, offset: NDArray
    ) -> None:
        """y = (x - near) * factor + offset."""

    @abstractmethod
    def gradient(
        self,
        x: NDArray,
        g: NDArray,
        dx: NDArray,
        near: NDArray,
        factor: NDArray,
        slope: Given,
        offset: Given,
    ) -> None:
        """dx = g * factor - (x - near) * slope + offset; or g * factor, if there is no slope."""

    def rounded(self, p: NDArray) -> NDArray:
        return p.astype(self.compute).astype(np.float64)


def standardize(
    view: View, x: NDArray, y: NDArray, scale: Given, bias: Given, eps: float, centered: bool
) -> tuple[NDArray, NDArray]:
    """Write the result to ``y``. Mean and variance."""
    _, mean, variance, _ = _statistics(view, x, None, centered)
    normalize(view, x, y, mean, variance, scale, bias, eps)
    return mean, variance


def normalize(
    view: View,
    x: NDArray,
    y: NDArray,
    mean: NDArray,
    variance: NDArray,
    scale: Given,
    bias: Given,
    eps: float,
) -> None:
    """The same with statistics that are given."""
    # Where the mean is not large beside the spread, it need not be subtracted first.
    far = mean * mean > _NEAR * variance
    near = np.where(far, view.rounded(mean), 0.0)
    rest = np.where(near == mean, 0.0, mean - near)
    factor = (1 / np.sqrt(variance + eps))[..., None]
    factor = factor if scale is None else factor * scale
    offset = -rest[..., None] * factor
    view.affine(x, y, near, factor, offset if bias is None else offset + bias)


def backward(
    view: View,
    x: NDArray,
    g: NDArray,
    dx: NDArray,
    mean: Given,
    variance: Given,
    scale: Given,
    eps: float,
    centered: bool,
    limit: float,
) -> tuple[NDArray, NDArray] | None:
    """Write the gradient of x to ``dx``. Those of scale and bias.

    Statistics are given, or those of ``x``; None, if a variance is not below the ``limit``.
    """
    own = mean is None
    if own:
        near, mean, variance, sums = _statistics(view, x, g, centered)
    else:
        near = view.rounded(mean)
        sums = view.sums(x, g, near, False, centered)
    if not np.all(variance <= limit):
        return None
    products, sums = sums
    rstd = 1 / np.sqrt(variance + eps)
    products -= (mean - near)[..., None] * sums
    near = view.rounded(mean)
    rest = mean - near
    dscale, dbias = (rstd[..., None] * products).sum(0), sums.sum(0)
    scale = np.ones_like(dscale) if scale is None else scale
    slope = offset = None
    if own:
        slope = rstd**3 * (scale * products).sum(2) / view.count
        offset = rest * slope
        if centered:
            offset -= rstd * (scale * sums).sum(2) / view.count
    view.gradient(x, g, dx, near, rstd[..., None] * scale, slope, offset)
    return dscale, dbias


def _statistics(
    view: View, x: NDArray, g: Given, centered: bool
) -> tuple[NDArray, NDArray, NDArray, list[NDArray]]:
    """A rough mean, mean and variance, in float64; and the sums that gradients are made of."""
    near = view.rounded(view.rough_mean(x)) if centered else np.zeros(view.groups)
    for again in (False, True):
        squares, *sums = view.sums(x, g, near, True, centered)
        variance = squares.sum(2) / view.count
        if not centered:
            return near, near, variance, sums
        rest = sums.pop(0).sum(2) / view.count
        variance = np.maximum(variance - rest * rest, 0)
        far = rest * rest > view.far * variance
        if again or not far.any():
            break
        near = np.where(far, view.rounded(near + rest), near)
    return near, near + rest, variance, sums
