"""Frozen statistics and parameters: what stays as it is, and for how long."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import normkit as nk
import normkit.torch

freeze, unfreeze = nk.torch.freeze, nk.torch.unfreeze


def network(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 3), norm(2)
    )
    model(data(1))
    return model


def data(seed=0):
    return torch.randn(5, 3, 7, 7, generator=torch.Generator().manual_seed(seed))


def step(model):
    """One of training; which parameters and buffers it moved."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.train()
    (model(data()) * data(2)[:, :2, :3, :3]).sum().backward()
    optimizer.step()
    return {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}


NORMS = ("1", "3", "5")
PARAMETERS = {f"{n}.{name}" for n in NORMS for name in ("weight", "bias")}
STATISTICS = {
    f"{n}.{name}"
    for n in ("1", "5")
    for name in ("running_mean", "running_var", "num_batches_tracked")
}
REST = {f"{n}.{name}" for n in ("0", "4") for name in ("weight", "bias")}
LAYERS = {
    "native": nn.BatchNorm2d,
    "normkit": nk.torch.BatchNorm2d,
    "instance": lambda c: nk.torch.InstanceNorm2d(c, affine=True, track_running_stats=True),
}


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("norm", LAYERS)
@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("parameters", [True, False])
@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, pickled, saved])
def test_what_a_step_of_training_moves(norm, statistics, parameters, copied):
    model = network(LAYERS[norm])
    if statistics or parameters:
        assert freeze(model, statistics=statistics, parameters=parameters) is model
    model = copied(model)
    moved = set() if statistics else STATISTICS
    assert step(model) == REST | moved | (set() if parameters else PARAMETERS)
    for n in ("1", "5"):
        assert model.get_submodule(n).training is not statistics
        assert type(model.get_submodule(n)) is type(LAYERS[norm](2))
    if statistics:
        x = data(3)
        assert torch.equal(model.train()(x), model.eval()(x))


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, pickled])
def test_thawed_it_is_as_it_was(copied):
    model, twin = network(), network()
    attributes = [set(vars(m)) for m in model.modules()]
    thawed = copied(freeze(model.train()))
    assert unfreeze(thawed) is thawed
    assert [set(vars(m)) for m in thawed.modules()] == attributes
    assert all(m.training for m in thawed.modules())
    assert step(thawed) == step(twin) == REST | PARAMETERS | STATISTICS
    for a, b in zip(thawed.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_it_is_frozen_at_once():
    model = network().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    freeze(model)(data())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_one_after_the_other():
    model = freeze(network())
    unfreeze(model, parameters=False)
    assert step(model) == REST | STATISTICS
    freeze(model)
    unfreeze(freeze(model), statistics=False)
    assert step(model) == REST | PARAMETERS
    unfreeze(model.eval())
    assert not any(m.training for m in model.modules())


def test_a_copy_is_of_its_own():
    model = freeze(network())
    twin = copy.deepcopy(model)
    unfreeze(model.train())
    assert model[1].training
    assert not twin.train()[1].training
    assert twin[1].train().training is False
    assert twin[1].train() is twin[1]


def test_state_dicts_go_in_and_out():
    model, other = freeze(network()), network()
    step(other)
    assert list(model.state_dict()) == list(other.state_dict())
    model.load_state_dict(other.state_dict())
    assert torch.equal(model[1].running_mean, other[1].running_mean)
    assert step(model) == REST


def test_convert_and_recalibrate_and_an_averaged_model():
    model = freeze(network())
    nk.torch.convert(model)
    assert type(model[1]) is nk.torch.BatchNorm2d
    assert step(model) == REST
    averaged = torch.optim.swa_utils.AveragedModel(model).train()
    assert not averaged.module[1].training
    nk.torch.recalibrate(model, [data(5)], progress=False)
    assert not model.train()[1].training
    assert model[1].num_batches_tracked == 1


def test_a_layer_by_itself_and_in_compiled_code():
    norm = freeze(nk.torch.BatchNorm1d(3))
    x = torch.randn(5, 3)
    assert torch.equal(torch.compile(norm.train(), backend="eager")(x), norm(x))
    assert norm.num_batches_tracked == 0


def test_nothing_to_freeze():
    for model, options, said in [
        (nn.Sequential(nn.Linear(3, 3)), {}, "parameters or running statistics"),
        (nn.LayerNorm(3), {"parameters": False}, "with running statistics"),
        (nn.BatchNorm1d(3, affine=False), {"statistics": False}, "with parameters"),
    ]:
        for change in (freeze, unfreeze):
            with pytest.warns(UserWarning, match=f"no normalization layer .*{said} was found in"):
                assert change(model, **options) is model


def test_gradients_of_before_move_nothing():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(4, 3)).square().sum().backward()
    before = model[1].weight.clone()
    normkit.torch.freeze(model)
    optimizer.step()
    assert torch.equal(model[1].weight, before)
