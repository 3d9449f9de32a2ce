"""What people do with PyTorch's modules, done to every drop-in beside its native twin."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from test_torch import assert_same, data
from torch import nn
from torch.func import vmap

import normkit as nk
import normkit.torch

# Class name -> arguments and the shape of an input.
LAYERS = {
    "BatchNorm1d": ((5,), {}, (4, 5, 7)),
    "BatchNorm2d": ((5,), {"momentum": None}, (4, 5, 3, 3)),
    "BatchNorm3d": ((5,), {"affine": False}, (4, 5, 2, 3, 2)),
    "LayerNorm": (((5, 7),), {}, (4, 5, 7)),
    "GroupNorm": ((2, 6), {}, (4, 6, 3, 3)),
    "InstanceNorm1d": ((5,), {}, (4, 5, 7)),
    "InstanceNorm2d": ((5,), {"affine": True, "track_running_stats": True}, (4, 5, 3, 3)),
    "InstanceNorm3d": ((5,), {"affine": True, "bias": False}, (4, 5, 2, 3, 2)),
    "RMSNorm": ((7,), {}, (4, 5, 7)),
}
LAZY = {
    f"Lazy{name}": ((), {**kwargs, "affine": True}, shape)
    for name, (_, kwargs, shape) in LAYERS.items()
    if name.startswith(("Batch", "Instance"))
}
TRACKING = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "InstanceNorm2d"]

each_layer = pytest.mark.parametrize("name", LAYERS)
each_tracking = pytest.mark.parametrize("name", TRACKING)
each_lazy = pytest.mark.parametrize("name", LAZY)
train_and_eval = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def build(where, name, dtype=torch.float32, **more):
    """A layer of ``nn`` or of ``nk.torch``, with parameters and statistics that are no default."""
    args, kwargs, _ = (LAYERS | LAZY)[name]
    layer = getattr(where, name)(*args, **kwargs, dtype=dtype, **more)
    if name in LAYERS:
        for i, value in enumerate(layer.state_dict().values()):
            if value.dtype.is_floating_point:
                value.copy_(data(value.shape, i).abs() + 0.5)
    return layer


def pair(name, training=True, dtype=torch.float32):
    return [build(where, name, dtype).train(training) for where in (nk.torch, nn)]


def batch(name, seed=0, dtype=torch.float32):
    return data((LAYERS | LAZY)[name][2], seed, dtype)


def step(layer, x, call=None):
    """Output, gradients and running statistics."""
    x = x.detach().clone().requires_grad_()
    y = (call or layer)(x)
    y.backward(data(y.shape, 77).to(y.dtype))
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters()), *statistics(layer)]


def scale(a):
    return float(a.detach().abs().max())


def statistics(layer):
    return [b for b in layer.buffers() if b.dtype.is_floating_point]


@each_layer
def test_types_that_others_ask_for(name):
    ours, native = pair(name)
    assert isinstance(ours, type(native))
    assert all(issubclass(type(ours), base) for base in type(native).__mro__)
    model = nn.Sequential(nn.Linear(3, 3), ours)
    decayed = [
        p
        for m in model.modules()
        if not isinstance(
            m, (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
        )
        for p in m.parameters(recurse=False)
    ]
    assert len(decayed) == 2
    assert repr(ours) == repr(native)


@each_tracking
def test_state_dicts_of_version_one(name):
    """As PyTorch 0.4 wrote them: no ``num_batches_tracked``, and no version."""
    for version in (1, None):
        loaded = []
        for layer in pair(name):
            old = build(nn, name).state_dict()
            del old["num_batches_tracked"]
            old._metadata[""]["version"] = version
            layer.load_state_dict(old, strict=True)
            loaded.append(layer.state_dict())
        assert list(loaded[0]) == list(loaded[1])
        assert all(torch.equal(a, b) for a, b in zip(*map(dict.values, loaded), strict=True))


def test_statistics_that_a_layer_does_not_track_are_refused():
    old = nn.InstanceNorm1d(5, track_running_stats=True).state_dict()
    old._metadata[""]["version"] = None
    for kind in (nk.torch.InstanceNorm1d, nn.InstanceNorm1d):
        with pytest.raises(RuntimeError, match="track_running_stats=False"):
            kind(5).load_state_dict(old)


@each_lazy
@train_and_eval
def test_lazy_layers(name, training):
    ours, native = pair(name, training)
    assert repr(ours) == repr(native)
    assert_same([ours(batch(name)).detach()], [native(batch(name)).detach()])
    assert type(ours) is getattr(nk.torch, name.removeprefix("Lazy"))
    assert type(native) is getattr(nn, name.removeprefix("Lazy"))
    assert repr(ours) == repr(native)
    assert_same(step(ours, batch(name, 1)), step(native, batch(name, 1)))
    masked = build(nk.torch, name)
    masked(batch(name), mask=torch.ones(()).expand(batch(name).shape))


@each_lazy
@train_and_eval
def test_lazy_layers_that_load_what_others_have_learnt(name, training):
    x = batch(name)
    for source, target in ((nn, nk.torch), (nk.torch, nn), (nk.torch, nk.torch)):
        learnt, other = build(source, name), build(target, name).train(training)
        learnt(x)
        other.load_state_dict(learnt.state_dict(), strict=True)
        if target is nn:
            # The native layer goes on without a number of channels; InstanceNorm then has none.
            if "Instance" in name:
                with pytest.raises(ValueError, match="num_features"):
                    other(x)
            continue
        assert_same(step(other, x), step(learnt.train(training), x))
        assert repr(other) == repr(learnt).replace("Lazy", "")


@each_lazy
@pytest.mark.filterwarnings("ignore:input's size")
def test_lazy_layers_without_parameters(name):
    for where in (nk.torch, nn):
        layer = getattr(where, name)(affine=False, track_running_stats=False)
        assert layer(batch(name)).shape == batch(name).shape
        assert layer.num_features == (0 if where is nn else 5)


@each_lazy
def test_lazy_layers_that_have_seen_nothing(name):
    for source, target in ((nn, nk.torch), (nk.torch, nn)):
        state = build(source, name).state_dict()
        other = build(target, name)
        other.load_state_dict(state, strict=True)
        assert pickle.loads(pickle.dumps(other)).has_uninitialized_params()


@each_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@train_and_eval
def test_autocast(name, dtype, training):
    """On the CPU the norms are in no list of autocast: they take what comes."""
    ours, native = pair(name, training)
    with torch.autocast("cpu", dtype=dtype):
        for x in (batch(name), batch(name, 0, dtype)):
            y, z = ours(x), native(x)
            assert y.dtype == z.dtype == x.dtype
            last_digit = 2.0**-7 if x.dtype == torch.bfloat16 else 2.0**-10
            rtol = 0.0 if x.dtype == torch.float32 else last_digit
            torch.testing.assert_close(y, z, rtol=rtol, atol=(2e-5 + rtol) * scale(z))
    assert_same(statistics(ours), statistics(native))


@each_layer
@pytest.mark.parametrize("of_x", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("of_layer", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_any_dtype_with_any_other(name, of_x, of_layer):
    layer = build(nk.torch, name, of_layer)
    got = step(layer, batch(name, 0, of_x))
    assert got[0].dtype == got[1].dtype == of_x
    assert all(a.dtype == of_layer for a in got[2:])
    exact = copy.deepcopy(build(nk.torch, name, of_layer)).double()
    want = step(exact, batch(name, 0, of_x).double())
    for a, b in zip(got[:1], want[:1], strict=True):
        digits = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 2.0**-8}[a.dtype]
        torch.testing.assert_close(a.double(), b, rtol=digits, atol=digits * 4)


@each_layer
def test_files(name):
    layer = build(nk.torch, name)
    layer(batch(name))
    for content, only in ((layer.state_dict(), True), (layer, False)):
        file = io.BytesIO()
        torch.save(content, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=only)
        if only:
            other = build(nk.torch, name)
            other.load_state_dict(loaded, strict=True, assign=True)
            loaded = other
        for twin in (loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert type(twin) is type(layer)
            assert repr(twin) == repr(layer)
            assert_same(step(twin, batch(name)), step(copy.deepcopy(layer), batch(name)), 0)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(one_process):
    def model(where):
        torch.manual_seed(0)
        names = ["BatchNorm2d", "InstanceNorm2d"]
        layers = [build(where, name) for name in names] + [where.GroupNorm(5, 5)]
        return nn.Sequential(*layers, nn.Flatten(2), where.LayerNorm(9), where.RMSNorm(9))

    results = []
    for where in (nk.torch, nn):
        inner = model(where)
        held = dict(inner.named_buffers())
        parallel = nn.parallel.DistributedDataParallel(inner)
        for seed in range(2):
            x = data((4, 5, 3, 3), seed).requires_grad_()
            parallel(x).pow(3).sum().backward()
        assert all(b is held[key] for key, b in inner.named_buffers())
        results.append([x.grad, *(p.grad for p in inner.parameters()), *statistics(inner)])
    assert_same(*results, atol=3e-5)


@each_tracking
def test_averaged_models(name):
    batches = [batch(name, seed) for seed in range(4)]
    results = []
    for layer in pair(name):
        model = nn.Sequential(layer, nn.PReLU())
        averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=False)
        for x in batches:
            model(x)
            averaged.update_parameters(model)
        momentum = layer.momentum
        torch.optim.swa_utils.update_bn(batches, averaged)
        assert averaged.module[0].momentum == momentum
        results.append([averaged.eval()(batches[0]).detach(), *statistics(averaged.module)])
    if name.startswith("Batch"):  # update_bn knows of no other layers
        assert_same(*results)


def test_replacing_by_type():
    """PyTorch's own tools find the layers, by what they are instances of."""
    layers = [build(nk.torch, name) for name in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")]
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(*layers))
    assert all(type(m) is nn.SyncBatchNorm for m in synchronized)
    pure = torch.func.replace_all_batch_norm_modules_(build(nk.torch, "BatchNorm1d"))
    x = torch.stack([batch("BatchNorm1d")] * 2)
    assert_same([vmap(pure)(x)[0].detach()], [pure(x[0]).detach()])


@pytest.mark.parametrize("name", ["BatchNorm1d", "LayerNorm", "GroupNorm", "RMSNorm"])
def test_parametrized_weights(name):
    class Positive(nn.Module):
        def forward(self, w):
            return nn.functional.softplus(w)

    results = []
    for layer in pair(name):
        nn.utils.parametrize.register_parametrization(layer, "weight", Positive())
        results.append(step(layer, batch(name)))
        nn.utils.parametrize.remove_parametrizations(layer, "weight")
        results[-1].append(layer(batch(name)).detach())
    assert_same(*results)


def test_fusing_with_a_convolution():
    results = []
    for norm in pair("BatchNorm2d", training=False):
        torch.manual_seed(0)
        conv = nn.Conv2d(2, 5, 3).eval()
        fused = nn.utils.fusion.fuse_conv_bn_eval(conv, norm)
        x = data((4, 2, 5, 5))
        results.append([fused(x).detach(), norm(conv(x)).detach()])
        assert_same(results[-1][:1], results[-1][1:], 5e-6)
    assert_same(*results)


def test_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in LAYERS:
            step(build(nk.torch, name), batch(name))
