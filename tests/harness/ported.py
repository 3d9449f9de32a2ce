"""A layer of any framework behind one call, and the law of a port."""

from __future__ import annotations

import importlib.util

import numpy as np

import normkit as nk
import normkit.numpy
from harness.data import DTYPES, job
from harness.table import Row
from normkit._bundle import Entry

__all__ = ["DTYPES"]

NEEDS = {
    "numpy": ["numpy"],
    "torch": ["torch"],
    "keras": ["keras"],
    "flax.nnx": ["flax"],
    "flax.linen": ["flax"],
}
HERE = [name for name, needs in NEEDS.items() if all(map(importlib.util.find_spec, needs))]


class Layer:
    """What ``port`` made, and how it is called."""

    def __init__(self, made, framework: str) -> None:
        self.made, self.framework = made, framework

    def port(self, framework: str) -> Layer:
        module, variables = self._parts()
        return Layer(nk.port(module, framework, variables=variables), framework)

    def entry(self) -> Entry:
        module, variables = self._parts()
        return nk.extract(module, variables)[""]

    def __call__(self, x: np.ndarray, training: bool) -> np.ndarray:
        tracks = getattr(self.entry().definition, "track_running_stats", False)
        if self.framework == "numpy":
            return self.made(x, training=training)
        if self.framework == "torch":
            import torch

            with torch.no_grad():
                return self.made.train(training)(torch.from_numpy(x)).numpy()
        if self.framework == "keras":
            import keras

            given = {"training": training} if tracks else {}
            return keras.ops.convert_to_numpy(self.made(x, **given))
        given = {"use_running_average": not training} if tracks else {}
        if self.framework == "flax.nnx":
            return np.asarray(self.made(x, **given))
        module, variables = self.made
        if tracks:  # it has what the call would say
            module = module.clone(use_running_average=None)
        y, changed = module.apply(variables, x, **given, mutable=["batch_stats"])
        self.made = self.made[0], variables | changed
        return np.asarray(y)

    def _parts(self):
        return self.made if self.framework == "flax.linen" else (self.made, None)


def trained(row: Row, framework: str) -> tuple[Layer, list[np.ndarray]]:
    """A layer with parameters and statistics that are its own, and batches to train it on."""
    work = job(row, offset=2.0)
    layer = nk.numpy.layer(row.definition)
    layer.params = {name: p.copy() for name, p in work.params.items()}
    for x in work.batches[:3]:
        layer(x, training=True)
    # Of two lengths: what is compiled is compiled for each.
    a, b, *_, c = work.batches
    return Layer(layer, "numpy").port(framework), [a, c, b, a, c]


def near(a: np.ndarray, b: np.ndarray) -> None:
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    assert np.max(np.abs(a - b)) <= 4e-6 * max(1.0, float(np.max(np.abs(b))))


def same_bits(a: Entry, b: Entry) -> None:
    """The same layer, but for a count of batches that nothing depends on."""
    assert a.definition == b.definition
    needed = a.arrays.keys() | b.arrays.keys()
    if getattr(a.definition, "decay", None) is not None:
        needed = needed - {"count"}
    for name in needed:
        one, other = a.arrays[name], b.arrays[name]
        assert one.dtype == other.dtype or name == "count"
        assert one.tobytes() == other.tobytes() or (name == "count" and one == other)


def law(row: Row, source: str, targets: list[str]) -> None:
    """A ported layer computes the same, in evaluation and in five steps of training; and back."""
    layer, batches = trained(row, source)
    before, new = layer.entry(), {target: layer.port(target) for target in targets}
    for other in new.values():
        same_bits(other.port(source).entry(), before)
        near(other(batches[0], False), layer(batches[0], False))
    for x in batches:
        want = layer(x, True)
        for other in new.values():
            near(other(x, True), want)
    want, after = layer(batches[0], False), layer.entry()
    for other in new.values():
        near(other(batches[0], False), want)
        if row.tracks:
            found = other.entry().arrays
            for name in ("mean", "var"):
                near(found[name], after.arrays[name])
    if row.tracks and row.definition.decay != 1:
        assert any(np.any(after.arrays[n] != before.arrays[n]) for n in ("mean", "var"))
