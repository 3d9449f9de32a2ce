"""Which backend an array belongs to. The only place in the core that knows frameworks by name.

A framework's backend is imported when the first of its arrays comes in, never before: whoever
holds such an array has imported the framework already.
"""

from __future__ import annotations

import array_api_compat

from normkit._backend import Array, Backend, Namespace

_BACKENDS = {
    # root of the module that defines the array type -> package that adapts it
    "numpy": "normkit.numpy",
    "torch": "normkit.torch",
    "tensorflow": "normkit.tensorflow",
    "jax": "normkit.jax",
    "jaxlib": "normkit.jax",
}
_by_type: dict[type, Backend] = {}


def backend_of(x: Array) -> Backend:
    """The backend of array ``x``; a TypeError if ``x`` is no array that the package knows."""
    backend = _by_type.get(type(x))
    if backend is None:
        backend = _find(x)
        register(type(x), backend)
    return backend


def register(array_type: type, backend: Backend) -> None:
    """Arrays of exactly this type are of ``backend``."""
    _by_type[array_type] = backend


def backend_of_namespace(xp: Namespace) -> Backend:
    """The backend of an array namespace, given as the framework's module or an Array API one."""
    name = xp.__name__.removeprefix("array_api_compat.")
    if name.startswith("normkit."):
        name = name.removeprefix("normkit.")
    adapter = _BACKENDS.get(name.partition(".")[0])
    return Backend(xp) if adapter is None else _load(adapter)


def _find(x: Array) -> Backend:
    for base in type(x).__mro__:
        adapter = _BACKENDS.get(base.__module__.partition(".")[0])
        if adapter is not None and hasattr(base, "shape"):
            return _load(adapter)
    try:
        return Backend(array_api_compat.array_namespace(x))
    except TypeError:
        msg = (
            f"normkit works on arrays (NumPy, PyTorch, TensorFlow, JAX, or any that follows the "
            f"Array API standard), but got a value of type {type(x).__name__!r}; convert it first, "
            f"for example with numpy.asarray(x, dtype='float32')."
        )
        raise TypeError(msg) from None


def _load(adapter: str) -> Backend:
    # Not importlib.import_module, which TensorFlow would try to trace inside of tf.function.
    backend: Backend = __import__(f"{adapter}._backend", fromlist=["BACKEND"]).BACKEND
    return backend
