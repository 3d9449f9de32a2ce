"""The faster paths out of PyTorch's kernels: which call takes which, and that none can be told
from the engine by its results."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

import normkit.torch as nt
from normkit.torch import _backend, _kernels

IMAGES, ROWS, MATRIX = (4, 6, 5, 3), (4, 6, 5), (12, 6)
# The layer, the shape of an input, and the function that does the work.
PATHS = {
    "batch": (nt.BatchNorm2d(6), IMAGES, "_channels"),
    "batch-bare": (nt.BatchNorm2d(6, affine=False), IMAGES, "_channels"),
    "batch-scale": (nt.BatchNorm2d(6, bias=False), IMAGES, "_channels"),
    "batch-bias": (nt.BatchNorm2d(6, scale=False), IMAGES, "_channels"),
    "batch-last": (nt.BatchNorm(3, axis=-1), IMAGES, "_channels"),
    "batch-middle": (nt.BatchNorm(5, axis=2), IMAGES, None),
    "batch-last-of-three": (nt.BatchNorm(5, axis=-1), ROWS, "_channels"),
    "batch-one-channel": (nt.BatchNorm(1), (8, 1, 5), "_channels"),
    "batch-eval-one-channel": (nt.BatchNorm(1).eval(), (8, 1, 5), "normalize"),
    "batch-matrix": (nt.BatchNorm1d(6), MATRIX, "_channels"),
    "batch-eval": (nt.BatchNorm2d(6).eval(), IMAGES, "normalize"),
    "batch-eval-last": (nt.BatchNorm(3, axis=-1).eval(), IMAGES, "normalize"),
    "layer": (nt.LayerNorm(5), ROWS, "_rows"),
    "layer-two": (nt.LayerNorm((6, 5)), ROWS, "_rows"),
    "layer-bare": (nt.LayerNorm(5, elementwise_affine=False), ROWS, "_rows"),
    "layer-scale": (nt.LayerNorm(5, bias=False), ROWS, "_rows"),
    "layer-one-feature": (nt.LayerNorm(1), (8, 3, 1), "_rows"),
    "layer-of-one-sample": (nt.LayerNorm((1, 1), axes=(0, 1)), (1, 1, 4), None),
    "layer-bias": (nt.LayerNorm(5, scale=False), ROWS, "_rows"),
    "layer-first": (nt.LayerNorm(6, axes=(1,)), ROWS, None),
    "group": (nt.GroupNorm(2, 6), IMAGES, "_groups"),
    "group-matrix": (nt.GroupNorm(2, 6), MATRIX, "_groups"),
    "group-one": (nt.GroupNorm(1, 6), ROWS, "_groups"),
    "group-scale": (nt.GroupNorm(2, 6, bias=False), IMAGES, "_groups"),
    "group-bias": (nt.GroupNorm(2, 6, scale=False), IMAGES, "_groups"),
    "group-bare": (nt.GroupNorm(2, 6, affine=False), IMAGES, "_rows"),
    "group-last": (nt.GroupNorm(3, 3, axis=-1), IMAGES, None),
    "instance": (nt.InstanceNorm2d(6, affine=True), IMAGES, "_groups"),
    "instance-bare": (nt.InstanceNorm2d(6), IMAGES, "_rows"),
    "instance-tracking": (nt.InstanceNorm2d(6, track_running_stats=True), IMAGES, None),
    "rms": (nt.RMSNorm(5, eps=1e-5), ROWS, "rescale"),
    "rms-two": (nt.RMSNorm((6, 5), eps=1e-5), ROWS, "rescale"),
    "rms-bare": (nt.RMSNorm(5, eps=1e-5, elementwise_affine=False), ROWS, "rescale"),
    "rms-zero-centered": (nt.RMSNorm(5, eps=1e-5, zero_centered=True), ROWS, "rescale"),
    "rms-first": (nt.RMSNorm(6, eps=1e-5, axes=(1,)), ROWS, None),
    "rms-after-cast": (nt.RMSNorm(5, eps=1e-5, scale_after_cast=True), ROWS, None),
}
KERNELS = ["_channels", "_rows", "_groups", "normalize", "rescale"]
paths = pytest.mark.parametrize("name", PATHS)


@pytest.fixture
def taken(monkeypatch):
    """The functions that gave a result, in the order of the calls."""
    found = []

    def watch(name):
        function = getattr(_kernels, name)

        def watched(*args):
            result = function(*args)
            if result is not None:
                found.append(name)
            return result

        monkeypatch.setattr(_kernels, name, watched)

    for name in KERNELS:
        watch(name)
    return found


def example(name, dtype=torch.float32, offset=0.0):
    """A layer with random parameters, an input and a gradient of the output."""
    torch.manual_seed(3)
    layer, shape, _ = PATHS[name]
    layer = copy.deepcopy(layer).to(dtype)
    for p in layer.parameters():
        torch.nn.init.uniform_(p, 0.5, 1.5)
    return layer, (torch.randn(shape) + offset).to(dtype), torch.randn(shape).to(dtype)


def results(layer, x, g):
    """Output, gradients, second derivatives, and the buffers afterwards."""
    x = x.clone().requires_grad_()
    y = layer(x)
    first = torch.autograd.grad(y, [x, *layer.parameters()], g, create_graph=True)
    loss = sum((d * d).sum() for d in first)
    second = torch.autograd.grad(loss, [x, *layer.parameters()], allow_unused=True)
    found = [y, *first, *(d for d in second if d is not None), *layer.buffers()]
    return [a.detach() for a in found]


def plain(call):
    """The same by the engine."""
    kernels, _backend._kernels = _backend._kernels, None
    try:
        return call()
    finally:
        _backend._kernels = kernels


@paths
def test_each_path_is_taken(name, taken):
    layer, x, _ = example(name)
    layer(x)
    assert taken == ([] if PATHS[name][2] is None else [PATHS[name][2]])


def test_every_path_is_in_the_table():
    assert {path for _, _, path in PATHS.values()} == {*KERNELS, None}


@pytest.mark.parametrize("offset", [0.0, 2.0, 1e2, 1e5])
@paths
def test_results_are_those_of_the_engine(name, offset):
    layer, x, g = example(name, torch.float64, offset)
    got = results(copy.deepcopy(layer), x, g)
    want = plain(lambda: results(copy.deepcopy(layer), x, g))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9 * float(b.abs().max()) + 1e-11)


@pytest.mark.parametrize("offset", [0.0, 1.0, 3.0, 4.5, 1e2, 1e5])
@paths
def test_float32_keeps_its_digits(name, offset):
    layer, x, _ = example(name, offset=offset)
    with torch.no_grad():
        y = copy.deepcopy(layer)(x)
        exact = plain(lambda: copy.deepcopy(layer).double()(x.double()))
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=2e-6 * float(exact.abs().max()))


@pytest.mark.parametrize("format", [torch.channels_last, torch.contiguous_format])
@paths
def test_the_layout_stays(name, format):
    layer, x, _ = example(name)
    if x.ndim == 4:
        x = x.contiguous(memory_format=format)
        y = layer(x)
        assert y.is_contiguous(memory_format=format)
        want = plain(lambda: copy.deepcopy(layer)(x))
        torch.testing.assert_close(y, want, rtol=0, atol=2e-6 * float(want.abs().max()))


@paths
def test_no_more_is_kept_for_the_gradient_than_natively(name):
    layer, x, _ = example(name)
    if (
        PATHS[name][2] not in ("_channels", "_rows", "_groups", "rescale")
        or 1 in x.shape
        or x.ndim == 2
    ):
        return
    native = next(c for c in type(layer).__mro__ if c.__module__.startswith("torch.nn"))
    if native.__name__.startswith("_"):  # a layer for any rank, of which there is no native one
        return
    reference = copy.deepcopy(layer)
    reference.__class__ = native
    x = torch.randn(8, *x.shape[1:])
    assert kept(layer, x) <= kept(reference, x)


def kept(layer, x):
    """How many numbers as large arrays as ``x`` are saved for the backward pass."""
    found = {}

    def pack(a):
        if a.numel() >= x.numel():
            found[a.data_ptr()] = a.numel()
        return a

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda a: a):
        layer(x.clone().requires_grad_() * 1)
    return sum(found.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@paths
def test_what_kernels_cannot_do_is_left_to_the_engine(name, value):
    layer, x, _ = example(name)
    x[-1, -1] = value
    got = copy.deepcopy(layer)(x)
    want = plain(lambda: copy.deepcopy(layer)(x))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_what_is_not_for_kernels(taken):
    layer, x, _ = example("layer")
    layer(x.to(torch.bfloat16))
    layer(x.double())  # parameters of another dtype
    layer(x, mask=x > 0)
    layer(x.transpose(0, 1))
    layer(x[:0])
    torch.func.vmap(layer)(x)
    torch.func.jvp(layer, (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        layer(torch.autograd.forward_ad.make_dual(x, x))
    torch.compile(layer, backend="eager", fullgraph=True)(x)
    assert taken == []
    layer(x)
    assert taken == ["_rows"]


def test_without_the_file_the_engine_does_it():
    code = """
import sys
sys.modules["normkit.torch._kernels"] = None
import torch, normkit.torch as nt
from normkit.torch import _backend
assert _backend._kernels is None
layer, x = nt.BatchNorm2d(3), torch.randn(4, 3, 5, 5)
y = layer(x)
assert abs(float(y.mean())) < 1e-6 and abs(float(y.var(correction=0)) - 1) < 1e-4
"""
    subprocess.run([sys.executable, "-c", code], check=True)
