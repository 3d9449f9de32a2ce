"""Masks in PyTorch's layers: a padded batch is as good as the batch without its padding."""

from __future__ import annotations

import copy

import pytest
import torch
from test_torch import assert_same, data
from test_torch_ecosystem import statistics
from torch import nn

import normkit as nk
import normkit.torch

T = nk.torch
LENGTHS = [7, 3, 5, 2]
STEPS = torch.arange(7) < torch.tensor(LENGTHS)[:, None]  # (4, 7): the valid steps of 4 sequences

# For (N, C, L) of 4 sequences with 6 channels and up to 7 steps.
LAYERS = {
    "batch": lambda: T.BatchNorm1d(6),
    "batch-average": lambda: T.BatchNorm1d(6, momentum=None),
    "batch-bare": lambda: T.BatchNorm1d(6, affine=False, track_running_stats=False),
    "batch-lazy": lambda: T.LazyBatchNorm1d(),
    "group": lambda: T.GroupNorm(3, 6),
    "instance": lambda: T.InstanceNorm1d(6, affine=True),
    "instance-tracking": lambda: T.InstanceNorm1d(6, affine=True, track_running_stats=True),
    "instance-lazy": lambda: T.LazyInstanceNorm1d(),
    "layer-channels": lambda: T.LayerNorm(6, axes=(1,)),
    "rms-channels": lambda: T.RMSNorm(6, axes=(1,)),
}
WHOLE_BATCH = [name for name in LAYERS if name.startswith("batch")]
ONE_BY_ONE = [name for name in LAYERS if not name.startswith("batch")]


def padded():
    """A batch with NaN for padding, and what its valid values are."""
    x = data((4, 6, 7)) * 2 + 30
    return x, torch.where(STEPS[:, None], x, torch.nan)


def upstream():
    """Gradients of a loss that does not look at the padding."""
    return torch.where(STEPS[:, None], data((4, 6, 7), 1), 0.0)


def step(layer, x, g, mask=None):
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = layer(x, mask=mask)
    y.backward(g)
    return y.detach(), x.grad, [p.grad.clone() for p in layer.parameters()]


@pytest.mark.parametrize("name", WHOLE_BATCH)
def test_statistics_of_the_valid_steps(name):
    x, broken = padded()
    a = LAYERS[name]()
    b, g = LAYERS[name](), upstream()
    y, dx, dparams = step(a, broken, g, STEPS)
    valid = [t.movedim(1, -1)[STEPS] for t in (x, g)]
    z, dz, dwant = step(b, *valid)
    got = [t.movedim(1, -1)[STEPS] for t in (y, dx)]
    assert_same([*got, *dparams], [z, dz, *dwant], 4e-6)
    assert_same(list(a.buffers()), list(b.buffers()))
    assert not dx.movedim(1, -1)[~STEPS].any()
    bias = 0 if a.bias is None else a.bias
    assert torch.equal(y.movedim(1, -1)[~STEPS], bias + torch.zeros((~STEPS).sum(), 6))


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_each_sample_as_if_it_were_cut(name):
    x, broken = padded()
    a, g = LAYERS[name](), upstream()
    y, dx, dparams = step(a, broken, g, STEPS)
    assert y.isfinite().all()
    assert dx.isfinite().all()
    total = [torch.zeros_like(p) for p in dparams]
    found = []
    for i, n in enumerate(LENGTHS):
        b = LAYERS[name]()
        z, dz, dwant = step(b, x[i : i + 1, :, :n], g[i : i + 1, :, :n])
        assert_same([y[i : i + 1, :, :n], dx[i : i + 1, :, :n]], [z, dz], 4e-6)
        total = [t + d for t, d in zip(total, dwant, strict=True)]
        found.append(statistics(b))
    assert_same(dparams, total, 4e-6)
    mean = [torch.stack(s).mean(0) for s in zip(*found, strict=True)]
    assert_same(statistics(a), mean)


@pytest.mark.parametrize("cls", [T.LayerNorm, T.RMSNorm])
@pytest.mark.parametrize("width", [1, 7, 64, 1000])
def test_rows_are_the_same_to_the_last_bit(cls, width):
    """A row that is kept, of a batch in which others are left out, is computed alike."""
    x = data((4, 7, width)) + 30
    broken = torch.where(STEPS[..., None], x, torch.nan)
    g = data(x.shape, 1)
    y, dx, _ = step(cls(width), broken, g, STEPS)
    z, dz, _ = step(cls(width), x[STEPS], g[STEPS])
    assert torch.equal(y[STEPS], z)
    assert_same([dx[STEPS]], [dz], 1e-6)
    assert not dx[~STEPS].any()


