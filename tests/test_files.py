"""Bundles in files: bit by bit, as a whole or not at all, and nothing is believed of a file."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import normkit as nk
import normkit.numpy
from harness.table import ROWS
from normkit import _files
from normkit._bundle import Bundle, Entry, from_fields, to_fields

pytest.importorskip("safetensors")

DTYPES = ["float64", "float32", "float16", "bfloat16"]


def random_entry(definition, dtype, rng):
    params, state = definition.init()
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    arrays = {}
    for name, a in (params | state).items():
        drawn = np.abs(rng.normal(size=a.shape)).astype(kind)
        arrays[name] = np.int64(7) + a if name == "count" else drawn
    return Entry(definition, arrays, [None, True, False][int(rng.integers(3))], ("an alias",))


@pytest.fixture(scope="module")
def bundle():
    rng = np.random.default_rng(0)
    return Bundle(
        {
            f"{dtype}/{row.name}": random_entry(row.definition, dtype, rng)
            for dtype in DTYPES
            for row in ROWS
        }
    )


def assert_same(a: Bundle, b: Bundle) -> None:
    assert list(a) == list(b)
    for name in a:
        x, y = a[name], b[name]
        assert (x.definition, x.training, x.aliases) == (y.definition, y.training, y.aliases)
        assert x.arrays.keys() == y.arrays.keys()
        for n in x.arrays:
            assert x.arrays[n].dtype == y.arrays[n].dtype
            assert x.arrays[n].tobytes() == y.arrays[n].tobytes()


def test_round_trips_are_bit_by_bit(bundle, tmp_path):
    nk.save(tmp_path / "a.safetensors", bundle)
    assert_same(nk.load(tmp_path / "a.safetensors"), bundle)
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_what_is_no_number_and_no_order_survives(tmp_path):
    a = np.array([np.nan, -0.0, np.inf, 1e-45], np.float32)
    strided = np.arange(8, dtype=np.float32)[::2]
    entry = Entry(nk.LayerNorm(4), {"scale": a, "bias": strided})
    nk.save(tmp_path / "a", Bundle({"": entry, "ä/..\\ \"'": entry}))
    assert_same(nk.load(tmp_path / "a"), Bundle({"": entry, "ä/..\\ \"'": entry}))


def test_a_bundle_of_nothing(tmp_path):
    nk.save(tmp_path / "a", Bundle({}))
    assert len(nk.load(tmp_path / "a")) == 0


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_definitions_as_json(row):
    assert from_fields(json.loads(json.dumps(to_fields(row.definition)))) == row.definition


def test_no_framework_is_needed(bundle, tmp_path):
    nk.save(tmp_path / "a", bundle)
    code = (
        "import sys, normkit as nk; nk.load(sys.argv[1]); "
        "assert not {'torch', 'tensorflow', 'keras', 'jax', 'flax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "a"], check=True)


def test_safetensors_reads_it(bundle, tmp_path):
    from safetensors import safe_open

    nk.save(tmp_path / "a", bundle)
    with safe_open(tmp_path / "a", framework="np") as file:
        assert file.metadata()["format"] == "normkit"
        got = file.get_tensor("float32/bn-nc.var")
    np.testing.assert_array_equal(got, bundle["float32/bn-nc"].arrays["var"])


def test_a_file_is_replaced_as_a_whole_or_not_at_all(bundle, tmp_path, monkeypatch):
    path = tmp_path / "a"
    nk.save(path, Bundle({}))
    before = path.read_bytes()

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        nk.save(path, bundle)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a"]


def test_permissions_are_those_of_new_files(tmp_path):
    nk.save(tmp_path / "a", Bundle({}))
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_link_stays_one_and_modes_stay(tmp_path):
    nk.save(tmp_path / "file", Bundle({}))
    (tmp_path / "file").chmod(0o600)
    (tmp_path / "link").symlink_to(tmp_path / "file")
    long = tmp_path / ("a" * 250)
    for path in (tmp_path / "link", long):
        nk.save(path, SMALL)
        assert_same(nk.load(path), SMALL)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        nk.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError):
        nk.save(tmp_path / "no" / "where", Bundle({}))


def rewritten(path: Path, **changes) -> None:
    """The same file with other metadata."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] |= changes
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + length :])


def layers(path: Path) -> list[dict]:
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return json.loads(header["__metadata__"]["layers"])


def altered(path: Path, **changes) -> None:
    """The same file with another first layer."""
    first, *rest = layers(path)
    rewritten(path, layers=json.dumps([first | changes, *rest]))


