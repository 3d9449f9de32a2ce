"""Where PyTorch's layers meet their limits: sizes, values, dtypes and arguments."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from test_torch import assert_same, data
from test_torch_ecosystem import LAYERS, batch, build, each_layer, pair, step, train_and_eval
from torch import nn

import normkit as nk
import normkit.torch

T = nk.torch
# Layers that take their statistics from the input, for inputs (N, 6, 7).
OWN = {
    "BatchNorm1d": (6,),
    "GroupNorm": (2, 6),
    "InstanceNorm1d": (6,),
    "LayerNorm": ((6, 7),),
    "RMSNorm": ((6, 7),),
}
each_own = pytest.mark.parametrize("name", OWN)


def both(name, **kwargs):
    return [getattr(where, name)(*OWN[name], **kwargs) for where in (T, nn)]


@each_layer
@train_and_eval
def test_an_empty_batch(name, training):
    """Gradients of zero, and no statistics (natively, its number is counted all the same)."""
    ours, native = pair(name, training)
    before = copy.deepcopy(ours.state_dict())
    x = torch.zeros((0, *LAYERS[name][2][1:]))
    got = step(ours, x)
    if name.startswith("Instance") and list(ours.parameters()):
        assert got[0].shape == x.shape
        assert not any(p.grad.any() for p in ours.parameters())
        with pytest.raises(IndexError):
            native(x)
    else:
        assert_same(got, step(native, x), 0)
    assert all(torch.equal(a, before[key]) for key, a in ours.state_dict().items())


@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "GroupNorm", "InstanceNorm1d"])
def test_no_positions(name):
    shape = (*LAYERS[name][2][:-1], 0)
    ours, native = pair(name)
    assert ours(torch.zeros(shape)).shape == native(torch.zeros(shape)).shape == shape


@pytest.mark.parametrize(
    ("name", "args", "shape"),
    [
        ("LayerNorm", (0,), (3, 0)),
        ("LayerNorm", ((0, 3),), (3, 0, 3)),
        ("RMSNorm", (0,), (3, 0)),
        ("GroupNorm", (1, 0), (3, 0)),
        ("InstanceNorm1d", (0,), (3, 0, 4)),
    ],
)
def test_zero_features(name, args, shape):
    for where in (T, nn):
        assert getattr(where, name)(*args)(torch.zeros(shape)).shape == shape
    # The native BatchNorm raises an IndexError.
    assert T.BatchNorm1d(0)(torch.zeros(3, 0)).shape == (3, 0)


@pytest.mark.parametrize(
    ("name", "args", "shape"),
    [
        ("BatchNorm1d", (3,), (1, 3)),
        ("BatchNorm2d", (3,), (1, 3, 1, 1)),
        ("InstanceNorm1d", (3,), (2, 3, 1)),
        ("InstanceNorm2d", (3,), (3, 1, 1)),
        ("GroupNorm", (3, 3), (1, 3)),
    ],
)
def test_one_value(name, args, shape):
    for where in (T, nn):
        with pytest.raises(ValueError, match=r"more than (1|one)"):
            getattr(where, name)(*args)(torch.zeros(shape))


def test_one_value_where_it_is_allowed():
    assert not T.LayerNorm(1)(torch.ones(3, 1)).any()
    assert_same([T.RMSNorm(1)(torch.ones(3, 1))], [nn.RMSNorm(1)(torch.ones(3, 1))])
    # Natively, any batch but one of a single sample passes, with zeros.
    with pytest.raises(ValueError, match="more than one value in each group"):
        T.GroupNorm(3, 3)(torch.zeros(2, 3))
    for where in (T, nn):  # in evaluation the running statistics are used
        layer = where.InstanceNorm1d(3, track_running_stats=True).eval()
        assert layer(torch.ones(2, 3, 1)).shape == (2, 3, 1)


@pytest.mark.parametrize("name", ["InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"])
@pytest.mark.parametrize("options", [{}, {"affine": True, "track_running_stats": True}], ids=str)
@train_and_eval
def test_instances_without_a_batch_axis(name, options, training):
    shape = LAYERS[name][2]
    x = data(shape)[0]
    results = []
    for where in (T, nn):
        layer = getattr(where, name)(5, **options).train(training)
        results.append(step(layer, x))
        assert results[-1][0].shape == shape[1:]
    assert_same(*results)


@each_own
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_what_is_not_finite_stays_in_its_group(name, value):
    x = data((4, 6, 7))
    clean = [layer(x) for layer in both(name)]
    x[1, 2, 3] = value
    for layer, before in zip(both(name), clean, strict=True):
        y = layer(x)
        spoilt = ~y.isfinite() | ((y - before).abs() > 1e-5)
        want = torch.zeros(4, 6, 7, dtype=torch.bool)
        group = {
            "BatchNorm1d": np.s_[:, 2],
            "GroupNorm": np.s_[1, :3],
            "InstanceNorm1d": np.s_[1, 2],
        }
        want[group.get(name, 1)] = True
        assert torch.equal(spoilt, want)


@each_own
@pytest.mark.parametrize("size", [1e37, 1e30, 1e-30, 1e-38])
def test_any_size_of_numbers(name, size):
    """Squares of these are no float32, which is where the native layers return zeros or NaN."""
    layer, native = both(name, eps=2.0**-23)
    x = data((4, 6, 7)) * size
    got, want = step(layer, x)[:2], step(native.double(), x.double())[:2]
    for a, b in zip(got, want, strict=True):
        largest = float(b.abs().max())
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-6 * largest)


@each_own
@pytest.mark.parametrize("eps", [1e-30, 1e-12, 1.0, 1e30])
def test_any_size_of_eps(name, eps):
    layer, native = both(name, eps=eps)
    x = data((4, 6, 7))
    got, want = step(layer, x)[:2], step(native.double(), x.double())[:2]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-6 * float(b.abs().max()))
    constant = layer(torch.full((4, 6, 7), 3.0))
    assert constant.isfinite().all()
    assert name == "RMSNorm" or constant.abs().max() < 1e-12


def test_eps_of_a_batch_norm_as_native():
    """Positive in training; in evaluation it may be zero."""
    for where in (T, nn):
        for eps in (0.0, -1.0):
            with pytest.raises(ValueError, match="eps must be positive"):
                where.BatchNorm1d(3, eps=eps)(data((4, 3)))
        assert where.BatchNorm1d(3, eps=0.0).eval()(data((4, 3))).isfinite().all()
        with pytest.raises(ValueError, match="eps must be"):
            where.BatchNorm1d(3, eps=-0.5).eval()(data((4, 3)))


@each_own
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_overflow_nowhere(name, dtype):
    """Values beside 65504, whose squares and whose sums are far beyond."""
    layer, native = both(name)
    x = (data((4, 6, 7)) * 1e4).clamp(-6e4, 6e4).to(dtype)
    got, want = step(layer, x)[0], step(native.double(), x.double())[0]
    last_digit = 2.0**-11 if dtype == torch.float16 else 2.0**-8
    torch.testing.assert_close(got.double(), want, rtol=last_digit, atol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_more_values_than_half_types_can_count(weighted):
    x = (data((1, 2, 70_001)) + 3).half()
    mask = torch.ones((1, 2, 70_001), dtype=torch.half) if weighted else None
    layers = (T.BatchNorm1d(2).half(), T.GroupNorm(1, 2), T.InstanceNorm1d(2), T.LayerNorm(70_001))
    for layer in layers:
        y = layer(x, mask=mask).float()
        assert abs(y.mean().item()) < 1e-4
        assert abs(y.var().item() - 1) < 1e-3
    assert_same([layers[0].running_mean.float()], [torch.full((2,), 0.3)], 2e-3)
    y = T.RMSNorm(70_001)(x, mask=mask).float()
    assert abs(y.square().mean().item() - 1) < 1e-3


@each_layer
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_what_are_no_real_numbers(name, dtype):
    layer = build(T, name)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(TypeError, match="real floating-point"):
        layer(torch.ones(LAYERS[name][2], dtype=dtype))
    assert all(torch.equal(a, before[key]) for key, a in layer.state_dict().items())


@each_layer
@train_and_eval
def test_shapes_that_do_not_fit(name, training):
    ours, native = pair(name, training)
    before = copy.deepcopy(ours.state_dict())
    shape = list(LAYERS[name][2])
    axis = len(shape) - 1 if name in ("LayerNorm", "RMSNorm") else 1
    wrong = [[*shape[:axis], shape[axis] * 2, *shape[axis + 1 :]]]
    wrong += [[5]] if name != "RMSNorm" else [[]]
    if name.startswith(("Batch", "Instance")):
        wrong += [[*shape, 2, 2], shape[:1]]
    if name == "InstanceNorm1d":
        wrong = wrong[1:]  # without parameters and statistics, any number of channels passes
        for layer in (ours, native):
            with pytest.warns(UserWarning, match="num_features"):
                layer(torch.zeros(4, 10, 7))
    for lengths in wrong:
        for layer in (ours, native):
            with pytest.raises((ValueError, RuntimeError)):
                layer(torch.zeros(lengths))
        with pytest.raises(ValueError, match=r"x|expected"):
            ours(torch.zeros(lengths))
    assert all(torch.equal(a, before[key]) for key, a in ours.state_dict().items())


@each_layer
def test_layouts_of_memory(name):
    """Slices, transposed and expanded tensors."""
    layer = build(T, name, torch.float64).eval()
    x = batch(name, 0, torch.float64)
    want = layer(x).detach()
    wide = torch.zeros((*x.shape[:-1], 2 * x.shape[-1]), dtype=x.dtype)
    wide[..., ::2] = x
    for other in (wide[..., ::2], x.transpose(0, -1).contiguous().transpose(0, -1)):
        assert_same([layer(other).detach()], [want], 1e-13)
    spread = x[:1].expand(3, *x.shape[1:])
    assert_same([layer(spread).detach()], [layer(spread.contiguous()).detach()], 1e-13)


@pytest.mark.parametrize("x", [np.ones((4, 6, 7), np.float32), [1.0] * 7], ids=["numpy", "list"])
@each_own
def test_what_is_no_tensor(name, x):
    with pytest.raises(TypeError) as raised:
        getattr(T, name)(*OWN[name])(x)
    assert str(raised.value) == (
        f"a layer of normkit.torch takes a torch.Tensor, but got a {type(x).__name__}; convert it "
        f"first, for example with torch.as_tensor(x)."
    )


@pytest.mark.parametrize("cls", [T.LayerNorm, T.RMSNorm])
def test_one_axis_as_a_number(cls):
    x = data((4, 6, 7))
    assert_same([cls(6, axes=1)(x)], [cls(6, axes=(1,))(x)], 0)


@pytest.mark.parametrize("cls", [T.LazyBatchNorm1d, T.LazyInstanceNorm2d, nn.LazyBatchNorm3d])
def test_a_lazy_layer_has_no_definition_yet(cls):
    sentence = (
        f"a {cls.__name__} learns its number of channels from its first input, so its definition "
        f"is not known yet; call it once first."
    )
    with pytest.raises(ValueError, match=sentence):
        T.definition(cls())


def test_without_a_counter_there_is_no_cumulative_average():
    """As natively: the statistics stay."""
    for cls in (T.BatchNorm1d, nn.BatchNorm1d, T.InstanceNorm1d):
        layer = cls(3, momentum=None, track_running_stats=True)
        layer.num_batches_tracked = None
        layer(data((8, 3, 5)))
        assert not layer.running_mean.any()


def test_an_infinite_variance_is_kept_out():
    """Zero times infinity would make the statistics NaN for good."""
    x = data((8, 3))
    layer = T.BatchNorm1d(3, momentum=0.0)
    layer(x * 1e30)
    assert (layer.running_var == 1).all()
    layer = T.BatchNorm1d(3, momentum=1.0)
    layer(x * 1e30)
    layer(x)
    assert_same([layer.running_var], [x.var(0)])


def test_numpy_masks_come_to_where_the_input_is():
    x = torch.ones((4, 6, 7), device="meta")
    y = nk.layer_norm(x, np.ones(7, np.float32), mask=np.ones((4, 6), bool))
    assert y.device.type == "meta"


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_left_to_the_native_layer(layout):
    parts = [data((3, 7)), data((5, 7))]
    x = torch.nested.nested_tensor(parts, layout=layout, requires_grad=layout == torch.jagged)
    layer = T.LayerNorm(7)
    y = layer(x)
    assert y.is_nested
    assert_same([a.detach() for a in y.unbind()], [layer(a).detach() for a in parts])
    if layout == torch.jagged:
        y.values().sum().backward()
    with pytest.raises(TypeError, match=r"a nested tensor is normalized by PyTorch's own layer"):
        layer(x, mask=torch.ones(2))


def test_options_are_not_lost_on_nested_tensors():
    x = torch.nested.nested_tensor([data((3, 7)), data((5, 7))], layout=torch.jagged)
    for options in ({"zero_centered": True}, {"scale_after_cast": True}):
        with pytest.raises(TypeError, match=r"which has no mask and no options of normkit's"):
            T.RMSNorm(7, **options)(x)
