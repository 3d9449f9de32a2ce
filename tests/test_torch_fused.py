"""What compilers trace instead of the engine: which function takes which path, and that none can
be told from the engine by its results."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

import normkit as nk
import normkit.torch as nt
from normkit.torch import _backend

fused = pytest.importorskip("normkit.torch._fused")

IMAGES, ROWS, MATRIX = (9, 6, 5, 9), (4, 6, 12), (24, 6)
# The layer and the shape of an input.
LAYERS = {
    "batch": (nt.BatchNorm2d(6), IMAGES),
    "batch-bare": (nt.BatchNorm2d(6, affine=False), IMAGES),
    "batch-bias": (nt.BatchNorm2d(6, scale=False), IMAGES),
    "batch-last": (nt.BatchNorm(9, axis=-1), IMAGES),
    "batch-matrix": (nt.BatchNorm1d(6), MATRIX),
    "layer": (nt.LayerNorm(12), ROWS),
    "layer-two": (nt.LayerNorm((6, 12)), ROWS),
    "layer-bare": (nt.LayerNorm(12, elementwise_affine=False), ROWS),
    "layer-bias": (nt.LayerNorm(12, scale=False), ROWS),
    "layer-first": (nt.LayerNorm(6, axes=(1,)), ROWS),
    "group": (nt.GroupNorm(2, 6), IMAGES),
    "group-bias": (nt.GroupNorm(2, 6, scale=False), IMAGES),
    "group-last": (nt.GroupNorm(3, 9, axis=-1), IMAGES),
    "instance": (nt.InstanceNorm2d(6, affine=True), IMAGES),
    "instance-tracking": (nt.InstanceNorm2d(6, track_running_stats=True), IMAGES),
    "rms": (nt.RMSNorm(12, eps=1e-5), ROWS),
    "rms-first": (nt.RMSNorm(6, eps=1e-5, axes=(1,)), ROWS),
    "rms-zero-centered": (nt.RMSNorm(12, eps=1e-5, zero_centered=True), ROWS),
}
layers = pytest.mark.parametrize("name", LAYERS)
PLAIN, RULE, GIVEN = fused.PATHS


@pytest.fixture(autouse=True)
def anew():
    torch._dynamo.reset()


def example(name, dtype=torch.float32, offset=0.0):
    """A layer with random parameters, an input and a gradient of the output."""
    torch.manual_seed(3)
    layer, shape = LAYERS[name]
    layer = copy.deepcopy(layer).to(dtype)
    for p in layer.parameters():
        nn.init.uniform_(p, 0.5, 1.5)
    return layer, (torch.randn(shape) + offset).to(dtype), torch.randn(shape).to(dtype)


def results(layer, x, g, call=None, second=False):
    """Output, gradients, second derivatives if asked for, and the buffers afterwards."""
    x = x.clone().requires_grad_()
    y = (layer if call is None else call)(x)
    leaves = [x, *layer.parameters()]
    found = [y, *torch.autograd.grad(y, leaves, g, create_graph=second)]
    if second:
        loss = sum((d * d).sum() for d in found[1:])
        more = torch.autograd.grad(loss, leaves, allow_unused=True)
        found += [
            torch.zeros_like(a) if d is None else d for a, d in zip(leaves, more, strict=True)
        ]
    return [a.detach() for a in (*found, *layer.buffers())]


def compiled(layer, backend="eager", **options):
    return torch.compile(layer, backend=backend, fullgraph=True, **options)


def plain(call):
    """The same by the engine, out of nothing but operations."""
    kernels, _backend._kernels = _backend._kernels, None
    try:
        return call()
    finally:
        _backend._kernels = kernels


def exact(name, layer, x, g, **options):
    layer = copy.deepcopy(layer).double()
    return plain(lambda: results(layer, x.double(), g.double(), **options))


def assert_close(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        size = float(b.abs().max())
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance * size + 1e-30)


def path(call, x):
    [step] = nk.explain(call, x)
    return step.path or step.why


@layers
def test_which_path(name):
    layer, x, _ = example(name)
    assert path(compiled(layer), x) == RULE
    if layer.training and getattr(layer, "running_mean", None) is not None:
        torch._dynamo.reset()
        assert path(compiled(layer.eval()), x) == GIVEN


def test_what_is_not_for_the_rule():
    layer, x, _ = example("layer")

    def taken(call, *args):
        torch._dynamo.reset()
        [step] = nk.explain(call, *args)
        return step.path or step.why

    # One graph for gradients of any order, for maps, for forward mode, and for other programs. What
    # a transformation computes in a compiled function is not always seen from outside.
    for transformed in (
        lambda x: torch.func.vmap(lambda v: layer(v))(x),
        lambda x: torch.func.jvp(layer, (x,), (x.sin(),))[1],
        torch.func.grad(lambda x: layer(x).pow(3).sum()),
    ):
        torch._dynamo.reset()
        steps = nk.explain(compiled(transformed), x)
        assert {step.path for step in steps} <= {PLAIN}
        assert_close([compiled(transformed)(x)], [transformed(x)], 2e-6)
    assert taken(lambda x: torch.export.export(layer, (x,)), x) == PLAIN
    # Neither path.
    assert taken(layer, x) not in fused.PATHS
    masked = taken(compiled(lambda x, m: layer(x, mask=m)), x, x > 0)
    assert masked == "a mask or weights lie along the reduced axes"
    llama = nt.RMSNorm(12, scale_after_cast=True)
    assert taken(compiled(llama), x) == "the last product is one of the dtype of the result"


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e5])
@layers
def test_results_and_both_derivatives(name, offset):
    """As PyTorch runs what was traced: in eager mode second derivatives are to be had."""
    layer, x, g = example(name, torch.float64, offset)
    twin = copy.deepcopy(layer)
    got = results(twin, x, g, compiled(twin), second=True)
    assert_close(got, exact(name, layer, x, g, second=True), 1e-9 if offset < 1e4 else 1e-6)


@pytest.mark.parametrize("name", ["batch", "layer", "group", "rms"])
def test_the_derivative_is_that_of_the_operations(name, monkeypatch):
    """The rule, against what PyTorch derives."""
    layer, x, g = example(name, torch.float64, 3.0)
    got = results(layer, x, g, compiled(layer), second=True)
    monkeypatch.setattr(fused, "_rule_applies", lambda: False)
    torch._dynamo.reset()
    twin = example(name, torch.float64)[0]
    assert_close(got, results(twin, x, g, compiled(twin), second=True), 1e-9)


@pytest.mark.parametrize("offset", [0.0, 4.0, 1e3, 1e5])
@layers
def test_float32_keeps_its_digits(name, offset):
    layer, x, g = example(name, offset=offset)
    twin = copy.deepcopy(layer)
    got = results(twin, x, g, compiled(twin))
    assert_close(got, exact(name, layer, x, g), 2e-6)


@pytest.mark.parametrize("size", [1e30, 1e20, 1e12, 1e-12, 1e-30])
@layers
def test_any_magnitude(name, size):
    layer, x, g = example(name)
    x = x * size
    if size > 1:
        x[0] /= size  # one of the groups, or a part of them
    got = results(layer, x, g, compiled(layer))
    layer = example(name)[0]
    want = exact(name, layer, x, g)
    count = 2 + len(list(layer.parameters()))
    assert_close(got[:count], want[:count], 5e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@layers
def test_half_types_are_rounded_once(name, dtype):
    layer, x, g = example(name)
    x, g = x.to(dtype), g.to(dtype)
    twin = copy.deepcopy(layer)
    got = results(twin, x, g, compiled(twin))
    assert got[0].dtype == got[1].dtype == dtype
    want = exact(name, layer, x, g)
    digits = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    assert_close(got[:2], want[:2], digits)
    assert_close(got[2:], want[2:], 1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["batch", "layer", "instance", "rms"])
def test_what_is_no_number_stays_in_its_group(name, value):
    layer, x, _ = example(name)
    x[-1, -1, -1] = value
    got = compiled(copy.deepcopy(layer))(x)
    want = plain(lambda: copy.deepcopy(layer)(x))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("value", [0.0, 1e-3, 0.1, 1e5 + 0.1, 1e10, 1e20, -1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["batch", "layer", "group"])
def test_equal_values_come_out_as_bias(name, dtype, value):
    layer, x, g = example(name)
    x = torch.full_like(x, value, dtype=dtype)
    y, dx, *rest = results(layer, x, g.to(dtype), compiled(layer))
    nn.init.zeros_(layer.weight)
    torch.testing.assert_close(y, plain(lambda: layer(x)), rtol=0, atol=2e-3)
    assert all(a.isfinite().all() for a in (dx, *rest))


def test_one_value_far_from_the_rest():
    """Where the rough mean is far off: among an eighth of the values, and in the other part."""
    layer, x, g = example("batch")
    for place in (0, -1):
        for size in (1e3, 1e8, 1e25):
            x[place, 2, 1, 1] = size
            twin = copy.deepcopy(layer)
            got = results(twin, x, g, compiled(twin))
            assert_close(got[:4], exact("batch", layer, x, g)[:4], 5e-6)


@pytest.mark.parametrize("name", ["batch", "layer", "rms"])
def test_nothing_comes_out_of_nothing(name):
    layer, x, _ = example(name)
    assert compiled(layer)(x[:0]).shape == x[:0].shape
    assert all(b.isfinite().all() for b in layer.buffers())
    assert compiled(layer.eval())(x[:0]).shape == x[:0].shape


def test_mixed_dtypes():
    """Which is what a compiled half-precision model with float32 parameters is, and the reverse."""
    for of_layer in (torch.float32, torch.bfloat16, torch.float64):
        for of_x in (torch.float32, torch.bfloat16, torch.float64):
            torch._dynamo.reset()
            layer, x, g = example("layer", of_layer)
            got = results(layer, x.to(of_x), g.to(of_x), compiled(layer))
            assert [a.dtype for a in got] == [of_x, of_x, of_layer, of_layer]


class Model(nn.Module):
    """All that Inductor has to see, in one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.images = nn.ModuleList([
            nt.BatchNorm2d(6), nt.BatchNorm(9, axis=-1), nt.GroupNorm(2, 6), nt.LayerNorm(9),
            nt.InstanceNorm2d(6, affine=True), nt.RMSNorm((5, 9), eps=1e-5),
        ])  # fmt: skip

    def forward(self, x):
        return torch.stack([norm(x) for norm in self.images])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_through_inductor(dtype):
    torch.manual_seed(0)
    x = (torch.randn(IMAGES) + 1e3 * (dtype == torch.float32)).to(dtype)
    g = torch.randn(6, *IMAGES).to(dtype)
    model, digits = Model(), 2e-6 if dtype == torch.float32 else 2.0**-8
    got = results(model, x, g, compiled(model, "inductor"))
    want = plain(lambda: results(Model().double(), x.double(), g.double()))
    assert_close(got[:2], want[:2], digits)
    assert_close(got[2:], want[2:], 1e-5)


