"""Normalization layers out of a model and into another: names, order, definitions, and nothing
changed where anything fails."""

from __future__ import annotations

import numpy as np
import pytest

import normkit as nk
import normkit.numpy
from normkit._bundle import Bundle, Entry

torch = pytest.importorskip("torch")
nt = pytest.importorskip("normkit.torch")
nn = torch.nn
prune = pytest.importorskip("torch.nn.utils.prune")


def model(eps=1e-5, norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), norm(8, eps=eps), nn.Sequential(nn.GroupNorm(2, 8)))
    return net


def trained(net):
    for _ in range(3):
        net.train()(torch.randn(4, 3, 9, 9) * 3 + 1)
    with torch.no_grad():
        for p in net.parameters():
            p += torch.randn_like(p)
    return net


def bits(net):
    return {name: t.numpy().tobytes() for name, t in net.state_dict().items()}


def test_names_and_what_they_hold():
    net = trained(model())
    bundle = nk.extract(net.eval())
    assert list(bundle) == ["1", "2.0"]
    entry = bundle["1"]
    assert entry.definition == nk.BatchNorm(8)
    assert entry.training is False
    np.testing.assert_array_equal(entry.arrays["var"], net[1].running_var.numpy())
    assert entry.arrays["count"] == 3
    entry.arrays["var"][:] = 0  # a copy
    assert net[1].running_var.min() > 0
    assert str(bundle).count("\n") == 3
    assert repr(bundle) == "<Bundle of 2 normalization layers>"
    assert str(nk.extract(nn.Linear(2, 2))) == "no normalization layers"


def test_shared_layers_come_once():
    shared = nn.LayerNorm(4)
    with torch.no_grad():
        shared.weight.fill_(3)
    net = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared, nn.LayerNorm(4)])})
    bundle = nk.extract(net)
    assert {name: entry.aliases for name, entry in bundle.items()} == {"a": ("b.0",), "b.1": ()}
    fresh = nn.ModuleDict({"b": nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)])})
    nk.restore(fresh, bundle)  # by an alias
    assert fresh["b"][0].weight.tolist() == [3.0] * 4


def test_by_name_by_mapping_by_function_and_in_order():
    net = trained(model())
    bundle, want = nk.extract(net), bits(net)
    renamed = Bundle({"first": bundle["1"], "second": bundle["2.0"]})
    table = {"1": "first", "2.0": "second"}
    for given, names in (
        (bundle, None),
        (renamed, table),
        (renamed, table.get),
        (renamed, "order"),
    ):
        other = model()
        report = nk.restore(other, given, names)
        assert len(report.rows) == 2
        assert {n: b for n, b in bits(other).items() if n[0] != "0"} == {
            n: b for n, b in want.items() if n[0] != "0"
        }


def test_a_function_leaves_layers_out():
    other, bundle = model(), nk.extract(trained(model()))
    part = Bundle({"2.0": bundle["2.0"]})
    nk.restore(other, part, lambda name: name if name == "2.0" else None)
    assert other[1].running_mean.abs().max() == 0
    assert other[2][0].weight.tolist() == bundle["2.0"].arrays["scale"].tolist()


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (None, r"1 of the model: the bundle has no '1';\n2\.0 .*first of the bundle: no layer of"),
        ({"1": "first"}, r"2\.0 of the model: .* no '2\.0';\nsecond of the bundle: no layer of"),
        (None, r"model: 1, 2\.0\nbundle: first, second$"),
        (["first"], r"names is None, .* but got \['first'\]"),
        ({"1": "first", "2.0": "second", "7": "x"}, r"7: the model has no such layer"),
        ("ordre", r"names is None, \"order\", a mapping or a function, but got 'ordre'"),
    ],
)
def test_names_that_do_not_fit(names, says):
    bundle = nk.extract(trained(model()))
    renamed = Bundle({"first": bundle["1"], "second": bundle["2.0"]})
    other = model()
    before = bits(other)
    with pytest.raises(ValueError, match=f"(?s){says}"):
        nk.restore(other, renamed, names)
    assert bits(other) == before


def test_an_order_of_other_length():
    bundle = nk.extract(model())
    with pytest.raises(ValueError, match="2 normalization layers, but the bundle has 1"):
        nk.restore(model(), Bundle({"1": bundle["1"]}), "order")


