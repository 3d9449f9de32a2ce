"""``python -m normkit check``: whether every framework here computes the same."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normkit._commands import exact, frameworks, machine, pictures, record
from normkit._commands.cases import Case, arrays
from normkit._report import table

Arrays = dict[str, NDArray[Any]]

OFFSETS = (0.0, 10.0, 1e3, 1e5)
# Of the largest value of the result (or gradient): how far float32 may be from float64.
BOUND = {"y": 2e-6, "dx": 1e-5}
CASES = (
    Case("BatchNorm", (32, 16, 14, 14), "float32", "train+grad"),
    Case("BatchNorm", (32, 16, 14, 14), "float32", "eval"),
    Case("LayerNorm", (64, 768), "float32", "forward+grad"),
    Case("RMSNorm", (64, 768), "float32", "forward+grad"),
    Case("GroupNorm", (8, 32, 14, 14), "float32", "forward+grad"),
    Case("InstanceNorm", (8, 32, 14, 14), "float32", "forward+grad"),
)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--framework", action="append", metavar="NAME", help="only this one")
    parser.add_argument("--json", metavar="FILE", help="write every error that was found")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the errors")


def main(options: argparse.Namespace) -> int:
    names = frameworks.named(options.framework or list(frameworks.FRAMEWORKS))
    here, missing = frameworks.divided(names)
    if options.plot:
        pictures.check(options.plot)
    with tempfile.TemporaryDirectory() as folder:
        with ThreadPoolExecutor(2) as pool:
            failures = list(pool.map(lambda name: _computed(name, Path(folder)), here))
        failed = [failure for failure in failures if failure is not None]
        here = [name for name, failure in zip(here, failures, strict=True) if failure is None]
        rows = list(_compared(here, Path(folder)))
    broken = [row for row in rows if row["broken"]]
    print(report(here, missing, rows))
    for failure in failed:
        print(f"\n{failure}")
    if options.json:
        everything = {"machine": machine.described(), "missing": missing, "rows": rows}
        record.write(options.json, everything)
    if options.plot and rows:
        pictures.errors(rows, options.plot)
    return 1 if broken or failed else 0


def _computed(name: str, folder: Path) -> str | None:
    """Let framework ``name`` write down what it computes; what went wrong, if anything did."""
    (folder / name).mkdir()
    mode = frameworks.FRAMEWORKS[name].modes[0]
    cases = [asdict(case) for case in CASES]
    place = str(folder / name)
    try:
        list(frameworks.run(name, "check", cases=cases, offsets=OFFSETS, mode=mode, folder=place))
    except RuntimeError as error:
        return str(error)
    return None


def _compared(names: list[str], folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each case, offset and result: the errors of each framework, and between pairs."""
    for number, case in enumerate(CASES if names else ()):
        for offset in OFFSETS:
            right = exact.results(case, arrays(case, offset))
            sides = {
                side: {
                    name: _read(folder / name / f"{side}-{number}-{offset:g}.npz") for name in names
                }
                for side in ("normkit", "native")
            }
            for result in case.results:
                scale = float(np.abs(right[result]).max())
                errors = {
                    side: {
                        name: _apart(a[result], right[result]) / scale for name, a in found.items()
                    }
                    for side, found in sides.items()
                }
                ours = sides["normkit"]
                pairs = {
                    f"{a} and {b}": _apart(ours[a][result], ours[b][result]) / scale
                    for a, b in combinations(names, 2)
                }
                yield {
                    "layer": case.layer,
                    "work": case.work,
                    "offset": offset,
                    "result": result,
                    "errors": errors,
                    "pairs": pairs,
                    "broken": max(errors["normkit"].values()) > BOUND[result],
                }


def _read(path: Path) -> Arrays:
    with np.load(path) as found:
        return dict(found)


def _apart(a: NDArray[Any], b: NDArray[Any]) -> float:
    """The largest difference; infinite where one of them is NaN."""
    difference = float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max())
    return np.inf if np.isnan(difference) else difference


def report(here: list[str], missing: dict[str, str], rows: list[dict[str, Any]]) -> str:
    """What was found, as text."""
    parts = [
        machine.described(),
        f"Here: {', '.join(here) or 'nothing'}."
        + "".join(f"\nNot here: {name}, for lack of {lacks}." for name, lacks in missing.items()),
        "Largest errors, relative to the largest value: of normkit's layers from float64 and\n"
        "between two frameworks, and of the native layers from float64; x from N(mean, 1).",
        _table(rows),
    ]
    broken = [row for row in rows if row["broken"]]
    bounds = ", ".join(f"{bound:g} for {result}" for result, bound in BOUND.items())
    if broken:
        parts.append(f"{len(broken)} rows are beyond the bounds ({bounds}), marked with !")
    elif rows:
        parts.append(f"Everything is within the bounds ({bounds}).")
    return "\n\n".join(parts)


def _table(rows: list[dict[str, Any]]) -> str:
    heads = ["layer", "work", "mean", "of", "normkit", "in", "between two", "native", "in", ""]
    lines = []
    for row in rows:
        worst, where = _largest(row["errors"]["normkit"])
        native, native_where = _largest(row["errors"]["native"])
        between = f"{_largest(row['pairs'])[0]:.1e}" if row["pairs"] else ""
        lines.append(
            [
                *(row["layer"], row["work"], f"{row['offset']:g}", row["result"]),
                *(f"{worst:.1e}", where, between, f"{native:.1e}", native_where),
                "!" if row["broken"] else "",
            ]
        )
    return table(heads, lines, left=2)


def _largest(errors: dict[str, float]) -> tuple[float, str]:
    """The largest error and its name."""
    name = max(errors, key=errors.__getitem__)
    return errors[name], name
