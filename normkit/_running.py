"""Running statistics: what a layer remembers of the batches it has seen."""

from __future__ import annotations

from typing import Any, Self

from normkit import _checks
from normkit._backend import Array, Backend, DType, Namespace, is_array
from normkit._definition import Definition, State
from normkit._statistics import Axes, Moments, averaging, cast


class Remembering(Definition):
    """A layer that may remember ``mean`` and ``var``, and counts the batches behind them."""

    track_running_stats: bool

    def __new__(cls, *args: Any, **options: Any) -> Self:
        if "momentum" in options:
            raise _checks.no_momentum(options["momentum"])
        return super().__new__(cls)

    def _initial_state(self, xp: Namespace, dtype: DType, place: dict[str, Any]) -> State:
        if not self.track_running_stats:
            return {}
        return {
            "mean": xp.zeros(self.parameter_shape, dtype=dtype, **place),
            "var": xp.ones(self.parameter_shape, dtype=dtype, **place),
            "count": xp.zeros((), dtype=xp.asarray(0).dtype, **place),
        }

    def _check_state(self, state: State, backend: Backend) -> None:
        names = ("mean", "var", "count")
        _checks.keys(state, dict.fromkeys(names, self.track_running_stats), "state")
        shapes = {"mean": self.parameter_shape, "var": self.parameter_shape, "count": ()}
        for name, array in state.items():
            _checks.remembered(array, shapes[name], name, backend)


def updated(
    state: State,
    batch: Moments,
    apart: Axes,
    decay: float | None,
    correction: int,
    backend: Backend,
) -> State:
    """The running statistics after ``batch``; no derivative passes through them.

    Where statistics lie ``apart`` along some axes, as those of instances do, their average counts.
    Where there are no more values than ``correction``, they do not define a variance, and the
    running statistics stay as they are.
    """
    xp = backend.xp
    enough = batch.count > correction
    found = {"mean": batch.mean, "var": batch.estimate(correction)}
    found = {name: backend.stop_gradient(a) for name, a in found.items()}
    if apart:
        found, enough = _averaged(found, enough, apart, backend)
    if decay is None and is_array(enough):
        # The batches are counted together, so the channels must have seen the same ones.
        enough = xp.all(enough)
    if not is_array(enough) and not enough:
        return state
    dtype = backend.statistics_dtype(state["mean"].dtype)
    if decay is None:
        keep = 1 - 1 / (cast(state["count"], dtype, backend) + 1)
    else:
        keep = decay
    new = {}
    for name, value in found.items():
        old = state[name]
        value = cast(xp.reshape(value, old.shape), dtype, backend)
        # An infinite variance that nothing is kept of, or added of, leaves no NaN.
        if decay is None or 0 < decay < 1:
            value = keep * cast(old, dtype, backend) + (1 - keep) * value
        elif decay:
            value = old
        value = cast(value, old.dtype, backend)
        if is_array(enough):
            moved = xp.reshape(enough, old.shape) if len(enough.shape) else enough
            value = xp.where(moved, value, old)
        new[name] = value
    if "count" in state:
        count = state["count"]
        new["count"] = count + (xp.astype(xp.any(enough), count.dtype) if is_array(enough) else 1)
    return new


def _averaged(
    found: dict[str, Array], enough: Any, apart: Axes, backend: Backend
) -> tuple[dict[str, Array], Any]:
    """Statistics averaged over the axes ``apart``, and whether there was one at least."""
    xp = backend.xp
    weights = None
    if is_array(enough):
        weights = cast(enough, found["mean"].dtype, backend)
        zero = xp.zeros_like(found["mean"])
        found = {name: xp.where(enough, a, zero) for name, a in found.items()}
    count, average = averaging(found["mean"], apart, weights, backend)
    some = count > 0
    if not is_array(enough):
        some = some if enough else enough
    return {name: average(a) for name, a in found.items()}, some
