"""The faster paths out of PyTorch's kernels: which call takes which, and that none can be told
from the engine by its results."""

from __future__ import annotations

import copy
import subprocess
import sys
import weakref

import pytest
import torch

import normkit as nk
import normkit.torch as nt
from normkit._engine import standardize
from normkit.torch import _backend

_kernels = pytest.importorskip("normkit.torch._kernels")

IMAGES, ROWS, MATRIX = (4, 6, 5, 3), (4, 6, 5), (12, 6)
LAYER, GROUP, FEW, MANY, GIVEN, ROOT = (
    "native_layer_norm",
    "native_group_norm",
    "native_batch_norm",
    "batch_norm of moments",
    "batch_norm of given moments",
    "rms_norm",
)
# The layer, the shape of an input, and its path, or a word of the reason why there is none.
PATHS = {
    "batch": (nt.BatchNorm2d(6), IMAGES, FEW),
    "batch-bare": (nt.BatchNorm2d(6, affine=False), IMAGES, FEW),
    "batch-scale": (nt.BatchNorm2d(6, bias=False), IMAGES, FEW),
    "batch-bias": (nt.BatchNorm2d(6, scale=False), IMAGES, FEW),
    "batch-last": (nt.BatchNorm(3, axis=-1), IMAGES, FEW),
    "batch-middle": (nt.BatchNorm(5, axis=2), IMAGES, "neither second nor last"),
    "batch-last-of-three": (nt.BatchNorm(5, axis=-1), ROWS, FEW),
    "batch-one-channel": (nt.BatchNorm(1), (8, 1, 5), FEW),
    "batch-eval-one-channel": (nt.BatchNorm(1).eval(), (8, 1, 5), GIVEN),
    "batch-matrix": (nt.BatchNorm1d(6), MATRIX, FEW),
    "batch-many": (nt.BatchNorm2d(6), (3, 6, 19, 19), MANY),
    "batch-many-last": (nt.BatchNorm(6, axis=-1), (90, 13, 6), MANY),
    "batch-eval": (nt.BatchNorm2d(6).eval(), IMAGES, GIVEN),
    "batch-eval-last": (nt.BatchNorm(3, axis=-1).eval(), IMAGES, GIVEN),
    "layer": (nt.LayerNorm(5), ROWS, LAYER),
    "layer-two": (nt.LayerNorm((6, 5)), ROWS, LAYER),
    "layer-bare": (nt.LayerNorm(5, elementwise_affine=False), ROWS, LAYER),
    "layer-scale": (nt.LayerNorm(5, bias=False), ROWS, LAYER),
    "layer-one-feature": (nt.LayerNorm(1), (8, 3, 1), LAYER),
    "layer-of-one-sample": (nt.LayerNorm((1, 1), axes=(0, 1)), (1, 1, 4), "not the last ones"),
    "layer-bias": (nt.LayerNorm(5, scale=False), ROWS, LAYER),
    "layer-first": (nt.LayerNorm(6, axes=(1,)), ROWS, "not the last ones"),
    "group": (nt.GroupNorm(2, 6), IMAGES, GROUP),
    "group-matrix": (nt.GroupNorm(2, 6), MATRIX, GROUP),
    "group-one": (nt.GroupNorm(1, 6), ROWS, GROUP),
    "group-scale": (nt.GroupNorm(2, 6, bias=False), IMAGES, GROUP),
    "group-bias": (nt.GroupNorm(2, 6, scale=False), IMAGES, GROUP),
    "group-bare": (nt.GroupNorm(2, 6, affine=False), IMAGES, GROUP),
    "group-last": (nt.GroupNorm(3, 3, axis=-1), IMAGES, "not the last ones"),
    "instance": (nt.InstanceNorm2d(6, affine=True), IMAGES, GROUP),
    "instance-bare": (nt.InstanceNorm2d(6), IMAGES, GROUP),
    "instance-tracking": (
        nt.InstanceNorm2d(6, track_running_stats=True),
        IMAGES,
        "to be remembered",
    ),
    "rms": (nt.RMSNorm(5, eps=1e-5), ROWS, ROOT),
    "rms-two": (nt.RMSNorm((6, 5), eps=1e-5), ROWS, ROOT),
    "rms-bare": (nt.RMSNorm(5, eps=1e-5, elementwise_affine=False), ROWS, ROOT),
    "rms-zero-centered": (nt.RMSNorm(5, eps=1e-5, zero_centered=True), ROWS, ROOT),
    "rms-many": (nt.RMSNorm(64, eps=1e-5), (5, 65, 64), "vector_norm"),
    "rms-first": (nt.RMSNorm(6, eps=1e-5, axes=(1,)), ROWS, "not the last ones"),
    "rms-after-cast": (nt.RMSNorm(5, eps=1e-5, scale_after_cast=True), ROWS, "dtype of the result"),
}
paths = pytest.mark.parametrize("name", PATHS)


