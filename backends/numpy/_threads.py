"""Threads that share the work of one call.

They are Python's, each running a loop that does not hold the interpreter's lock, and not those of
Numba: its threads end the process when two of Python's call them at once, or when it has forked.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from threading import Lock

import numba

Share = tuple[int, int]


def count() -> int:
    """How many threads work together: as many as Numba would use (``NUMBA_NUM_THREADS``)."""
    return max(1, int(numba.config.NUMBA_NUM_THREADS))


def shares(length: int) -> list[Share]:
    """``range(length)`` in parts of about the same length: one for each thread, at the most."""
    parts = min(count(), length)
    cuts = [length * i // parts for i in range(parts + 1)]
    return list(pairwise(cuts))


def together(jobs: list[Callable[[], None]]) -> None:
    """Do all ``jobs``, each in a thread, one of them in this one."""
    waiting = [_submit(job) for job in jobs[1:]]
    try:
        jobs[0]()
    finally:
        for future in waiting:
            future.result()


def _submit(job: Callable[[], None]) -> Future[None]:
    global _pool
    try:
        with _lock:
            if _pool is None:
                _pool = ThreadPoolExecutor(max(1, count() - 1), "normkit")
            return _pool.submit(job)
    except RuntimeError:  # the interpreter is shutting down, and starts no threads any more
        done: Future[None] = Future()
        job()
        done.set_result(None)
        return done


def _forget() -> None:
    """A forked process has none of the threads; nor does anybody hold the lock there."""
    global _pool, _lock
    _pool, _lock = None, Lock()


_pool: ThreadPoolExecutor | None = None
_lock = Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
