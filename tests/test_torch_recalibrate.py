"""Running statistics taken again, beside float64 statistics of what each layer sees."""

from __future__ import annotations

import copy
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import normkit as nk
import normkit.torch

recalibrate = nk.torch.recalibrate
SIZES = (7, 3, 1)

NORMS = {
    "native": nn.BatchNorm2d,
    "native-average": lambda c: nn.BatchNorm2d(c, momentum=None),
    "synchronized": nn.SyncBatchNorm,
    "normkit": nk.torch.BatchNorm2d,
    "normkit-population": lambda c: nk.torch.BatchNorm(c, correction=0, momentum=None),
    "native-instance": lambda c: nn.InstanceNorm2d(c, track_running_stats=True),
    "instance": lambda c: nk.torch.InstanceNorm2d(c, track_running_stats=True, correction=0),
}


def data(offset=1e3):
    rng = torch.Generator().manual_seed(0)
    return offset + 3 * torch.randn(sum(SIZES), 3, 9, 9, generator=rng)


def network(norm):
    """Two layers to take statistics of, between others; trained a little on something else."""
    torch.manual_seed(0)
    model = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 8, 3),
            norm1=norm(8),
            relu=nn.ReLU(),
            dropout=nn.Dropout(0.5),
            conv2=nn.Conv2d(8, 4, 3),
            norm2=norm(4),
            layer=nn.LayerNorm(5),
        )
    )
    if norm is not nn.SyncBatchNorm:  # which trains on GPUs only
        model(torch.randn(4, 3, 9, 9))
    return model


def seen(model, batches, forward=None):
    """What each layer with running statistics is called with in inference, in float64."""
    found, hooks = {}, []
    model = copy.deepcopy(model).eval()
    for name, layer in model.named_modules():
        if getattr(layer, "running_mean", None) is not None:

            def hook(_, args, name=name):
                found.setdefault(name, []).append(args[0].double().numpy())

            hooks.append(layer.register_forward_pre_hook(hook))
    with torch.no_grad():
        for batch in batches:
            (forward or (lambda model, batch: model(batch)))(model, batch)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def statistics(layer, x):
    """What ``layer`` is to remember of ``x``, which has channels at axis 1."""
    ddof = getattr(layer, "correction", 1)
    others = tuple(range(2, x.ndim))
    if isinstance(layer, nn.modules.instancenorm._InstanceNorm):
        return x.mean(others).mean(0), x.var(others, ddof=ddof).mean(0)
    return x.mean((0, *others)), x.var((0, *others), ddof=ddof)


def check(model, batches, rtol=1e-6, **options):
    """Each layer has the statistics of what it sees in the model as it is now."""
    inputs = seen(model, batches, **options)
    for name, x in inputs.items():
        layer = model.get_submodule(name)
        mean, variance = statistics(layer, x)
        np.testing.assert_allclose(layer.running_mean.double().numpy(), mean, rtol=rtol)
        np.testing.assert_allclose(layer.running_var.double().numpy(), variance, rtol=rtol)
        assert layer.num_batches_tracked == len(batches)
    return inputs


def everything(model):
    """All that an error must leave as it was."""
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [
            (m.training, dict(m._forward_pre_hooks), getattr(m, "momentum", 0))
            for m in model.modules()
        ],
        torch.is_grad_enabled(),
    )


def assert_unchanged(model, before):
    state, *rest = everything(model)
    assert rest == list(before[1:])
    assert list(state) == list(before[0])
    assert all(torch.equal(state[name], before[0][name]) for name in state)


@pytest.mark.parametrize("name", NORMS)
def test_each_layer_has_the_statistics_of_what_it_sees(name):
    model = network(NORMS[name])
    model.norm1.eval()
    state, rest = everything(model)[0], everything(model)[1:]
    buffers = dict(model.named_buffers())
    batches = data().split(SIZES)
    assert recalibrate(model, batches, progress=False) is model
    inputs = check(model, batches)
    assert list(inputs) == ["norm1", "norm2"]
    assert everything(model)[1:] == rest
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]) == ("running" not in key and "num_" not in key)
    assert all(buffers[key] is buffer for key, buffer in model.named_buffers())
    # Of a network that has them, the result is standardized.
    if "instance" not in name:
        y = model.eval()[:2](data())
        torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(8), atol=1e-3, rtol=0)


def test_one_pass_sees_with_the_old_statistics():
    model = network(nn.BatchNorm2d)
    batches = data().split(SIZES)
    old = seen(model, batches)
    recalibrate(model, iter(batches), one_pass=True, progress=False)
    for name, x in old.items():
        layer = model.get_submodule(name)
        mean, variance = statistics(layer, x)
        np.testing.assert_allclose(layer.running_mean.double().numpy(), mean, rtol=1e-6)
        np.testing.assert_allclose(layer.running_var.double().numpy(), variance, rtol=1e-6)
        assert layer.num_batches_tracked == 3
    with pytest.raises(AssertionError):  # which is not what the second layer sees from now on
        check(model, batches)