BAD = {
    "version": (lambda p: rewritten(p, version="2"), "has version '2', but this normkit reads '1'"),
    "format": (lambda p: rewritten(p, format="pt"), "was not written by normkit"),
    "no list": (lambda p: rewritten(p, layers="{}"), "has no list of layers"),
    "no json": (lambda p: rewritten(p, layers="["), "does not say which layers it has"),
    "deep": (lambda p: rewritten(p, layers="[" * 100_000), "does not say which layers"),
    "no layers": (lambda p: rewritten(p, layers="[]"), "tensors that belong to no layer"),
    "twice": (lambda p: rewritten(p, layers=json.dumps(layers(p) * 2)), "not described"),
    "name": (lambda p: altered(p, name=3), "not described"),
    "training": (lambda p: altered(p, training="yes"), "not described"),
    "aliases": (lambda p: altered(p, aliases={}), "not described"),
    "arrays": (lambda p: altered(p, arrays=["scale"]), "needs bias"),
    "missing": (lambda p: altered(p, arrays=["scale", "bias", "mean"]), "'.mean'"),
    "kind": (lambda p: altered(p, definition={"kind": "os"}), "there is no layer 'os'"),
    "field": (lambda p: altered(p, definition={"kind": "LayerNorm", "x": 1}), "not right are"),
    "empty": (lambda p: p.write_bytes(b""), "is no file of safetensors"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-3]), "is damaged"),
    "longer": (lambda p: p.write_bytes(p.read_bytes() + b"x"), "is damaged"),
    "pickle": (lambda p: p.write_bytes(b"\x80\x04cos\nsystem\n."), "is no file of safetensors"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(name, tmp_path):
    spoil, says = BAD[name]
    path = tmp_path / "a"
    nk.save(path, nk.extract(nk.numpy.layer(nk.LayerNorm(3))))
    spoil(path)
    with pytest.raises(ValueError, match=f"(?s){says}"):
        nk.load(path)


NO_DEFINITIONS = [
    *({"eps": 0}, {"eps": "1e-5"}, {"eps": float("nan")}, {"eps": 10**400}, {"scale": False}),
    *({"shape": [3, 10**30]}, {"shape": "3"}, {"shape": [-3]}, {"shape": {"a": 1}}),
    *({"shape": [[3]]}, {"axes": [5, 5]}, {"axes": 0.5}, {"eps": True}, {"scale": None}),
]


@pytest.mark.parametrize("changes", NO_DEFINITIONS, ids=lambda c: f"{c}"[:30])
def test_bad_definitions(changes, tmp_path):
    path = tmp_path / "a"
    nk.save(path, nk.extract(nk.numpy.layer(nk.LayerNorm(3))))
    altered(path, definition=layers(path)[0]["definition"] | changes)
    with pytest.raises(ValueError, match="at the layer ''"):
        nk.load(path)


SMALL = Bundle(
    {
        "a.b": random_entry(nk.BatchNorm(2), "float32", np.random.default_rng(0)),
        "c": random_entry(nk.RMSNorm((2, 1)), "bfloat16", np.random.default_rng(1)),
    }
)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "a"
    nk.save(path, SMALL)
    return path, path.read_bytes()


@settings(
    max_examples=10_000,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_whatever_a_file_holds_there_is_one_error(written, data):
    """Bytes that are changed, left out, put in or repeated, most of them in the header."""
    path, good = written
    found = bytearray(good)
    header = int.from_bytes(good[:8], "little") + 8
    for _ in range(data.draw(st.integers(1, 4))):
        end = data.draw(st.sampled_from([8, header, len(found)]))
        at = data.draw(st.integers(0, max(0, min(end, len(found)) - 1)))
        match data.draw(st.sampled_from("bcdrw")):
            case "b":
                found[at : at + 1] = data.draw(st.binary(min_size=1, max_size=8))
            case "c":
                del found[at:]
            case "d":
                del found[at : at + data.draw(st.integers(1, 30))]
            case "r":
                found[at:at] = found[at : at + data.draw(st.integers(1, 60))]
            case "w":
                word = data.draw(st.sampled_from(_WORDS))
                found[at : at + len(word)] = word
    path.write_bytes(found)
    with contextlib.suppress(ValueError):
        assert str(nk.load(path))
    assert path.read_bytes() == found
    assert os.listdir(path.parent) == ["a"]


_WORDS = [
    *(b"null", b"true", b"-1", b"1e999", b"9" * 30, b'"', b"\\", b"{", b"}", b"[", b"]", b"\xff"),
    *(b"../../../etc/passwd", b'"__metadata__"', b'"F64"', b'"BF16"', b'"I4"', b"[0,0]", b"NaN"),
]


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(_files, "require", _missing)
    with pytest.raises(ImportError, match=r"normkit\.load"):
        nk.load("a")
    with pytest.raises(ImportError, match=r"normkit\.save"):
        nk.save("a", Bundle({}))


def _missing(module, what, extra):
    raise ImportError(f"{what} needs {module}")
