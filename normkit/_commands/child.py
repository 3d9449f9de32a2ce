"""The process in which one framework runs: it says what it found, a line of JSON at a time."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from normkit._commands import timing
from normkit._commands.cases import Case, arrays


def bench(adapter: Any, cases: list[dict[str, Any]], mode: str, seconds: float) -> Iterator[Any]:
    """Time the native layer and normkit's, case by case."""
    for fields in cases:
        case = Case(**fields | {"shape": tuple(fields["shape"])})
        given = [_laid_out(case, arrays(case, seed=seed), adapter.LAYOUT) for seed in (0, 1)]
        inputs = [tuple(adapter.array(a[name], case.dtype) for name in ("x", "g")) for a in given]
        runs = {
            side: adapter.function(library, case, given[0], mode)
            for side, library in (("native", adapter.NATIVE), ("normkit", adapter.NORMKIT))
        }
        native, normkit = (_finished(adapter, run, inputs) for run in runs.values())
        like = np.empty(case.shape, "float32" if case.dtype == "float32" else "uint16")
        times = timing.pair(native, normkit, timing.copier(like), seconds)
        memory = {side: adapter.peak(run, *inputs[0]) for side, run in runs.items()}
        yield times | {"memory": memory}


def _finished(adapter: Any, run: Any, inputs: list[tuple[Any, ...]]) -> timing.Call:
    """A call that returns when the result is there; two inputs take turns."""
    return lambda i: adapter.wait(run(*inputs[i % 2]))


def check(
    adapter: Any, cases: list[dict[str, Any]], offsets: list[float], mode: str, folder: str
) -> Iterator[Any]:
    """Write down what the layers compute: ``<side>-<case>-<offset>.npz`` for each."""
    for number, fields in enumerate(cases):
        case = Case(**fields | {"shape": tuple(fields["shape"])})
        for offset in offsets:
            given = _laid_out(case, arrays(case, offset), adapter.LAYOUT)
            x, g = (adapter.array(given[name], case.dtype) for name in ("x", "g"))
            for side, library in (("native", adapter.NATIVE), ("normkit", adapter.NORMKIT)):
                result = adapter.function(library, case, given, mode)(x, g)
                found = {
                    name: _images(case, adapter.numpy(a), adapter.LAYOUT)
                    for name, a in zip(case.results, result, strict=False)
                }
                np.savez(Path(folder, f"{side}-{number}-{offset:g}.npz"), **found)
        yield {"done": number}


def info(adapter: Any) -> Iterator[Any]:
    """Versions, devices, and the faster paths that are there."""
    backend = adapter.BACKEND
    yield {
        "versions": {name: sys.modules[name].__version__ for name in adapter.PACKAGES},
        "device": adapter.device(),
        "paths": dict(backend.paths),
    }


def _laid_out(case: Case, given: dict[str, Any], layout: str) -> dict[str, Any]:
    """With the channels of images last, for a framework that has them there."""
    if case.along != 1 or layout == "channels first":
        return given
    moved = {name: np.moveaxis(given[name], 1, -1).copy() for name in ("x", "g")}
    return given | moved


def _images(case: Case, a: Any, layout: str) -> Any:
    return a if case.along != 1 or layout == "channels first" else np.moveaxis(a, -1, 1)


def main(job: dict[str, Any]) -> None:
    # What frameworks print must not get between the lines of JSON.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in job["without"]:
        sys.modules[name] = None  # type: ignore[assignment]
    adapter = importlib.import_module(f"normkit.{job['adapter']}._compared")
    task: Any = {"bench": bench, "check": check, "info": info}[job["task"]]
    for message in task(adapter, **job["arguments"]):
        print(json.dumps(message), file=out, flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
