"""The built wheel, in a fresh environment that has the required dependencies and nothing else."""

from __future__ import annotations

import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command, cwd=None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The interpreter of that environment."""
    at = tmp_path_factory.mktemp("package")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    # From a copy, so that building leaves nothing in the source tree.
    source = at / "source"
    run("git", "clone", "--quiet", ROOT, source)
    for name in run("git", "ls-files", "-mo", "--exclude-standard", cwd=ROOT).splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", at, source)
    (wheel,) = at.glob("normkit-*.whl")
    venv.create(at / "venv", with_pip=False)
    interpreter = at / "venv" / "bin" / "python"
    run(*pip, "--python", interpreter, "install", "-c", ROOT / "constraints.txt", wheel)
    return interpreter


def test_only_the_required_dependencies(python, tmp_path):
    listed = run(
        python,
        "-c",
        "from importlib.metadata import distributions as d\n"
        "print(*sorted(x.name.lower().replace('_', '-') for x in d()))",
        cwd=tmp_path,
    )
    assert listed.split() == ["array-api-compat", "normkit", "numpy"]


def test_it_works_there(python, tmp_path):
    use = (
        "import numpy as np, normkit as nk, normkit.numpy\n"
        "x = np.array([[1, 2, 3, 4]], 'float32')\n"
        "print(nk.layer_norm(x).round(4).tolist() == nk.numpy.LayerNorm(4)(x).round(4).tolist())\n"
        "print(nk.layer_norm(x).dtype)"
    )
    assert run(python, "-c", use, cwd=tmp_path).split() == ["True", "float32"]


def test_importing_it_imports_little(python, tmp_path):
    """NumPy, array-api-compat, and the standard library."""
    code = (
        "import sys, normkit\n"
        "named = [name for name, module in sys.modules.items() if getattr(module, '__spec__', 0)]\n"
        "roots = {name.partition('.')[0] for name in named} - sys.stdlib_module_names\n"
        "print(*sorted(name for name in roots if not name.startswith('_')))"
    )
    assert run(python, "-c", code, cwd=tmp_path).split() == ["array_api_compat", "normkit", "numpy"]


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
def test_without_its_framework_an_adapter_names_the_extra(
    python, tmp_path, adapter, framework, extra
):
    code = f"try:\n    import {adapter}\nexcept ImportError as error:\n    print(error)"
    assert run(python, "-c", code, cwd=tmp_path).strip() == (
        f"{adapter} needs the package '{framework}', which is not installed; "
        f"install it with: pip install 'normkit[{extra}]'"
    )


@pytest.mark.parametrize("command", ["info", "check", "bench --quick --layer RMSNorm"])
def test_the_commands_run_there(python, tmp_path, command):
    said = run(python, "-m", "normkit", *command.split(), cwd=tmp_path)
    assert "numpy" in said
    assert re.search(r"torch.*for lack of torch", said)


def test_types_are_shipped(python, tmp_path):
    code = (
        "import normkit, pathlib\n"
        "print((pathlib.Path(normkit.__file__).parent / 'py.typed').is_file())"
    )
    assert run(python, "-c", code, cwd=tmp_path).strip() == "True"


def test_in_a_checkout_the_adapters_are_found(python, tmp_path):
    """What is installed stands behind the folder that Python is started in."""
    code = "import normkit.numpy; print(normkit.__file__, normkit.numpy.__file__)"
    assert run(python, "-c", code, cwd=ROOT).split() == [
        str(ROOT / "normkit" / "__init__.py"),
        str(ROOT / "backends" / "numpy" / "__init__.py"),
    ]
