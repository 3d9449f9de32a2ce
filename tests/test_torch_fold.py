"""normkit.torch.fold: models without their BatchNorms that predict the same."""

from __future__ import annotations

import copy
import operator
from itertools import pairwise

import pytest
import torch
from test_torch_convert import resnet
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations, prune

import normkit as nk
import normkit.torch
from normkit import _unfolded
from normkit.torch._calls import Calls

fold = nk.torch.fold


def trained(model, seed=0):
    """As if it had seen data of large means; in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            with torch.no_grad():
                shape = (norm.num_features,)
                mean = 1 + 9 * torch.rand(shape, generator=generator)
                norm.running_mean.copy_(mean * (-1) ** torch.arange(len(mean)))
                norm.running_var.copy_(10 ** (3 * torch.rand(shape, generator=generator) - 2))
                if norm.weight is not None:
                    norm.weight.copy_(0.5 + torch.rand(shape, generator=generator))
                    norm.weight[0] *= -1
                if norm.bias is not None:
                    norm.bias.copy_(torch.randn(shape, generator=generator))
    return model.eval()


def error(model, folded, x):
    """The largest difference of their predictions, relative to their scale."""
    with torch.no_grad():
        expected, found = model(x), folded(x)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def data(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


ours = nk.torch
PAIRS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), lambda: nn.BatchNorm1d(6), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, bias=False), lambda: nn.BatchNorm2d(6), (2, 4, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), lambda: nn.BatchNorm3d(6), (2, 4, 5, 4, 3)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: nn.BatchNorm2d(6), (2, 4, 9, 8)),
    "depthwise": (
        lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1, padding_mode="reflect"),
        lambda: ours.BatchNorm2d(8),
        (2, 4, 9, 8),
    ),
    "transposed": (
        lambda: nn.ConvTranspose1d(4, 6, 3, 2),
        lambda: ours.BatchNorm1d(6, scale=False),
        (2, 4, 9),
    ),
    "transposed, grouped": (
        lambda: nn.ConvTranspose2d(4, 6, 3, 2, groups=2, bias=False),
        lambda: nn.BatchNorm2d(6),
        (2, 4, 9, 8),
    ),
    "transposed, 3d, grouped": (
        lambda: nn.ConvTranspose3d(6, 3, 2, groups=3),
        lambda: nn.BatchNorm3d(3, affine=False),
        (2, 6, 5, 4, 3),
    ),
    "linear": (lambda: nn.Linear(4, 6, bias=False), lambda: nn.BatchNorm1d(6), (9, 4)),
    "linear, last axis": (
        lambda: nn.Linear(4, 6),
        lambda: ours.BatchNorm(6, axis=-1, correction=0),
        (9, 6, 4),
    ),
    "any rank": (
        lambda: nn.Conv2d(4, 6, 3),
        lambda: ours.BatchNorm(6, bias=False, momentum=None),
        (2, 4, 9, 8),
    ),
    "from Keras": (
        lambda: nn.Conv2d(4, 6, 3),
        lambda: ours.layer(nk.BatchNorm.keras(6, axis=-3)),
        (4, 9, 8),
    ),
    "synchronized": (lambda: nn.Conv2d(4, 6, 1), lambda: nn.SyncBatchNorm(6), (2, 4, 3, 3)),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_layer(name, dtype):
    layer, norm, shape = PAIRS[name]
    torch.manual_seed(0)
    model = trained(nn.Sequential(layer(), norm(), nn.Identity())).to(dtype)
    before = copy.deepcopy(model.state_dict())
    x = data(*shape, dtype=dtype)
    folded, report = fold(model, x)
    assert report.rows == (("1", "0", ""),)
    assert type(folded[1]) is nn.Identity
    assert vars(folded[1]).keys() == vars(nn.Identity()).keys()
    assert set(folded.state_dict()) == {"0.weight", "0.bias"}
    assert not any(m.training for m in folded.modules())
    assert error(model, folded, x) < (1e-6 if dtype == torch.float32 else 1e-14)
    # The model that was given is as it was, and stands alone.
    with torch.no_grad():
        folded[0].weight.zero_()
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(p, before[k]) for k, p in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype):
    model = trained(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))).to(dtype)
    x = data(2, 4, 9, 8, dtype=dtype)
    folded, report = fold(model)
    assert report.rows == (("1", "0", ""),)
    assert folded[0].weight.dtype == dtype
    exact = copy.deepcopy(model).double()(x.double())
    worst = [(m(x).double() - exact).abs().max() for m in (folded, model)]
    # The model itself rounds to this dtype twice, the copy once, but its bias too.
    assert worst[0] < 3 * worst[1]


def test_what_a_half_type_cannot_hold():
    model = trained(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))).half()
    with torch.no_grad():
        model[0].weight.fill_(6e4)
    folded, report = fold(model)
    why = "the folded weight is too large for torch.float16; convert the weight first, for example "
    assert report.rows == (("1", "", why + "to float32."),)
    assert type(folded[1]) is nn.BatchNorm2d


def test_a_residual_network():
    model = trained(resnet(nn.BatchNorm2d))
    x = data(2, 1, 8, 8)
    folded, report = fold(model)
    assert report.rows == (
        ("0.1", "0.0", ""),
        ("1.bn1", "1.conv1", ""),
        ("1.bn2", "1.conv2", ""),
        ("2.bn1", "2.conv1", ""),
        ("2.bn2", "2.conv2", ""),
        ("2.downsample.1", "2.downsample.0", ""),
    )
    assert error(model, folded, x) < 5e-6
    assert not any(isinstance(m, _BatchNorm) for m in folded.modules())
    # Frozen stays frozen, and what was free is.
    assert folded[1].conv1.bias.requires_grad
    assert fold(nn.Sequential(nn.Linear(2, 3).requires_grad_(False)))[1].rows == ()


class Twice(nn.Module):
    """The output of a convolution that two read, one that is called twice, and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn1 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.second, self.bn2, self.bn3 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.third, self.bn4 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.fourth, self.bn5 = nn.Conv2d(4, 4, 1), ours.BatchNorm2d(4)
        self.fifth, self.bn6 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.unused = nn.BatchNorm2d(4)

    def forward(self, x, scale=None):
        if scale is not None:
            x = x * scale
        y = self.first(x)
        x = self.bn1(y) + y
        x = self.bn3(self.second(self.bn2(self.second(x))))
        x = self.bn4(self.third(self.bn4(F.relu(x))))
        x = self.bn5(self.fourth(x), mask=x > 0)
        return self.bn6(self.fifth(x)) + self.fifth.weight.mean()