def test_definitions_that_differ():
    bundle = nk.extract(trained(model(eps=1e-3)))
    other = model()
    before = bits(other)
    with pytest.raises(ValueError, match=r"1: eps is 1e-05 in the model, but 0\.001 in the bundle"):
        nk.restore(other, bundle)
    with pytest.raises(ValueError, match="eps is 1e-05 in the model"):
        nk.restore(other, bundle, adopt=["decay"])
    assert bits(other) == before
    kept = model()
    nk.restore(kept, bundle, keep=["eps"])
    assert kept[1].eps == 1e-5
    for adopt in (True, ["eps"]):
        other = model()
        report = nk.restore(other, bundle, adopt=adopt)
        assert other[1].eps == 1e-3
        assert report.rows[0] == ("1", "1", "eps: 1e-05 to 0.001")


def test_momentum_is_taken_over_as_it_was_written():
    source = nn.Sequential(nn.BatchNorm2d(8, momentum=0.03))
    other = nn.Sequential(nn.BatchNorm2d(8))
    nk.restore(other, nk.extract(source), adopt=True)
    assert other[0].momentum == 0.03


def test_what_a_native_layer_cannot_take_over():
    bundle = nk.extract(nk.numpy.layer(nk.BatchNorm.keras(8, axis=1)))
    other = nn.BatchNorm2d(8)
    before = bits(other)
    with pytest.raises(ValueError, match="a torch BatchNorm2d cannot take over correction=0"):
        nk.restore(other, bundle, adopt=True)
    assert bits(other) == before
    assert (other.eps, other.momentum) == (1e-5, 0.1)  # as it was
    ours = nt.BatchNorm2d(8)
    nk.restore(ours, bundle, adopt=True)
    assert nt.definition(ours) == nk.BatchNorm.keras(8, axis=1)


@pytest.mark.parametrize(
    ("definition", "says"),
    [
        (nk.BatchNorm(7), "num_features is 8 in the model, but 7 in the bundle"),
        (nk.BatchNorm(8, bias=False), "bias is True in the model, but False in the bundle"),
        (nk.LayerNorm(8), "it is a BatchNorm, but the bundle has a LayerNorm"),
    ],
)
def test_what_nobody_can_take_over(definition, says):
    bundle = nk.extract(nk.numpy.layer(definition))
    with pytest.raises(ValueError, match=f"{says};\nnothing was changed"):
        nk.restore(nn.BatchNorm2d(8), bundle, adopt=True)


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_broken_statistics(value):
    net, other = model(), model()
    net[1].running_var[3] = value
    with pytest.raises(
        ValueError, match="1: the running variance of 1 channels is negative or NaN"
    ):
        nk.restore(other, nk.extract(net))


def test_nothing_is_changed_if_writing_fails(monkeypatch):
    from normkit.torch import _slots

    bundle, other = nk.extract(trained(model(eps=1e-3))), model()
    before, write = bits(other), _slots._Slot.write

    def fail(slot, arrays):
        if slot.name == "2.0" and arrays is bundle["2.0"].arrays:
            raise KeyboardInterrupt
        write(slot, arrays)

    monkeypatch.setattr(_slots._Slot, "write", fail)
    with pytest.raises(KeyboardInterrupt):
        nk.restore(other, bundle, adopt=True)
    assert bits(other) == before
    assert other[1].eps == 1e-5


def test_rounding_is_in_the_report():
    wide, half = nn.LayerNorm(3).double(), nn.LayerNorm(3).bfloat16()
    with torch.no_grad():
        wide.weight += 1e-9
    report = nk.restore(half, nk.extract(wide))
    assert report.rows == (("(itself)", "(itself)", "scale rounded to bfloat16"),)


def test_parametrized_layers_are_refused():
    layer = nn.LayerNorm(3)
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())
    with pytest.raises(ValueError, match=r"\(a parametrization, pruning"):
        nk.restore(layer, nk.extract(nn.LayerNorm(3)))


def test_weights_that_a_hook_computes_are_refused():
    layer = nn.LayerNorm(3)
    prune.identity(layer, "weight")
    with pytest.raises(ValueError, match="computes its weight from other parameters"):
        nk.restore(layer, nk.extract(nn.LayerNorm(3)))


def test_subclasses_with_a_forward_of_their_own_are_refused():
    class LayerNorm2d(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.movedim(1, -1)).movedim(-1, 1)

    class Renamed(nn.LayerNorm):
        pass

    for act in (nk.extract, lambda layer: nk.port(layer, "numpy")):
        with pytest.raises(ValueError, match="LayerNorm2d has a forward of its own"):
            act(LayerNorm2d(3))
        act(Renamed(3))