def test_a_cumulative_average_goes_on():
    bn, x = nn.BatchNorm1d(2, momentum=None), torch.randn(12, 2)
    recalibrate(bn, [x[:5], x[5:9]], progress=False)
    mean = bn.running_mean.clone()
    bn.train()(x[9:])
    torch.testing.assert_close(bn.running_mean, (2 * mean + x[9:].mean(0)) / 3)
    assert bn.num_batches_tracked == 3


class Shared(nn.Module):
    """One layer in two places, one that is not always called, and a mask for another."""

    def __init__(self):
        super().__init__()
        self.norm = self.again = nk.torch.BatchNorm1d(3)
        self.masked = nk.torch.BatchNorm1d(3)
        self.aside = nk.torch.BatchNorm1d(3)

    def forward(self, x, mask=None, aside=False):
        y = self.norm(x) + self.again(2 * x)
        y = self.masked(y, mask=mask)
        return self.aside(y) if aside else y


def test_a_layer_in_two_places_and_a_mask():
    model = Shared()
    x = data()[:, :, 0]
    mask = torch.rand(11, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    batches = [
        {"x": a, "mask": b, "aside": True}
        for a, b in zip(x.split(SIZES), mask.split(SIZES), strict=True)
    ]
    recalibrate(model, batches, progress=False)
    inputs = seen(model, batches, lambda model, batch: model(**batch))
    for name, keep in (("norm", None), ("masked", mask), ("aside", None)):
        rows = np.moveaxis(inputs[name], 1, 2).reshape(-1, 3)
        rows = rows if keep is None else rows[keep.numpy().ravel()]
        layer = model.get_submodule(name)
        # The values that are standardized lie around zero, which has no digits to be right in.
        atol = 1e-6 * rows.std()
        np.testing.assert_allclose(layer.running_mean, rows.mean(0), rtol=1e-6, atol=atol)
        np.testing.assert_allclose(layer.running_var, rows.var(0, ddof=1), rtol=1e-6)
    assert model.norm.num_batches_tracked == 6
    assert model.masked.num_batches_tracked == 3


def test_kinds_of_batches():
    x, y = data(0), torch.arange(11)
    expected = recalibrate(network(nn.BatchNorm2d), [x], progress=False).state_dict()
    for batches, call in [
        (DataLoader(TensorDataset(x, y), batch_size=4), None),
        (DataLoader([(a, {"label": 0}) for a in x], batch_size=4), None),
        (DataLoader([{"input": a} for a in x], batch_size=4), None),
        ([(x[:4], y[:4], "more"), [x[4:], y[4:]]], None),
        ([("first", x[:4]), ("second", x[4:])], lambda model, batch: model(batch[1])),
    ]:
        model = network(nn.BatchNorm2d)
        recalibrate(model, batches, call=call, progress=False)
        for key, value in model.state_dict().items():
            if "num_batches" not in key:
                torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)


def test_instances_without_a_batch_axis():
    norm = nk.torch.InstanceNorm1d(3, track_running_stats=True)
    x = torch.randn(2, 3, 9)
    recalibrate(norm, list(x), progress=False)
    torch.testing.assert_close(norm.running_mean, x.mean((0, 2)), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(norm.running_var, x.var(2).mean(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    model = network(nk.torch.BatchNorm2d).to(dtype)
    batches = data(10.0).to(dtype).split(SIZES)
    recalibrate(model, batches, progress=False)
    check(model, batches, rtol=1e-10 if dtype == torch.float64 else 2.0**-8)


def test_a_compiled_model():
    model = network(nn.BatchNorm2d)
    compiled = torch.compile(model, backend="eager")
    batches = data().split(SIZES)
    compiled(batches[0])
    recalibrate(compiled, batches, progress=False)
    check(model, batches)


class Interrupted(list):
    """Batches that stop with an error after so many of them."""

    def __init__(self, batches, after, error):
        super().__init__(batches)
        self.left, self.error = after, error

    def __iter__(self):
        for batch in super().__iter__():
            if not self.left:
                raise self.error
            self.left -= 1
            yield batch


@pytest.mark.parametrize("after", [0, 1, 4])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no disk")], ids=repr)
def test_whatever_is_raised_leaves_the_model_as_it_was(after, error):
    model = network(nk.torch.BatchNorm2d)
    model.norm2.eval()
    model.relu.register_forward_pre_hook(lambda *_: None)
    before = everything(model)
    with pytest.raises(type(error)):
        recalibrate(model, Interrupted(data().split(SIZES), after, error), progress=False)
    assert_unchanged(model, before)


def infinite(model):
    with torch.no_grad():
        model.conv2.weight[0] = float("nan")


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ([], "there are no batches"),
        ([torch.tensor(1.0)], r"the model was called with an array of shape \(\)"),
        ([data()[0]], "expected 4D input"),
        (iter([data()]), "passed over once for each of the 2 layers"),
        ([data() * float("inf")], "the mean of what layer 'norm1' sees is NaN"),
        ([data()[:, :, :4]], "Kernel size|kernel size"),
    ],
)
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nk.torch.BatchNorm2d])
def test_batches_that_are_refused(norm, batches, said):
    model = network(norm)
    before = everything(model)
    with pytest.raises((ValueError, RuntimeError), match=said):
        recalibrate(model, batches, progress=False)
    assert_unchanged(model, before)


