"""The backend fixture: every test that takes it runs once for each backend that was chosen."""

from __future__ import annotations

import sys

import pytest

from harness import arrays, backends

# Files about one framework, by how their names begin: for when it is chosen (or installed, if
# nothing is chosen).
_ABOUT = {
    "test_flax": "flax-",
    "test_jax": "jax",
    "test_keras": "keras-",
    "test_tensorflow": "tensorflow",
    "test_torch": "torch",
}
collect_ignore_glob = [
    f"{files}*.py"
    for files, backend in _ABOUT.items()
    if not any(name.startswith(backend) for name in backends.chosen())
]


@pytest.fixture(scope="module", autouse=True)
def compiled_functions_do_not_pile_up():
    """Those that JAX keeps of a file of tests take gigabytes, and no other file needs them."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


def pytest_generate_tests(metafunc):
    chosen = backends.chosen()
    if "differentiable" in metafunc.fixturenames:
        names = [name for name in chosen if backends.differentiates(name)]
        metafunc.parametrize("differentiable", names)
    if "kind" in metafunc.fixturenames:
        metafunc.parametrize("kind", arrays.kinds(), ids=lambda kind: kind.name)
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", chosen)


def pytest_report_header():
    return f"normkit backends: {', '.join(backends.chosen())}"
