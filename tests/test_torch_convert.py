"""Exchanging the layers of models that were built by others, and training on."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from sklearn.datasets import load_digits
from test_torch import assert_same, data
from test_torch_ecosystem import LAYERS, LAZY, batch, build, statistics
from torch import nn
from torch.nn import functional as F

import normkit as nk
import normkit.torch

convert, revert = nk.torch.convert, nk.torch.revert

NORMS = {
    "batch": nn.BatchNorm2d,
    "batch-average": lambda c: nn.BatchNorm2d(c, momentum=None),
    "group": lambda c: nn.GroupNorm(4, c),
    "instance-tracking": lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True),
}


class BasicBlock(nn.Module):
    def __init__(self, inputs, outputs, norm, stride) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = norm(outputs)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, norm(outputs))

    def forward(self, x):
        aside = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + aside)


class Head(nn.Module):
    """One normalization layer used in two places, and two of other kinds."""

    def __init__(self, width) -> None:
        super().__init__()
        self.shared = nn.LayerNorm(width)
        self.again = self.shared
        self.rms = nn.RMSNorm(width)
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, 10)

    def forward(self, x):
        x = self.shared(x.mean((2, 3)))
        return self.last(self.rms(self.again(F.relu(self.first(x)))))


def resnet(norm):
    """As torchvision's are, for images of 8 by 8 pixels; the first norm is frozen."""
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(1, 8, 3, 1, 1, bias=False), norm(8), nn.ReLU())
    blocks = [BasicBlock(8, 8, norm, 1), BasicBlock(8, 16, norm, 2)]
    model = nn.Sequential(stem, *blocks, Head(16))
    stem[1].requires_grad_(False)
    return model


def digits(steps, dtype=torch.float32, size=16):
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=dtype).reshape(-1, 1, 8, 8) / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    for i in range(steps):
        chosen = order[i * size : (i + 1) * size]
        yield images[chosen], torch.tensor(labels)[chosen]


def train(model, optimizer, batches):
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def kinds(model):
    return [type(m) for m in model.modules()]


