"""``python -m normkit``: what it measures is right, and what is wrong or missing is said."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from normkit import __main__ as command
from normkit._commands import cases, check, exact, frameworks, record, timing
from normkit._commands.frameworks import FRAMEWORKS, Framework

HERE = [name for name in FRAMEWORKS if not frameworks.missing(name)]
SMALL = {"BatchNorm": ((4, 6, 5, 3),), "LayerNorm": ((4, 6),)}


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """Its exit status and what it found, in all frameworks."""
    file = tmp_path_factory.mktemp("check") / "found.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "OFFSETS", (0.0, 1e5))
        status = command.main(
            ["check", "--json", str(file), "--plot", str(file.with_suffix(".png"))]
        )
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    return status, json.loads(file.read_text())


def test_every_framework_keeps_the_bounds(checked):
    status, found = checked
    assert status == 0
    assert len(found["rows"]) == 2 * (2 * 5 + 1)  # BatchNorm in evaluation has no gradient
    for row in found["rows"]:
        assert list(row["errors"]["normkit"]) == list(row["errors"]["native"]) == HERE
        assert len(row["pairs"]) == len(HERE) * (len(HERE) - 1) / 2
        assert not row["broken"]
        assert 0 < max(row["errors"]["normkit"].values()) <= check.BOUND[row["result"]]


def test_the_native_layers_do_not(checked):
    """So what is compared is not one thing with itself."""
    _, found = checked
    [row] = [
        row
        for row in found["rows"]
        if (row["layer"], row["result"], row["offset"]) == ("LayerNorm", "y", 1e5)
    ]
    errors = row["errors"]["native"].values()
    assert all(error is None or error > 1e-4 for error in errors)


def test_a_broken_bound_is_marked_and_fails(monkeypatch, capsys):
    monkeypatch.setattr(check, "BOUND", {"y": 1e-9, "dx": 1})
    monkeypatch.setattr(check, "OFFSETS", (10.0,))
    assert command.main(["check", "--framework", "numpy"]) == 1
    said = capsys.readouterr().out
    assert f"{len(check.CASES)} rows are beyond the bounds (1e-09 for y, 1 for dx)" in said
    assert sum(line.endswith("| ! |") for line in said.splitlines()) == len(check.CASES)


def test_what_is_not_finite_is_broken(monkeypatch, tmp_path):
    case = check.CASES[2]
    monkeypatch.setattr(check, "CASES", (case,))
    monkeypatch.setattr(check, "OFFSETS", (0.0,))
    right = exact.results(case, cases.arrays(case))
    for side, y in (("native", right["y"]), ("normkit", right["y"] * np.nan)):
        (tmp_path / "numpy").mkdir(exist_ok=True)
        np.savez(tmp_path / "numpy" / f"{side}-0-0.npz", y=y, dx=right["dx"])
    y, dx = check._compared(["numpy"], tmp_path)
    assert y["broken"]
    assert not dx["broken"]


@pytest.mark.parametrize("name", [name for name in HERE if FRAMEWORKS[name].usual])
def test_bench_measures_every_cell(name, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cases, "_GRID", SMALL)
    monkeypatch.setattr("normkit._commands.bench._SECONDS", {"full": 0.01})
    files = tmp_path / "found.json", tmp_path / "found.png"
    dtypes = ("float32",) if name == "torch" else FRAMEWORKS[name].dtypes  # it compiles for long
    alone = {name: replace(FRAMEWORKS[name], dtypes=dtypes)}
    monkeypatch.setattr(frameworks, "FRAMEWORKS", alone)
    modes = FRAMEWORKS[name].modes
    options = ["--framework", name, "--json", str(files[0]), "--plot", str(files[1])]
    options += [word for layer in SMALL for word in ("--layer", layer)]
    assert command.main(["bench", *options]) == 0
    found = json.loads(files[0].read_text())
    assert files[1].read_bytes().startswith(b"\x89PNG")
    cells = [cell for cell in found["cells"] if cell["framework"] == name]
    assert len(cells) == 5 * len(dtypes) * len(modes)
    for cell in cells:
        low, ratio, high = cell["ratio"]
        assert 0 < low <= ratio <= high
        assert min(cell["native"], cell["normkit"], cell["copy"]) > 0
    said = capsys.readouterr().out
    assert all(f"{name} ({mode})" in said for mode in modes)


def test_info_lists_versions_and_paths(capsys):
    assert command.main(["info"]) == 0
    said = capsys.readouterr().out
    for name in HERE:
        assert f"\n{name}: " in said
    assert f"numpy {np.__version__}" in said


def test_what_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setattr(frameworks, "find_spec", lambda package: package == "numpy" or None)
    monkeypatch.setattr(check, "OFFSETS", (10.0,))
    assert command.main(["check"]) == 0
    said = capsys.readouterr().out
    assert "Here: numpy." in said
    assert "Not here: torch, for lack of torch." in said
    assert "Not here: keras-jax, for lack of keras, jax." in said


@pytest.mark.parametrize("name", ["check", "bench"])
def test_nothing_to_run_is_no_success(name, monkeypatch, capsys):
    monkeypatch.setattr(frameworks, "find_spec", lambda package: None)
    with pytest.raises(SystemExit) as stopped:
        command.main([name, "--framework", "torch"])
    assert stopped.value.code == 2
    assert "nothing to run: not here are torch, for lack of torch." in capsys.readouterr().err


@pytest.mark.parametrize("path", ["no/where.png", "a.txt", "a"])
def test_a_place_for_the_picture_is_asked_for_first(path, capsys):
    with pytest.raises(SystemExit):
        command.main(["check", "--framework", "numpy", "--plot", path])
    assert "--plot takes a file .png" in capsys.readouterr().err


def test_a_framework_that_fails_is_not_passed_over(monkeypatch, capsys):
    broken = {"numpy": Framework("no_such_adapter", ("numpy",), ("plain",))}
    monkeypatch.setattr(frameworks, "FRAMEWORKS", broken)
    for name in ("check", "bench"):
        assert command.main([name, "--framework", "numpy"]) == 1
        assert "No module named 'normkit.no_such_adapter'" in capsys.readouterr().out


def test_an_unknown_framework_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["bench", "--framework", "caffe"])
    assert stopped.value.code == 2
    assert "no framework is called 'caffe'; there are numpy," in capsys.readouterr().err


def test_a_name_means_all_that_begin_with_it():
    assert frameworks.named(["keras", "torch", "keras-jax"]) == [
        "keras-tensorflow",
        "keras-jax",
        "keras-torch",
        "torch",
    ]


def test_a_picture_is_refused_before_anything_is_measured(monkeypatch, capsys):
    monkeypatch.setattr("normkit._commands.pictures.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        command.main(["bench", "--plot", "a.png"])
    assert "pip install 'normkit[bench]'" in capsys.readouterr().err


@pytest.mark.parametrize("case", check.CASES, ids=lambda case: f"{case.layer}-{case.work}")
def test_the_exact_formulas(case):
    """Their gradient is that of their values."""
    given = cases.arrays(case, offset=3.0)
    y, dx = exact.results(case, given)["y"], exact.results(case, given)["dx"]
    step = 1e-5
    direction = np.random.default_rng(5).standard_normal(case.shape)
    moved = [
        exact.results(case, given | {"x": given["x"].astype(np.float64) + sign * step * direction})
        for sign in (1, -1)
    ]
    slope = ((moved[0]["y"] - moved[1]["y"]) * given["g"]).sum() / (2 * step)
    np.testing.assert_allclose((dx * direction).sum(), slope, rtol=1e-6)
    assert y.shape == dx.shape == case.shape


def test_times_are_those_of_the_clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing, "perf_counter", lambda: now[0])

    def takes(seconds):
        def call(i):
            now[0] += seconds

        return call

    found = timing.pair(takes(0.02), takes(0.01), takes(0.0001), seconds=0.5)
    assert found["ratio"] == pytest.approx([0.5, 0.5, 0.5])
    assert [found[name] for name in ("native", "normkit", "copy")] == pytest.approx([20, 10, 0.1])
    # A round takes 30 milliseconds and the half of one for copies.
    assert found["rounds"] == int(0.5 / 0.0305)


def test_the_peak_of_memory_is_found():
    if timing.peak(lambda: None) is None:
        pytest.skip("this system does not tell")

    def call():
        large = np.ones(2**25, "uint8")  # 32 MiB
        return np.concatenate([large, large])  # and 64

    assert timing.peak(call) == pytest.approx(96, rel=0.05)


def test_a_record_is_json(tmp_path):
    record.write(str(tmp_path / "a"), {"a": [np.inf, 1.5, {"b": float("nan")}]})
    assert json.loads((tmp_path / "a").read_text()) == {"a": [None, 1.5, {"b": None}]}