def test_what_is_not_certain_stays():
    model, x = trained(Twice()), data(2, 4, 3, 3)
    folded, report = fold(model)
    assert report.rows == (
        ("bn1", "", _unfolded.output_elsewhere("first")),
        ("bn2", "", _unfolded.layer_called_often("second")),
        ("bn3", "", _unfolded.layer_called_often("second")),
        ("bn4", "", _unfolded.OFTEN),
        ("bn5", "", _unfolded.MASKED),
        ("bn6", "", _unfolded.layer_shared("fifth")),
        ("unused", "", _unfolded.NOT_FOUND),
    )
    assert torch.equal(folded(x), model(x))
    assert "the output of 'first' is used elsewhere too" in str(report)


class MyNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


def conv_and(norm, *more):
    return trained(nn.Sequential(nn.Conv2d(4, 4, 1), norm, *more))


def tied():
    model = trained(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)))
    model[2].weight = model[0].weight
    return model


def hooked(place, **options):
    model = conv_and(nn.BatchNorm2d(4))
    if options:
        model[place].register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    else:
        model[place].register_forward_hook(lambda m, args, y: y + 1)
    return model


def wrapped():
    """What comes out of a module with a hook is not what came out of the layer in it."""
    model = trained(nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4)))
    model[0].register_forward_hook(lambda m, args, y: None)
    return model


def with_forward():
    model = conv_and(nn.BatchNorm2d(4))
    model[0].forward = lambda x: x * 2
    return model


