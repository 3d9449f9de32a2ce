"""The statistics that compilers see: twice through x and a bit, see ``_fused.py``."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ._fit import Axes


class Found(NamedTuple):
    """The statistics of x along some axes, which are kept with length 1.

    Attributes:
        rough, rest: the mean in two parts, None where it is not subtracted. The rest is None as
            well if the rough part is all of it.
        variance: the mean square of what is left, in a unit of its own where not ``usual``.
        rstd: 1 / sqrt(variance + eps), in units of 1 / x.
        usual: where the unit is that of x.
    """

    rough: Tensor | None
    rest: Tensor | None
    variance: Tensor
    rstd: Tensor
    usual: Tensor | None


# Of the statistics' dtype: the mean square from which on there is another unit, what values are
# multiplied by to be in it, and what is then added to them: squares of usual values in that unit
# would be numbers that processors are slow with. (The variance does not depend on it.)
_UNITS = {
    torch.float32: (2.0**80, 2.0**-76, 2.0**-62),
    torch.float64: (2.0**640, 2.0**-600, 2.0**-500),
}


def find(x: Tensor, axes: Axes, eps: float, centred: bool) -> Found:
    """The statistics of ``x``."""
    share = share_of(x, axes)
    rough, near = _rough(x, axes, centred)
    d = less(x, rough)
    if near is None:
        squares = total_over(d * d, axes) * share
    else:
        squares = near + total_over(d * d - near, axes) * share
    rest = total_over(d, axes) * share if centred else None
    offset, usual = rest, None
    large, unit, away = _UNITS[d.dtype]
    if x.dtype != torch.float16:  # whose squares are no large numbers
        usual = squares < large
        far = d * unit + away
        squares = torch.where(usual, squares, total_over(far * far, axes) * share)
        offset = None if rest is None else torch.where(usual, rest, rest * unit + away)
    variance = squares
    if offset is not None:
        variance = squares - offset * offset
        # Of equal values rounding alone is left, which must not come out negative.
        least = squares * 2.0**-20
        variance = torch.where(variance >= least, variance, least)
    if usual is None:
        rstd = torch.rsqrt(variance + eps)
    else:
        rstd = torch.rsqrt(torch.where(usual, variance + eps, variance + eps * unit * unit))
        rstd = torch.where(usual, rstd, rstd * unit)
    if rest is not None and x.dtype == torch.bfloat16:
        # The mean has so many more digits than x that it needs no rest.
        rough, rest = rough + rest, None
    return Found(rough, rest, variance, rstd, usual)


def in_units_of_x(found: Found) -> Tensor:
    """The variance, infinite where it is no number of its dtype."""
    if found.usual is None:
        return found.variance
    unit = _UNITS[found.variance.dtype][1]
    # Not divided twice by the unit: a compiler would divide once, by a square that is zero.
    deviation = torch.sqrt(found.variance) / unit
    return torch.where(found.usual, found.variance, deviation * deviation)


def _rough(x: Tensor, axes: Axes, centred: bool) -> tuple[Tensor | None, Tensor | None]:
    """The mean of an eighth of the values, and of their squares when it is subtracted: constants.

    The first is None if the mean is not subtracted; the second, if it does not matter.
    """
    first, wide = x, wide_of(x.dtype)
    for axis in axes:
        first = first.narrow(axis, 0, 1)
    first = first.to(wide).detach() if centred else 0.0
    short = _is_short(x, axes)
    if short and (not centred or _has_few_digits(x, axes)):
        return (first if centred else None), None
    for axis in axes:
        if statically_known_true(x.shape[axis] >= 8):
            x = x.narrow(axis, 0, -(-x.shape[axis] // 8))
            break
    share = share_of(x, axes)
    # What is added up is near zero, or a sum in the order of the values would be far off.
    d = x.detach().to(wide) - first
    mean = d.sum(axes, keepdim=True) * share if centred else 0.0
    if centred and x.device.type != "cpu":
        # See Backend.constant: a multiplication is not fused into what follows through this.
        mean = torch.where(mean > -torch.inf, mean, torch.nan)
    near = None if short else (d * d).sum(axes, keepdim=True) * share - mean * mean
    return (first + mean if centred else None), near


def _has_few_digits(x: Tensor, axes: Axes) -> bool:
    """Whether any of the values is a rough mean, since x has few digits and not many values."""
    return x.dtype == torch.bfloat16 and statically_known_true(_count(x, axes) <= 4096)


def _is_short(x: Tensor, axes: Axes) -> bool:
    """Whether squares may be added up as they are.

    In float32 a sum in the order of the values drifts: that of the squares of numbers with few
    digits loses a quarter of a unit at every other step, as a square has the remainder 0 or 1.
    """
    if x.dtype == torch.bfloat16 or statically_known_true(_count(x, axes) <= 256):
        return True
    # Inductor adds up sixteen rows of what lies side by side.
    first, _ = _steps(x, axes)
    last = x.ndim - 1
    return (
        last in first
        and statically_known_true(x.stride(last) == 1)
        and statically_known_true(_count(x, first) <= 4096)
    )


def less(x: Tensor, rough: Tensor | None) -> Tensor:
    x = x.to(wide_of(x.dtype))
    return x if rough is None else x - rough


def wide_of(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def share_of(x: Tensor, axes: Axes) -> Any:
    """What a sum is multiplied by to be a mean. That of nothing is zero."""
    count = _count(x, axes)
    return 1 / count if count else 1.0


def _count(x: Tensor, axes: Axes) -> Any:
    return math.prod([x.shape[axis] for axis in axes])


def total_over(x: Tensor, axes: Axes) -> Tensor:
    """The sum over ``axes``, which are kept."""
    for step in _steps(x, axes):
        if step:
            x = x.sum(step, keepdim=True)
    return x


def _steps(x: Tensor, axes: Axes) -> tuple[Axes, Axes]:
    """The axes to sum over in a first step and in a second, which may have none.

    The first goes along what lies side by side in memory. Neither is so long that it would lose
    digits, or that Inductor would take precautions that cost more than another step does.
    """
    first = tuple(a for i, a in enumerate(axes) if axes[i:] == tuple(range(a, x.ndim)))
    first = first or axes[1:] or axes
    while len(first) > 1 and statically_known_true(_count(x, first) > 4096):
        first = first[1:]
    return first, tuple(axis for axis in axes if axis not in first)


def sum_to(x: Tensor, shape: Iterable[int]) -> Tensor:
    """``x`` added up over all axes along which ``shape`` has length 1."""
    return total_over(x, tuple(axis for axis, length in enumerate(shape) if length == 1))
