"""Importing normkit loads no framework; the package speaks of none but where it must."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import normkit

FRAMEWORKS = ["torch", "tensorflow", "keras", "jax", "flax", "dask", "cupy"]
CORE = sorted(Path(normkit.__file__).parent.glob("*.py"))
PROBE = """
import sys
{imports}
loaded = sorted(set({frameworks}) & set(sys.modules))
print(",".join(loaded))
"""


def loaded_by(imports: str) -> list[str]:
    code = PROBE.format(imports=imports, frameworks=FRAMEWORKS)
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    return [name for name in out.strip().split(",") if name]


def test_import_loads_no_framework():
    assert loaded_by("import normkit") == []


def test_using_it_on_numpy_loads_no_framework():
    use = "import numpy, normkit, normkit.numpy\nnormkit.layer_norm(numpy.ones((2, 3)))"
    assert loaded_by(use) == []


def test_the_test_above_can_fail():
    pytest.importorskip("torch")
    assert loaded_by("import normkit, torch") == ["torch"]


@pytest.mark.parametrize(
    ("adapter", "framework", "strangers"),
    [
        ("normkit.torch", "torch", {"tensorflow", "jax", "keras", "flax"}),
        ("normkit.tensorflow", "tensorflow", {"torch", "flax"}),
        ("normkit.jax", "jax", {"torch", "tensorflow", "keras", "flax"}),
        ("normkit.flax.nnx", "flax", {"torch", "tensorflow", "keras"}),
        ("normkit.flax.linen", "flax", {"torch", "tensorflow", "keras"}),
    ],
)
def test_an_adapter_loads_its_own_framework_only(adapter, framework, strangers):
    pytest.importorskip(framework)
    loaded = set(loaded_by(f"import {adapter}"))
    assert framework in loaded
    assert not loaded & strangers


MISSING = """
import importlib.util, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == {framework!r} else real(name, *a)
try:
    import {adapter}
except ImportError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("adapter", "framework", "extra"),
    [
        ("normkit.torch", "torch", "torch"),
        ("normkit.tensorflow", "tensorflow", "tensorflow"),
        ("normkit.jax", "jax", "jax"),
        ("normkit.keras", "keras", "keras"),
        ("normkit.flax", "flax", "flax"),
    ],
)
def test_a_missing_framework_is_named_with_its_extra(adapter, framework, extra):
    """Simulated here; test_package.py sees it in an environment without any framework."""
    code = MISSING.format(adapter=adapter, framework=framework)
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == (
        f"{adapter} needs the package '{framework}', which is not installed; "
        f"install it with: pip install 'normkit[{extra}]'"
    )


def test_an_adapter_that_was_not_imported_is_named():
    code = (
        "import normkit\ntry:\n    normkit.torch\nexcept AttributeError as error:\n    print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == (
        "module 'normkit' has no attribute 'torch'; an adapter is imported by whoever uses it: "
        "import normkit.torch"
    )
    with pytest.raises(AttributeError, match=r"^module 'normkit' has no attribute 'tourch'$"):
        _ = normkit.tourch


def names_and_strings(tree: ast.AST):
    """What the code says, without its docstrings and messages."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.name for alias in node.names)
            yield getattr(node, "module", None) or ""
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Compare):
            yield from (n.value for n in ast.walk(node) if isinstance(n, ast.Constant))


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_the_core_branches_on_no_framework(path):
    """Only the files that recognise arrays and models know frameworks by name."""
    said = {
        part
        for text in names_and_strings(ast.parse(path.read_text()))
        for part in str(text).split(".")
    }
    assert not said & set(FRAMEWORKS) or path.name in ("_arrays.py", "_models.py")


def test_the_public_surface():
    assert sorted(
        n
        for n in vars(normkit)
        if not n.startswith("_") and n[0].isalpha() and not hasattr(getattr(normkit, n), "__path__")
    ) == [
        "BatchNorm",
        "Bundle",
        "GroupNorm",
        "InstanceNorm",
        "LayerNorm",
        "Moments",
        "RMSNorm",
        "batch_norm",
        "explain",
        "extract",
        "fold",
        "group_norm",
        "instance_norm",
        "layer_norm",
        "load",
        "moments",
        "normalize",
        "port",
        "restore",
        "rms_norm",
        "save",
    ]
    assert normkit.__version__.count(".") == 2
