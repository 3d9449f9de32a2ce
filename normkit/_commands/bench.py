"""``python -m normkit bench``: how long normkit takes here, beside the native layers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np

from normkit._commands import frameworks, machine, pictures, record
from normkit._commands.cases import LAYERS, Case, grid
from normkit._report import table

Cell = dict[str, Any]

_SECONDS = {"quick": 0.25, "full": 1.0}  # for each cell, besides compiling
# Compiling a case takes some seconds there, so that `--quick` has time for these.
_SLOW_TO_COMPILE = "compile"
_QUICK_COMPILED = {("BatchNorm", "train+grad"), ("LayerNorm", "forward+grad")}
_LARGE = 2**20  # bytes of x, from which on the time is that of the work and not of the call


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="fewer cells, up to three minutes")
    parser.add_argument("--framework", action="append", metavar="NAME", help="only this one")
    parser.add_argument("--layer", action="append", choices=LAYERS, help="only this one")
    parser.add_argument("--json", metavar="FILE", help="write all that was measured")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the ratios")


def main(options: argparse.Namespace) -> int:
    usual = [name for name, framework in frameworks.FRAMEWORKS.items() if framework.usual]
    names = usual if options.framework is None else frameworks.named(options.framework)
    here, missing = frameworks.divided(names)
    if options.plot:
        pictures.check(options.plot)
    cases = grid(quick=options.quick, layers=tuple(options.layer or LAYERS))
    plan = [
        (name, mode, [case for case in cases if _is_run(case, name, mode, options.quick)])
        for name in here
        for mode in frameworks.FRAMEWORKS[name].modes
    ]
    seconds = _SECONDS["quick" if options.quick else "full"]
    cells, failed = [], []
    with _progress(sum(len(mine) for *_, mine in plan)) as step:
        for name, mode, mine in plan:
            try:
                for cell in _measured(name, mode, mine, seconds):
                    step(f"{name} {mode}: {cell['layer']}")
                    cells.append(cell)
            except RuntimeError as error:
                failed.append(str(error))
    found = {
        "machine": machine.described(),
        "missing": missing,
        "failed": failed,
        "cells": cells,
    }
    print(report(found))
    if options.json:
        record.write(options.json, found)
    if options.plot and cells:
        pictures.bench(cells, options.plot)
    return 1 if failed else 0


def _is_run(case: Case, name: str, mode: str, quick: bool) -> bool:
    if quick and mode == _SLOW_TO_COMPILE:
        large = case.shape[-1] > 64 or len(case.shape) > 2
        return large and (case.layer, case.work) in _QUICK_COMPILED
    return case.dtype in frameworks.FRAMEWORKS[name].dtypes


def _measured(name: str, mode: str, cases: list[Case], seconds: float) -> Iterator[Cell]:
    fields = [asdict(case) for case in cases]
    answers = frameworks.run(name, "bench", cases=fields, mode=mode, seconds=seconds)
    for field, times in zip(fields, answers, strict=True):
        yield {"framework": name, "mode": mode} | field | times


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A function to call after each cell."""
    try:
        from tqdm import tqdm
    except ImportError:  # it comes with the extra "bench"
        yield lambda said: print(said, file=sys.stderr)
        return
    with tqdm(total=total, unit="cell", disable=None) as bar:

        def step(said: str) -> None:
            bar.set_description(said)
            bar.update()

        yield step


def report(found: dict[str, Any]) -> str:
    """What was measured, as text."""
    parts = [found["machine"]]
    kinds = dict.fromkeys((cell["framework"], cell["mode"]) for cell in found["cells"])
    for name, mode in kinds:
        mine = [c for c in found["cells"] if (c["framework"], c["mode"]) == (name, mode)]
        parts.append(f"{name} ({mode})\n\n{_cells(mine)}")
    if kinds:
        parts.append(_summary(found["cells"], list(kinds)))
    parts += [
        f"{name}: not measured, for lack of {lacks}" for name, lacks in found["missing"].items()
    ]
    return "\n\n".join(parts + found["failed"])


def _cells(cells: list[Cell]) -> str:
    heads = ["layer", "x", "dtype", "work", "normkit ms", "native ms", "ratio", "quartiles"]
    heads += ["copies", "MiB", "native MiB"]
    rows = []
    for c in cells:
        low, ratio, high = c["ratio"]
        shape = ", ".join(map(str, c["shape"]))
        memory = [c["memory"][side] for side in ("normkit", "native")]
        rows.append(
            [c["layer"], f"({shape})", c["dtype"], c["work"]]
            + [f"{c[side]:.3g}" for side in ("normkit", "native")]
            + [f"{ratio:.2f}", f"{low:.2f}-{high:.2f}", f"{c['normkit'] / c['copy']:.1f}"]
            + ["" if m is None else f"{m:.1f}" for m in memory]
        )
    return table(heads, rows, left=4)


def _summary(cells: list[Cell], kinds: list[tuple[str, str]]) -> str:
    """The geometric mean of the ratios, and the worst of them."""
    heads = ["", "mean of ratios", "worst from 1 MiB", "added to small calls, microseconds"]
    rows = []
    for name, mode in kinds:
        mine = [c for c in cells if (c["framework"], c["mode"]) == (name, mode)]
        large = [c["ratio"][1] for c in mine if size(c) >= _LARGE]
        small = [1e3 * (c["normkit"] - c["native"]) for c in mine if size(c) < _LARGE]
        rows.append(
            [
                f"{name} ({mode})",
                f"{geometric_mean([c['ratio'][1] for c in mine]):.2f}",
                f"{max(large):.2f}" if large else "",
                f"{max(small):+.0f}" if small else "",
            ]
        )
    return table(heads, rows)


def size(cell: Cell) -> int:
    """Bytes of x."""
    return int(np.prod(cell["shape"])) * (4 if cell["dtype"] == "float32" else 2)


def geometric_mean(ratios: list[float]) -> float:
    return float(np.exp(np.mean(np.log(ratios))))