def negative():
    model = conv_and(nn.BatchNorm2d(4))
    model[1].running_var[0] = -1e-7
    return model


def no_buffers():
    return nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).eval()


STAYS = {
    "training": (lambda: conv_and(nn.BatchNorm2d(4)).train(), _unfolded.TRAINING),
    "no statistics": (no_buffers, _unfolded.NO_STATISTICS),
    "derived": (lambda: conv_and(MyNorm(4)), _unfolded.own_class(MyNorm(4))),
    "first": (
        lambda: trained(nn.Sequential(nn.BatchNorm2d(4))),
        _unfolded.no_layer("an input of the model"),
    ),
    "relu": (
        lambda: trained(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4))),
        _unfolded.no_layer("a ReLU"),
    ),
    "tied": (tied, _unfolded.layer_shared("0")),
    "hook": (lambda: hooked(0), _unfolded.layer_hooked("0")),
    "pre-hook": (lambda: hooked(1, pre=True), _unfolded.HOOKED),
    "hook around": (wrapped, _unfolded.layer_hooked("0")),
    "forward": (with_forward, _unfolded.layer_hooked("0")),
    "axis": (
        lambda: conv_and(ours.BatchNorm(3, axis=2)),
        _unfolded.other_axis(2, "0", -3),
    ),
    "last axis": (lambda: conv_and(ours.BatchNorm(3, axis=-1)), _unfolded.other_axis(-1, "0", -3)),
    "batch axis": (
        lambda: conv_and(ours.BatchNorm2d(2, axis=0)),
        _unfolded.other_axis(0, "0", 1),
    ),
    "variance": (
        negative,
        "state['var'] must hold variances, but some are negative or NaN; take the running "
        "statistics again.",
    ),
}


@pytest.mark.parametrize("name", STAYS)
def test_why_not(name):
    make, why = STAYS[name]
    torch.manual_seed(0)
    model, x = make(), data(2, 4, 3, 3)
    folded, report = fold(model)
    assert [row[1:] for row in report.rows] == [("", why)]
    if name != "training":  # which is another call each time
        assert torch.equal(folded(x), model(x))
    assert [m.training for m in folded.modules()] == [m.training for m in model.modules()]


def test_weights_that_are_computed_stay():
    for change in (parametrizations.weight_norm, lambda m: prune.l1_unstructured(m, "weight", 2)):
        model = conv_and(nn.BatchNorm2d(4))
        with torch.no_grad():
            change(model[0])
        folded, report = fold(model)
        assert report.rows[0][1] == ""
        x = data(2, 4, 3, 3)
        assert torch.equal(folded(x), model(x))


def mlp(*widths, start=()):
    layers = list(start)
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU()]
    return trained(nn.Sequential(*layers))


class Views(nn.Module):
    def __init__(self, how) -> None:
        super().__init__()
        self.how, self.fc, self.bn = how, nn.Linear(12, 6), nn.BatchNorm1d(6)

    def forward(self, x):
        return self.bn(F.relu(self.fc(self.how(x))) if self.how is F.relu else self.fc(self.how(x)))


def test_the_rank_decides_after_a_linear():
    """Of (N, L, C) a BatchNorm1d normalizes L, even where L and C are the same length."""
    model, x = mlp(4, 6), data(9, 6, 4)
    for inputs, why in [((), _unfolded.unknown_rank("0")), ((x,), _unfolded.other_axis(1, "0", 2))]:
        folded, report = fold(model, *inputs)
        assert report.rows == (("1", "", why),)
        assert torch.equal(folded(x), model(x))
    x = data(9, 4)
    folded, report = fold(model, x)
    assert report.rows == (("1", "0", ""),)
    assert error(model, folded, x) < 1e-6


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: mlp(12, 6, start=[nn.Flatten()]), (9, 3, 4)),
        (lambda: mlp(12, 6, 6, 6, start=[nn.Flatten(), nn.Dropout()]), (9, 3, 4)),
        # Were there an axis between, it would have two lengths.
        (lambda: mlp(12, 8, 6), (9, 12)),
        (lambda: trained(Views(lambda x: x.flatten(1))), (9, 3, 4)),
        (lambda: trained(Views(lambda x: torch.flatten(x, start_dim=1))), (9, 3, 4)),
        (lambda: trained(Views(lambda x: x.view(x.size(0), -1))), (9, 3, 4)),
        (lambda: trained(Views(lambda x: x.reshape((-1, 12)))), (9, 3, 4)),
    ],
)
def test_models_that_decide_the_rank_themselves(make, shape):
    model, x = make(), data(*shape)
    folded, report = fold(model)
    assert all(why == "" for _, _, why in report.rows)
    assert error(model, folded, x) < 2e-6