def path_of(layer, x, **options):
    """The path of the only step of a call, or the reason why it was the engine's."""
    [step] = nk.explain(layer, x, **options)
    return step.path or step.why


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


@pytest.fixture
def unread(monkeypatch):
    """As on a device, whose values nobody waits for."""
    monkeypatch.setattr(_kernels, "readable", lambda x: False)


def gap(got, want):
    """The largest difference, relative to the largest value."""
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


@paths
def test_each_path_is_taken(name):
    layer, x, _ = example(name)
    assert PATHS[name][2] in path_of(layer, x)


def test_every_path_is_in_the_tables():
    taken = {path for _, _, path in PATHS.values()} | set(UNREAD.values())
    assert taken >= set(_kernels.PATHS) <= set(_backend.BACKEND.paths)


@paths
def test_a_layer_and_the_definition_it_has_do_the_same(name):
    """The usual call of a layer is on a shorter way."""
    layer, x, _ = example(name)
    definition = nt.definition(layer)
    params = {"scale": layer.weight, "bias": getattr(layer, "bias", None)}
    params = {name: p.detach() for name, p in params.items() if p is not None}
    state = {}
    if getattr(layer, "running_mean", None) is not None:
        names = {"mean": "running_mean", "var": "running_var", "count": "num_batches_tracked"}
        state = {name: getattr(layer, buffer).clone() for name, buffer in names.items()}
    y, new = definition.apply(params, state, x, training=layer.training)
    torch.testing.assert_close(layer(x), y, rtol=0, atol=2e-6)
    for buffer, name in zip(layer.buffers(), ("mean", "var", "count"), strict=False):
        torch.testing.assert_close(buffer, new[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("offset", [0.0, 2.0, 1e5])
@paths
def test_results_are_those_of_the_engine(name, offset):
    layer, x, g = example(name, torch.float64, offset)
    same_results(layer, x, g)


def same_results(layer, x, g):
    got = results(copy.deepcopy(layer), x, g)
    want = plain(lambda: results(copy.deepcopy(layer), x, g))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9 * float(b.abs().max()) + 1e-11)


@pytest.mark.parametrize("offset", [0.0, 1.0, 4.5, 1e5])
@paths
def test_float32_keeps_its_digits(name, offset):
    layer, x, g = example(name, offset=offset)
    keeps_digits(layer, x, g)


def keeps_digits(layer, x, g):
    got = first(copy.deepcopy(layer), x, g)
    want = plain(lambda: first(copy.deepcopy(layer).double(), x.double(), g.double()))
    # Output, gradients, running statistics; gradients that cancel are no more exact than what
    # they are made of: sums of g, times as much as 1 / sqrt(eps).
    slope = 300 if x.shape[-1] == 1 else 1
    for a, b in zip(got, want, strict=True):
        limit = 2e-6 * float(b.abs().max()) + (0 if a is got[0] else 1e-6 * slope * len(x) ** 0.5)
        torch.testing.assert_close(a.double(), b, rtol=0, atol=limit)


def first(layer, x, g):
    """Output, gradients, and the buffers afterwards."""
    x = x.clone().requires_grad_()
    y = layer(x)
    found = torch.autograd.grad(y, [x, *layer.parameters()], g)
    return [a.detach() for a in (y, *found, *(b for b in layer.buffers() if b.is_floating_point()))]


BIG = {
    "images": (nt.BatchNorm2d(8), (16, 8, 32, 32)),
    "channels-last": (nt.BatchNorm2d(8), (16, 8, 32, 32)),
    "images-scale": (nt.BatchNorm2d(8, bias=False), (16, 8, 32, 32)),
    "images-bare": (nt.BatchNorm2d(8, affine=False), (16, 8, 32, 32)),
    "matrix": (nt.BatchNorm1d(8), (5000, 8)),
    "layer": (nt.LayerNorm(256), (3, 700, 256)),
    "rms": (nt.RMSNorm(256), (3, 700, 256)),
    "rms-bare": (nt.RMSNorm(256, elementwise_affine=False), (3, 700, 256)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.5, 1e3])
@pytest.mark.parametrize("name", BIG)
def test_what_is_done_in_blocks(name, offset, dtype):
    torch.manual_seed(3)
    layer, shape = BIG[name]
    for p in layer.parameters():
        torch.nn.init.uniform_(p, 0.5, 1.5)
    x, g = (torch.randn(shape) + offset).to(dtype), torch.randn(shape).to(dtype)
    if name == "channels-last":
        x, g = (a.contiguous(memory_format=torch.channels_last) for a in (x, g))
    got = first(copy.deepcopy(layer), x, g)
    want = plain(lambda: first(copy.deepcopy(layer).double(), x.double(), g.double()))
    for a, b in zip(got, want, strict=True):
        limit = (2e-6 if a is got[0] else 4e-6) if a.dtype == torch.float32 else 2.0**-8
        assert gap(a, b) < limit if b.abs().max() > 1e-3 else a.abs().max() < 1e-3


@pytest.mark.parametrize("value", [0.7, -1e8, 1e12, 1e17])
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("shape", [(4099, 6), (5000, 6, 7)], ids=str)
def test_equal_values_come_out_as_nothing(shape, axis, value):
    x = torch.full(shape, value)
    y = nt.BatchNorm(shape[axis], axis=axis)(x)
    assert y.abs().max() < 2e-6


@pytest.mark.parametrize("layer", [nt.RMSNorm(2**17), nt.BatchNorm2d(2)], ids=["rms", "batch"])
def test_long_sums_of_few_kinds_of_values(layer):
    """Of which a sum in the order of the values is off in one direction."""
    torch.manual_seed(3)
    x = torch.full((4, 2**17), 0.7)
    if isinstance(layer, nt.BatchNorm2d):
        x = (torch.rand(1, 2, 1024, 1024) < 0.3).float()
    want = plain(lambda: copy.deepcopy(layer).double()(x.double()))
    assert gap(layer(x), want) < 2e-6


def test_a_row_of_zeros_has_gradients():
    """Whose 1 / sqrt(squares + eps) is large, and its cube no number."""
    layer = nt.RMSNorm(8, eps=1e-28)
    x = torch.randn(3, 8)
    x[1] = 0
    x.requires_grad_()
    layer(x).square().sum().backward()
    assert x.grad.isfinite().all()
    assert layer.weight.grad.isfinite().all()


def test_gradients_of_many_outputs_at_once():
    for layer, shape in BIG.values():
        x = torch.randn(shape, requires_grad=True)
        y = layer(x)
        g = torch.randn(2, *shape)
        (got,) = torch.autograd.grad(y, x, g, is_grads_batched=True, retain_graph=True)
        want = torch.stack([torch.autograd.grad(y, x, a, retain_graph=True)[0] for a in g])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("parameters", ["half", "autocast"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("offset", [0.0, 40.0])
@paths
def test_half_types_are_rounded_once(name, offset, dtype, parameters):
    layer, x, g = example(name, offset=offset)
    if name == "rms-after-cast":  # rounded twice, as it says
        return
    layer = layer.to(dtype if parameters == "half" else torch.float32)
    halves_keep_digits(layer, x.to(dtype), g.to(dtype), parameters == "autocast")


def halves_keep_digits(layer, x, g, autocast=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = first(copy.deepcopy(layer), x, g)
    want = plain(lambda: first(copy.deepcopy(layer).double(), x.double(), g.double()))
    unit = torch.finfo(x.dtype).eps
    assert got[0].dtype == got[1].dtype == x.dtype
    # One rounding is half a unit of the value itself; what float32 loses is a fiftieth of one.
    error = (got[0].double() - want[0]).abs()
    assert bool((error <= 0.501 * unit * want[0].abs() + 0.02 * unit).all())
    for a, b in zip(got[1:], want[1:], strict=True):
        assert float((a.double() - b).abs().max()) < 2 * unit * max(float(b.abs().max()), 1.0)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_types_take_the_same_paths(dtype):
    for name, (_, _, path) in PATHS.items():
        layer, x, _ = example(name)
        assert path in path_of(layer, x.to(dtype)), name


UNREAD = {
    "native_layer_norm": "native_layer_norm of x - mean",
    "native_group_norm": "native_group_norm of x - mean",
    "native_batch_norm": "native_batch_norm of x - mean",
    "batch_norm of moments": "native_batch_norm of x - mean",
    "batch_norm of given moments": "batch_norm of x - mean",
    "rms_norm": "rms_norm in units",
    "vector_norm": "rms_norm in units",
}


@paths
def test_nothing_is_read_on_a_device(name, unread, monkeypatch):
    def read(*_):
        raise AssertionError("this waits for the device")

    layer, x, _ = example(name)
    path = PATHS[name][2]
    if path in UNREAD:
        for method in ("item", "__bool__", "tolist", "__float__"):
            monkeypatch.setattr(torch.Tensor, method, read)
        assert path_of(layer, x) == UNREAD[path]


@pytest.mark.parametrize("offset", [0.0, 1e5])
@paths
def test_unread_values_give_the_same(name, offset, unread):
    layer, x, g = example(name, torch.float64, offset)
    same_results(layer, x, g)
    layer, x, g = example(name, offset=offset)
    keeps_digits(layer, x, g)
    for dtype in HALVES if name != "rms-after-cast" else ():
        layer, x, g = example(name, offset=min(offset, 40.0))
        halves_keep_digits(layer, x.to(dtype), g.to(dtype))


@paths
def test_unread_values_are_of_any_size(name, unread):
    for dtype in (torch.float32, torch.bfloat16):
        layer, x, _ = example(name)
        x[-1] *= 1e30
        x = x.to(dtype)
        got = copy.deepcopy(layer)(x)
        want = plain(lambda x=x, layer=layer: copy.deepcopy(layer)(x))
        assert gap(got, want) < (2e-6 if dtype == torch.float32 else 2.0**-7)


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


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@paths
def test_no_more_is_kept_for_the_gradient_than_natively(name, dtype, offset):
    layer, x, _ = example(name)
    if PATHS[name][2] not in UNREAD or 1 in x.shape:
        return
    native = next(c for c in type(layer).__mro__ if c.__module__.startswith("torch.nn"))
    if native.__name__.startswith("_"):  # a layer for any rank, of which there is no native one
        return
    # A shifted half type is kept in float32, and so may a group of three values be.
    if dtype == torch.bfloat16 and (offset or x.ndim == 2):
        return
    reference = copy.deepcopy(layer)
    reference.__class__ = native
    # Of few values in a half type it does not matter.
    samples = 600 if dtype == torch.bfloat16 and PATHS[name][2] == LAYER else 8
    x = torch.randn(samples, *x.shape[1:]) + offset
    if samples > 8:  # so that no row of five has a small spread
        x[..., 0] = 5.0
    x = x.to(dtype)
    assert kept(layer, x) <= kept(reference, x)


def kept(layer, x):
    """How many bytes of arrays as large as ``x`` are saved for the backward pass."""

    class Saved:
        def __init__(self, a):
            self.a = a.detach()  # a saved output would keep itself alive

    saved = weakref.WeakSet()

    def pack(a):
        found = Saved(a)
        saved.add(found)
        return found

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda found: found.a):
        y = layer(x.clone().requires_grad_() * 1)
    alive = [found.a for found in saved if found.a.numel() >= x.numel()]
    assert y.grad_fn is not None
    return sum({a.data_ptr(): a.nbytes for a in alive}.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@paths
def test_what_kernels_cannot_do_is_left_to_the_engine(name, value):
    layer, x, _ = example(name)
    x[-1, -1] = value
    got = copy.deepcopy(layer)(x)
    want = plain(lambda: copy.deepcopy(layer)(x))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_what_is_not_for_kernels():
    layer, x, _ = example("layer")
    traced = "traced, transformed or differentiated forward"

    def forward(x):
        with torch.autograd.forward_ad.dual_level():
            return layer(torch.autograd.forward_ad.make_dual(x, x))

    for call, why in {
        lambda: layer(x.double()): "another dtype than x",
        lambda: layer(x, mask=x > 0): "a mask or weights",
        lambda: layer(x.transpose(0, 1)): "not the last ones of a contiguous tensor",
        lambda: layer(x[:0]): "no values",
        lambda: torch.func.vmap(layer)(x): traced,
        lambda: torch.func.jvp(layer, (x,), (x,)): traced,
        lambda: forward(x): traced,
        lambda: layer(x * 1e30): "squares overflow",
        lambda: nk.normalize(x, x[:1], (x * x)[:1], eps=1e-5): "not one value a channel",
        lambda: nk.normalize(
            x, x[:1, :, :1].clone().requires_grad_(), x[:1, :, :1] ** 2, eps=1e-5
        ): "statistics are differentiated",
        lambda: standardize(
            x, (2,), None, None, eps=1e-5, dtype=torch.float64, backend=_backend.BACKEND
        ): "do not give that dtype",
        lambda: nk.layer_norm(x[0, 0]): "one axis",
    }.items():
        [step] = nk.explain(call)
        assert step.path is None
        assert why in step.why
    assert path_of(layer, x) == LAYER
    torch.compile(layer, backend="eager", fullgraph=True)(x)


@pytest.mark.parametrize("file", ["_kernels", "_fit", "_gradients", "_moments", "_unread"])
def test_without_the_files_the_engine_does_it(file):
    code = f"""
import sys
sys.modules["normkit.torch.{file}"] = None
import torch, normkit.torch as nt
from normkit.torch import _backend
assert _backend._kernels is None
assert not {{"rms_norm", "native_batch_norm"}} & set(_backend.BACKEND.paths)
layer, x = nt.BatchNorm2d(3), torch.randn(4, 3, 5, 5)
y = layer(x)
assert abs(float(y.mean())) < 1e-6 and abs(float(y.var(correction=0)) - 1) < 1e-4
"""
    subprocess.run([sys.executable, "-c", code], check=True)
