"""What a row of the table should compute: the oracle, told what the row's layer is."""

from __future__ import annotations

import numpy as np

from harness import oracle
from harness.oracle import Answer
from harness.table import Row


class Exact:
    """The oracle for one row, with given parameters.

    Groups of channels are an axis of their own here: nothing but where the numbers stand.
    """

    def __init__(self, row: Row, params: dict[str, np.ndarray], dtype: str) -> None:
        d = row.definition
        self.groups, self.channel = d.groups, row.parameter_axes[0]
        self.axes, self.parameter_axes = row.axes, row.parameter_axes
        if self.groups > 1:
            self.parameter_axes = (self.channel, self.channel + 1)
            self.axes = tuple(a if a < self.channel else a + 1 for a in self.axes)
        eps = 2.0**-52 if d.eps is None and dtype == "float64" else row.eps
        self.options = {"parameter_axes": self.parameter_axes, "eps": eps}
        self.own = {"axes": self.axes, "centered": row.centered}
        self.params = {name: self._split(p, 0) for name, p in params.items()}
        if "scale" in params:
            self.params["scale"] = oracle.wide(self.params["scale"]) + (
                1 - oracle.wide(d.first_scale)
            )

    def forward(self, x, mask) -> dict:
        scale, bias = self.params.get("scale"), self.params.get("bias")
        weights = self._weights(mask)
        x = self._split(x, self.channel)
        found = oracle.forward(x, scale, bias, weights=weights, **self.own, **self.options)
        return found | {"y": self._join(found["y"], self.channel)}

    def backward(self, g, x, mask) -> dict[str, Answer]:
        g, x = (self._split(a, self.channel) for a in (g, x))
        found = oracle.backward(
            g, x, self.params.get("scale"), weights=self._weights(mask), **self.own, **self.options
        )
        axes = {"dx": self.channel, "dscale": 0, "dbias": 0}
        return {name: self._join(found[name], axis) for name, axis in axes.items()}

    def given(self, x, mean, var) -> Answer:
        scale, bias = self.params.get("scale"), self.params.get("bias")
        return oracle.given(x, mean, var, scale, bias, **self.options)["y"]

    def _weights(self, mask):
        if mask is None or mask.shape[self.channel] > 1:
            return None if mask is None else self._split(mask, self.channel)
        return np.expand_dims(mask, self.channel) if self.groups > 1 else mask

    def _split(self, a, axis: int):
        if self.groups == 1:
            return a
        return a.reshape(*a.shape[:axis], self.groups, -1, *a.shape[axis + 1 :])

    def _join(self, answer: Answer, axis: int) -> Answer:
        if self.groups == 1:
            return answer
        a = answer.value
        return Answer(a.reshape(*a.shape[:axis], -1, *a.shape[axis + 2 :]), answer.scale)
