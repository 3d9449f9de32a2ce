"""A layer of one framework as one of another: the same, and the same in further training."""

from __future__ import annotations

import numpy as np
import pytest

import normkit as nk
import normkit.numpy
from harness import ported
from harness.table import ROWS

FRAMEWORKS = [name for name in ported.HERE if name != "keras"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("source", FRAMEWORKS)
def test_every_pair(row, source):
    ported.law(row, source, [name for name in FRAMEWORKS if name != source])


def test_what_cannot_be_ported():
    layer = nk.numpy.layer(nk.BatchNorm(3))
    with pytest.raises(ValueError, match=r"framework is one of 'keras', 'torch', .* got 'mxnet'"):
        nk.port(layer, "mxnet")
    with pytest.raises(TypeError, match=r"normkit takes models and layers of .* but got a dict"):
        nk.port({}, "numpy")
    layer.state["var"][1] = -1
    with pytest.raises(ValueError, match="the running variance of 1 channels is negative or NaN"):
        nk.port(layer, "numpy")


@pytest.mark.parametrize("framework", [name for name in ported.HERE if name != "numpy"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types(framework, dtype):
    """Their parameters keep their bits, and the statistics are float32 beside them. (Keras has one
    dtype for all.)"""
    layer, _ = ported.trained(ROWS[1], "numpy")
    kind = ported.DTYPES[dtype]
    layer.made.params = {name: p.astype(kind) for name, p in layer.made.params.items()}
    before = layer.entry()
    new = layer.port(framework)
    found = new.entry().arrays
    assert found["scale"].dtype == (np.float32 if framework == "keras" else kind)
    for name, array in before.arrays.items():
        np.testing.assert_array_equal(found.get(name, array).astype(float), array.astype(float))


@pytest.mark.parametrize("framework", ported.HERE)
def test_nothing_is_rounded_in_silence(framework):
    layer = nk.numpy.layer(nk.LayerNorm(3), dtype=np.float64)
    layer.params["scale"][0] = 1 + 2**-40
    option = "param_dtype" if framework.startswith("flax") else "dtype"
    options = {option: np.dtype(np.float32)}
    if framework == "torch":
        import torch

        options = {"dtype": torch.float32}
    if framework == "keras":
        options = {"dtype": "float32"}
    with pytest.raises(ValueError, match="'scale' is float64 and would be rounded to float32"):
        nk.port(layer, framework, **options)
