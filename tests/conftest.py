"""The backend fixture: every test that takes it runs once for each backend that was chosen."""

from __future__ import annotations

from harness import arrays, backends


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