@pytest.mark.parametrize(
    "how", [lambda x: x.flatten(0, 1), lambda x: x.flatten(end_dim=1), lambda x: x * 2]
)
def test_models_that_leave_the_rank_open(how):
    assert fold(trained(Views(how)))[1].rows == (("bn", "", _unfolded.unknown_rank("fc")),)


def test_the_rank_decides_after_a_convolution_without_a_batch():
    """Conv1d takes (C, L) as well, and then BatchNorm1d takes L for the channels."""
    model, alone = trained(nn.Sequential(nn.Conv1d(4, 6, 1), nn.BatchNorm1d(6))), data(4, 6)
    for inputs, why in [
        ((), _unfolded.unknown_rank("0")),
        ((alone,), _unfolded.other_axis(1, "0", 0)),
    ]:
        folded, report = fold(model, *inputs)
        assert report.rows == (("1", "", why),)
        assert torch.equal(folded(alone), model(alone))
    shorter = [nn.ReLU(), nn.Conv1d(6, 8, 3, 2, 1), nn.BatchNorm1d(8)]
    rows = fold(trained(nn.Sequential(*model, *shorter)))[1].rows
    assert [row[2] for row in rows] == [_unfolded.unknown_rank(name) for name in ("0", "3")]
    wider = [nn.ReLU(), nn.Conv1d(6, 8, 3, padding=1), nn.BatchNorm1d(8)]
    model = trained(nn.Sequential(*model, *wider))
    folded, report = fold(model)
    assert [row[1] for row in report.rows] == ["0", "3"]
    assert error(model, folded, data(2, 4, 9)) < 2e-6


def test_an_option_is_taken_as_it_is_given():
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x, features=False):
            y = self.conv(x)
            return (self.bn(y), y) if features else self.bn(y)

    model, x = trained(Optional()), data(2, 4, 3, 3)
    assert fold(model)[1].rows == (("bn", "conv", ""),)
    why = (("bn", "", _unfolded.output_elsewhere("conv")),)
    assert fold(model, x, True)[1].rows == fold(model, x=x, features=True)[1].rows == why