@pytest.mark.parametrize(
    ("name", "dtype", "rtol"),
    [
        # In float32 rounding sooner or later switches a unit of a ReLU on or off.
        ("batch", torch.float32, 1e-5),
        ("batch-average", torch.float64, 1e-10),
        ("group", torch.float64, 1e-10),
        ("instance-tracking", torch.float64, 1e-10),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_training_goes_on(name, dtype, rtol):
    """Twenty steps beside a copy that is left native, with the optimizer of before."""
    native = resnet(NORMS[name]).to(dtype)
    ours = copy.deepcopy(native)
    optimizers = [torch.optim.SGD(m.parameters(), 0.05, 0.9) for m in (ours, native)]
    fired = []
    ours[1].bn1.register_forward_hook(lambda *_: fired.append("forward"))
    ours[1].bn1.register_full_backward_hook(lambda *_: fired.append("backward"))
    ours[3].shared.register_forward_pre_hook(lambda *_: fired.append("shared"))
    before, held = kinds(ours), dict(ours.named_parameters()) | dict(ours.named_buffers())
    batches = list(digits(24, dtype))
    for m, optimizer in zip((ours, native), optimizers, strict=True):
        train(m, optimizer, batches[:2])

    state = copy.deepcopy(ours.state_dict())
    assert convert(ours) is ours
    assert not {nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d, nn.LayerNorm} & set(kinds(ours))
    assert ours[3].shared is ours[3].again
    assert not ours[0][1].weight.requires_grad
    fired.clear()
    losses, expected = (
        train(m, optimizer, batches[2:22])
        for m, optimizer in zip((ours, native), optimizers, strict=True)
    )
    torch.testing.assert_close(losses, expected, rtol=rtol, atol=0)
    assert losses.std() > 0.01
    assert fired == ["forward", "shared", "shared", "backward"] * 20
    assert list(state) == list(ours.state_dict())

    state = copy.deepcopy(ours.state_dict())
    assert revert(ours) is ours
    assert kinds(ours) == before
    assert all(torch.equal(a, state[key]) for key, a in ours.state_dict().items())
    now = dict(ours.named_parameters()) | dict(ours.named_buffers())
    assert all(now[key] is a for key, a in held.items())
    train(ours, optimizers[0], batches[22:])  # and on, as it was


@pytest.mark.parametrize("name", [*LAYERS, *LAZY])
@pytest.mark.parametrize("training", [True, False])
def test_every_class_there_and_back(name, training):
    layer, twin = (build(nn, name).train(training) for _ in range(2))
    convert(layer)
    assert type(layer) is getattr(nk.torch, name)
    assert layer.training == training
    assert repr(layer) == repr(twin)
    x = batch(name)
    assert_same([layer(x).detach()], [twin(x).detach()])
    assert_same(statistics(layer), statistics(twin))
    revert(layer)
    assert type(layer) is type(twin)
    assert vars(layer).keys() == vars(twin).keys()
    assert_same([layer(x).detach()], [twin(x).detach()])


def test_a_lazy_layer_that_has_loaded_its_parameters():
    """The native one has never learnt how many channels it has."""
    layer = nn.LazyBatchNorm2d()
    layer.load_state_dict(nn.BatchNorm2d(5).state_dict())
    layer(batch("BatchNorm2d"))
    assert (type(layer), layer.num_features) == (nn.BatchNorm2d, 0)
    twin = copy.deepcopy(layer)
    assert convert(layer).num_features == 5
    assert_same([layer(batch("BatchNorm2d")).detach()], [twin(batch("BatchNorm2d")).detach()])


def test_layers_that_are_left_alone():
    class Own(nn.BatchNorm2d):
        pass

    parametrized = nn.LayerNorm(3)
    nn.utils.parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    alone = [Own(3), nn.SyncBatchNorm(3), parametrized]
    model = nn.Sequential(*alone, nn.BatchNorm2d(3))
    before = kinds(model)[:-1]
    assert kinds(convert(model))[:-1] == before
    assert type(model[-1]) is nk.torch.BatchNorm2d
    assert kinds(revert(model))[:-1] == before


def test_nothing_to_exchange():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    for exchange, which in ((convert, "native"), (revert, "normkit")):
        with pytest.warns(UserWarning, match=f"no {which} normalization layer was found"):
            assert exchange(model) is model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(revert(convert(nn.LayerNorm(3)))) is nn.LayerNorm


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (lambda t: t.BatchNorm2d(3, axis=-1), "axis=-1"),
        (lambda t: t.BatchNorm2d(3, correction=0), "correction=0"),
        (lambda t: t.BatchNorm2d(3, scale=False), "scale=False"),
        (lambda t: t.BatchNorm(3), "no rank of its own, as BatchNorm1d, 2d and 3d have"),
        (lambda t: t.GroupNorm(3, 3, axis=2), "axis=2"),
        (lambda t: t.GroupNorm(3, 3, scale=False), "scale=False"),
        (lambda t: t.InstanceNorm1d(3, correction=0), "correction=0"),
        (lambda t: t.InstanceNorm(3), "no rank of its own, as BatchNorm1d, 2d and 3d have"),
        (lambda t: t.LayerNorm(3, axes=(1,)), r"axes=\(1,\)"),
        (lambda t: t.LayerNorm(3, scale=False), "scale=False"),
        (lambda t: t.RMSNorm(3, axes=(1,)), r"axes=\(1,\)"),
        (lambda t: t.RMSNorm(3, zero_centered=True), "zero_centered=True"),
        (lambda t: t.RMSNorm(3, scale_after_cast=True), "scale_after_cast=True"),
    ],
)
def test_options_that_no_native_layer_has(layer, said):
    """Nothing is changed then, whatever stands before the layer."""
    model = nn.Sequential(nk.torch.BatchNorm2d(3), nn.Sequential(layer(nk.torch)))
    before = kinds(model)
    with pytest.raises(ValueError, match=f"'1.0' has {said}, for which there is no native"):
        revert(model)
    assert kinds(model) == before


def test_a_model_that_is_compiled_already():
    """It notices: at a large mean the native layer has lost the digits that normkit's keeps."""
    torch._dynamo.reset()
    x = data((8, 5, 4, 4)) + 1e5
    model = nn.Sequential(nn.BatchNorm2d(5), nn.Identity())
    compiled = torch.compile(model, backend="aot_eager")
    exact = nk.batch_norm(x.double(), eps=1e-5).float()
    assert (compiled(x) - exact).abs().max() > 1e-4
    convert(compiled)
    assert type(model[0]) is nk.torch.BatchNorm2d
    assert_same([compiled(x).detach()], [exact])
    revert(compiled)
    assert (compiled(x) - exact).abs().max() > 1e-4
    # A part of one that is compiled.
    whole = nn.Sequential(compiled, nn.LayerNorm(4))
    assert type(convert(whole)[1]) is nk.torch.LayerNorm
    assert type(model[0]) is nk.torch.BatchNorm2d
    assert_same([whole[0](x).detach()], [exact])


def test_an_averaged_model_and_a_copy():
    model = resnet(nn.BatchNorm2d)
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    convert(model)
    (x, _), (z, _) = digits(2)
    model(x)
    averaged.update_parameters(model)  # the copy is still native
    assert_same(
        [averaged.module.state_dict()["0.1.running_mean"]], [model[0][1].running_mean], 1e-6
    )
    convert(averaged)
    assert_same([averaged.eval()(z).detach()], [copy.deepcopy(averaged)(z).detach()], 0)
