"""The normalization layers of a model: here, a layer alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from normkit._bundle import Arrays, Entry
from normkit._definition import Definition
from normkit._slot import Slot

from ._layer import Layer


class _Slot(Slot):
    @property
    def definition(self) -> Definition:
        return self.layer.definition

    @property
    def training(self) -> None:
        return None

    def read(self) -> Arrays:
        return {name: np.array(a) for name, a in (self.layer.params | self.layer.state).items()}

    def write(self, arrays: Arrays) -> None:
        for own in (self.layer.params, self.layer.state):
            for name in own.keys() & arrays.keys():
                own[name] = np.asarray(arrays[name], np.asarray(own[name]).dtype).copy()

    def configure(self, definition: Definition) -> None:
        self.layer.definition = definition


def slots(layer: Layer) -> list[Slot]:
    """``layer``, under the empty name."""
    return [_Slot("", layer)]


def made(entry: Entry, **options: Any) -> Layer:
    """A new layer that computes what ``entry`` does."""
    layer = Layer(entry.definition, **{"dtype": entry.dtype} | options)
    slots(layer)[0].write(entry.arrays)
    return layer