def test_layers_whose_flag_was_changed_are_refused():
    for layer in (nn.BatchNorm1d(3), nn.InstanceNorm1d(3, track_running_stats=True)):
        layer.track_running_stats = False
        with pytest.raises(ValueError, match="has track_running_stats=False, but it was made"):
            nk.extract(layer)
    layer = nn.BatchNorm1d(3, momentum=None)
    layer.num_batches_tracked = None  # as natively, it then never learns
    assert nk.extract(layer)[""].definition.decay == 1.0


@pytest.mark.parametrize("field", ["shape", "scale", "track_running_stats", "epsilon"])
def test_only_what_may_differ_is_kept_or_adopted(field):
    bundle = nk.extract(nn.LayerNorm((2, 3)))
    for option in ({"keep": [field]}, {"adopt": [field]}, {"keep": field}):
        with pytest.raises(ValueError, match=f"names fields of definitions.* but got '{field}'"):
            nk.restore(nn.LayerNorm((3, 2)), bundle, **option)


def test_a_cumulative_average_needs_its_count():
    entry = nk.extract(nk.numpy.layer(nk.BatchNorm(3)))[""]
    arrays = {name: a for name, a in entry.arrays.items() if name != "count"}
    bundle = Bundle({"": Entry(entry.definition, arrays)})
    with pytest.raises(ValueError, match="needs a count of batches, and the bundle has none"):
        nk.restore(nn.BatchNorm1d(3, momentum=None), bundle, keep=["decay"])


def test_what_a_layer_cannot_hold_is_undone():
    twins = nn.ModuleList([nn.LayerNorm(3), nn.LayerNorm(3)])
    bundle = nk.extract(twins)
    bundle["1"].arrays["scale"][:] = 2
    twins[1].weight = twins[0].weight
    before = bits(twins)
    with pytest.raises(ValueError, match="0: scale does not hold what it was given: it shares"):
        nk.restore(twins, bundle)
    assert bits(twins) == before
    half = nn.BatchNorm1d(3).half()
    wide = nk.extract(nn.BatchNorm1d(3))
    wide[""].arrays["var"][:] = 1e6
    before = bits(half)
    with pytest.raises(ValueError, match="its dtype, float16, is too narrow; nothing was changed"):
        nk.restore(half, wide)
    assert bits(half) == before


def test_scripted_modules_are_refused():
    with pytest.raises(TypeError, match="a scripted module does not say what its layers are"):
        nk.extract(torch.jit.script(nn.Sequential(nn.LayerNorm(3))))


def test_aliases_name_layers_too():
    shared = nn.LayerNorm(4)
    net = nn.ModuleDict({"a": shared, "b": shared})
    nk.restore(net, Bundle({"x": nk.extract(nn.LayerNorm(4))[""]}), {"b": "x"})


def test_lazy_and_meta_layers_are_refused():
    with pytest.raises(ValueError, match="call it once first"):
        nk.extract(nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match="on the meta device and has no values"):
        nk.extract(nn.LayerNorm(3, device="meta"))


def test_entries_are_checked():
    ones = np.ones(3, np.float32)
    with pytest.raises(ValueError, match=r"'scale' of .* has shape \(3,\), but got \(2,\)"):
        Entry(nk.LayerNorm(3, bias=False), {"scale": ones[:2]})
    with pytest.raises(ValueError, match="needs bias, but got scale"):
        Entry(nk.LayerNorm(3), {"scale": ones})
    with pytest.raises(ValueError, match="has no 'mean'"):
        Entry(nk.LayerNorm(3, bias=False), {"scale": ones, "mean": ones})


def test_axes_are_adopted_by_name_only():
    source = nk.extract(nk.numpy.layer(nk.BatchNorm(8, axis=-1)))
    layer = nt.BatchNorm(8)
    with pytest.raises(ValueError, match="axis is 1 in the model, but -1 in the bundle"):
        nk.restore(layer, source, adopt=True)
    nk.restore(layer, source, adopt=["axis"])
    assert layer.axis == -1


def test_what_is_no_bundle():
    with pytest.raises(TypeError, match=r"restore takes a bundle, .* but got a str"):
        nk.restore(model(), "a.safetensors")
    with pytest.raises(TypeError, match=r"save takes a bundle, .* but got a Sequential"):
        nk.save("a.safetensors", model())


def test_only_linen_has_variables():
    with pytest.raises(TypeError, match="variables belong to modules of Flax Linen"):
        nk.extract(nn.LayerNorm(3), {})