class Auxiliary(nn.Module):
    """In training it puts out more."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return (self.bn(y), y) if self.training else self.bn(y)


def test_it_is_for_eval_mode():
    model, x = trained(Auxiliary()), data(2, 4, 3, 3)
    model.training = True  # and its BatchNorm is not
    folded, report = fold(model)
    assert report.rows == (("bn", "conv", ""),)
    assert (folded.training, folded.conv.training) == (True, False)
    assert error(model.eval(), folded.eval(), x) < 1e-6


def test_layers_that_go_by_several_names():
    """A model may keep its layers in a list beside: that list has the folded ones, too."""

    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            self.pairs = [(self.conv, self.bn)]

        def forward(self, x):
            for conv, bn in self.pairs:
                x = bn(conv(x))
            return x

    model, x = trained(Listed()), data(2, 4, 3, 3)
    folded, report = fold(model)
    assert report.rows == (("bn", "conv", ""),)
    assert error(model, folded, x) < 1e-6


def test_a_model_that_cannot_be_traced():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    sentence = r"^torch.fx cannot trace this Branching \(TraceError.*fold the parts of it that can"
    with pytest.raises(ValueError, match=sentence):
        fold(Branching())
    assert fold(trained(nn.BatchNorm2d(4)))[1].rows == (("", "", _unfolded.NOT_FOUND),)


class Written(nn.Module):
    """A convolution, a BatchNorm, and a function of the two and x."""

    def __init__(self, function, bias=True) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1, bias=bias), nn.BatchNorm2d(4)
        self.function, self.kept, self.n = function, None, 0

    def forward(self, x):
        return self.function(self, x)


def plain(m, x):
    return m.bn(m.conv(x))


def asks_for_a_tensor(m, x):
    y = m.conv(x)
    return m.bn(F.relu(y) if isinstance(y, torch.Tensor) else y)


def asks_for_a_list(m, x):
    if isinstance(x, list):
        return m.bn(F.relu(m.conv(torch.cat(x))))
    return m.bn(m.conv(x["x"])) if isinstance(x, dict) else x


def asks_again(m, x):
    return plain(m, x) + 1 if torch.is_tensor(x.shape[-1] // 2) else plain(m, x)


def test_what_is_traced_is_a_tensor():
    model, x = trained(Written(asks_for_a_tensor)), data(2, 4, 3, 3)
    folded, report = fold(model)
    assert report.rows == (("bn", "", _unfolded.no_layer("relu")),)
    assert torch.equal(folded(x), model(x))
    # An input is what the example is.
    model = trained(Written(asks_for_a_list))
    assert fold(model, [x, x])[1].rows == (("bn", "", _unfolded.no_layer("relu")),)
    folded, report = fold(model, {"x": x})
    assert report.rows == (("bn", "conv", ""),)
    assert error(model, folded, {"x": x}) < 1e-6
    # The sizes of one are none.
    model = trained(Written(asks_again))
    folded, report = fold(model)
    assert report.rows == (("bn", "conv", ""),)
    assert error(model, folded, x) < 1e-6
    assert not any(node.target is operator.add for node in Calls(model, (), {}).graph.nodes)


def test_what_a_call_keeps_is_not_in_the_copy():
    def once(m, x):
        m.n += 1
        m.kept = torch.ones_like(x) if m.kept is None else m.kept
        m.features = [x]
        return m.bn(m.conv(x * m.kept))

    model, x = trained(Written(once)), data(2, 4, 3, 3)
    folded, report = fold(model, x)
    assert report.rows == (("bn", "conv", ""),)
    assert vars(folded).keys() == vars(model).keys()
    assert (folded.n, folded.kept) == (model.n, model.kept) == (0, None)
    assert error(model, folded, x) < 1e-6
    assert torch.equal(folded.features[0], x)


LOOKS = {
    "class": lambda m, x: plain(m, x) if isinstance(m.bn, nn.BatchNorm2d) else x,
    "bias": lambda m, x: plain(m, x) * (2 if m.conv.bias is None else 3),
    "statistics": lambda m, x: plain(m, x) * m.bn.num_features,
    "parameters": lambda m, x: plain(m, x) + sum(p.pow(2).sum() for p in m.conv.parameters()),
    "number": lambda m, x: plain(m, x) + next(m.conv.parameters()).sum().item(),
}


@pytest.mark.parametrize("name", LOOKS)
def test_a_model_that_looks_at_its_layers_stays(name):
    model, x = trained(Written(LOOKS[name], bias=False)), data(2, 4, 3, 3)
    folded, report = fold(model)
    assert report.rows == (("bn", "", _unfolded.LOOKED_AT),)
    assert torch.equal(folded(x), model(x))


def test_constants_are_no_reason_to_stay():
    def constants(m, x):
        return plain(m, x) + torch.randn(4, 1, 1) + torch.tensor(-torch.inf).exp()

    model, seed = trained(Written(constants)), torch.random.get_rng_state()
    assert fold(model)[1].rows == (("bn", "conv", ""),)
    assert torch.equal(seed, torch.random.get_rng_state())


def test_layers_that_are_made_in_a_call():
    def makes(m, x):
        m.more = nn.ReLU()
        return m.more(plain(m, x))

    with pytest.raises(ValueError, match="module is not installed as a submodule"):
        fold(trained(Written(makes)))