def test_models_that_are_refused():
    x = torch.randn(4, 3)
    model = network(nn.BatchNorm2d)
    infinite(model)
    before = everything(model)[0]["norm1.running_mean"]
    with pytest.raises(ValueError, match="the mean of what layer 'norm2' sees is NaN"):
        recalibrate(model, [data()], progress=False)
    assert torch.equal(model.norm1.running_mean, before)  # which had been written

    for single in (nn.BatchNorm1d(3), nk.torch.BatchNorm1d(3)):
        with pytest.raises(ValueError, match="'BatchNorm1d' remembers an estimate with corr"):
            recalibrate(single, [x[:1]], progress=False)
        recalibrate(single, [x[:1], x[1:2]], progress=False)
    for none in (
        nn.Linear(3, 3),
        nn.BatchNorm1d(3, track_running_stats=False),
        nn.InstanceNorm1d(3),
    ):
        with pytest.raises(ValueError, match="no layer with running statistics"):
            recalibrate(none, [x], progress=False)
    model = Shared()
    with pytest.raises(ValueError, match=r"never seen to be called.*: aside\."):
        recalibrate(model, [x], progress=False)
    assert model.norm.num_batches_tracked == 0
    with pytest.raises(ValueError, match="'0' is lazy and has not been called"):
        recalibrate(nn.Sequential(nn.LazyBatchNorm1d()), [x], progress=False)
    with pytest.raises(TypeError, match=r"a batch must be a tensor, .* but got a str"):
        recalibrate(nn.BatchNorm1d(3), ["x"], progress=False)


class Routes(nn.Module):
    """Batches that take different ways to a layer that they share."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.BatchNorm1d(1) for _ in range(3))

    def forward(self, x, which):
        return self.c(getattr(self, which)(x))


@pytest.mark.parametrize("order", ["ab", "ba", "aab", "abb"])
def test_batches_that_take_different_routes(order):
    torch.manual_seed(0)
    x = torch.randn(50, 1)
    batches = [
        {"x": x * (i + 1) + 9 * (which == "b"), "which": which} for i, which in enumerate(order)
    ]
    model = normkit.torch.recalibrate(Routes(), batches, progress=False).eval()
    seen = torch.cat([getattr(model, b["which"])(b["x"]) for b in batches]).double()
    torch.testing.assert_close(model.c.running_mean.double(), seen.mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(model.c.running_var.double(), seen.var(0), rtol=1e-6, atol=0)


def test_layers_that_are_called_behind_each_other():
    """In one order and in the other, so that one has to be the first."""

    class Crossed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.BatchNorm1d(1), nn.BatchNorm1d(1)

        def forward(self, x, turned):
            first, second = (self.b, self.a) if turned else (self.a, self.b)
            return second(first(x))

    x = torch.randn(50, 1) * 3 + 5
    batches = [{"x": x, "turned": False}, {"x": x + 1, "turned": True}]
    model = normkit.torch.recalibrate(Crossed(), batches, progress=False)
    assert model.a.num_batches_tracked == model.b.num_batches_tracked == 2
    assert model.b.running_mean.abs() > 1


def test_a_layer_that_stays_in_training_is_refused():
    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.BatchNorm1d(3)

        def train(self, mode=True):
            super().train(mode)
            self.a.train()
            return self

        def forward(self, x):
            return self.a(x)

    model = Kept()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="layer 'a' is called in training mode"):
        normkit.torch.recalibrate(model, [torch.randn(5, 3)], progress=False)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_an_array_is_no_list_of_batches():
    with pytest.raises(TypeError, match=r"got an array of shape \(5, 3\); give a list of batches"):
        normkit.torch.recalibrate(nn.BatchNorm1d(3), torch.randn(5, 3), progress=False)
