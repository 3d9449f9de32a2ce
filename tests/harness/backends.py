"""Every backend that a layer can run on, behind one call.

``run(job)`` trains the layer that the job defines, step by step, then evaluates it on the first
batch, and returns NumPy arrays: ``y0``, ``dx0``, ``dscale0``, ``dbias0`` and so on for each step;
``mean``, ``var`` and ``count`` afterwards; and ``eval``.

Keras picks its backend once a process, so each of its three runs in a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

from harness.data import Job

Run = Callable[[Job], dict]

# name -> (module in this folder that runs it, packages it needs, whether it has derivatives)
BACKENDS = {
    "numpy": ("on_arrays", ["numpy"], True),
    "array-api-strict": ("on_arrays", ["array_api_strict"], False),
    "dask": ("on_arrays", ["dask"], False),
    "torch": ("on_torch", ["torch"], True),
    "tensorflow": ("on_tensorflow", ["tensorflow"], True),
    "tensorflow-xla": ("on_tensorflow", ["tensorflow"], True),
    "jax": ("on_jax", ["jax"], True),
    "keras-tensorflow": ("on_keras", ["keras", "tensorflow"], True),
    "keras-jax": ("on_keras", ["keras", "jax"], True),
    "keras-torch": ("on_keras", ["keras", "torch"], True),
    "flax-nnx": ("on_flax", ["flax"], True),
    "flax-linen": ("on_flax", ["flax"], True),
}
HALF = {"numpy": ["float16", "bfloat16"], "array-api-strict": [], "dask": ["float16"]}
VARIABLE = "NORMKIT_TEST_BACKENDS"


def chosen() -> list[str]:
    """The backends named by the environment; if it names none, those that are installed."""
    names = os.environ.get(VARIABLE)
    if names is None:
        return [name for name in BACKENDS if not missing(name)]
    wanted = list(BACKENDS) if names == "all" else names.split(",")
    for name in wanted:
        if name not in BACKENDS:
            raise LookupError(f"{VARIABLE} names {name!r}; known: {', '.join(BACKENDS)}")
        if missing(name):
            raise LookupError(f"{VARIABLE} names {name!r}, but {missing(name)} is not installed")
    return wanted


def missing(name: str) -> list[str]:
    return [p for p in BACKENDS[name][1] if importlib.util.find_spec(p) is None]


def dtypes(name: str) -> list[str]:
    return ["float32", "float64", *HALF.get(name, ["float16", "bfloat16"])]


def differentiates(name: str) -> bool:
    return BACKENDS[name][2]


@cache
def runner(name: str) -> Run:
    """The function that runs a job on backend ``name``."""
    module = BACKENDS[name][0]
    if name.startswith("keras-"):
        return _remote(name)
    return importlib.import_module(f"harness.{module}").runner(name)


def _remote(name: str) -> Run:
    worker = subprocess.Popen(
        [sys.executable, "-W", "ignore", Path(__file__).with_name("worker.py"), name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ
        | {"KERAS_BACKEND": name.removeprefix("keras-"), "TF_CPP_MIN_LOG_LEVEL": "3"},
    )

    def run(job: Job) -> dict:
        pickle.dump(job, worker.stdin)
        worker.stdin.flush()
        ok, result = pickle.load(worker.stdout)
        if not ok:
            raise RuntimeError(f"{name}: {result}")
        return result

    return run
