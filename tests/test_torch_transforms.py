"""torch.func, tracing and checkpointing, done to every drop-in beside its native twin."""

from __future__ import annotations

import copy

import pytest
import torch
from test_torch import assert_same
from test_torch_ecosystem import (
    batch,
    build,
    each_layer,
    each_tracking,
    pair,
    statistics,
    step,
    train_and_eval,
)
from torch import nn
from torch.func import functional_call, grad, hessian, jvp, stack_module_state, vjp, vmap
from torch.utils.checkpoint import checkpoint

import normkit as nk
import normkit.torch


@each_layer
@train_and_eval
def test_transforms_of_functions(name, training):
    """vmap, jvp, vjp, hessian, functional_call, per-sample gradients: as natively."""
    ours, native = pair(name, training, torch.float64)
    x, u = (batch(name, seed, torch.float64) for seed in (1, 2))
    results = []
    for layer in (ours, native):
        params, buffers = (dict(a) for a in (layer.named_parameters(), layer.named_buffers()))

        def pure(params, x, layer=layer, buffers=buffers):
            state = {name: b.clone() for name, b in buffers.items()}
            return functional_call(layer, (params, state), (x,)), state

        def loss(params, x, pure=pure):
            return pure(params, x)[0].pow(3).mul(u).sum()

        def call(x, params=params, pure=pure):
            return pure(params, x)[0]

        y, pull = vjp(call, x)
        out = [y, *jvp(call, (x,), (u,)), *pull(u), *grad(loss)(params, x).values()]
        out += [b for b in pure(params, x)[1].values() if b.ndim]
        small = x[:2]
        out.append(
            hessian(lambda a, params=params, pure=pure: pure(params, a)[0].pow(3).sum())(small)
        )
        results.append(out)
        assert_same(buffers.values(), layer.buffers())  # nothing has changed them
    assert_same(*results, atol=1e-11)


@each_layer
@train_and_eval
def test_many_at_once(name, training):
    """An ensemble of layers, and the gradients of each batch on its own."""
    if name == "BatchNorm2d" and training:
        # With momentum=None the native layer reads a number out of its buffer.
        with pytest.raises(RuntimeError, match="item"):
            ensemble(nn, name, training)
        ensemble(nk.torch, name, training)
    else:
        assert_same(*(ensemble(where, name, training) for where in (nk.torch, nn)), atol=1e-11)


def ensemble(where, name, training):
    x = torch.stack([batch(name, seed, torch.float64) for seed in range(3)])
    layers = [build(where, name, torch.float64).train(training) for _ in range(3)]
    params, buffers = stack_module_state(layers)

    def loss(params, buffers, x):
        return functional_call(layers[0], (params, buffers), (x,)).pow(3).sum()

    grads = vmap(grad(loss))(params, buffers, x)
    # The statistics have changed in place.
    moved = [b for b in buffers.values() if b.ndim > 1]
    for layer, a in zip(layers, x, strict=True):
        layer(a)
    alone = [torch.stack(b) for b in zip(*map(statistics, layers), strict=True)]
    assert_same(moved, alone, 1e-12)
    return [*grads.values(), *moved]


@each_tracking
def test_one_state_for_many_batches_is_refused(name):
    """Under vmap the running statistics cannot follow batches that do not know of each other."""
    ours, native = pair(name)
    before = copy.deepcopy(ours.state_dict())
    for layer in (ours, native):
        with pytest.raises(RuntimeError, match="track_running_stats"):
            vmap(layer)(torch.stack([batch(name)] * 2))
    with pytest.raises(RuntimeError, match="inside vmap each batch needs"):
        vmap(grad(lambda x: ours(x).sum()))(torch.stack([batch(name)] * 2))
    assert all(torch.equal(a, before[key]) for key, a in ours.state_dict().items())
    x = torch.stack([batch(name)] * 2)
    torch.testing.assert_close(vmap(ours.eval())(x), torch.stack([ours(a) for a in x]))


@each_layer
@train_and_eval
def test_activation_checkpointing(name, training):
    """The same gradients; as natively, the second forward pass updates the statistics again.

    (Only the layer that is the last of all has none then: the pass stops at what is asked for.)
    """
    ours, native = (nn.Sequential(layer, nn.Sigmoid()) for layer in pair(name, training))
    plain = step(copy.deepcopy(ours), batch(name))
    got, want = (
        step(layer, batch(name), lambda x, layer=layer: checkpoint(layer, x, use_reentrant=False))
        for layer in (ours, native)
    )
    assert_same(got, want)
    count = 2 + len(list(ours.parameters()))
    assert_same(got[:count], plain[:count], 0)


@each_layer
@train_and_eval
def test_symbolic_tracing(name, training):
    """A layer is a leaf of the graph, as those of torch.nn are."""
    results = []
    for layer in pair(name, training):
        traced = torch.fx.symbolic_trace(nn.Sequential(nn.ReLU(), layer))
        assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["0", "1"]
        assert type(traced.get_submodule("1")) is type(layer)
        results.append(step(traced, batch(name)))
    assert_same(*results)


def test_symbolic_tracing_with_a_mask():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nk.torch.BatchNorm1d(5)

        def forward(self, x, mask):
            return self.norm(x, mask=mask)

    model, x = Model(), batch("BatchNorm1d")
    mask = x[:, 0] > 0
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    assert_same([traced(x, mask).detach()], [model(x, mask).detach()], 0)


@each_layer
@train_and_eval
def test_tracing_of_operations(name, training):
    """A graph of plain operations, with and without the gradients."""
    layer = build(nk.torch, name).train(training)

    def call(x):
        state = {key: b.clone() for key, b in layer.named_buffers()}
        return functional_call(layer, state, (x,))

    def gradient(x):
        return torch.autograd.grad(call(x).pow(3).sum(), x)[0]

    for function in (call, gradient):
        x, z = (batch(name, seed).requires_grad_() for seed in range(2))
        graph = torch.fx.experimental.proxy_tensor.make_fx(function)(x)
        assert_same([graph(z).detach()], [function(z).detach()], 1e-6)


@each_layer
@pytest.mark.filterwarnings("ignore")  # of every shape that is looked at
def test_tracing_to_torchscript(name):
    layer = build(nk.torch, name).eval()
    traced = torch.jit.trace(layer, batch(name), check_trace=False)
    for x in (batch(name, 1), batch(name, 1)[:3], batch(name, 1) * 1e30):
        assert_same([traced(x).detach()], [layer(x).detach()], 1e-6)


@each_layer
def test_under_inference_mode_and_no_grad(name):
    ours = build(nk.torch, name)
    want = copy.deepcopy(ours)(batch(name)).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        layer = copy.deepcopy(ours)
        with mode():
            assert_same([layer(batch(name))], [want], 0)
        layer(batch(name).requires_grad_()).sum().backward()


@each_layer
def test_gradients_flow_through_evaluation_while_statistics_change(name):
    """A backward pass after the next training step: what was saved is not the buffer itself."""
    layer = build(nk.torch, name).eval()
    x = batch(name).requires_grad_()
    y = layer(x)
    layer.train()(batch(name, 1))
    y.sum().backward()
    assert x.grad.isfinite().all()
