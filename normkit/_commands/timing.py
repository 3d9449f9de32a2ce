"""How long two functions take, beside each other; and how much memory one of them takes."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

Call = Callable[[int], Any]  # of the number of the call, which picks its input

_SHORTEST = 0.5e-3  # seconds that one reading takes at least, by repetition
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def pair(native: Call, normkit: Call, copy: Call, seconds: float) -> dict[str, Any]:
    """Times of both and of a copy, called in turn for about so many ``seconds``.

    Returns:
        Medians in milliseconds (``native``, ``normkit``, ``copy``), and the quartiles of the ratio
        normkit / native of calls next to each other (``ratio``).
    """
    calls = {"native": native, "normkit": normkit, "copy": copy}
    repeats, each = {}, 0.0
    for name, call in calls.items():
        call(0)  # compiles
        call(1)
        once = min(_time(call, 1), _time(call, 1))
        repeats[name] = max(1, round(_SHORTEST / max(once, 1e-9)))
        each += once * repeats[name]
    rounds = int(np.clip(seconds / each, 7, 200))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds):
        # Each follows the other half of the time, so that neither has the warmer cache.
        for name in list(calls) if i % 2 else list(calls)[::-1]:
            times[name].append(_time(calls[name], repeats[name]))
    ratios = np.divide(times["normkit"], times["native"])
    return {
        **{name: float(np.median(t)) * 1e3 for name, t in times.items()},
        "ratio": [float(q) for q in np.quantile(ratios, (0.25, 0.5, 0.75))],
        "rounds": rounds,
    }


def _time(call: Call, repeats: int) -> float:
    start = perf_counter()
    for i in range(repeats):
        call(i)
    return (perf_counter() - start) / repeats


def copier(x: NDArray[Any]) -> Call:
    """A copy of an array to a place that is there already: the least that any layer could take."""
    places = [np.empty_like(x), np.empty_like(x)]
    return lambda i: np.copyto(places[i % 2], x)


def peak(call: Callable[..., Any], *given: Any) -> float | None:
    """How many MiB a call holds at its peak beyond what was there before, its results included.

    None where the system does not tell (other than Linux).
    """
    if not sys.platform.startswith("linux") or not _CLEAR.exists():
        return None
    gc.collect()
    _trim()
    try:
        _CLEAR.write_text("5")  # the peak starts from here
    except OSError:
        return None
    before = _status("VmRSS")
    result = call(*given)
    extra = _status("VmHWM") - before
    del result
    return max(0.0, extra / 1024)


def _status(field: str) -> int:
    """In KiB."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise LookupError(field)


def _trim() -> None:
    """Give memory that was freed back to the system, where the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
