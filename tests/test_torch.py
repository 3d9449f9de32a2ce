"""PyTorch's drop-in layers beside the native ones, and in the ways that PyTorch uses modules."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import normkit as nk
import normkit.torch

PAIRS = {
    "1d": (nn.BatchNorm1d, nk.torch.BatchNorm1d, (8, 5, 7)),
    "2d": (nn.BatchNorm2d, nk.torch.BatchNorm2d, (4, 5, 3, 3)),
    "3d": (nn.BatchNorm3d, nk.torch.BatchNorm3d, (4, 5, 2, 3, 2)),
}
OPTIONS = [
    {"eps": eps, "momentum": momentum, "affine": affine, "track_running_stats": track, "bias": bias}
    for eps, momentum, affine, track, bias in itertools.product(
        (1e-5, 0.1), (0.1, None, 0.0), (True, False), (True, False), (True, False)
    )
]


def data(shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def steps(layer, shape, count=4):
    """Outputs, gradients and buffers over some steps of training, then evaluation."""
    out = []
    for seed in range(count):
        x = data(shape, seed).requires_grad_()
        layer.zero_grad()
        y = layer(x)
        y.backward(data(shape, seed + 100))
        out += [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]
    layer.eval()
    return [*out, layer(data(shape, 9)).detach(), *(b.clone() for b in layer.buffers())]


def assert_same(a, b, atol=2e-6):
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype
        scale = max(1.0, float(y.detach().abs().max())) if y.numel() else 1.0
        torch.testing.assert_close(x, y, rtol=0, atol=atol * scale)


@pytest.mark.parametrize("rank", PAIRS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_batch_norm_as_native(rank, options):
    native, ours, shape = PAIRS[rank]
    assert_same(steps(ours(5, **options), shape), steps(native(5, **options), shape))


@pytest.mark.parametrize("shape", [7, (5, 7), [7]])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_as_native(shape, affine, bias):
    a, b = (kind(shape, 1e-3, affine, bias) for kind in (nk.torch.LayerNorm, nn.LayerNorm))
    assert_same(steps(a, (4, 5, 7)), steps(b, (4, 5, 7)))


@pytest.mark.parametrize("rank", PAIRS)
def test_state_dicts_load_strictly_both_ways(rank):
    native, ours, shape = PAIRS[rank]
    for source, target in ((native(5), ours(5)), (ours(5), native(5))):
        steps(source, shape)
        with torch.no_grad():
            for p in source.parameters():
                p.copy_(data(p.shape, 3))
        assert list(source.state_dict()) == list(target.state_dict())
        assert str(target.load_state_dict(source.state_dict(), strict=True)) == (
            "<All keys matched successfully>"
        )
        target.eval()
        assert_same([target(data(shape))], [source(data(shape))])


def test_layer_norm_state_dicts_load_strictly_both_ways():
    for source, target in itertools.permutations((nn.LayerNorm(7), nk.torch.LayerNorm(7))):
        target.load_state_dict(source.state_dict(), strict=True)


def test_a_state_dict_of_version_one_loads():
    old = nn.BatchNorm2d(5).state_dict()
    del old["num_batches_tracked"]
    old._metadata[""]["version"] = 1
    layer = nk.torch.BatchNorm2d(5)
    layer.load_state_dict(old, strict=True)
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("rank", PAIRS)
def test_is_an_instance_of_what_it_replaces(rank):
    native, ours, _ = PAIRS[rank]
    assert isinstance(ours(5), native)
    assert isinstance(ours(5), nn.modules.batchnorm._BatchNorm)
    assert isinstance(nk.torch.LayerNorm(5), nn.LayerNorm)


@pytest.mark.parametrize("rank", PAIRS)
def test_the_wrong_rank_is_refused_as_native(rank):
    native, ours, shape = PAIRS[rank]
    x = torch.zeros((*shape, 2, 2))
    with pytest.raises(ValueError, match="expected") as want:
        native(5)(x)
    with pytest.raises(ValueError, match="expected") as got:
        ours(5)(x)
    assert str(got.value) == str(want.value)


def test_a_refused_step_moves_no_buffer():
    layer = nk.torch.BatchNorm1d(3)
    before = copy.deepcopy(layer.state_dict())
    for x in (torch.zeros(1, 3), torch.zeros(4, 2), torch.zeros(4, 3, dtype=torch.int64)):
        with pytest.raises((TypeError, ValueError)):
            layer(x)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


def test_toggling_track_running_stats_later_as_native():
    x = data((8, 5))
    for layers in [(nn.BatchNorm1d(5), nk.torch.BatchNorm1d(5))]:
        outputs = []
        for layer in layers:
            layer(x)
            layer.track_running_stats = False
            y = layer(x * 2 + 1)
            layer.eval()
            outputs.append([y.detach(), layer(x).detach(), *layer.buffers()])
        assert_same(*outputs)


def test_buffers_are_updated_in_place():
    layer = nk.torch.BatchNorm1d(5)
    held = dict(layer.named_buffers())
    layer(data((8, 5)))
    for name, buffer in layer.named_buffers():
        assert buffer is held[name]
    assert held["num_batches_tracked"] == 1


def test_momentum_of_eval_is_read_at_call():
    a, b = nk.torch.BatchNorm1d(5), nn.BatchNorm1d(5)
    a.momentum = b.momentum = 0.7
    a.eps = b.eps = 0.3
    assert_same(steps(a, (8, 5)), steps(b, (8, 5)))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
def test_compiles_as_one_graph(momentum, training, dynamic):
    torch._dynamo.reset()
    eager = nk.torch.BatchNorm2d(5, momentum=momentum)
    eager.train(training)
    layer = copy.deepcopy(eager)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (4, 6):
        x, z = (data((n, 5, 3, 3)).requires_grad_() for _ in range(2))
        y, w = compiled(x), eager(z)
        (y**2).sum().backward()
        (w**2).sum().backward()
        assert_same([y.detach(), *layer.buffers()], [w.detach(), *eager.buffers()])
        assert_same([x.grad], [z.grad], 4e-6)  # terms that cancel


def test_layer_norm_compiles_as_one_graph():
    torch._dynamo.reset()
    layer = nk.torch.LayerNorm(7)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = data((4, 5, 7))
    assert_same([compiled(x).detach()], [layer(x).detach()])


def test_the_functions_compile_as_one_graph():
    torch._dynamo.reset()
    x, mask = data((4, 5, 7)), data((4, 5, 7)) > 0

    def f(x, mask):
        mean, var = nk.moments(x, (0, 2), weights=mask, keepdims=True)
        return nk.normalize(x, mean, var, eps=1e-5) + nk.layer_norm(x) + nk.batch_norm(x)

    assert_same([torch.compile(f, fullgraph=True, backend="aot_eager")(x, mask)], [f(x, mask)])


@pytest.mark.parametrize("training", [True, False])
def test_inductor_is_as_exact(training):
    """Fused by the compiler, at an offset where the native layer has lost its digits."""
    torch._dynamo.reset()
    layer = nk.torch.BatchNorm2d(5)
    layer(data((4, 5, 3, 3)) + 1e5)
    layer.train(training)
    x = (data((4, 5, 3, 3)) + 1e5).requires_grad_()
    want = layer(x.double()) if not training else nk.batch_norm(x.double(), eps=layer.eps)
    y = torch.compile(layer, fullgraph=True)(x)
    assert_same([y.detach()], [want.detach().float()])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_exports(training, momentum):
    layer = nk.torch.BatchNorm2d(5, momentum=momentum).train(training)
    x = data((4, 5, 3, 3))
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(layer, (x,), dynamic_shapes={"input": {0: batch}})
    twin = copy.deepcopy(layer)
    for n in (4, 7):
        y = data((n, 5, 3, 3), n)
        assert_same([program.module()(y).detach()], [twin(y).detach()])


def test_functional_transforms():
    layer = nk.torch.LayerNorm(7).double()
    x, u = data((4, 7), dtype=torch.float64), data((4, 7), 1, torch.float64)
    per_row = torch.func.vmap(layer)(x)
    assert_same([per_row.detach()], [layer(x).detach()], 1e-13)
    _, jvp = torch.func.jvp(layer, (x,), (u,))
    _, vjp = torch.func.vjp(layer, x)
    assert torch.allclose((jvp * u).sum(), (vjp(u)[0] * u).sum())
    hessian = torch.func.hessian(lambda a: layer(a).square().mul(u).sum())(x)
    assert_same([hessian.reshape(28, 28)], [hessian.reshape(28, 28).T], 1e-12)
    params = {name: p * 2 for name, p in layer.named_parameters()}
    assert_same([torch.func.functional_call(layer, params, x).detach()], [2 * layer(x).detach()])


def test_copies_and_files():
    layer = nk.torch.BatchNorm2d(5, axis=-1, correction=0)
    layer(data((4, 3, 3, 5)))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ]
    for other in copies:
        assert nk.torch.definition(other) == nk.torch.definition(layer)
        assert_same([other(data((4, 3, 3, 5)))], [layer(data((4, 3, 3, 5)))])


def test_meta_device():
    layer = nk.torch.BatchNorm2d(5, device="meta")
    assert layer(torch.empty(4, 5, 3, 3, device="meta")).shape == (4, 5, 3, 3)
    assert nk.torch.layer(nk.LayerNorm(7), device="meta").weight.is_meta


def test_channels_last_is_kept():
    x = data((4, 5, 3, 3)).contiguous(memory_format=torch.channels_last)
    for layer in (nk.torch.BatchNorm2d(5), nk.torch.BatchNorm2d(5).eval()):
        assert layer(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_input_with_float32_parameters(dtype):
    x = data((4, 5, 3, 3), dtype=dtype)
    a, b = nk.torch.BatchNorm2d(5), nn.BatchNorm2d(5)
    y, z = a(x), b(x)
    assert y.dtype == z.dtype == dtype
    assert_same([a.running_mean, a.running_var], [b.running_mean, b.running_var])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert a(x).dtype == b(x).dtype == dtype


def test_half_layers_keep_the_dtype_of_their_buffers():
    layer = nk.torch.BatchNorm2d(5).to(torch.bfloat16)
    y = layer(data((4, 5, 3, 3), dtype=torch.bfloat16))
    assert y.dtype == layer.running_var.dtype == torch.bfloat16
    assert layer.num_batches_tracked.dtype == torch.int64


@pytest.mark.parametrize("d", [
    nk.BatchNorm(5), nk.BatchNorm.keras(5), nk.BatchNorm.flax(5, scale=False),
    nk.BatchNorm(5, decay=None, bias=False), nk.BatchNorm(5, scale=False, bias=False),
    nk.BatchNorm(5, decay=0.1), nk.BatchNorm(5, decay=0.123, axis=2, track_running_stats=False),
    nk.LayerNorm(5), nk.LayerNorm.flax((5, 3)), nk.LayerNorm((5, 3), axes=(1, 3), scale=False),
    nk.LayerNorm(5, axes=1, bias=False), nk.LayerNorm(5, scale=False, bias=False),
], ids=repr)  # fmt: skip
def test_definitions_come_back(d):
    layer = nk.torch.layer(d)
    assert nk.torch.definition(layer) == d
    params, state = d.init()
    names = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    have = dict(layer.named_parameters()) | dict(layer.named_buffers())
    for key, name in names.items():
        assert (name in have) == (key in params | state)


def test_definitions_of_native_layers():
    assert nk.torch.definition(nn.BatchNorm2d(5)) == nk.BatchNorm.torch(5)
    assert nk.torch.definition(nn.BatchNorm1d(5, momentum=None, affine=False)) == nk.BatchNorm(
        5, decay=None, scale=False, bias=False
    )
    assert nk.torch.definition(nn.LayerNorm((3, 4), bias=False)) == nk.LayerNorm((3, 4), bias=False)
    for make, wrong in ((nk.torch.definition, nn.ReLU()), (nk.torch.layer, nn.BatchNorm2d(3))):
        with pytest.raises(TypeError, match="definition"):
            make(wrong)


def test_repr():
    assert repr(nk.torch.BatchNorm2d(5)) == repr(nn.BatchNorm2d(5))
    assert repr(nk.torch.LayerNorm(5)) == repr(nn.LayerNorm(5))
    assert repr(nk.torch.layer(nk.BatchNorm.keras(5))) == (
        "BatchNorm(5, eps=0.001, momentum=0.01, affine=True, bias=True, "
        "track_running_stats=True, axis=-1, correction=0)"
    )


def test_a_mask_in_a_module():
    x = data((4, 5, 7))
    mask = torch.from_numpy(np.arange(7) < np.array([[7], [3], [5], [1]]))
    broken = torch.where(mask[:, None], x, torch.nan).requires_grad_()
    layer = nk.torch.BatchNorm1d(5)
    y = layer(broken, mask=mask)
    y.sum().backward()
    assert y.isfinite().all()
    assert broken.grad.isfinite().all()
    valid = x.movedim(1, -1)[mask]
    other = nn.BatchNorm1d(5)
    assert_same([y.movedim(1, -1)[mask].detach()], [other(valid).detach()])
    assert_same(list(layer.buffers()), list(other.buffers()))
