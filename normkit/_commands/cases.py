"""What is run: a layer, the shape and dtype of x, and the work that is done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

GROUPS = 8  # of a GroupNorm
EPS = 1e-5

LAYERS = ("BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm")
_IMAGES = (32, 64, 56, 56), (64, 256, 14, 14)
_MATRIX = (256, 512)
_ROWS = (8, 128, 4096), (16, 512, 768), (8, 64)
# For each layer the shapes of x, and for those of `--quick`.
_GRID = {
    "BatchNorm": (*_IMAGES, _MATRIX),
    "LayerNorm": _ROWS,
    "RMSNorm": _ROWS,
    "GroupNorm": _IMAGES,
    "InstanceNorm": _IMAGES,
}
_QUICK = {(64, 256, 14, 14), (16, 512, 768), (8, 64)}
_WORK = {"BatchNorm": ("train", "train+grad", "eval")}


@dataclass(frozen=True)
class Case:
    """One layer at work.

    Attributes:
        layer: one of ``LAYERS``.
        shape: of x; images are (batch, channels, height, width), whatever a framework prefers.
        dtype: of x and the result.
        work: ``train`` or ``eval``, and ``forward`` where they are the same; ``+grad`` with the
            gradients of x and the parameters.
    """

    layer: str
    shape: tuple[int, ...]
    dtype: str
    work: str

    @property
    def training(self) -> bool:
        return not self.work.startswith("eval")

    @property
    def gradient(self) -> bool:
        return self.work.endswith("+grad")

    @property
    def remembers(self) -> bool:
        """Whether training and evaluation differ."""
        return self.layer == "BatchNorm"

    @property
    def along(self) -> int:
        """The axis of the parameters."""
        return len(self.shape) - 1 if self.layer in ("LayerNorm", "RMSNorm") else 1

    @property
    def features(self) -> int:
        return self.shape[self.along]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the parameters."""
        return ("scale",) if self.layer == "RMSNorm" else ("scale", "bias")

    @property
    def results(self) -> tuple[str, ...]:
        """What comes first of what is computed: the result, and the gradient of x."""
        return ("y", "dx") if self.gradient else ("y",)


def grid(*, quick: bool, layers: tuple[str, ...] = LAYERS) -> list[Case]:
    """The cases of a benchmark."""
    return [
        Case(layer, shape, dtype, work)
        for dtype in (("float32",) if quick else ("float32", "bfloat16"))
        for layer in layers
        for shape in _GRID[layer]
        if not quick or shape in _QUICK
        for work in _WORK.get(layer, ("forward", "forward+grad"))
    ]


def arrays(case: Case, offset: float = 0.0, seed: int = 0) -> dict[str, NDArray[Any]]:
    """x, the gradient of the result, parameters and statistics, in float32: the same every time.

    x is drawn from N(offset, 1).
    """
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> NDArray[Any]:
        return random.standard_normal(shape, dtype="float32")

    n = case.features
    return {
        "x": normal(*case.shape) + np.float32(offset),
        "g": normal(*case.shape),
        "scale": 1 + normal(n) / 4,
        "bias": normal(n) / 4,
        "mean": np.float32(offset) + normal(n) / 4,
        "var": np.exp(normal(n) / 4),
    }
