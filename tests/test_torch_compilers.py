"""torch.compile, torch.export and ONNX, for every drop-in."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap

import numpy as np
import onnxruntime
import pytest
import torch
from test_torch import assert_same, data
from test_torch_ecosystem import LAYERS, build, each_layer, step, train_and_eval
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import normkit as nk
import normkit.torch


class Family(nn.Module):
    """Every layer there is, one after the other, for inputs (N, 4, 5, 6)."""

    def __init__(self) -> None:
        super().__init__()
        t = nk.torch
        self.images = images()
        self.rows = nn.Sequential(t.RMSNorm(30), t.BatchNorm1d(4), t.InstanceNorm1d(4))
        self.volumes = nn.Sequential(t.BatchNorm3d(2), t.InstanceNorm3d(2))

    def forward(self, x, mask=None):
        for norm in self.images:
            x = torch.tanh(norm(x, mask=mask))
        x = self.rows(x.flatten(2))
        return self.volumes(x.reshape(x.shape[0], 2, 2, 5, 6))


def images():
    return nn.ModuleList([
        nk.torch.BatchNorm2d(4, momentum=None),
        nk.torch.GroupNorm(2, 4),
        nk.torch.InstanceNorm2d(4, affine=True, track_running_stats=True),
        nk.torch.LayerNorm((5, 6)),
    ])  # fmt: skip


class Abreast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = images().append(nk.torch.RMSNorm((5, 6)))

    def forward(self, x, mask=None):
        return torch.stack([norm(x) for norm in self.norms])


def compare(eager, compiled, x, mask=None, atol=2e-6):
    got, want = (
        step(model, x, lambda x, model=model: model(x, mask)) for model in (compiled, eager)
    )
    assert_same(got, want, atol)


@pytest.mark.parametrize(("training", "masked"), [(True, True), (False, False)])
def test_the_family_in_one_graph_for_every_batch_size(training, masked):
    torch._dynamo.reset()
    eager = Family().train(training)
    model = copy.deepcopy(eager)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    graphs = set()
    for n in (3, 7, 9):
        x, mask = data((n, 4, 5, 6)), None
        if masked:
            mask = data((n, 1, 5, 6), 1) > -0.5
            x = torch.where(mask, x, torch.nan)
        compare(eager, compiled, x, mask, atol=5e-5)  # sums that are zero
        graphs.add(counter.frame_count)
    assert len(graphs) == 1  # the first one serves


@train_and_eval
def test_the_family_through_inductor(training):
    """Where fused kernels compute, at a mean beside which native layers lose digits."""
    torch._dynamo.reset()
    eager = Abreast()
    eager(data((3, 4, 5, 6)) + 1e4)
    eager.train(training)
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True)
    compare(eager, compiled, data((3, 4, 5, 6)) + 1e4, atol=5e-6)


def test_compiled_before_anything_else():
    """A layer whose first call ever is a compiled one."""
    code = """
        import torch, normkit.torch as t
        model = torch.nn.Sequential(t.BatchNorm1d(4), t.LayerNorm(4), t.RMSNorm(4))
        y = torch.compile(model, fullgraph=True, backend="eager")(torch.randn(3, 4))
        print(tuple(y.shape), int(model[0].num_batches_tracked))
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.stdout.strip(), done.returncode) == ("(3, 4) 1", 0), done.stderr


def exported(name, training, x):
    layer = build(nk.torch, name)
    if training:
        layer(x)
    layer.train(training)
    shapes = ({0: torch.export.Dim("batch", min=2)},)
    return layer, torch.export.export(copy.deepcopy(layer), (x,), dynamic_shapes=shapes)


@each_layer
@train_and_eval
def test_export(name, training):
    layer, program = exported(name, training, data((4, *LAYERS[name][2][1:])))
    names = [n for n, _ in layer.named_buffers()]
    module = program.module()
    for n in (3, 8):
        x = data((n, *LAYERS[name][2][1:]), n)
        assert_same([module(x).detach()], [layer(x).detach()], 1e-6)
        state = module.state_dict()
        assert_same([state[b] for b in names], layer.buffers(), 1e-6)


@each_layer
def test_onnx(name, tmp_path):
    layer = build(nk.torch, name).eval()
    x = data(LAYERS[name][2])
    file = tmp_path / "layer.onnx"
    program = torch.onnx.export(
        layer, (x,), dynamo=True, verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch", min=2)},),
    )  # fmt: skip
    program.save(file)
    session = onnxruntime.InferenceSession(file)
    (given,) = session.get_inputs()
    for n in (4, 7):
        x = data((n, *x.shape[1:]), n)
        (y,) = session.run(None, {given.name: x.numpy()})
        want = layer(x).detach().numpy()
        np.testing.assert_allclose(y, want, rtol=0, atol=2e-6 * np.abs(want).max())