@pytest.mark.parametrize("cls", [T.LayerNorm, T.RMSNorm])
def test_padded_features(cls):
    x, broken = padded()
    for i, n in enumerate(LENGTHS):
        y = cls(7)(broken[i], mask=STEPS[i : i + 1])
        assert_same([y[:, :n].detach()], [cls(n)(x[i, :, :n]).detach()])


@pytest.mark.parametrize("name", LAYERS)
def test_every_form_of_one_mask(name):
    _, broken = padded()
    full = STEPS[:, None].expand(4, 6, 7)
    forms = [
        full, full.contiguous(), STEPS[:, None], STEPS, full.int(), full.double(), full.half(),
        STEPS.float(), STEPS.numpy(),
    ]  # fmt: skip
    results = []
    for mask in forms:
        layer = LAYERS[name]()
        g = data(broken.shape, 1)
        y, dx, dparams = step(layer, broken, g, mask)
        results.append([y, dx, *dparams, *layer.buffers()])
    for other in results[1:]:
        assert_same(other, results[0], 1e-6)


@pytest.mark.parametrize("name", ["batch", "batch-bare", "group", "instance", "layer-channels"])
def test_a_weight_is_that_many_copies(name):
    """Of a step: 2 counts twice, in values and in the running variance."""
    x = data((4, 6, 5)) + 3
    times = torch.tensor([2, 0, 1, 3, 1])
    repeated = x.repeat_interleave(times, -1)
    a, b = LAYERS[name](), LAYERS[name]()
    y, z = a(x, mask=times.expand(4, 5)), b(repeated)
    keep = times > 0
    first = (times.cumsum(0) - times)[keep]
    assert_same([y[..., keep].detach()], [z[..., first].detach()])
    assert_same(statistics(a), statistics(b))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_valid(name, dtype):
    x = torch.full((4, 6, 7), torch.nan, dtype=dtype)
    layer = LAYERS[name]()
    if "lazy" in name:
        layer(data((4, 6, 7)))
    before = copy.deepcopy(layer.state_dict())
    y, dx, dparams = step(layer, x, torch.ones_like(x), torch.zeros(4, 7, dtype=torch.bool))
    assert not y.any()
    assert not dx.any()
    assert all(d.isfinite().all() for d in dparams)
    assert all(torch.equal(a, before[key]) for key, a in layer.state_dict().items())


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_beside_nan_and_infinity(name):
    """Of every kind of rubbish, in first and second derivatives."""
    x = data((4, 6, 7), dtype=torch.float64)
    for rubbish in (torch.nan, torch.inf, -torch.inf, 1e308):
        layer = LAYERS[name]().double()
        broken = torch.where(STEPS[:, None], x, rubbish).requires_grad_()
        y = layer(broken, mask=STEPS)
        inputs = [broken, *layer.parameters()]
        grads = torch.autograd.grad(y.pow(3).sum(), inputs, create_graph=True)
        again = torch.autograd.grad(sum(g.pow(2).sum() for g in grads), inputs)
        for a in (*grads, *again):
            assert a.isfinite().all()
        assert not again[0].movedim(1, -1)[~STEPS].any()


def test_a_mask_in_evaluation():
    """The running statistics are used; what is left out comes out as the bias."""
    layers = [LAYERS[name]() for name in ("batch", "instance-tracking")]
    for layer in layers:
        layer(data((4, 6, 7)))
        nn.init.constant_(layer.bias, 0.5)
        layer.eval()
        x, broken = padded()
        y = layer(broken, mask=STEPS)
        assert_same([y.movedim(1, -1)[STEPS]], [layer(x).movedim(1, -1)[STEPS]], 0)
        assert (y.movedim(1, -1)[~STEPS] == 0.5).all()


def test_masks_inside_transforms():
    x, broken = padded()
    layer = T.GroupNorm(3, 6)
    one = torch.func.vmap(lambda a, m: layer(a[None], mask=m[None])[0])(broken, STEPS)
    assert_same([one.detach()], [layer(broken, mask=STEPS).detach()])
    u = torch.func.jvp(lambda a: layer(a, mask=STEPS), (broken,), (data(x.shape, 1),))[1]
    assert u.isfinite().all()
    lone = T.InstanceNorm1d(6)
    assert_same([lone(broken[1], mask=STEPS[1])], [lone(broken, mask=STEPS)[1]])
    assert_same([lone(broken[1], mask=STEPS[1][None])], [lone(broken, mask=STEPS)[1]])


@pytest.mark.parametrize("name", LAYERS)
def test_masks_that_do_not_fit(name):
    for shape in [(4, 6), (7,), (3, 7), (4, 6, 7, 1), (1, 4, 7, 1), ()]:
        with pytest.raises(ValueError, match="mask or weights"):
            LAYERS[name]()(data((4, 6, 7)), mask=torch.ones(shape, dtype=torch.bool))
