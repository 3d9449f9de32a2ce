"""``python -m normkit inspect`` and ``diff``: what they find in files, and what they refuse."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import normkit as nk
import normkit.__main__ as command
import normkit.numpy
from normkit._bundle import Bundle, Entry

pytest.importorskip("safetensors")


def saved(path, **layers):
    bundle = Bundle({name: nk.extract(layer)[""] for name, layer in layers.items()})
    nk.save(path, bundle)
    return str(path)


def said(capsys, *arguments, status=0):
    assert command.main(list(arguments)) == status
    return capsys.readouterr().out


def test_a_bundle(tmp_path, capsys):
    fresh, far, broken = (nk.numpy.layer(nk.BatchNorm(4)) for _ in range(3))
    far.state |= {"mean": np.full(4, 1e5, "f"), "var": np.array([1, 1, 1e-7, 1], "f")}
    broken.state["var"] = np.array([1, -1, np.nan, 1], "f")
    keras = nk.numpy.layer(nk.LayerNorm.keras(3))
    path = saved(tmp_path / "a.safetensors", fresh=fresh, far=far, broken=broken, ln=keras)
    text = said(capsys, "inspect", path)
    for line in (
        "| far    | BatchNorm(num_features=4, axis=1, eps=1e-05, decay=0.9, correction=1,",
        "1e+05 to 1e+05 |",
        "- a layer of keras has by default eps 0.001, here 1e-05; decay 0.99, here 0.9; "
        "correction 0, here 1: fresh, far, broken\n",
        "- it has never seen a batch: its statistics are those that it began with: fresh\n",
        "- 1 of 4 channels vary less than eps, which decides their scale: far\n",
        "- 4 of 4 channels have a mean over 1000 times their spread",
        "- 2 of 4 channels have statistics that are NaN or negative: broken\n",
        "- a layer of torch has by default eps 1e-05, here 0.001: ln\n",
    ):
        assert line in text


def test_many_names_are_cut(tmp_path, capsys):
    layers = {f"n{i}": nk.numpy.layer(nk.LayerNorm.keras(3)) for i in range(9)}
    assert ": n0, n1, n2, n3, n4 and 4 more" in said(
        capsys, "inspect", saved(tmp_path / "a.safetensors", **layers)
    )


def test_nothing_in_it(tmp_path, capsys):
    assert said(capsys, "inspect", saved(tmp_path / "a.safetensors")) == "no normalization layers\n"


def test_a_checkpoint_of_pytorch(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    nn = torch.nn
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LayerNorm(5), nn.RMSNorm(5))
    for i, found in enumerate((model.state_dict(), {"model": model.state_dict(), "step": 3})):
        torch.save(found, tmp_path / f"{i}.pt")
        text = said(capsys, "inspect", str(tmp_path / f"{i}.pt"))
        assert "| 1     | BatchNorm or InstanceNorm " in text
        assert "| 2     | LayerNorm or GroupNorm " in text
        assert "| 3     | RMSNorm, or no normalization " in text
        assert "\n| 0 " not in text
        assert "does not say what its layers compute" in text
    torch.save(model, tmp_path / "model.pt")
    with pytest.raises(SystemExit):
        command.main(["inspect", str(tmp_path / "model.pt")])
    assert "Save model.state_dict() instead" in capsys.readouterr().err


def test_checkpoints_of_every_shape(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    nn, ones = torch.nn, torch.ones
    model = nn.Sequential(nn.LayerNorm((3, 2)), nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    nested = {"generator": model.state_dict(), "critic": {"norm": nn.LayerNorm(2).state_dict()}}
    torch.save(nested, tmp_path / "a.pt")
    text = said(capsys, "inspect", str(tmp_path / "a.pt"))
    for name in ("generator.0", "generator.2", "critic.norm"):
        assert f"\n| {name} " in text
    assert "generator.1 " not in text
    odd = {"a.running_mean": ones(4), "a.running_var": ones(5), "b.running_var": ones(2)}
    torch.save(odd, tmp_path / "b.pt")
    assert said(capsys, "inspect", str(tmp_path / "b.pt")) == "no normalization layers\n"
    with pytest.raises(SystemExit):
        command.main(["diff", *[str(tmp_path / "b.pt")] * 2])
    assert "no normalization layers were found in either file" in capsys.readouterr().err
    same = said(capsys, "diff", *[str(tmp_path / "a.pt")] * 2)
    assert same.startswith("the same: 3 layers\nA checkpoint does not say what its layers compute")


def test_safetensors_of_others(tmp_path, capsys):
    from safetensors.numpy import save_file

    ones = np.ones(3, np.float32)
    found = {"ln.weight": ones, "ln.bias": ones, "fc.weight": np.ones((3, 3))}
    save_file(found, tmp_path / "m.safetensors")
    text = said(capsys, "inspect", str(tmp_path / "m.safetensors"))
    assert "| ln    | LayerNorm or GroupNorm |" in text
    assert "fc" not in text


def test_a_bundle_by_any_name(tmp_path, capsys):
    path = saved(tmp_path / "a.pt", ln=nk.numpy.layer(nk.LayerNorm(3)))
    assert "| ln    | LayerNorm(shape=(3,)" in said(capsys, "inspect", path)


def test_names_forge_no_rows(tmp_path, capsys):
    layer = nk.numpy.layer(nk.LayerNorm(3))
    path = saved(tmp_path / "a.safetensors", **{"a\n| b \x1b[2J": layer})
    text = said(capsys, "inspect", path)
    assert "\x1b" not in text
    assert text.startswith("| layer ")
    assert "| a\\n\\| b \\x1b[2J |" in text


def test_a_pickle_is_not_run(tmp_path):
    """Which a checkpoint may be."""
    pytest.importorskip("torch")
    mark = tmp_path / "mark"
    code = f"cos\nsystem\n(S'touch {mark}'\ntR."
    (tmp_path / "a.pt").write_bytes(code.encode())
    run = [sys.executable, "-m", "normkit", "inspect", str(tmp_path / "a.pt")]
    found = subprocess.run(run, capture_output=True, text=True)
    assert found.returncode == 2
    assert "Traceback" not in found.stderr
    assert not mark.exists()


def test_a_model_of_keras(tmp_path, capsys):
    keras = pytest.importorskip("keras")
    block = keras.Sequential([keras.layers.LayerNormalization(name="ln")], name="block")
    inputs = keras.Input((5, 3))
    x = keras.layers.BatchNormalization(name="bn")(inputs)
    keras.Model(inputs, block(x)).save(tmp_path / "a.keras")
    text = said(capsys, "inspect", str(tmp_path / "a.keras"))
    assert "| bn       | BatchNorm(num_features=3, axis=-1, eps=0.001, decay=0.99," in text
    assert "| block/ln | LayerNorm(shape=(3,)" in text
    (tmp_path / "b.keras").write_bytes((tmp_path / "a.keras").read_bytes()[:100])
    with pytest.raises(SystemExit):
        command.main(["inspect", str(tmp_path / "b.keras")])
    assert "Keras cannot load" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.safetensors", b"\x00" * 20, "is no file of safetensors"),
        ("a.pt", b"nothing", "is damaged, or holds more than tensors"),
        ("a.h5", b"", "is none of the files that are read here"),
        ("nowhere.safetensors", None, "No such file"),
        ("nowhere.pt", None, "No such file"),
    ],
)
def test_what_is_refused(name, content, says, tmp_path, capsys):
    if name.endswith(".pt"):
        pytest.importorskip("torch")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        command.main(["inspect", str(tmp_path / name)])
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


def test_two_files(tmp_path, capsys):
    one, other = (nk.numpy.layer(nk.BatchNorm(4, eps=eps)) for eps in (1e-5, 1e-3))
    other.state["mean"] = np.array([0, 0.5, 0, 0], "f")
    alone = nk.numpy.layer(nk.RMSNorm(2))
    a = saved(tmp_path / "a.safetensors", bn=one, ln=nk.numpy.layer(nk.LayerNorm(4)))
    b = saved(tmp_path / "b.safetensors", bn=other, ln=nk.numpy.layer(nk.GroupNorm(1, 4)), x=alone)
    text = said(capsys, "diff", a, b, status=1)
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    assert rows == [
        ["bn", "eps", "1e-05", "0.001"],
        ["bn", "mean", "0 to 0", "0 to 0.5; up to 0.5 apart"],
        ["ln", "kind", "LayerNorm", "GroupNorm"],
        ["x", "the layer", f"only in {b}", ""],
    ]
    assert said(capsys, "diff", a, a) == "the same: 2 layers\n"


def test_two_files_in_order(tmp_path, capsys):
    layer, wide = nk.numpy.layer(nk.LayerNorm(3)), nk.numpy.layer(nk.LayerNorm(3), dtype="float64")
    a = saved(tmp_path / "a.safetensors", first=layer)
    b = saved(tmp_path / "b.safetensors", other=wide)
    text = said(capsys, "diff", a, b, "--order", status=1)
    assert "| first / other | scale | float32" in text
    c = saved(tmp_path / "c.safetensors", one=layer, two=layer)
    with pytest.raises(SystemExit):
        command.main(["diff", a, c, "--order"])
    assert "one file has 1 layers, the other 2" in capsys.readouterr().err


def test_arrays_that_one_has(tmp_path, capsys):
    entry = nk.extract(nk.numpy.layer(nk.BatchNorm(2)))[""]
    without = Entry(entry.definition, {n: a for n, a in entry.arrays.items() if n != "count"})
    for name, each in (("a", entry), ("b", without)):
        nk.save(tmp_path / f"{name}.safetensors", Bundle({"bn": each}))
    files = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    assert "| bn    | count | yes" in said(capsys, "diff", *files, status=1)
