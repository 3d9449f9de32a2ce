"""Running statistics taken again: from which values, in which order, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np

from normkit import _checks
from normkit._arrays import backend_of
from normkit._backend import Array, is_array
from normkit._statistics import Axes, Moments
from normkit._streaming import widened

Weigh = Callable[[], Array | None]
Write = Callable[[Any, Array, Array, int], None]

# What a running statistic can be at most. (That of bfloat16 is less than 1% below the next one.)
_LARGEST = {"float16": 65504.0, "float64": float(np.finfo(np.float64).max)}
_LARGEST_ELSE = float(np.finfo(np.float32).max)


class Statistics:
    """What one layer is to remember of all that it sees.

    Args:
        name: of the layer, for errors.
        correction: which estimate of the variance it remembers.
        apart: whether each instance has statistics of its own, the average of which is remembered.
        dtype: the name of the dtype that they are kept in.
    """

    def __init__(self, name: str, correction: int, apart: bool, dtype: Any) -> None:
        self.name = name
        self.correction = correction
        self.apart = apart
        self.largest = _LARGEST.get(str(dtype).rpartition(".")[2], _LARGEST_ELSE)
        self.clear()

    def clear(self) -> None:
        """Forget what was seen."""
        self.calls = 0
        self._total: Moments | None = None
        self._instances: Any = 0
        self._sums: tuple[Any, Any] = (0.0, 0.0)

    def add(self, x: Array, channel: int | Axes, weights: Array | None) -> None:
        """Count in ``x``, of which each position along ``channel`` has statistics of its own."""
        own = {*_checks.axes_in_range(channel, len(x.shape)), *([0] if self.apart else [])}
        axes = tuple(axis for axis in range(len(x.shape)) if axis not in own)
        taken = Moments.of(x, axes, weights=weights)
        try:
            found = widened(taken)
        except Exception as error:
            # Each library has an error of its own for values that are not there to be read.
            raise _unread(self.name) from error
        self.calls += 1
        if not self.apart:
            self._total = found if self._total is None else self._total.merge(found)
            return
        enough = np.broadcast_to(found.count > self.correction, found.mean.shape)
        self._instances = self._instances + np.sum(enough, axis=0)
        values = (found.mean, found.estimate(self.correction))
        old_mean, old_variance = self._sums
        mean, variance = (np.sum(np.where(enough, a, 0.0), axis=0) for a in values)
        self._sums = (old_mean + mean, old_variance + variance)

    def estimates(self) -> tuple[Array, Array]:
        """Mean and variance of all that was seen."""
        if self.apart:
            enough = self._instances > 0
            divisor = np.where(enough, self._instances, 1)
            mean, variance = (a / divisor for a in self._sums)
        else:
            assert self._total is not None
            count = self._total.count
            enough = (count if is_array(count) else np.asarray(count)) > self.correction
            mean, variance = self._total.mean, self._total.estimate(self.correction)
        if not np.all(enough):
            raise _too_few(self.name, self.correction, self.apart)
        for which, found in (("mean", mean), ("variance", variance)):
            if not np.all(np.abs(found) <= self.largest):
                raise _no_number(self.name, which)
        return mean, variance


class Recalibration:
    """The passes over the data in which the layers of a model see what they are to remember.

    Args:
        layers: what is to be found out, by a key for each layer.
        one_pass: whether all of them are found out at once, from the model as it is.
    """

    def __init__(self, layers: Mapping[Any, Statistics], *, one_pass: bool) -> None:
        if not layers:
            raise _nothing()
        self._left = dict(layers)
        self._one_pass = one_pass
        self._called: dict[Hashable, None] = {}
        self._first: Hashable | None = None  # of this batch
        self._early: set[Hashable] = set()
        self._forced: Hashable | None = None

    def see(self, key: Hashable, x: Array, channel: int | Axes, weigh: Weigh) -> None:
        """To be told of each ``x`` that a layer is called with; ``weigh`` gives its weights.

        In each pass the layers learn what they see that are, in every batch, the first one called
        of which nothing is known yet: what is before them is as it will be then. For others it is
        too early.
        """
        if key not in self._left:
            return
        self._called.setdefault(key)
        if self._first is None:
            self._first = key
        if not self._one_pass and key != self._forced:
            if self._first != key:
                self._early.add(key)
            if key in self._early:
                return
        statistics = self._left[key]
        if len(x.shape) < 2:
            raise no_batch_axis(tuple(x.shape), f"layer {statistics.name!r}")
        statistics.add(x, channel, weigh())

    def run(
        self,
        batches: Iterable[Any],
        forward: Callable[[Any], Any],
        write: Write,
        *,
        progress: bool = True,
    ) -> None:
        """Call ``forward`` with the batches until each layer has been given its statistics.

        ``write`` gets the key of a layer, its mean, its variance, and how often it was called.
        """
        if hasattr(batches, "shape"):
            raise _no_list(tuple(batches.shape))
        passes = 1 if self._one_pass else len(self._left)
        if passes > 1 and isinstance(batches, Iterator):
            raise _one_shot(passes)
        with _bar(batches, passes, progress) as step:
            while self._left:
                self._called.clear()
                self._early.clear()
                empty = True
                for batch in batches:
                    empty = False
                    self._first = None
                    forward(batch)
                    step()
                if empty:
                    raise _no_batches()
                missed = [s.name for key, s in self._left.items() if key not in self._called]
                if missed:
                    raise _never_called(missed)
                done = [key for key in self._called if key not in self._early]
                # Where each is called behind another one, in some batch, one has to be the first.
                self._forced = None if done else next(iter(self._called))
                found = [(key, *self._left[key].estimates()) for key in done]
                for key, mean, variance in found:
                    write(key, mean, variance, self._left.pop(key).calls)
                for statistics in self._left.values():
                    statistics.clear()


@contextmanager
def _bar(batches: Any, passes: int, shown: bool) -> Iterator[Callable[[], Any]]:
    """A function to call after each batch. The bar needs the package tqdm, and a terminal."""
    if not shown or find_spec("tqdm") is None:
        yield lambda: None
        return
    from tqdm import tqdm

    try:
        total = passes * len(batches)
    except TypeError:  # of a stream
        total = None
    with tqdm(total=total, unit="batch", desc="recalibrate", disable=None) as bar:
        yield bar.update


def weights_like(x: Array, mask: Array | None, channel: int) -> Array | None:
    """``mask`` as weights of the rank of ``x``, where it may lack the ``channel`` axis."""
    if mask is None:
        return None
    (axis,) = _checks.axes_in_range(channel, len(x.shape))
    return _checks.weights_for(x, mask, axis, backend_of(x))


def has_batch_axis(x: Any) -> None:
    """A batch is no single value."""
    if len(x.shape) == 0:
        raise no_batch_axis((), "the model")


def no_batch_axis(shape: tuple[int, ...], what: str) -> ValueError:
    msg = (
        f"{what} was called with an array of shape {shape}, but the first axis must be that of the "
        f"batch and another that of the channels; batches must yield whole batches, not samples."
    )
    return ValueError(msg)


def no_input(batch: object, wanted: str) -> TypeError:
    """A batch that the model is not simply called with."""
    msg = (
        f"a batch must be {wanted}, but got a {type(batch).__name__}; for any other give call=, a "
        f"function of the model and the batch that calls one with the other."
    )
    return TypeError(msg)


def in_training(name: str) -> ValueError:
    """A layer that does not normalize with its running statistics."""
    msg = (
        f"layer {name!r} is called in training mode, but to be found out is what layers see in "
        f"inference; nothing was changed. Give call=, a function that calls the model as in "
        f"inference."
    )
    return ValueError(msg)


def _nothing() -> ValueError:
    msg = (
        "the model has no layer with running statistics, so there is nothing to take again; only "
        "BatchNorm, and normkit's InstanceNorm with track_running_stats, keep some."
    )
    return ValueError(msg)


def _no_list(shape: tuple[int, ...]) -> TypeError:
    msg = (
        f"the data must be something that yields batches, but got an array of shape {shape}; give "
        f"a list of batches, or [x] if it is a single one."
    )
    return TypeError(msg)


def _one_shot(layers: int) -> ValueError:
    msg = (
        f"the data are passed over once for each of the {layers} layers with running statistics, "
        f"but an iterator gives its batches only once; give a list or a data loader, or "
        f"one_pass=True."
    )
    return ValueError(msg)


def _no_batches() -> ValueError:
    msg = "there are no batches to take statistics of; nothing was changed. Give one at least."
    return ValueError(msg)


def _never_called(names: list[str]) -> ValueError:
    msg = (
        f"these layers were never seen to be called, so nothing is known of what they see, and "
        f"nothing was changed: {', '.join(names)}. Give call=, a function that calls the model so "
        f"that they take part, or recalibrate parts of the model."
    )
    return ValueError(msg)


def _too_few(name: str, correction: int, apart: bool) -> ValueError:
    each = "channel of an instance" if apart else "channel"
    msg = (
        f"layer {name!r} remembers an estimate with correction={correction}, which needs more than "
        f"{correction} value in each {each}, but it saw no more; nothing was changed. Give more "
        f"data."
    )
    return ValueError(msg)


def _no_number(name: str, which: str) -> ValueError:
    msg = (
        f"the {which} of what layer {name!r} sees is NaN or infinite in the dtype that it is kept "
        f"in; nothing was changed. Look for NaN and infinities in the data and in the parameters."
    )
    return ValueError(msg)


def _unread(name: str) -> ValueError:
    msg = (
        f"layer {name!r} is called inside of a compiled or transformed function, where values "
        f"cannot be read; nothing was changed. Call the model without jit, scan, vmap or remat, "
        f"for example with call=."
    )
    return ValueError(msg)
