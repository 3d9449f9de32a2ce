"""Which way a call is computed, and why: by the engine, or by a backend's faster path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Step(NamedTuple):
    """One operation of the engine, as it was computed.

    Attributes:
        operation: ``standardize``, ``normalize`` or ``rescale``, and what an adapter adds.
        library: of the arrays.
        path: the faster path that was taken, None for the engine.
        why: the reason, if it was the engine.
    """

    operation: str
    library: str
    path: str | None
    why: str

    def __str__(self) -> str:
        by = self.path if self.path else f"the engine, since {self.why}"
        return f"{self.operation} ({self.library}): {by}"


class Explanation(list[Step]):
    """The steps of a call, in order. Printed, a line each."""

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or (
            "nothing was computed, or by a compiled function that had been traced before"
        )


_steps: Explanation | None = None  # while somebody listens
_taken = ""
_why = ""


def explain(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which way every normalization in ``call(*args, **kwargs)`` is computed, and why.

    The call is made, with all its effects, and its result dropped. Of a compiled function this
    shows what is seen while it is traced: nothing, if that has happened before. Calls are listened
    to one at a time: not for use in several threads at once.

    Returns:
        A list of steps: ``operation``, ``library``, ``path`` (None: the engine) and ``why``.

    >>> import numpy as np, normkit as nk
    >>> [step] = nk.explain(nk.layer_norm, np.ones((2, 3), "float32"), mask=np.ones((2, 3)))
    >>> print(step)
    standardize (numpy): the engine, since a mask or weights lie along the reduced axes
    """
    global _steps
    before, _steps = _steps, Explanation()
    try:
        call(*args, **kwargs)
        return _steps
    finally:
        _steps = before


def taken(path: str) -> None:
    """A backend says which of its paths it takes: a key of its ``paths``."""
    global _taken
    if _steps is not None:
        _taken = path


def declined(why: str) -> None:
    """A backend says why it leaves an operation to the engine; what it returns for it is None."""
    global _taken, _why
    if _steps is not None:
        _taken, _why = "", why


def settled(operation: str, library: str, fast: bool) -> None:
    """An operation was computed, by a faster path if ``fast``."""
    global _taken, _why
    if _steps is None:
        return
    path = _taken if fast else None
    _steps.append(Step(operation, library, path, "" if fast else _why or "there is no faster path"))
    _taken = _why = ""
