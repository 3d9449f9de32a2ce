"""Each preset against the native layer it names: in its own framework, and in all the others.

A Keras BatchNorm reproduced in PyTorch, a Flax LayerNorm in NumPy, and so on: three conventions
on every backend, over five training steps and an evaluation.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

import normkit as nk
from harness import backends
from harness.data import assert_near, job
from harness.oracle import Answer, wide
from harness.table import Row

# preset -> (the backend whose native layer it names, the row)
PRESETS = {
    "BatchNorm.torch": ("torch", Row("torch", nk.BatchNorm.torch(5), (8, 5, 7))),
    "BatchNorm.keras": ("keras-tensorflow", Row("keras", nk.BatchNorm.keras(7), (8, 5, 7))),
    "BatchNorm.flax": ("flax-nnx", Row("flax", nk.BatchNorm.flax(7), (8, 5, 7))),
    "LayerNorm.torch": ("torch", Row("torch", nk.LayerNorm.torch(7), (8, 5, 7))),
    "LayerNorm.keras": ("keras-tensorflow", Row("keras", nk.LayerNorm.keras(7), (8, 5, 7))),
    "LayerNorm.flax": ("flax-nnx", Row("flax", nk.LayerNorm.flax(7), (8, 5, 7))),
    "GroupNorm.torch": ("torch", Row("torch", nk.GroupNorm.torch(2, 6), (8, 6, 7))),
    "GroupNorm.keras": ("keras-tensorflow", Row("keras", nk.GroupNorm.keras(2, 6), (8, 5, 6))),
    "GroupNorm.flax": ("flax-nnx", Row("flax", nk.GroupNorm.flax(2, 6), (8, 5, 6))),
    "InstanceNorm.torch": ("torch", Row("torch", nk.InstanceNorm.torch(5), (8, 5, 7))),
    "InstanceNorm.keras": (
        "keras-tensorflow",
        Row("keras", nk.InstanceNorm.keras(7), (8, 5, 7)),
    ),
    "InstanceNorm.flax": ("flax-nnx", Row("flax", nk.InstanceNorm.flax(7), (8, 5, 7))),
    "RMSNorm.torch": ("torch", Row("torch", nk.RMSNorm.torch(7), (8, 5, 7))),
    "RMSNorm.keras": ("keras-tensorflow", Row("keras", nk.RMSNorm.keras(7), (8, 5, 7))),
    "RMSNorm.flax": ("flax-nnx", Row("flax", nk.RMSNorm.flax(7), (8, 5, 7))),
}
NATIVE = [name for name, (native, _) in PRESETS.items() if native in backends.chosen()]
KEYS = [f"{what}{i}" for i in range(5) for what in ("y", "dx", "dscale", "dbias")]


@cache
def native(preset: str) -> dict:
    backend, row = PRESETS[preset]
    return backends.runner(backend)(replace(job(row), native=True))


@pytest.mark.parametrize("preset", NATIVE)
def test_preset(backend, preset):
    """As close as the native layer is to the exact answer, where the mean is small."""
    want = native(preset)
    got = backends.runner(backend)(job(PRESETS[preset][1]))
    compared = [key for key in (*KEYS, "mean", "var", "eval") if key in got and key in want]
    d = PRESETS[preset][1].definition
    least = 5 + (3 if isinstance(d, nk.BatchNorm) else 1)
    gradients = 5 * (1 + d.scale + d.bias)
    assert len(compared) >= least + gradients * backends.differentiates(backend)
    for key in compared:
        largest = max(1.0, float(np.max(np.abs(want[key]))))
        assert_near(got[key], Answer(wide(want[key]), largest), "float32", key)


def test_presets_say_what_the_frameworks_say():
    assert nk.BatchNorm.torch(3) == nk.BatchNorm(3)
    assert nk.BatchNorm.keras(3) == nk.BatchNorm(3, axis=-1, eps=1e-3, decay=0.99, correction=0)
    assert nk.BatchNorm.flax(3) == nk.BatchNorm(3, axis=-1, eps=1e-5, decay=0.99, correction=0)
    assert nk.LayerNorm.torch(3) == nk.LayerNorm(3, eps=1e-5)
    assert nk.LayerNorm.keras(3) == nk.LayerNorm(3, eps=1e-3)
    assert nk.LayerNorm.flax(3) == nk.LayerNorm(3, eps=1e-6)
    assert nk.GroupNorm.torch(2, 4) == nk.GroupNorm(2, 4, axis=1, eps=1e-5)
    assert nk.GroupNorm.keras(2, 4) == nk.GroupNorm(2, 4, axis=-1, eps=1e-3)
    assert nk.GroupNorm.flax(2, 4) == nk.GroupNorm(2, 4, axis=-1, eps=1e-6)
    affine = {"axis": -1, "scale": True, "bias": True, "decay": 0.99, "correction": 0}
    assert nk.InstanceNorm.torch(3) == nk.InstanceNorm(3)
    assert nk.InstanceNorm.keras(3) == nk.InstanceNorm(3, eps=1e-3, **affine)
    assert nk.InstanceNorm.flax(3) == nk.InstanceNorm(3, eps=1e-6, **affine)
    assert nk.RMSNorm.torch(3) == nk.RMSNorm(3, eps=None)
    assert nk.RMSNorm.keras(3) == nk.RMSNorm.flax(3) == nk.RMSNorm(3, eps=1e-6)


def test_presets_take_changes():
    assert nk.BatchNorm.keras(3, axis=1, scale=False) == nk.BatchNorm(
        3, axis=1, eps=1e-3, decay=0.99, correction=0, scale=False
    )
    assert nk.LayerNorm.flax(3, eps=0.1) == nk.LayerNorm(3, eps=0.1)
