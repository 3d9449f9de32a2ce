"""Layers of Keras, on the backend that this process has: to and from every other framework."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import normkit as nk
import normkit.keras
from harness import backends, ported
from harness.table import BY_NAME, ROWS
from normkit._bundle import Bundle

OTHERS = [
    name
    for name in ("tensorflow", "jax", "torch")
    if name != keras.backend.backend() and not backends.missing(f"keras-{name}")
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("source", ported.HERE)
def test_every_pair(row, source):
    """That has Keras at one end."""
    others = [name for name in ported.HERE if name != "keras"]
    ported.law(row, source, others if source == "keras" else ["keras"])


THERE = """
import sys
import numpy as np, keras, normkit as nk, normkit.keras
from harness import ported
from harness.table import BY_NAME
from normkit._bundle import Bundle
from normkit.keras._slots import made

given, folder = nk.load(sys.argv[1]), sys.argv[2]
batches = np.load(sys.argv[3])
back = {name: nk.extract(made(entry))[""] for name, entry in given.items()}
nk.save(f"{folder}/back.safetensors", Bundle(back))
results, after = {}, {}
for name, entry in given.items():
    layer = ported.Layer(made(entry), "keras")
    for i in range(5):
        results[f"{name}.{i}"] = layer(batches[f"{name}.{i}"], True)
    results[f"{name}.eval"] = layer(batches[f"{name}.0"], False)
    after[name] = layer.entry()
np.savez(f"{folder}/results.npz", **results)
nk.save(f"{folder}/after.safetensors", Bundle(after))
"""


@pytest.mark.parametrize("other", OTHERS)
def test_every_other_backend(other, tmp_path):
    """Through a file, into a process that has another backend, and back."""
    layers, arrays = {}, {}
    for row in ROWS:
        layers[row.name], batches = ported.trained(row, "keras")
        arrays |= {f"{row.name}.{i}": x for i, x in enumerate(batches)}
    before = Bundle({name: layer.entry() for name, layer in layers.items()})
    nk.save(tmp_path / "given.safetensors", before)
    np.savez(tmp_path / "batches.npz", **arrays)
    subprocess.run(
        [
            *(sys.executable, "-c", THERE),
            *(tmp_path / "given.safetensors", tmp_path, tmp_path / "batches.npz"),
        ],
        check=True,
        cwd=Path(__file__).parent,
        env=dict(os.environ) | {"KERAS_BACKEND": other},
    )
    back, after = (nk.load(tmp_path / f"{name}.safetensors") for name in ("back", "after"))
    results = np.load(tmp_path / "results.npz")
    for name, layer in layers.items():
        ported.same_bits(back[name], before[name])
        for i in range(5):
            ported.near(results[f"{name}.{i}"], layer(arrays[f"{name}.{i}"], True))
        ported.near(results[f"{name}.eval"], layer(arrays[f"{name}.0"], False))
        for array in ("mean", "var") if BY_NAME[name].tracks else ():
            ported.near(after[name].arrays[array], layer.entry().arrays[array])


def test_a_ported_layer_in_a_model_that_is_saved(tmp_path):
    """It was built on the shape of no input, and is held to none."""
    layer, _ = ported.trained(BY_NAME["bn-nhwc"], "numpy")
    new = layer.port("keras").made
    inputs = keras.Input((5, 7, 6))
    model = keras.Model(inputs, new(inputs))
    model.save(tmp_path / "model.keras")
    x = np.random.default_rng(0).normal(size=(2, 5, 7, 6)).astype("float32")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    ported.near(model.predict(x, verbose=0), layer(x, False))
