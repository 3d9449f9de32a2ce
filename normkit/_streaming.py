"""Moments of data that never lie in memory as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import Any

import numpy as np

from normkit import _checks
from normkit._arrays import backend_of
from normkit._backend import Array, is_array
from normkit._statistics import Axes, Moments

_VALUES = 2**22  # of an array, that are taken at a time


def moments_over(batches: Any, axes: int | Axes | None = None, *, weights: Any = None) -> Moments:
    """The moments over ``axes`` of all batches together, merged in NumPy float64.

    Args:
        batches: an iterable of arrays of any library that the package knows (a generator, a data
            loader), all of the same shape but for the reduced axes. Or one array that may be
            larger than memory: of NumPy's ``memmap``, or anything that gives an array when it is
            sliced, which is walked along the first reduced axis; of Dask, which is walked block
            by block.
        axes: axis or axes of each batch to reduce; all of them if None.
        weights: how often each value counts, as in ``nk.moments``: one array for each batch, or
            one for the whole array.

    Returns:
        The moments as NumPy arrays of float64. Without weights ``count`` is an int.

    Raises:
        TypeError: a batch is not an array of real floating-point numbers.
        ValueError: there are no batches, or no values; their shapes do not fit; ``axes`` or
            ``weights`` are not what they must be.

    >>> import normkit as nk
    >>> total = nk.Moments.over((np.full((n, 2), float(n)) for n in (3, 1)), axes=0)
    >>> total.count, total.mean.tolist(), total.variance.tolist()
    (4, [2.5, 2.5], [0.75, 0.75])
    """
    total: Moments | None
    if hasattr(batches, "numblocks"):
        total = _over_blocks(batches, axes, weights)
    else:
        total = _merged(_parts(batches, axes, weights), axes)
    if total is None or (not is_array(total.count) and total.count == 0):
        msg = (
            "there are no values to take moments of: the data hold no batch, or only empty ones; "
            "a generator that has been used before is empty, so make a new one."
        )
        raise ValueError(msg)
    return total


def widened(found: Moments) -> Moments:
    """``found`` in NumPy float64, in which moments are merged without losing digits."""
    mean, variance, remainder = (_on_host(a) for a in (found.mean, found.variance, found.remainder))
    count = _on_host(found.count) if is_array(found.count) else found.count
    # Of equal shapes, so that all of it merges alike.
    return Moments(count, np.asarray(mean + remainder), variance, np.zeros_like(mean))


def _on_host(a: Array) -> Array:
    if is_array(a):
        a = backend_of(a).stop_gradient(a)
    try:
        return np.asarray(a, dtype=np.float64)
    except TypeError:
        if not hasattr(a, "cpu"):
            raise
        # NumPy does not read the memory of other devices.
        return np.asarray(a.cpu(), dtype=np.float64)


def _merged(parts: Iterable[tuple[Array, Array | None]], axes: int | Axes | None) -> Moments | None:
    total = None
    for x, weights in parts:
        found = widened(Moments.of(x, axes, weights=weights))
        total = found if total is None else total.merge(found)
    return total


def _parts(
    batches: Any, axes: int | Axes | None, weights: Any
) -> Iterator[tuple[Array, Array | None]]:
    """The batches, or parts of an array, and the weights of each."""
    if not hasattr(batches, "shape"):
        yield from (
            zip(batches, repeat(None), strict=False)
            if weights is None
            else zip(batches, weights, strict=True)
        )
        return
    shape = tuple(batches.shape)
    reduced = _checks.axes_in_range(axes, len(shape))
    if not reduced:
        yield _read(batches, ()), weights
        return
    axis = reduced[0]
    rest = int(np.prod(shape[:axis] + shape[axis + 1 :]))
    step = max(1, _VALUES // max(1, rest))
    for start in range(0, shape[axis], step):
        place = tuple(
            slice(start, start + step) if a == axis else slice(None) for a in range(len(shape))
        )
        yield _read(batches, place), _weights_at(weights, place, shape)


def _read(x: Any, place: tuple[slice, ...]) -> Array:
    part = x[place]
    return np.asarray(part) if isinstance(part, np.memmap) else part


def _weights_at(weights: Any, place: tuple[slice, ...], shape: tuple[int, ...]) -> Array | None:
    """The weights of a part of an array, which broadcast to the whole."""
    if weights is None or len(weights.shape) > len(shape):  # of which Moments.of will complain
        return weights
    lacking = len(shape) - len(weights.shape)
    found = weights[
        tuple(
            where if length > 1 else slice(None)
            for where, length in zip(place[lacking:], weights.shape, strict=True)
        )
    ]
    return np.asarray(found.compute() if hasattr(found, "compute") else found)


def _over_blocks(x: Any, axes: int | Axes | None, weights: Any) -> Moments:
    """The moments of a Dask array, of which one block at a time is computed."""
    reduced = _checks.axes_in_range(axes, x.ndim)
    kept = [axis for axis in range(x.ndim) if axis not in reduced]
    if weights is not None:
        backend_of(x).size(x, tuple(range(x.ndim)))  # where blocks begin must be known
    totals: dict[tuple[int, ...], Moments] = {}
    for index in np.ndindex(*x.numblocks):
        block = x.blocks[index].compute()
        found = None
        if weights is not None:
            starts = [sum(x.chunks[axis][:i]) for axis, i in enumerate(index)]
            place = tuple(slice(s, s + n) for s, n in zip(starts, block.shape, strict=True))
            found = _weights_at(weights, place, tuple(x.shape))
        part = widened(Moments.of(block, axes, weights=found))
        at = tuple(index[axis] for axis in kept)
        totals[at] = totals[at].merge(part) if at in totals else part

    def together(name: str, at: tuple[int, ...] = ()) -> Any:
        if len(at) == len(kept):
            return getattr(totals[at], name)
        return [together(name, (*at, i)) for i in range(x.numblocks[kept[len(at)]])]

    count = next(iter(totals.values())).count
    if is_array(count):
        count = np.block(together("count"))
    names = ("mean", "variance", "remainder")
    return Moments(count, *(np.block(together(name)) for name in names))