def test_long_sums_through_inductor():
    """Sums that are added up in the order of the values, of numbers with few digits."""
    torch.manual_seed(3)
    layer = nt.BatchNorm1d(16)
    x = torch.randn(4096, 16) + 1e5
    y = compiled(layer, "inductor")(x)
    want = plain(lambda: nt.BatchNorm1d(16).double()(x.double()))
    torch.testing.assert_close(y.double(), want, rtol=0, atol=3e-6 * float(want.abs().max()))


@pytest.mark.parametrize("name", ["batch", "layer", "rms"])
def test_no_more_is_kept_for_the_gradient_than_natively(name):
    """Of what has the size of x: x alone."""
    layer, x, _ = example(name)
    found = {}

    def pack(a):
        if a.numel() >= x.numel():
            found[a.data_ptr()] = a.numel()
        return a

    # What the compiler keeps it knows by the graph of gradients, which it then runs as it is.
    call = compiled(layer, "aot_eager_decomp_partition")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda a: a):
        call(x.clone().requires_grad_() * 1)
    assert sum(found.values()) <= x.numel()


def test_without_the_file_the_engine_is_traced():
    code = """
import sys
sys.modules["normkit.torch._fused"] = None
import torch, normkit as nk, normkit.torch as nt
from normkit.torch import _backend
assert _backend._fused is None
layer, x = nt.BatchNorm2d(3), torch.randn(4, 3, 5, 5)
for x in (x, x.bfloat16()):
    call = torch.compile(layer, backend="eager", fullgraph=True)
    [step] = nk.explain(call, x)
    assert step.path is None, step
    y = call(x).float()
    assert abs(float(y.mean())) < 1e-2 and abs(float(y.var(correction=0)) - 1) < 1e-2
"""
    subprocess.run([sys.executable, "-c", code], check=True)
