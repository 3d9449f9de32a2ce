"""``python -m normkit diff A B``: in what the normalization layers of two files differ."""

from __future__ import annotations

import argparse

import numpy as np

from normkit._bundle import differences, shown
from normkit._commands import RefusedError, sources
from normkit._report import table


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", help="a file, as for inspect")
    parser.add_argument("b", help="another one")
    parser.add_argument("--order", action="store_true", help="match layers by order, not by name")


def main(options: argparse.Namespace) -> int:
    """1 if they differ, as of diff."""
    a, b = sources.read(options.a), sources.read(options.b)
    rows = []
    for mine, theirs in _matched(a, b, options.order):
        if mine is None or theirs is None:
            only, where = (mine, options.a) if theirs is None else (theirs, options.b)
            assert only is not None
            rows.append([shown(only.name), "the layer", f"only in {where}", ""])
            continue
        names = dict.fromkeys((shown(mine.name), shown(theirs.name)))
        rows += [[" / ".join(names), *difference] for difference in _between(mine, theirs)]
    if not a and not b:
        msg = "no normalization layers were found in either file."
        raise RefusedError(msg)
    if rows:
        print(table(["layer", "in", options.a, options.b], rows, left=4))
    else:
        print(f"the same: {len(a)} layers")
    if any(layer.definition is None for layer in (*a, *b)):
        print(sources.CHECKPOINT)
    return 1 if rows else 0


Pair = tuple[sources.Found | None, sources.Found | None]


def _matched(a: list[sources.Found], b: list[sources.Found], order: bool) -> list[Pair]:
    if order:
        if len(a) != len(b):
            msg = f"one file has {len(a)} layers, the other {len(b)}; leave out --order."
            raise RefusedError(msg)
        return list(zip(a, b, strict=True))
    others = {layer.name: layer for layer in b}
    pairs: list[Pair] = [(layer, others.pop(layer.name, None)) for layer in a]
    return [*pairs, *((None, layer) for layer in others.values())]


def _between(a: sources.Found, b: sources.Found) -> list[list[str]]:
    found = []
    if a.definition is not None and b.definition is not None:
        if type(a.definition) is not type(b.definition):
            return [["kind", a.kind, b.kind]]
        found = [[n, repr(x), repr(y)] for n, x, y in differences(a.definition, b.definition)]
    for name in sorted(a.arrays.keys() | b.arrays.keys()):
        one, other = a.arrays.get(name), b.arrays.get(name)
        if one is None or other is None:
            found.append([name, *("no" if each is None else "yes" for each in (one, other))])
        elif one.shape != other.shape:
            found.append([name, f"shape {one.shape}", f"shape {other.shape}"])
        else:
            x, y = one.astype(np.float64), other.astype(np.float64)
            if not np.array_equal(x, y, equal_nan=True):
                both = np.isfinite(x) & np.isfinite(y)
                gap = f"up to {np.max(np.abs(x[both] - y[both]), initial=0):.3g} apart"
                found.append([name, sources.summary(x), f"{sources.summary(y)}; {gap}"])
            elif one.dtype != other.dtype:
                found.append([name, str(one.dtype), str(other.dtype)])
    return found
