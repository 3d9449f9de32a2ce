"""The backend fixture: every test that takes it runs once for each backend that was chosen."""

from __future__ import annotations

from harness import arrays, backends

# Files about one framework, for when it is chosen (or installed, if nothing is chosen).
_ABOUT = {
    "test_flax.py": "flax-",
    "test_flax_convert.py": "flax-",
    "test_flax_ecosystem.py": "flax-",
    "test_flax_edges.py": "flax-",
    "test_flax_options.py": "flax-",
    "test_flax_rules.py": "flax-",
    "test_jax.py": "jax",
    "test_keras.py": "keras-",
    "test_keras_conformance.py": "keras-",
    "test_keras_contract.py": "keras-",
    "test_keras_convert.py": "keras-",
    "test_keras_edges.py": "keras-",
    "test_keras_masks.py": "keras-",
    "test_keras_models.py": "keras-",
    "test_tensorflow_backend.py": "tensorflow",
    "test_tensorflow_namespace.py": "tensorflow",
    "test_torch.py": "torch",
    "test_torch_compilers.py": "torch",
    "test_torch_conformance.py": "torch",
    "test_torch_convert.py": "torch",
    "test_torch_ecosystem.py": "torch",
    "test_torch_edges.py": "torch",
    "test_torch_masks.py": "torch",
    "test_torch_transforms.py": "torch",
}
collect_ignore = [
    file
    for file, backend in _ABOUT.items()
    if not any(name.startswith(backend) for name in backends.chosen())
]


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
