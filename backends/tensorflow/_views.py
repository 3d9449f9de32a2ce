"""Any input as three axes, so that a few fast operations of TensorFlow do for every layer."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any, NamedTuple

import tensorflow as tf

Tensor = Any
Axes = tuple[int, ...]
Length = Any  # an int, or a scalar tensor where it is not known yet

# Where the axes of x go that are kept (K) or reduced (R), one run of neighbours after the other,
# and which axis of the view is then added up.
_PLACES = {
    "RK": ((1, 2), 1),
    "KRK": ((0, 1, 2), 1),
    "KRKR": ((0, 1, 2, 2), 1),
    "RKR": ((0, 1, 2), 2),
    "R": ((2,), 2),
    "KR": ((1, 2), 2),
}


class View(NamedTuple):
    """``x`` as (samples, rows, columns), and along which of them its statistics are taken.

    What is added up first is a *part*: a column of each sample (``axis`` 1) or a row (``axis`` 2).
    Groups are made of parts: those of all samples if ``shared``, and ``width`` neighbours each.

    Attributes:
        shape: the three lengths.
        axis: the one that is added up.
        shared: whether all samples are one group (BatchNorm).
        width: how many parts next to each other are one group (GroupNorm).
        inner: by what the length of ``axis`` can be divided, as far as that is known.
        places: which axis of the view each axis of ``x`` is in; None for those of length 1.
    """

    shape: tuple[Length, Length, Length]
    axis: int
    shared: bool
    width: int
    inner: int
    places: tuple[int | None, ...]

    @property
    def parts(self) -> int:
        """The axis along which the parts of a sample lie."""
        return 3 - self.axis

    @property
    def is_one_sample(self) -> bool:
        return _is_one(self.shape[0])

    @property
    def values(self) -> list[Length]:
        """Factors of the number of values that a group has."""
        return [self.shape[self.axis], self.width, self.shape[0] if self.shared else 1]

    def along(self, p: Tensor) -> int | None:
        """Which axis the parameter ``p`` lies along, all of it; None if there is none."""
        long = [a for a, n in enumerate(p.shape) if n != 1 and self.places[a] is not None]
        if not long:
            return self.parts if _is_one(self.shape[self.parts]) else None
        place = self.places[long[0]]
        whole = [a for a, other in enumerate(self.places) if other == place]
        return place if place and long == whole else None

    def flat(self, p: Tensor | None, dtype: tf.DType) -> Tensor | None:
        """A parameter with three axes."""
        if p is None:
            return None
        return tf.reshape(tf.cast(p, dtype), (1, -1, 1) if self.along(p) == 1 else (1, 1, -1))

    def pool(self, totals: Tensor) -> Tensor:
        """Sums over groups, out of those over parts; one for each part again."""
        if self.shared and not _is_one(self.shape[0]):
            totals = tf.reduce_sum(totals, 0, keepdims=True)
        if self.width == 1:
            return totals
        groups = tf.reshape(totals, (-1, self.width))
        groups = tf.reduce_sum(groups, 1, keepdims=True) + tf.zeros_like(groups)
        return tf.reshape(groups, tf.shape(totals))


def view(x: Tensor, axes: Axes, given: Iterable[Tensor]) -> View | None:
    """``x`` for statistics over ``axes`` and parameters ``given``; None: there is no such view."""
    given = list(given)
    runs = _runs(x.shape, axes)
    kinds = "".join("R" if reduced else "K" for reduced, _ in runs)
    if kinds not in _PLACES:
        return None
    targets, axis = _PLACES[kinds]
    places: list[int | None] = [None] * len(x.shape)
    for (_, run), target in zip(runs, targets, strict=True):
        for a in run:
            places[a] = target
    together: list[int] = []  # the reduced axes that make neighbouring parts a group
    if kinds == "KRKR":
        together = runs[3][1]
    elif kinds == "KR":
        long = {a for p in given for a, n in enumerate(p.shape) if n != 1 and places[a]}
        if long.intersection(runs[0][1]):
            # Rows that have one value of each parameter, and those before them as samples.
            together = [a for a in runs[1][1] if a in long]
            for a in runs[0][1] + together:
                places[a] = 1 if a >= min(long) else 0
    in_order = [place for place in places if place is not None]
    width = _product(x.shape[a] for a in together)
    if width is None or in_order != sorted(in_order):
        return None
    reduced = [a for a, place in enumerate(places) if place == axis and a in axes]
    found = View(_joined(x, places), axis, kinds == "RKR", width, _known(x, reduced), tuple(places))
    # Along the rows of columns that are added up there is no way that pays.
    places_of = {found.along(p) for p in given}
    return found if places_of <= {2, found.parts} else None


def lengths(x: Tensor) -> list[Length]:
    """The shape of ``x``, with a scalar tensor for each length that is not known yet."""
    known = x.shape.as_list()
    if None not in known:
        return list(known)
    found = tf.shape(x)
    return [found[a] if n is None else n for a, n in enumerate(known)]


def _runs(shape: Any, axes: Axes) -> list[tuple[bool, list[int]]]:
    """Axes next to each other that are all reduced, or all kept. Those of length 1 are neither."""
    runs: list[tuple[bool, list[int]]] = []
    for a, n in enumerate(shape):
        if n == 1:
            continue
        if not runs or runs[-1][0] != (a in axes):
            runs.append((a in axes, []))
        runs[-1][1].append(a)
    return runs


def _joined(x: Tensor, places: list[int | None]) -> tuple[Length, Length, Length]:
    shape: list[Length] = [1, 1, 1]
    for n, place in zip(lengths(x), places, strict=True):
        if place is not None:
            shape[place] = n if _is_one(shape[place]) else shape[place] * n
    return tuple(shape)


def _known(x: Tensor, axes: list[int]) -> int:
    """The product of the last lengths along ``axes``, up to one that is not known."""
    found = 1
    for a in reversed(axes):
        if x.shape[a] is None:
            break
        found *= x.shape[a]
    return found


def _product(lengths: Iterable[int | None]) -> int | None:
    found = list(lengths)
    return None if None in found else prod(n for n in found if n is not None)


def _is_one(n: Length) -> bool:
    return isinstance(n, int) and n == 1
